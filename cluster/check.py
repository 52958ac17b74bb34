"""Check a live Ray cluster against the pools that a config of Serve is placed on.

`python -m cluster check serve_config.yaml` joins the cluster at RAY_ADDRESS, or the one that runs on this machine, and
says of each pool what it lacks: nodes, labels, resources, a Python and a Ray of the cluster's versions, and an
environment in which replicas can start. Ends with status 1 if a pool lacks something.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.nodes import LiveNode, check_address, find_lack, live_nodes
from cluster.pools import Pool
from cluster.probe import find_flaws, find_versions
from deployments.check import StartError, read_config
from stages.yaml_file import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("config", type=Path, nargs="?", default=Path("serve_config.yaml"), help="in Serve's own schema")
    parser.add_argument("--deadline", type=float, default=120.0, help="seconds that nodes have for an answer")


def run(arguments: argparse.Namespace) -> int:
    """Print a line for each pool, and what it lacks; return the status to exit with.

    Raises:
        ConfigError: the config or its pools are wrong, or no cluster can be joined.
    """
    try:
        config = read_config(arguments.config)
    except StartError as error:
        raise ConfigError(str(error)) from error
    address = os.environ.get("RAY_ADDRESS", "auto")
    try:
        check_address(address)
        ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"no Ray cluster can be joined: {' '.join(str(error).split())}") from error
    sound = True
    try:
        nodes = live_nodes()
        for name, pool in config.pools.items():
            lacks = list(examine(pool, nodes, arguments.deadline))
            own = [node for node in nodes if node.belongs_to(pool)]
            print(f"{name}: {len(own)} nodes with room for {sum(node.room(pool) for node in own)} replicas")
            for lack in lacks:
                print(f"{name}: {lack}", file=sys.stderr)
            sound = sound and not lacks
    finally:
        ray.shutdown()
    return 0 if sound else 1


def examine(pool: Pool, nodes: Sequence[LiveNode], deadline_s: float) -> Iterator[str]:
    """Say what a pool lacks on the cluster that this process has joined.

    Args:
        pool: the pool.
        nodes: all of the cluster's nodes.
        deadline_s: seconds that the pool's nodes have for each of two answers.
    """
    if lack := find_lack(pool, nodes):
        yield lack
    own = [node for node in nodes if node.belongs_to(pool)]
    # Before Ray starts a worker by another Python, which it would wait for without end.
    answers = _ask(own, find_versions, (pool.environment.py_executable, deadline_s / 2), {}, deadline_s)
    wrong = {node: _wrong_versions(answer) for node, answer in answers.items()}
    yield from _by_node(wrong)
    fit = [node for node in own if not wrong[node]]
    options: dict[str, Any] = {"runtime_env": pool.environment.runtime_env} if pool.environment.runtime_env else {}
    if idle := _are_idle(pool):
        options |= {key: value for key, value in pool.actor_options.items() if key in ("num_gpus", "resources")}
    answers = _ask(
        fit, find_flaws, (pool.backend, pool.environment.compilation_cache), options, deadline_s, on_device=idle
    )
    yield from _by_node({node: [answer] if isinstance(answer, str) else answer for node, answer in answers.items()})


def _are_idle(pool: Pool) -> bool:
    """Whether nothing uses the pool's kind of devices, so that a short task may."""
    every, free = ray.cluster_resources(), ray.available_resources()
    return all(free.get(name) == every.get(name) for name in pool.resources if name not in ("CPU", "memory"))


def _wrong_versions(answer: Any) -> list[str]:
    """Say how the versions that a node answered differ from the cluster's, which are this process's."""
    if isinstance(answer, str):
        return [answer]
    python, its_ray = answer
    wrong = []
    if python.split(".")[:2] != platform.python_version().split(".")[:2]:
        wrong.append(f"has Python {python}, and the cluster {platform.python_version()}: the minor must be the same")
    if its_ray != ray.__version__:
        wrong.append(f"has Ray {its_ray}, and the cluster {ray.__version__}")
    return wrong


def _ask(
    nodes: Sequence[LiveNode],
    function: Callable[..., Any],
    values: Sequence[Any],
    options: Mapping[str, Any],
    deadline_s: float,
    **named: Any,
) -> dict[LiveNode, Any]:
    """Call a function of this project on each node; an answer is its result, or a sentence why there is none.

    Ray sends the function's name alone, so that another version of Python can run its own.
    """
    remote = ray.remote(num_cpus=0, max_retries=0)(function)
    answers: dict[LiveNode, Any] = {}
    tasks = {}
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(node.id, soft=False)
        tasks[remote.options(scheduling_strategy=strategy, **options).remote(*values, **named)] = node
    done, late = ray.wait(list(tasks), num_returns=len(tasks), timeout=deadline_s) if tasks else ([], [])
    for task in done:
        try:
            answers[tasks[task]] = ray.get(task)
        except (RayError, RuntimeError, ImportError) as error:
            answers[tasks[task]] = _reason(error)
    for task in late:
        ray.cancel(task, force=True)
        answers[tasks[task]] = f"no answer within {deadline_s:g} s"
    return answers


def _reason(error: Exception) -> str:
    """The last line of an error of Ray's, which has the remote traceback before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _by_node(found: Mapping[LiveNode, Sequence[str]]) -> Iterator[str]:
    """Sentences with the nodes that they hold for."""
    nodes = defaultdict(list)
    for node, sentences in found.items():
        for sentence in sentences:
            nodes[sentence].append(node.id[:8])
    for sentence, ids in nodes.items():
        yield f"node {', '.join(sorted(ids))}: {sentence}"
