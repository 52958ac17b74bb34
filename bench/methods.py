"""The methods that the benches compare, from `bench/methods.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from stages.plan import Plan
from stages.yaml_file import read_mapping

METHODS = Path(__file__).parent / "methods.yaml"


def read_methods(plans: Mapping[str, Plan], path: Path = METHODS) -> dict[str, dict[str, Plan]]:
    """Group -> name -> plan; a method may be the name of one of `plans`, which are the model's own."""
    return {
        group: {
            name: plans[plan] if isinstance(plan, str) else Plan(name=name, stages=plan)
            for name, plan in methods.items()
        }
        for group, methods in read_mapping(path).items()
    }
