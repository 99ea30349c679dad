"""Asking a server questions of known answer, and counting right answers."""
