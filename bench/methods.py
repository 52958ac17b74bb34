"""The methods that the benchmarks compare, as plans; the default ones are in `bench/methods.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from stages.plan import Plan
from stages.yaml_file import read_mapping

METHODS = Path(__file__).parent / "methods.yaml"


def read_methods(plans: Mapping[str, Plan], path: Path = METHODS) -> dict[str, dict[str, Plan]]:
    """Read the plans of a file of methods, by group and name.

    Args:
        plans: the model's own plans, which a method may refer to by name.
        path: YAML file that maps each group to its methods, and each method to its stages or to the name of a plan.

    Raises:
        KeyError: a method names a plan that the model does not have.
        pydantic.ValidationError: a method's stages do not form a plan.
    """
    return {
        group: {
            name: plans[plan] if isinstance(plan, str) else Plan(name=name, stages=plan)
            for name, plan in methods.items()
        }
        for group, methods in read_mapping(path).items()
    }
