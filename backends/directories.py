"""Directories that replicas write to."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile


def make_writable(directory: Path) -> None:
    """Make a directory where there is none; raises OSError if files cannot be written there."""
    directory.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=directory):
        pass
