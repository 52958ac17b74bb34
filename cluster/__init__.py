"""Pools of devices: how many devices a load needs, and what they cost."""
