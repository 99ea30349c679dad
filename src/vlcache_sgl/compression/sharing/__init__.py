"""Copies of images for later questions."""
