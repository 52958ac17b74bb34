"""Checks of weights on disk: whether they are complete and match the model."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from torch import nn

from stages.sources import BadFile, find_component


def weights_of(directory: Path) -> list[Path]:
    """List the files that hold a component's weights, in the order of its index.

    Raises:
        BadFile: the component's config or one of the files is missing, or a file is truncated.
    """
    if not (directory / "config.json").is_file():
        raise BadFile("source", directory / "config.json", "is missing")
    indices = sorted(directory.glob("*.safetensors.index.json"))
    if indices:
        names = dict.fromkeys(_read_index(indices[0]).values())
        files = [directory / name for name in names]
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise BadFile("source", directory, "holds no .safetensors file")
    for file in files:
        if not file.is_file():
            raise BadFile("source", file, f"is missing, which {indices[0].name} names" if indices else "is no file")
        read_header("source", file)
    return files


def _read_index(file: Path) -> dict[str, str]:
    """Files of weights by the names of the weights; raises BadFile."""
    try:
        return TypeAdapter(dict[str, str]).validate_python(json.loads(file.read_text())["weight_map"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BadFile("source", file, "is no index of weights: weight_map must name a file for each") from error


def read_header(key: str, file: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file, and check its length against its header.

    Raises:
        BadFile: the file is truncated or not a safetensors file; the error names `key`, a key of the config.
    """
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise BadFile(key, file, f"cannot be read as safetensors, it may be truncated: {error}") from error


def read_tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the names and tensors of a safetensors file, one at a time."""
    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            yield name, opened.get_tensor(name)


def check_finite(key: str, file: Path, dtype: torch.dtype | None = None) -> None:
    """Check that all numbers of a file are finite; this reads the file at the speed of the disk.

    Args:
        key: key of the config that errors name.
        file: safetensors file.
        dtype: dtype in which the numbers must be finite, by default float32.

    Raises:
        BadFile: a number is NaN or infinite.
    """
    for name, tensor in read_tensors(file):
        if tensor.is_floating_point() and not torch.isfinite(tensor.to(dtype or torch.float32)).all():
            raise BadFile(key, file, f"holds numbers that are not finite, in {name!r}")


def load_component(
    kind: Any, source: str, component: str, *, dtype: torch.dtype | None = None, device_map: str | None = None
) -> Any:
    """Load a pipeline's component by its library's `from_pretrained`, whose warnings about weights are errors here.

    Args:
        kind: class of the component.
        source: directory or repo id of the pipeline.
        component: name of the component's directory.
        dtype: dtype of the weights, by default the library's choice.
        device_map: where to load it, by default the processor.

    Raises:
        BadFile: the component's files are missing or truncated, or their weights do not match the component, in which
            case the library would leave some at random.
    """
    directory = find_component(source, component)
    files = weights_of(directory)
    try:
        _check_release(directory)
        module, info = kind.from_pretrained(
            directory,
            torch_dtype=dtype,  # the name that the libraries' older releases know, too
            device_map=device_map,
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # of whatever kind: libraries take their configs as they come
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BadFile("source", directory, f"cannot be loaded: {reason[0]}") from error
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


def _check_release(directory: Path) -> None:
    """Raise ValueError if the component was saved by a later major release of transformers than is installed.

    Release 4 does not look for release 5's `rope_parameters`, and would rotate by frequencies of its own.
    """
    here = version("transformers")
    saved_by = json.loads((directory / "config.json").read_text()).get("transformers_version", here)
    if int(saved_by.partition(".")[0]) > int(here.partition(".")[0]):
        raise ValueError(f"transformers {saved_by} saved it, whose config {here}, which is installed, would misread")


def check_loaded(module: nn.Module, source: str, component: str) -> None:
    """Check that a loaded component's parameters are finite, on the device that holds them, which takes milliseconds.

    Raises:
        BadFile: a parameter is NaN or infinite; the error names its file.
    """
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            directory = find_component(source, component)
            for file in weights_of(directory):
                check_finite("source", file, parameter.dtype)
            raise BadFile("source", directory, f"is not finite in {parameter.dtype} at {name!r}")


def list_keys(keys: Collection[str]) -> str:
    """Name the first key, and how many more there are."""
    first, *others = sorted(keys)
    return f"{first!r}" + (f" and {len(others)} more" if others else "")
