"""Output of replicas to the console of `python -m deployments`: a line per image, and warnings."""

from __future__ import annotations

import logging
import os
import sys

_FORMAT = "%(asctime)s %(levelname)s %(message)s"

images = logging.getLogger("ray.serve.images")


def attach() -> None:
    """Send `images` and this replica's warnings to the console if Serve's own logs go to files alone."""
    if os.environ.get("RAY_SERVE_LOG_TO_STDERR") != "0":
        return
    for logger, level in ((logging.getLogger("ray.serve"), logging.WARNING), (images, logging.INFO)):
        handler = logging.StreamHandler(sys.__stderr__)
        handler.setLevel(level)
        handler.setFormatter(logging.Formatter(_FORMAT))
        logger.addHandler(handler)
