"""Name of the machine on which figures were measured."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch


def machine_name() -> str:
    """Return the accelerator's name, or the processor's with its number of cores, such as `2-core-amd-epyc`."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        name = f"{len(os.sched_getaffinity(0))}-core-{_processor()}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists() and (found := re.search(r"model name\s*:\s*(.+)", information.read_text())):
        return found[1].removesuffix(" Processor")
    return platform.machine()
