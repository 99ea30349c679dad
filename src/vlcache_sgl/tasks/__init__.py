"""Synthetic visual question answering tasks with known answers."""
