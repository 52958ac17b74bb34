"""What replicas say on the console of `python -m deployments`: a line an image, and what is wrong."""

from __future__ import annotations

import logging
import os
import sys

_FORMAT = "%(asctime)s %(levelname)s %(message)s"

images = logging.getLogger("ray.serve.images")


def attach() -> None:
    """Send `images`, and warnings of this replica, to the console, where Serve's own logs go to files alone."""
    if os.environ.get("RAY_SERVE_LOG_TO_STDERR") != "0":
        return
    for logger, level in ((logging.getLogger("ray.serve"), logging.WARNING), (images, logging.INFO)):
        handler = logging.StreamHandler(sys.__stderr__)
        handler.setLevel(level)
        handler.setFormatter(logging.Formatter(_FORMAT))
        logger.addHandler(handler)
