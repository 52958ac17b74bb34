"""Checks of a config that need nothing to be started."""

from __future__ import annotations

import inspect
import ipaddress
import os
import shlex
import shutil
import socket
import ssl
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, ProxyLocation
from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

from backends import get_backend
from backends.directories import make_writable
from cluster.pools import Pool, read_pools
from deployments.fit import actor_options, contradictions, overfull, weights_gib
from deployments.settings import Settings
from stages.config import ModelConfig
from stages.yaml_file import ConfigError, read_mapping, validate

IMPORT_PATH = "deployments.app:build"


class StartError(Exception):
    """An error that keeps the server from starting; the message is one sentence that names the key or the file."""


@dataclass(frozen=True)
class Config:
    """A config of Serve that is right in itself.

    Attributes:
        path: the file.
        serve: what it says, in Serve's schema.
        application: the application of this project.
        settings: the application's arguments.
        pools: the pools that it is placed on, by name.
    """

    path: Path
    serve: ServeDeploySchema
    application: ServeApplicationSchema
    settings: Settings
    pools: Mapping[str, Pool]

    @property
    def logs_json(self) -> bool:
        """Whether the application's logs are JSON."""
        logging = self.application.logging_config or self.serve.logging_config
        return logging is not None and logging.encoding == "JSON"

    @property
    def where(self) -> str:
        """File and key of the application, for messages."""
        return f"{self.path}: applications.{self.application.name}"


def check(path: Path) -> Config:
    """Read Serve's config at `path`; check it, the port, this machine's devices and directories, and the model's files.

    Raises:
        StartError: the first error.
    """
    config = read_config(path)
    _check_http(config)
    _check_tracing()
    # From here on torch and diffusers are imported, which takes seconds, so the errors above are reported first.
    if not os.environ.get("RAY_ADDRESS"):  # else other machines run the replicas
        _check_metrics_port(config)
        check_pythons(config)
        _check_devices(config)
        _check_directories(config)
        _check_access(config)
        _check_jobs(config)
    from stages.check import check_files

    with _refusing(f"{config.settings.model}: "):
        model = config.settings.read_model()
        check_files(model)
        _check_memory(config, model)
    return config


def read_config(path: Path) -> Config:
    """Read Serve's config at `path`, and check it by Serve's schema, the application's and the pools'.

    Raises:
        StartError: the first error.
    """
    with _refusing():
        content = read_mapping(path)
        try:
            serve = validate(path, ServeDeploySchema, content, strict=False)  # as Serve itself does
        except (ImportError, AttributeError) as error:  # which the schema does not turn into errors of its own
            raise StartError(
                f"{path}: a policy_function or request_router_class cannot be imported: {error}"
            ) from error
    _check_keys(path, content, serve.model_dump(exclude_unset=True))
    ours = [application for application in serve.applications if application.import_path == IMPORT_PATH]
    if not ours:
        raise StartError(f"{path}: applications: one must have the import_path {IMPORT_PATH}")
    if len(ours) > 1:
        raise StartError(f"{path}: applications: only one may have the import_path {IMPORT_PATH}")
    (application,) = ours
    where = f"{path}: applications.{application.name}"
    settings = _read_settings(application, where)
    if not (application.route_prefix or "").startswith("/") or "{" in (application.route_prefix or ""):
        raise StartError(
            f"{where}.route_prefix: must begin with / and have no braces, not {application.route_prefix!r}"
        )
    http_timeout_s = serve.http_options.request_timeout_s
    if http_timeout_s is not None and settings.request_timeout_s >= http_timeout_s:
        raise StartError(
            f"{where}.args.request_timeout_s: must be below http_options.request_timeout_s, {http_timeout_s:g}, "
            f"not {settings.request_timeout_s:g}"
        )
    config = Config(path, serve, application, settings, settings.read_pools())
    _check_deployments(config)
    return config


def _read_settings(application: ServeApplicationSchema, where: str) -> Settings:
    """Read the application's arguments, and first the files that they name, so that errors begin with the file."""
    model, pools = application.args.get("model"), application.args.get("pools")
    if isinstance(model, str):
        with _refusing(named_by=f"{where}.args.model: "):
            config = ModelConfig.read(Path(model))
        with _refusing(f"{model}: "):
            config.check_family()
            config.check_plans()
    if isinstance(pools, str):
        with _refusing(named_by=f"{where}.args.pools: "):
            read_pools(Path(pools))
    with _refusing():
        return validate(f"{where}.args", Settings, application.args)


