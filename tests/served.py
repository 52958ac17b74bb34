"""What tests read of a running server."""

from __future__ import annotations

import base64
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image


def deployment_statuses() -> dict[str, str]:
    """Of the application, by name, as `serve status` says."""
    command = [str(Path(sys.executable).with_name("serve")), "status"]
    status = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    deployments = yaml.safe_load(status.stdout)["applications"]["images"]["deployments"]
    return {name: entry["status"] for name, entry in deployments.items()}


def pixels(image: Any) -> np.ndarray:
    """(height, width, 3) of an image of an answer, the openai client's or plain JSON's."""
    data = image["b64_json"] if isinstance(image, dict) else image.b64_json
    return np.asarray(Image.open(BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)
