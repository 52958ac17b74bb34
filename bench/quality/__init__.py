"""How good the images are, and what they cost."""
