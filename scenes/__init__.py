"""A synthetic data set of captioned scenes, and an oracle and an embedding that read images of them."""
