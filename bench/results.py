"""Files of results."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.machine import machine_name


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--output`, see `output_directory`."""
    parser.add_argument("--output", type=Path, help="directory, by default bench/results/MACHINE")


def output_directory(arguments: argparse.Namespace) -> Path:
    """Return the directory that `--output` names, by default this machine's, and create it if it does not exist."""
    output: Path = arguments.output or Path(__file__).parent / "results" / machine_name()
    output.mkdir(parents=True, exist_ok=True)
    return output


def positive(text: str) -> float:
    """Return the number of an argument that must be above 0; raises ValueError, of which argparse makes an error."""
    if not (value := float(text)) > 0:
        raise ValueError
    return value


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(content, indent=1) + "\n")
