"""Cells and who holds them."""
