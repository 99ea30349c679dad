"""Asking and counting."""
