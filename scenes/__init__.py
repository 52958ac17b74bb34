"""Captioned scenes of simple objects: the data set, and what reads it off images again."""
