"""Everything that can be known to be wrong before anything is started."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from deployments.settings import Settings
from stages.config import ModelConfig
from stages.yaml_file import ConfigError, read_mapping, validate

_IMPORT_PATH = "deployments.app:build"


class StartError(Exception):
    """Why the server cannot start: one sentence that names the key or the file."""


def check(path: Path) -> ServeDeploySchema:
    """Read Serve's config at `path` and check it, the port, the application's arguments and the model's files.

    Raises:
        StartError: something is wrong.
    """
    with _refusing():
        content = read_mapping(path)
        config = validate(path, ServeDeploySchema, content, strict=False)  # as Serve itself does
    _check_keys(path, content, config.model_dump(exclude_unset=True))
    ours = [application for application in config.applications if application.import_path == _IMPORT_PATH]
    if not ours:
        raise StartError(f"{path}: applications: one must have the import_path {_IMPORT_PATH}")
    _check_port(config, path)
    for application in ours:
        check_application(application, f"{path}: applications.{application.name}")
    return config


def check_application(application: ServeApplicationSchema, where: str) -> None:
    """Check the application's arguments, its deployments and its model's files.

    Args:
        where: what its keys are in, for messages.

    Raises:
        StartError: something is wrong.
    """
    with _refusing():
        if isinstance(model := application.args.get("model"), str):
            ModelConfig.read(Path(model)).check_plans()  # alone, so that the sentence begins with its file
        settings = validate(f"{where}.args", Settings, application.args)
    configured = {deployment.name for deployment in application.deployments}
    expected = {"Ingress", *settings.placement}
    if unknown := configured - expected:
        raise StartError(f"{where}.deployments: {min(unknown)} is not in args.placement, whose are {sorted(expected)}")
    if missing := expected - configured:
        raise StartError(f"{where}.deployments: {min(missing)} of args.placement is missing")
    # torch and diffusers come with this, which take seconds: what is wrong above is told before.
    from stages.check import check_files

    with _refusing(f"{settings.model}: "):
        check_files(settings.read_model())


def _check_keys(path: Path, content: object, understood: object, *keys: str) -> None:
    """Refuse keys of `content` that Serve's schema dropped from what it `understood`, which it does silently."""
    if isinstance(content, dict) and isinstance(understood, dict):
        for key, value in content.items():
            if key not in understood:
                raise StartError(f"{path}: {'.'.join((*keys, str(key)))}: Ray Serve's schema has no such key")
            _check_keys(path, value, understood[key], *keys, str(key))
    elif isinstance(content, list) and isinstance(understood, list):
        for index, (each, known) in enumerate(zip(content, understood, strict=True)):
            _check_keys(path, each, known, *keys, str(index))


def _check_port(config: ServeDeploySchema, path: Path) -> None:
    """Check that nothing listens where the server will; Ray looks for a free port for its dashboard by itself."""
    host, port = config.http_options.host, config.http_options.port
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise StartError(f"{path}: http_options.port: {host}:{port} cannot be had: {error.strerror}") from error


@contextmanager
def _refusing(where: str = "") -> Iterator[None]:
    """Turn what is wrong with a file of configuration, or with one that it names, into StartError."""
    try:
        yield
    except OSError as error:
        raise StartError(f"{error.filename}: {error.strerror}") from error
    except ConfigError as error:
        raise StartError(f"{where}{' '.join(str(error).split())}") from error
