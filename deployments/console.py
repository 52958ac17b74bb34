"""Output of replicas to the console of `python -m deployments`: a line per image, and warnings."""

from __future__ import annotations

import json
import logging
import os
import sys

from ray import serve

from deployments import ray_internals, tracing

images = logging.getLogger("ray.serve.images")


def attach() -> None:
    """Send `images` and this replica's warnings to the console if Serve's own logs go to files alone.

    Lines are JSON if Serve's logs are. In all of them, what belongs to a trace has its id.
    """
    tracing.stamp_logs()
    ray_internals.mend_print()
    if os.environ.get("RAY_SERVE_LOG_TO_STDERR") != "0":
        return
    context = serve.get_replica_context()
    if ray_internals.logs_json():
        formatter: logging.Formatter = JSONLines(f"{context.app_name}_{context.deployment}")
    else:
        formatter = logging.Formatter(f"%(asctime)s %(levelname)s {context.deployment}: %(message)s")
    for logger, level in ((logging.getLogger("ray.serve"), logging.WARNING), (images, logging.INFO)):
        handler = logging.StreamHandler(sys.__stderr__)
        handler.setLevel(level)
        handler.setFormatter(formatter)
        logger.addHandler(handler)


class JSONLines(logging.Formatter):
    """Formats records as Serve's JSON logs do, with the fields that a console needs."""

    def __init__(self, name: str) -> None:
        """Format records of a deployment.

        Args:
            name: name of the deployment, as Serve's logs have it.
        """
        super().__init__()
        self._name = name

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "asctime": self.formatTime(record),
            "levelname": record.levelname,
            "deployment": self._name,
            "message": record.getMessage(),
        }
        for key in ("request_id", "trace_id"):
            if value := getattr(record, key, None):
                line[key] = value
        if record.exc_info:
            line["exc_text"] = self.formatException(record.exc_info)
        return json.dumps(line)
