"""Attention over cells, one file per kernel library."""
