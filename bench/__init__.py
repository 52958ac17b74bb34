"""Measurements of image quality, of a running server, and of models."""
