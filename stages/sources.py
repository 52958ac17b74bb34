"""Lookup of a model's files, in a directory or on a hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from stages.yaml_file import ConfigError

_COMPONENT_FILES = ["*.json", "*.txt", "*.jinja", "*.safetensors"]


class BadFile(ConfigError):
    """A file that cannot be served; the message is one sentence with the config's key, the file and the error."""

    def __init__(self, key: str, path: Path | str, reason: str) -> None:
        super().__init__(f"{key}: {path} {reason}")
        self.key, self.path, self.reason = key, path, reason

    def __reduce__(self) -> tuple[type[BadFile], tuple[str, Path | str, str]]:
        return type(self), (self.key, self.path, self.reason)


def read_json(source: str, name: str) -> dict[str, Any]:
    """Read a JSON file of a pipeline (e.g. `transformer/config.json`), downloaded first if `source` is a repo id.

    Raises:
        BadFile: the file does not exist or is not a JSON object.
    """
    path = Path(source) / name
    if not Path(source).is_dir():
        with _reading_hub("source", source):
            path = Path(hf_hub_download(source, name))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadFile("source", path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BadFile("source", path, f"is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadFile("source", path, "must be an object")
    return content


def find_component(source: str, component: str) -> Path:
    """Find the directory of a pipeline's component, downloaded first if `source` is a repo id.

    Raises:
        BadFile: there is no such directory.
    """
    if Path(source).is_dir():
        root = Path(source)
    else:
        with _reading_hub("source", source):
            root = Path(snapshot_download(source, allow_patterns=[f"{component}/{name}" for name in _COMPONENT_FILES]))
    if not (root / component).is_dir():
        raise BadFile("source", source, f"has no directory {component!r}")
    return root / component


def find_adapter(key: str, source: str, weight_name: str | None) -> Path:
    """Find an adapter's file, downloaded first if `source` is a repo id.

    Args:
        key: key of the config that errors name.
        source: file, directory or repo id.
        weight_name: name of the file in `source`; may be None if there is only one, or one with diffusers' default
            name.

    Raises:
        BadFile: there is no such file, or several.
    """
    directory = Path(source)
    if directory.is_file():
        return directory
    if not directory.is_dir():
        with _reading_hub(key, source):
            if weight_name is not None:
                return Path(hf_hub_download(source, weight_name))
            directory = Path(snapshot_download(source, allow_patterns=["*.safetensors", "adapter_config.json"]))
    if weight_name is not None:
        if not (directory / weight_name).is_file():
            raise BadFile(key, directory / weight_name, "is missing")
        return directory / weight_name
    names = sorted(file.name for file in directory.glob("*.safetensors"))
    if "pytorch_lora_weights.safetensors" in names:
        return directory / "pytorch_lora_weights.safetensors"
    if len(names) != 1:
        found = f"several .safetensors files, of which weight_name must name one: {', '.join(names)}"
        raise BadFile(key, directory, f"holds {found if names else 'no .safetensors file'}")
    return directory / names[0]


@contextmanager
def _reading_hub(key: str, source: str) -> Iterator[None]:
    """Turn errors of a download into a BadFile of one sentence about `source`."""
    try:
        yield
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadFile(key, source, f"is neither a directory nor a repo that can be read: {reason}") from error
