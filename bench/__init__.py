"""Measurements of a running server and of the stages."""