def _check_deployments(config: Config) -> None:
    """Check that `deployments` and `placement` name the same, and that each deployment goes with its pool."""
    where, placement = config.where, config.settings.placement
    names = [deployment.name for deployment in config.application.deployments]
    expected = {"Ingress", *placement}
    if unknown := set(names) - expected:
        raise StartError(f"{where}.deployments: {min(unknown)} is not in args.placement, whose are {sorted(expected)}")
    if missing := expected - set(names):
        raise StartError(f"{where}.deployments: {min(missing)} of args.placement is missing")
    if twice := [name for name in names if names.count(name) > 1]:
        raise StartError(f"{where}.deployments: {twice[0]} is there twice")
    deployments = {deployment.name: deployment for deployment in config.application.deployments}
    for name, deployment in deployments.items():
        _check_deployment(deployment, f"{where}.deployments.{name}")
        if name in placement:
            _check_queue(deployment, config.settings.max_images_in_service, f"{where}.deployments.{name}")
            pool = placement[name].pool
            for complaint in contradictions(actor_options(deployment, config.pools[pool]), pool, config.pools[pool]):
                raise StartError(
                    f"{where}.deployments.{name}.ray_actor_options: {complaint} of {config.settings.pools}; "
                    "without this key the deployment has the pool's"
                )
    for complaint in overfull(deployments, placement, config.pools):
        raise StartError(f"{where}.deployments: {complaint} in {config.settings.pools}")


def check_pythons(config: Config) -> None:
    """Check that the pools' Pythons are on this machine; Ray would try to start them without end."""
    for name, pool in config.pools.items():
        command = shlex.split(pool.environment.py_executable or "")
        if command and not shutil.which(command[0]):
            raise StartError(
                f"{config.settings.pools}: {name}.environment.py_executable: this machine has no program {command[0]}"
            )


def _check_devices(config: Config) -> None:
    """Check that this machine has the devices, as far as this Python can tell."""
    for name, placement in config.settings.placement.items():
        elsewhere = config.pools[placement.pool].environment.py_executable
        missing = None if elsewhere else get_backend(placement.backend).missing
        if missing:
            raise StartError(
                f"{config.where}.args.placement.{name}.pool: this machine cannot run {placement.pool!r}: {missing}"
            )


def _check_directories(config: Config) -> None:
    """Check that replicas on this machine can keep what they compile."""
    for name, pool in config.pools.items():
        if directory := pool.environment.compilation_cache:
            try:
                make_writable(directory)
            except OSError as error:
                raise StartError(
                    f"{config.settings.pools}: {name}.environment.compilation_cache: "
                    f"{directory} cannot be written: {error.strerror}"
                ) from error


def _check_jobs(config: Config) -> None:
    """Check that the store, the directory of images and the secret of webhooks can be used."""
    jobs = config.settings.jobs
    if jobs is None:
        return
    from deployments.jobs.files import ImageFiles
    from deployments.jobs.store import Store
    from deployments.jobs.webhook import read_secret

    checks: dict[str, Callable[[], object]] = {
        "store": lambda: Store(jobs.store_url).close(),
        "images": lambda: ImageFiles(jobs.images_url).probe(),
    }
    if webhooks := jobs.webhooks:
        checks["webhooks.secret_file"] = lambda: read_secret(webhooks.secret_file)
    for key, attempt in checks.items():
        _attempt(attempt, f"{config.where}.args.jobs.{key}")


def _check_access(config: Config) -> None:
    """Check that the database of keys can be used."""
    if access := config.settings.access:
        from deployments.access.store import AccessStore

        _attempt(lambda: AccessStore(access.database).close(), f"{config.where}.args.access.database")


def _attempt(function: Callable[[], object], where: str) -> None:
    """Call a function; raises StartError if it raises anything."""
    try:
        function()
    except Exception as error:  # of whatever database or file system it is
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StartError(f"{where}: {reason}") from error


def _check_memory(config: Config, model: ModelConfig) -> None:
    """Check that the model's weights fit into the memory of the devices that hold them."""
    for name, placement in config.settings.placement.items():
        memory = config.pools[placement.pool].memory_gib
        if memory is not None and (held := weights_gib(model, placement)) > memory:
            raise StartError(
                f"{config.where}.args.placement.{name}.pool: its weights take {held:.3g} GiB, and a device of "
                f"{placement.pool} has {memory:g}, memory_gib in {config.settings.pools}"
            )


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
        if isinstance(policy := scaling.get("policy"), dict):
            _check_policy(policy, f"{where}.autoscaling_config.policy")
        with _refusing(), warnings.catch_warnings(action="ignore"):
            validate(f"{where}.autoscaling_config", AutoscalingConfig, scaling, strict=False)


