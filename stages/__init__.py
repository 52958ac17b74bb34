"""The stages of image generation, as a library: plans, packets, models and what runs them; knows nothing of Ray."""
