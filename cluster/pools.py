"""Pools: hardware of one kind, and the environment in which replicas run there; read without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

from backends import get_backend
from stages.yaml_file import ConfigError, read_mapping, validate

# What Ray and Kubernetes both take.
_WORD = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_LABEL_KEY = rf"^([a-z0-9]([a-z0-9.-]{{0,251}}[a-z0-9])?/)?{_WORD}$"
PoolName = Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$")]
LabelKey = Annotated[str, Field(pattern=_LABEL_KEY)]
LabelValue = Annotated[str, Field(pattern=rf"^{_WORD}$")]
ResourceName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.:-]{0,63}$")]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
ClaimName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]
Text = Annotated[str, Field(min_length=1, max_length=4096)]

_OPTIONS = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}  # resources that Ray has options for


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _known_backend(name: str) -> str:
    get_backend(name)
    return name


def _as_range(value: object) -> object:
    return value if isinstance(value, dict) else {"min": value, "max": value}


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError(f"must begin with /, since it is on the pool's nodes, not {str(path)!r}")
    return path


BackendName = Annotated[str, AfterValidator(_known_backend)]


class Range(_Strict):
    """Bounds of a number that the cluster scales, both included."""

    min: Annotated[int, Field(ge=0, le=10_000)]
    max: Annotated[int, Field(ge=1, le=10_000)]

    @model_validator(mode="after")
    def _in_order(self) -> Range:
        if self.min > self.max:
            raise ValueError(f"min must be at most max, {self.max}, not {self.min}")
        return self


class Environment(_Strict):
    """What replicas of a pool run in.

    Attributes:
        py_executable: command that starts the environment's Python on the pool's nodes, or None for the Python that
            Ray runs in there. It needs the cluster's Ray and Python minor version, this project and its dependencies.
        env_vars: environment variables of the replicas.
        compilation_cache: directory on the pool's nodes that keeps what replicas compile, for the next ones to find;
            None if each compiles anew.
        image: name of the container image of the pool's nodes, for manifests.
    """

    py_executable: Text | None = None
    env_vars: dict[VariableName, str] = {}
    compilation_cache: Annotated[Path, AfterValidator(_absolute)] | None = None
    image: Text | None = None

    @property
    def runtime_env(self) -> dict[str, Any]:
        """Ray's runtime environment, empty if the node's own will do."""
        options = {"py_executable": self.py_executable, "env_vars": self.env_vars}
        return {key: value for key, value in options.items() if value}


class NodeShape(_Strict):
    """A node of a pool, for manifests.

    Attributes:
        devices: number of devices, each with room for a replica.
        cpus: number of cores.
        memory_gib: memory of the node itself, in GiB.
        selector: labels of the Kubernetes nodes that have such devices.
        cache_claim: name of the PersistentVolumeClaim in Kubernetes that keeps what replicas compile, or None for a
            directory of the node.
        config: `node_config` of `ray up`: what the cloud provider calls such a node.
    """

    devices: Annotated[int, Field(ge=1, le=64)] = 1
    cpus: Annotated[int, Field(ge=1, le=1024)] = 4
    memory_gib: Annotated[float, Field(gt=0.0, le=65536.0)] = 16.0
    selector: dict[LabelKey, LabelValue] = {}
    cache_claim: ClaimName | None = None
    config: dict[str, JsonValue] = {}


class Pool(_Strict):
    """Devices of one kind, on nodes that are alike.

    Attributes:
        backend: name of the backend that replicas run on.
        resources: Ray resources of a device, for which a replica asks; by default the backend's.
        labels: Ray labels of the pool's nodes, which replicas select; none if any node will do.
        environment: what replicas run in.
        replicas: number of replicas that have room, a device each; a range if the cluster scales.
        price: dollars an hour for a device.
        memory_gib: memory of a device in GiB, or None if weights need not be checked to fit.
        node: a node of the pool.
    """

    backend: BackendName
    resources: dict[ResourceName, Annotated[float, Field(gt=0.0, allow_inf_nan=False)]] = {}
    labels: dict[LabelKey, LabelValue] = {}
    environment: Environment = Environment()
    replicas: Annotated[Range, BeforeValidator(_as_range)] = Range(min=1, max=1)
    price: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    memory_gib: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    node: NodeShape = NodeShape()

    @model_validator(mode="before")
    @classmethod
    def _as_the_backend_says(cls, content: Any) -> Any:
        try:
            backend = get_backend(content["backend"])
        except (TypeError, KeyError, ValueError):  # which the field's own check tells
            return content
        return {"resources": dict(backend.resources), **content}

    @model_validator(mode="after")
    def _claims_for_something(self) -> Pool:
        if self.node.cache_claim and not self.environment.compilation_cache:
            raise ValueError("node.cache_claim needs environment.compilation_cache, where it is mounted")
        return self

    @property
    def needed_resources(self) -> dict[str, float]:
        """Ray resources that a node must have for a replica: Serve asks for a core where nothing else is said."""
        return {"CPU": 1.0, **self.resources}

    @property
    def actor_options(self) -> dict[str, Any]:
        """What Ray is asked for a replica: `ray_actor_options` of its deployment."""
        options: dict[str, Any] = {
            _OPTIONS[name]: amount for name, amount in self.resources.items() if name in _OPTIONS
        }
        if others := {name: amount for name, amount in self.resources.items() if name not in _OPTIONS}:
            options["resources"] = others
        if self.labels:
            options["label_selector"] = self.labels
        if runtime_env := self.environment.runtime_env:
            options["runtime_env"] = runtime_env
        return options


def read_pools(path: Path) -> dict[str, Pool]:
    """Read pools by name.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: the error names the file and the key that is wrong.
    """
    pools = validate(path, dict[PoolName, Pool], read_mapping(path))
    if not pools:
        raise ConfigError(f"{path}: must name at least one pool")
    return pools
