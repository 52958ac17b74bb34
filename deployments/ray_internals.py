"""What the engine uses of Ray and Serve beyond what they promise; `tests/test_internals.py` checks each."""

from __future__ import annotations

import builtins
import logging
import sys
from typing import Any

import ray
from ray._common.formatters import JSONFormatter
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put
from ray.serve._private import logging_utils
from ray.serve.handle import DeploymentHandle

_NAMESPACE = b"images"
# The names of Serve's actors begin with these.
_REPLICA = "SERVE_REPLICA::"
_PROXY = "SERVE_PROXY_ACTOR-"


def get(key: str) -> bytes | None:
    """Read a value from the store that all of the cluster's processes share."""
    return _internal_kv_get(key, namespace=_NAMESPACE)


def put(key: str, value: bytes) -> None:
    """Write a value to the store that all of the cluster's processes share."""
    _internal_kv_put(key, value, namespace=_NAMESPACE)


def delete(key: str) -> None:
    """Delete a value from the store that all of the cluster's processes share."""
    _internal_kv_del(key, namespace=_NAMESPACE)


def follow(handle: DeploymentHandle) -> None:
    """Let a handle be told of its deployment's replicas from now on, not only from its first call."""
    handle._init()


def lacks_replicas(handle: DeploymentHandle) -> bool:
    """Whether a deployment has no replicas, as far as its handle was told; False before it was told of anything."""
    router = handle._router and handle._router._asyncio_router.request_router
    return router is not None and not router.curr_replicas


def list_replicas() -> frozenset[str]:
    """List the names of the replicas' actors that are alive, including those that still load."""
    return frozenset(name for name in ray.util.list_named_actors() if name.startswith(_REPLICA))


def list_proxies() -> list[str]:
    """List the names of the proxies' actors that are alive."""
    return [name for name in ray.util.list_named_actors() if name.startswith(_PROXY)]


def deployment_of(replica: str) -> str:
    """Return `application#deployment` of a replica's actor."""
    return replica.removeprefix(_REPLICA).rpartition("#")[0]


def logs_json() -> bool:
    """Whether Serve writes this replica's log as JSON, see `logging_config` in its schema."""
    handlers = logging.getLogger("ray.serve").handlers
    return any(isinstance(getattr(each, "target", each).formatter, JSONFormatter) for each in handlers)


def mend_print() -> None:
    """Let Serve's `print`, where it has replaced Python's, hand its arguments on to files one by one.

    Tracebacks in logs are printed, and Serve's would print a tuple in place of each line.
    """
    if builtins.print is logging_utils.redirected_print:
        builtins.print = _print  # type: ignore[assignment]


def _print(*objects: Any, sep: str = " ", end: str = "\n", file: Any = None, flush: bool = False) -> None:
    if file in (sys.stdout, sys.stderr, None):
        logging_utils.redirected_print(*objects, sep=sep, end=end)
    else:
        logging_utils.buildin_print(*objects, sep=sep, end=end, file=file, flush=flush)
