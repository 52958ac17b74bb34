"""Servers that a user might run in place of this engine, each set up as its documentation recommends."""
