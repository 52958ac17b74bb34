"""Ray Serve deployments, thin over `stages`."""
