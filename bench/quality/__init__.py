"""Measurements of image quality and of its cost."""
