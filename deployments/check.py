"""Everything that can be known to be wrong before anything is started."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from deployments.settings import Settings
from stages.check import check_files
from stages.model import ModelConfig
from stages.weight_files import BadFile
from stages.yaml_file import ConfigError, read_mapping

_IMPORT_PATH = "deployments.app:build"


class StartError(Exception):
    """Why the server cannot start: one sentence that names the key or the file."""


def check(path: Path) -> ServeDeploySchema:
    """Read Serve's config at `path` and check it, the application's arguments, the model's files and the port.

    Raises:
        StartError: something is wrong.
    """
    content = _read_yaml(path)
    config = _validated(ServeDeploySchema, content, str(path))
    _check_keys(content, config.model_dump(exclude_unset=True), str(path))
    ours = [application for application in config.applications if application.import_path == _IMPORT_PATH]
    if not ours:
        raise StartError(f"{path}: applications: one must have the import_path {_IMPORT_PATH}")
    for application in ours:
        check_application(application, f"{path}: applications.{application.name}")
    _check_port(config, path)
    return config


def _check_keys(content: object, understood: object, where: str) -> None:
    """Refuse keys of `content` that Serve's schema silently dropped from what it `understood`."""
    if isinstance(content, dict) and isinstance(understood, dict):
        for key, value in content.items():
            if key not in understood:
                raise StartError(f"{where}: {key} is not a key of Ray Serve's schema here")
            _check_keys(value, understood[key], f"{where}.{key}")
    elif isinstance(content, list) and isinstance(understood, list):
        for index, (each, known) in enumerate(zip(content, understood, strict=True)):
            _check_keys(each, known, f"{where}.{index}")


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
        check_files(model)
    except ConfigError as error:
        raise StartError(f"{path}: {error}" if isinstance(error, BadFile) else str(error)) from error
    except OSError as error:
        raise StartError(f"{error.filename or path}: {error.strerror or error}") from error


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
