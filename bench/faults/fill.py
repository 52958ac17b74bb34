"""Fill the object store of each node of a cluster for some seconds: `python -m bench.faults.fill ADDRESS SECONDS`."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_CHUNK_BYTES = 4 * 1024 * 1024


@ray.remote(num_cpus=0)
def _fill(capacity: float, seconds: float) -> int:
    """Hold objects that are mapped, which Ray can neither evict nor spill; return their bytes."""
    held: list[Any] = []
    for _ in range(int(capacity) // _CHUNK_BYTES):
        held.append(ray.get(ray.put(np.ones(_CHUNK_BYTES, np.uint8))))
    time.sleep(seconds)
    return len(held) * _CHUNK_BYTES


def main() -> None:
    """Run the program."""
    address, seconds = sys.argv[1:]
    ray.init(address, log_to_driver=False)
    fills = [
        _fill.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            node["Resources"]["object_store_memory"], float(seconds)
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    print(ray.get(fills, timeout=60 + float(seconds)))


if __name__ == "__main__":
    main()
