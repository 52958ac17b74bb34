"""Ray Serve deployments, thin over `stages`."""

import logging
import os
import warnings

# What the model's libraries say on being imported or while they load concerns no user of the server; each is read when
# its library is imported. What is wrong with a file is an error of ours (`deployments.check`, `stages.loading`).
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute", category=UserWarning)
