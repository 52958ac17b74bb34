"""Whether deployments fit the pools that they are placed on."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ray.serve.schema import DeploymentSchema
from safetensors import safe_open

from backends import get_backend
from cluster.pools import Pool
from deployments.settings import DECODE, ENCODE, Placement
from stages.config import ModelConfig

_HOST = {"CPU", "memory"}  # what every node has, of which a deployment may ask for more or less than a device's share
_BYTES = {"float32": 4, "bfloat16": 2}


def actor_options(deployment: DeploymentSchema, pool: Pool | None = None) -> dict[str, Any]:
    """What Ray is asked for a replica: the config's options, or else the pool's."""
    options = deployment.model_dump(exclude_unset=True).get("ray_actor_options")
    if options is None:
        return pool.actor_options if pool else {}
    return options


def asked_resources(options: Mapping[str, Any]) -> dict[str, float]:
    """Resources that options of an actor ask for, by Ray's names."""
    asked = {
        "CPU": options.get("num_cpus", 1),
        "GPU": options.get("num_gpus", 0),
        "memory": options.get("memory", 0),
        **(options.get("resources") or {}),
    }
    return {name: amount for name, amount in asked.items() if amount and math.isfinite(amount)}


def starting_resources(deployment: DeploymentSchema, pool: Pool | None = None) -> Counter[str]:
    """What the replicas that a deployment starts with ask for together."""
    options = deployment.model_dump(exclude_unset=True)
    scaling = options.get("autoscaling_config") or {}
    fixed = options.get("num_replicas")
    least = scaling.get("initial_replicas") or scaling.get("min_replicas", 1)
    replicas = fixed if isinstance(fixed, int) else least
    asked = asked_resources(actor_options(deployment, pool))
    return Counter({name: replicas * amount for name, amount in asked.items()})


def contradictions(options: Mapping[str, Any], name: str, pool: Pool) -> Iterator[str]:
    """Say where a deployment's own options contradict the pool called `name`."""
    asked = asked_resources(options)
    for resource, amount in pool.resources.items():
        if resource not in _HOST and not asked.get(resource):
            yield f"asks for no {resource}, of which a device of pool {name} is {amount:g}"
    for resource in asked:
        if resource not in _HOST and resource not in pool.resources:
            yield f"asks for {resource}, which is no resource of pool {name}"
    selector = options.get("label_selector") or {}
    for label, value in pool.labels.items():
        if selector.get(label) != value:
            yield f"selects no {label}={value}, a label of pool {name}"
    environment = options.get("runtime_env") or {}
    ours = pool.environment.py_executable
    if environment.get("py_executable") != ours:
        yield f"has the py_executable {environment.get('py_executable')!r}, and pool {name} has {ours!r}"
    for variable, text in pool.environment.env_vars.items():
        if (environment.get("env_vars") or {}).get(variable) != text:
            yield f"does not set {variable}={text}, an environment variable of pool {name}"


def overfull(
    deployments: Mapping[str, DeploymentSchema], placement: Mapping[str, Placement], pools: Mapping[str, Pool]
) -> Iterator[str]:
    """Say which pools have no room for the replicas that their deployments start with."""
    asked: dict[str, Counter[str]] = defaultdict(Counter)
    for name, placed in placement.items():
        asked[placed.pool].update(starting_resources(deployments[name], pools[placed.pool]))
    for name, total in asked.items():
        pool = pools[name]
        for resource, amount in pool.resources.items():
            if total[resource] > amount * pool.replicas.max + 1e-6:
                yield (
                    f"those on pool {name} ask for {total[resource]:g} {resource} together, "
                    f"and its {pool.replicas.max} replicas at most have {amount * pool.replicas.max:g}"
                )


def weights_gib(model: ModelConfig, placement: Placement) -> float:
    """Weigh what a replica holds, in GiB, as far as files on this machine tell: 0 for a model on a hub."""
    from stages.sources import find_component
    from stages.weight_files import weights_of  # here, because it loads torch

    if not Path(model.source).is_dir():
        return 0.0
    components = {
        "text_encoder": (ENCODE in placement.stages, model.quantize.text_encoder),
        "transformer": (placement.denoises, model.quantize.transformer),
        "vae": (DECODE in placement.stages, None),
    }
    size = _BYTES[model.dtype or get_backend(placement.backend).default_dtype]
    held = sum(
        _count_numbers(weights_of(find_component(model.source, component))) * (1 if quantized else size)
        for component, (here, quantized) in components.items()
        if here
    )
    return held / 2**30


def _count_numbers(files: Iterable[Path]) -> int:
    """Count the numbers of all tensors in safetensors files, by their headers."""
    count = 0
    for file in files:
        with safe_open(file, "np") as opened:
            count += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    return count
