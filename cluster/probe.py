"""What a process on a pool's node can do; imports nothing but the standard library, so that it runs anywhere."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
from importlib import import_module
from pathlib import Path

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


def find_flaws(backend: str, compilation_cache: Path | None, *, on_device: bool) -> list[str]:
    """Import what a replica imports, write where it does, and compute on its device; return a sentence for what fails.

    Args:
        backend: name of the backend.
        compilation_cache: directory that is to keep what replicas compile, if any.
        on_device: whether this process has a device, on which the backend then computes.
    """
    doing = "import what replicas import"
    try:
        import_module("deployments.components")
        if compilation_cache:
            doing = f"write to {compilation_cache}, the pool's environment.compilation_cache"
            import_module("backends.directories").make_writable(compilation_cache)
        doing = f"look for backend {backend}"
        there = import_module("backends").get_backend(backend)
        if on_device:
            if there.missing:
                return [f"backend {backend}: {there.missing}"]
            doing = f"compute on {backend}"
            there.probe()
    except Exception as error:  # of whatever kind, since libraries of devices raise as they like
        return [f"cannot {doing}: {type(error).__name__}: {error}"]
    return []
