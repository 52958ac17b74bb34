"""Pools of devices: how many a load needs, and what they cost."""
