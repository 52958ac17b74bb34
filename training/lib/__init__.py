"""Modules that the training programs share."""
