"""Jobs: images that a client asks for in one request and fetches in another; loads no torch."""
