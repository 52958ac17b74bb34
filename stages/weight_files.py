"""Weights on disk: where they are, whether they are whole, and whether they hold what the model needs."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import nn

from stages.yaml_file import ConfigError

_PART_FILES = ["*.json", "*.txt", "*.jinja", "*.safetensors"]


class BadFile(ConfigError):
    """Files that cannot be served, in one sentence: the config's key, the file, and what is wrong with it."""

    def __init__(self, key: str, path: Path | str, reason: str) -> None:
        super().__init__(f"{key}: {path} {reason}")
        self.key, self.path, self.reason = key, path, reason

    def __reduce__(self) -> tuple[type[BadFile], tuple[str, Path | str, str]]:
        return type(self), (self.key, self.path, self.reason)


def find_part(source: str, part: str) -> Path:
    """The directory of a part of a pipeline, downloaded first if `source` is a repo id.

    Raises:
        BadFile: there is none.
    """
    if Path(source).is_dir():
        root = Path(source)
    else:
        with _reading_hub("source", source):
            root = Path(snapshot_download(source, allow_patterns=[f"{part}/{name}" for name in _PART_FILES]))
    if not (root / part).is_dir():
        raise BadFile("source", source, f"has no directory {part!r}")
    return root / part


def weights_of(directory: Path) -> list[Path]:
    """Files that hold the weights of a part, whole ones, in the order of its index.

    Raises:
        BadFile: the part's config or one of the files is missing, or a file is truncated.
    """
    if not (directory / "config.json").is_file():
        raise BadFile("source", directory / "config.json", "is missing")
    indices = sorted(directory.glob("*.safetensors.index.json"))
    if indices:
        names = dict.fromkeys(json.loads(indices[0].read_text())["weight_map"].values())
        files = [directory / name for name in names]
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise BadFile("source", directory, "holds no .safetensors file")
    for file in files:
        if not file.is_file():
            raise BadFile("source", file, f"is missing, which {indices[0].name} names")
        read_header("source", file)
    return files


def read_header(key: str, file: Path) -> dict[str, str]:
    """Metadata of a safetensors file, whose length is checked against its header.

    Raises:
        BadFile: it is truncated or no such file; `key` is the config's, to be blamed.
    """
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise BadFile(key, file, f"cannot be read as safetensors, it may be truncated: {error}") from error


def read_tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a safetensors file, one at a time."""
    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            yield name, opened.get_tensor(name)


def check_finite(key: str, file: Path, dtype: torch.dtype | None = None) -> None:
    """Read a file's numbers, at the speed of the disk.

    Args:
        dtype: that they will be served in, in which they must be finite too.

    Raises:
        BadFile: one is NaN or infinite.
    """
    for name, tensor in read_tensors(file):
        if tensor.is_floating_point() and not torch.isfinite(tensor.to(dtype or torch.float32)).all():
            raise BadFile(key, file, f"holds numbers that are not finite, in {name!r}")


def load_part(kind: Any, source: str, part: str, **options: Any) -> Any:
    """Load a part of a pipeline by its library's `from_pretrained`, whose warnings about weights are errors here.

    Args:
        kind: class of the part.
        options: of `from_pretrained`, among them the dtype.

    Raises:
        BadFile: the part's files are missing or truncated, or hold other weights than the part has, of which the
            library would leave some at random.
    """
    directory = find_part(source, part)
    files = weights_of(directory)
    try:
        module, info = kind.from_pretrained(
            directory, output_loading_info=True, use_safetensors=True, ignore_mismatched_sizes=True, **options
        )
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise BadFile("source", directory, f"cannot be loaded: {str(error).splitlines()[0]}") from error
    where = files[0] if len(files) == 1 else directory
    wrong = {
        "lacks": info["missing_keys"],
        "has, which the model does not take,": info["unexpected_keys"],
        "has in another shape": [name for name, *_ in info["mismatched_keys"]],
    }
    for verb, keys in wrong.items():
        if keys:
            raise BadFile("source", where, f"{verb} {list_keys(keys)}")
    return module


def check_loaded(module: nn.Module, source: str, part: str) -> None:
    """Check that the parameters of a loaded part are finite, where they are; on a device this takes milliseconds.

    Raises:
        BadFile: names the file that holds NaN or infinity.
    """
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            directory = find_part(source, part)
            for file in weights_of(directory):
                check_finite("source", file, parameter.dtype)
            raise BadFile("source", directory, f"is not finite in {parameter.dtype} at {name!r}")


def find_adapter(key: str, source: str, weight_name: str | None) -> Path:
    """The file of an adapter, downloaded first if `source` is a repo id.

    Args:
        key: the config's, to be blamed.
        weight_name: the file in `source`; may be None where there is one, or one under diffusers' default name.

    Raises:
        BadFile: no such file, or several.
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


def list_keys(keys: Collection[str]) -> str:
    """The first of some keys, and how many more there are."""
    first, *others = sorted(keys)
    return f"{first!r}" + (f" and {len(others)} more" if others else "")


@contextmanager
def _reading_hub(key: str, source: str) -> Iterator[None]:
    """Say in one sentence about `source` what goes wrong in a download."""
    try:
        yield
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadFile(key, source, f"is neither a directory nor a repo that can be read: {reason}") from error
