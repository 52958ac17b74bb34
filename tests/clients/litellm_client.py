"""LiteLLM's Python client, in an environment of its own, against the server at argv[1]."""

import json
import sys

import litellm

litellm.suppress_debug_info = True  # it is printed where the answer is
ASKED = {"model": "openai/scenes", "api_base": f"{sys.argv[1]}/v1", "api_key": "unused", "prompt": "a red star"}

made = litellm.image_generation(**ASKED, n=2, size="128x128", plan="distilled", seed=5, quality="standard", user="a")
try:
    litellm.image_generation(**ASKED, size="100x100", max_retries=0)
except litellm.BadRequestError as error:
    refusal = {"class": type(error).__name__, "status": error.status_code, "message": str(error)}
print(json.dumps({"made": made.model_dump(), "refusal": refusal}, default=str))
