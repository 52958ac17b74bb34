"""The HTTP interface: the OpenAI Images API, probes, and errors in the API's format; loads no torch."""
