"""What clients meet: the OpenAI Images API, probes, and errors in its shape; without torch."""
