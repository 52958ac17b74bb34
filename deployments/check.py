"""Checks of a config that need nothing to be started."""

from __future__ import annotations

import math
import os
import socket
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray.serve.config import AutoscalingConfig, ProxyLocation
from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

from backends import get_backend
from deployments.settings import Settings
from stages.config import ModelConfig
from stages.yaml_file import ConfigError, read_mapping, validate

IMPORT_PATH = "deployments.app:build"


class StartError(Exception):
    """An error that keeps the server from starting; the message is one sentence that names the key or the file."""


def check(path: Path) -> ServeDeploySchema:
    """Read Serve's config at `path` and check it, the port, the application's arguments and the model's files.

    Raises:
        StartError: the first error.
    """
    with _refusing():
        content = read_mapping(path)
        config = validate(path, ServeDeploySchema, content, strict=False)  # as Serve itself does
    _check_keys(path, content, config.model_dump(exclude_unset=True))
    ours = [application for application in config.applications if application.import_path == IMPORT_PATH]
    if not ours:
        raise StartError(f"{path}: applications: one must have the import_path {IMPORT_PATH}")
    if len(ours) > 1:
        raise StartError(f"{path}: applications: only one may have the import_path {IMPORT_PATH}")
    _check_http(config, path)
    check_application(ours[0], f"{path}: applications.{ours[0].name}", config.http_options.request_timeout_s)
    return config


def check_application(application: ServeApplicationSchema, where: str, http_timeout_s: float | None) -> None:
    """Check the application's arguments, its deployments and its model's files.

    Args:
        application: the application, as Serve's config has it.
        where: file and key of the application, for messages.
        http_timeout_s: seconds after which Serve's proxy gives up on a request, or None.

    Raises:
        StartError: the first error.
    """
    if not (application.route_prefix or "").startswith("/") or "{" in (application.route_prefix or ""):
        raise StartError(
            f"{where}.route_prefix: must begin with / and have no braces, not {application.route_prefix!r}"
        )
    if isinstance(model := application.args.get("model"), str):
        with _refusing(named_by=f"{where}.args.model: "):
            config = ModelConfig.read(Path(model))  # separately, so that the message begins with its file
        with _refusing(f"{model}: "):
            config.check_plans()
    with _refusing():
        settings = validate(f"{where}.args", Settings, application.args)
    if http_timeout_s is not None and settings.request_timeout_s >= http_timeout_s:
        raise StartError(
            f"{where}.args.request_timeout_s: must be below http_options.request_timeout_s, {http_timeout_s:g}, "
            f"not {settings.request_timeout_s:g}"
        )
    configured = [deployment.name for deployment in application.deployments]
    expected = {"Ingress", *settings.placement}
    if unknown := set(configured) - expected:
        raise StartError(f"{where}.deployments: {min(unknown)} is not in args.placement, whose are {sorted(expected)}")
    if missing := expected - set(configured):
        raise StartError(f"{where}.deployments: {min(missing)} of args.placement is missing")
    if twice := [name for name in configured if configured.count(name) > 1]:
        raise StartError(f"{where}.deployments: {twice[0]} is there twice")
    for deployment in application.deployments:
        _check_deployment(deployment, f"{where}.deployments.{deployment.name}")
    # From here on torch and diffusers are imported, which takes seconds, so the errors above are reported first.
    if not os.environ.get("RAY_ADDRESS"):  # else other machines run the replicas
        for name, placement in settings.placement.items():
            if not get_backend(placement.backend).available:
                raise StartError(
                    f"{where}.args.placement.{name}.backend: this machine has no device for {placement.backend!r}"
                )
    from stages.check import check_files

    with _refusing(f"{settings.model}: "):
        check_files(settings.read_model())


def resources(deployment: DeploymentSchema) -> Counter[str]:
    """What the replicas that a deployment starts with ask for, by Ray's names of resources."""
    options = deployment.model_dump(exclude_unset=True)
    scaling = options.get("autoscaling_config") or {}
    fixed = options.get("num_replicas")
    least = scaling.get("initial_replicas") or scaling.get("min_replicas", 1)
    replicas = fixed if isinstance(fixed, int) else least
    actor = options.get("ray_actor_options") or {}
    asked = {"CPU": actor.get("num_cpus", 1), "GPU": actor.get("num_gpus", 0), **(actor.get("resources") or {})}
    return Counter({name: replicas * amount for name, amount in asked.items() if amount and math.isfinite(amount)})


def _check_deployment(deployment: DeploymentSchema, where: str) -> None:
    """Check what Serve looks at only when it starts replicas."""
    options = deployment.model_dump(exclude_unset=True)
    asked = (options.get("ray_actor_options") or {}).get("resources") or {}
    for name, amount in asked.items():
        if isinstance(amount, bool) or not isinstance(amount, int | float):
            raise StartError(f"{where}.ray_actor_options.resources.{name}: must be a number, not {amount!r}")
    scaling = options.get("autoscaling_config")
    if isinstance(scaling, dict):
        if unknown := set(scaling) - set(AutoscalingConfig.model_fields):
            raise StartError(f"{where}.autoscaling_config.{min(unknown)}: Ray Serve has no such key")
        with _refusing(), warnings.catch_warnings(action="ignore"):
            validate(f"{where}.autoscaling_config", AutoscalingConfig, scaling, strict=False)


def _check_keys(path: Path, content: object, understood: object, *keys: str) -> None:
    """Refuse keys of `content` that are not in `understood`: Serve's schema drops unknown keys silently."""
    if isinstance(content, dict) and isinstance(understood, dict):
        for key, value in content.items():
            if key not in understood:
                raise StartError(f"{path}: {'.'.join((*keys, str(key)))}: Ray Serve's schema has no such key")
            _check_keys(path, value, understood[key], *keys, str(key))
    elif isinstance(content, list) and isinstance(understood, list):
        for index, (each, known) in enumerate(zip(content, understood, strict=True)):
            _check_keys(path, each, known, *keys, str(index))


def _check_http(config: ServeDeploySchema, path: Path) -> None:
    """Check that Serve will listen, and that its port is free; for its dashboard, Ray finds a free port by itself."""
    if config.proxy_location == ProxyLocation.Disabled:
        raise StartError(f"{path}: proxy_location: must be HeadOnly or EveryNode, or nobody answers")
    host, port = config.http_options.host, config.http_options.port
    if not 1 <= port <= 65535:
        raise StartError(f"{path}: http_options.port: must be 1 to 65535, not {port}")
    if not host:
        raise StartError(f"{path}: http_options.host: must be an address or a name")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, TypeError, ValueError) as error:  # not only names that nobody has, also those that are none
            reason = error.strerror if isinstance(error, OSError) else error
            raise StartError(f"{path}: http_options.port: {host}:{port} cannot be had: {reason}") from error


@contextmanager
def _refusing(where: str = "", *, named_by: str = "") -> Iterator[None]:
    """Turn errors in a configuration file, or in one that it names, into StartError.

    Args:
        where: file of the key that the error names.
        named_by: key that names a file which may be missing.
    """
    try:
        yield
    except OSError as error:
        raise StartError(f"{where}{named_by}{error.filename}: {error.strerror}") from error
    except ConfigError as error:
        raise StartError(f"{where}{' '.join(str(error).split())}") from error
