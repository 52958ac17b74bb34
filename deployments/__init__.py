"""Ray Serve deployments, a thin layer over `stages`."""

import logging
import os
import warnings

# Libraries' messages on import and on loading do not concern users of the server. Each variable is read when its
# library is imported. Errors in files are reported by this project (`deployments.check`, `stages.loading`).
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute", category=UserWarning)

# Of every node's environment: Serve's HTTP proxies read it when they start.
PROXY_CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deployments.http.front:middlewares"}