def _check_queue(deployment: DeploymentSchema, images: int, where: str) -> None:
    """Check that the queue of a stage, of which each replica of Ingress has one, holds all images that are let in."""
    queued = deployment.model_dump(exclude_unset=True).get("max_queued_requests", -1)
    if queued != -1 and queued < images:
        raise StartError(
            f"{where}.max_queued_requests: must be -1 or at least {images}, args.max_images_in_service, not {queued}: "
            "what was admitted must not be refused later"
        )


def _check_policy(policy: dict[str, Any], where: str) -> None:
    """Check that a policy of Serve's autoscaler can be made: Serve does that in its controller."""
    if unknown := set(policy) - set(AutoscalingPolicy.model_fields):
        raise StartError(f"{where}.{min(unknown)}: Ray Serve has no such key")
    with _refusing():
        made = validate(where, AutoscalingPolicy, policy, strict=False).get_policy()
    if inspect.isclass(made):
        try:
            made(**policy.get("policy_kwargs", {}))
        except (TypeError, ValueError) as error:
            raise StartError(f"{where}.policy_kwargs: {error}") from error


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


def _check_http(config: Config) -> None:
    """Check that Serve will listen, that its port is free, and that nobody reaches it without a key.

    For its dashboard, Ray finds a free port by itself.
    """
    path, serve = config.path, config.serve
    if serve.proxy_location == ProxyLocation.Disabled:
        raise StartError(f"{path}: proxy_location: must be HeadOnly or EveryNode, or nobody answers")
    host, port = serve.http_options.host, serve.http_options.port
    if not 1 <= port <= 65535:
        raise StartError(f"{path}: http_options.port: must be 1 to 65535, not {port}")
    if not host:
        raise StartError(f"{path}: http_options.host: must be an address or a name")
    address = check_free(host, port, f"{path}: http_options.port")
    if config.settings.access is None and not ipaddress.ip_address(address).is_loopback:
        raise StartError(
            f"{config.where}.args.access: must be there, or http_options.host be 127.0.0.1 in place of {host}: "
            "others than this machine would reach the API without a key"
        )
    _check_certificate(serve, path)


def _check_certificate(serve: ServeDeploySchema, path: Path) -> None:
    """Check that the key and the certificate of HTTPS can be used, if there are any."""
    options = serve.http_options
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        file = getattr(options, name)
        if file and not (os.path.isfile(file) and os.access(file, os.R_OK)):
            raise StartError(f"{path}: http_options.{name}: {file} cannot be read")
    if options.ssl_keyfile and not options.ssl_certfile:  # Serve refuses the reverse alone, and would speak plain HTTP
        raise StartError(f"{path}: http_options.ssl_certfile: must be there, since ssl_keyfile is")
    if options.ssl_certfile:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # A password that is not there would be asked for at the terminal.
            context.load_cert_chain(options.ssl_certfile, options.ssl_keyfile, options.ssl_keyfile_password or "")
        except (OSError, ValueError) as error:
            raise StartError(
                f"{path}: http_options.ssl_certfile: {options.ssl_certfile} and ssl_keyfile do not go together: {error}"
            ) from error


def _check_metrics_port(config: Config) -> None:
    """Check that the port of metrics is free: without it Ray's agent would end, and the node with it."""
    port, where = config.settings.metrics_port, f"{config.where}.args.metrics_port"
    if port == config.serve.http_options.port:
        raise StartError(f"{where}: must differ from http_options.port, {port}")
    check_free("", port, where)


def check_free(host: str, port: int, where: str) -> str:
    """Return the address of a host, or of any if it is empty; raise StartError if the port, from `where`, is taken."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, TypeError, ValueError) as error:  # not only names that nobody has, also those that are none
            reason = error.strerror if isinstance(error, OSError) else error
            raise StartError(f"{where}: {host or '*'}:{port} cannot be had: {reason}") from error
        address: str = listener.getsockname()[0]
        return address


def _check_tracing() -> None:
    """Check that traces can be exported as OpenTelemetry's variables ask for."""
    from deployments import tracing

    try:
        tracing.check()
    except ValueError as error:
        raise StartError(str(error)) from error


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
