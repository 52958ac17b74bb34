"""Measurements of a model that need no trained oracle: latency, prunable blocks, magnitude ratios."""
