"""Everything that can be known to be wrong before anything is started."""

from __future__ import annotations

import json
import socket
import struct
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from deployments.settings import Settings
from stages.model import ModelConfig, load_scheduler
from stages.yaml_file import ConfigError, read_mapping

_IMPORT_PATH = "deployments.app:build"
_PARTS = ("transformer", "text_encoder", "vae")


class StartError(Exception):
    """Why the server cannot start: one sentence that names the key or the file."""


def check(path: Path) -> ServeDeploySchema:
    """Read Serve's config at `path` and check it, the application's arguments, the model's files and the port.

    Raises:
        StartError: something is wrong.
    """
    content = _read_yaml(path)
    config = _validated(ServeDeploySchema, content, str(path))
    ours = [application for application in config.applications if application.import_path == _IMPORT_PATH]
    if not ours:
        raise StartError(f"{path}: applications: one must have the import_path {_IMPORT_PATH}")
    for application in ours:
        check_application(application, f"{path}: applications.{application.name}")
    _check_port(config, path)
    return config


def check_application(application: ServeApplicationSchema, where: str) -> None:
    """Check the application's arguments, its deployments and its model's files.

    Args:
        where: what its keys are in, for messages.

    Raises:
        StartError: something is wrong.
    """
    model_path = application.args.get("model")
    if isinstance(model_path, str):
        _check_model(Path(model_path))
    settings = _validated(Settings, application.args, f"{where}.args")
    configured = {deployment.name for deployment in application.deployments}
    expected = {"Ingress", *settings.placement}
    if unknown := configured - expected:
        raise StartError(f"{where}.deployments: {min(unknown)} is not in args.placement, whose are {sorted(expected)}")
    if missing := expected - configured:
        raise StartError(f"{where}.deployments: {min(missing)} of args.placement is missing")


def _check_model(path: Path) -> None:
    """Check the model's config and, where they are on this machine, its files."""
    try:
        model = ModelConfig.read(path)
        model.check_plans()
    except ConfigError as error:
        raise StartError(str(error)) from error
    except OSError as error:
        raise StartError(f"{error.filename}: {error.strerror}") from error
    source = Path(model.source)
    if source.is_dir():
        try:
            load_scheduler(model)
        except (ConfigError, OSError) as error:
            raise StartError(str(error)) from error
        for part in _PARTS:
            _check_weights(source / part, f"{path}: source")
    elif not _is_on_hub(model.source):
        raise StartError(f"{path}: source: {model.source} is neither a directory nor a repo that the hub answers for")
    for name, adapter in model.adapters.items():
        place, key = Path(adapter.source), f"{path}: adapters.{name}.source"
        if place.is_dir():
            _check_weights(place, key, adapter.weight_name)
        elif not _is_on_hub(adapter.source):
            raise StartError(f"{key}: {adapter.source} is neither a directory nor a repo that the hub answers for")


def _check_weights(directory: Path, key: str, name: str | None = None) -> None:
    """Check that `directory` has weights, or the file called `name`, and all bytes of each that it should have."""
    if name:
        files = [directory / name]
    elif index := sorted(directory.glob("*.safetensors.index.json")):
        files = sorted({directory / file for file in json.loads(index[0].read_text())["weight_map"].values()})
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise StartError(f"{key}: {directory} has no .safetensors file")
    for file in files:
        if not file.is_file():
            raise StartError(f"{key}: {file} does not exist")
        _check_safetensors(file, key)


def _check_safetensors(file: Path, key: str) -> None:
    """Compare the length of `file` with that which its header tells (https://github.com/huggingface/safetensors)."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        try:
            header = json.loads(stream.read(length) if length < size else b"")
        except ValueError as error:
            raise StartError(f"{key}: {file} is truncated or no safetensors file") from error
    header.pop("__metadata__", None)
    expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != expected:
        raise StartError(f"{key}: {file} is damaged: it has {size} bytes, and its header tells of {expected}")


def _is_on_hub(source: str) -> bool:
    from huggingface_hub import HfApi, try_to_load_from_cache  # takes a second, which a local model should not cost

    if isinstance(try_to_load_from_cache(source, "model_index.json"), str):
        return True
    try:
        HfApi().model_info(source, timeout=10)
    except Exception:
        return False
    return True


def _check_port(config: ServeDeploySchema, path: Path) -> None:
    """Check that nothing listens where the server will; Ray looks for a free port for its dashboard by itself."""
    host, port = config.http_options.host, config.http_options.port
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise StartError(f"{path}: http_options.port: {host}:{port} cannot be had: {error.strerror}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        return read_mapping(path)
    except OSError as error:
        raise StartError(f"{path}: {error.strerror}") from error
    except ConfigError as error:
        raise StartError(str(error)) from error


def _validated(model: Any, content: dict[str, Any], where: str) -> Any:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise StartError(f"{where}: {f'{key}: ' if key else ''}{first['msg']}") from error
