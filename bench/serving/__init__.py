"""Measurements of a running server under load, and of the alternatives to it."""
