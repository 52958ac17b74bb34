"""The methods that the benches compare, from `bench/methods.yaml`."""

from __future__ import annotations

from pathlib import Path

import yaml

from stages.plan import Plan, presets

METHODS = Path(__file__).parent / "methods.yaml"


def read_methods(path: Path = METHODS) -> dict[str, dict[str, Plan]]:
    """Group -> name -> plan."""
    groups = yaml.safe_load(path.read_text())
    return {
        group: {
            name: presets()[plan] if isinstance(plan, str) else Plan(name=name, stages=plan)
            for name, plan in methods.items()
        }
        for group, methods in groups.items()
    }
