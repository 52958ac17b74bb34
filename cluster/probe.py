"""What a process on a pool's node can do; imports nothing but the standard library, so that it runs anywhere."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
from importlib import import_module

_VERSIONS = "import json, platform, ray; print(json.dumps([platform.python_version(), ray.__version__]))"


def find_versions(py_executable: str | None, timeout_s: float) -> tuple[str, str]:
    """Ask a Python on this node for its version and that of its Ray; by default this one.

    Args:
        py_executable: command that starts it, as in Ray's runtime environments.
        timeout_s: seconds within which it must answer.

    Raises:
        RuntimeError: it cannot be started, has no Ray, or does not answer in time.
    """
    if py_executable is None:
        return platform.python_version(), import_module("ray").__version__
    try:
        answer = subprocess.run(
            [*shlex.split(py_executable), "-c", _VERSIONS],
            capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{py_executable} cannot be run: {error}") from error
    if answer.returncode:
        last = (answer.stderr.strip().splitlines() or [f"status {answer.returncode}"])[-1]
        raise RuntimeError(f"{py_executable} has no Ray that can be imported: {last}")
    python, ray = json.loads(answer.stdout.strip().splitlines()[-1])
    return python, ray


def find_flaws(backend: str, *, on_device: bool) -> list[str]:
    """Import what a replica imports; return a sentence for each thing that fails.

    Args:
        backend: name of the backend.
        on_device: whether this process has a device, which the backend must then see.
    """
    flaws = []
    try:
        import_module("deployments.replica")
        available = import_module("backends").get_backend(backend).available
    except Exception as error:  # of whatever kind, since libraries of devices raise as they like
        flaws.append(f"cannot import what replicas on {backend} import: {type(error).__name__}: {error}")
    else:
        if on_device and not available:
            flaws.append(f"backend {backend} sees no device")
    return flaws
