"""What tests read of a running server."""

from __future__ import annotations

import base64
import subprocess
import sys
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import openai.types
import yaml
from openai.types import ImageGenStreamEvent, ImagesResponse
from PIL import Image

from bench.serving.servers import Running


def deployment_statuses() -> dict[str, str]:
    """Of the application, by name, as `serve status` says."""
    command = [str(Path(sys.executable).with_name("serve")), "status"]
    status = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    deployments = yaml.safe_load(status.stdout)["applications"]["images"]["deployments"]
    return {name: entry["status"] for name, entry in deployments.items()}


def log_lines(server: Running, deployment: str, *texts: str) -> list[str]:
    """Of a deployment's replicas, those that hold all of these texts."""
    logs = Path(server.process.environ()["RAY_TMPDIR"]).glob(
        f"*/session_latest/logs/serve/replica_images_{deployment}_*.log"
    )
    lines = [line for log in logs for line in log.read_text().splitlines()]
    return [line for line in lines if all(text in line for text in texts)]


def images_of(answer: ImagesResponse) -> list[openai.types.Image]:
    """Of an answer that has some."""
    assert answer.data is not None
    return answer.data


def pixels(image: openai.types.Image | ImageGenStreamEvent | Mapping[str, Any]) -> np.ndarray:
    """(height, width, 3) of an image of an answer, the openai client's or plain JSON's."""
    data = image["b64_json"] if isinstance(image, Mapping) else image.b64_json
    assert data is not None
    return np.asarray(Image.open(BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)
