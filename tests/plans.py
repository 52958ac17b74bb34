"""The small model's own plans, for tests that are parametrised by them."""

from __future__ import annotations

from pathlib import Path

from stages.plan import read_plans

PLANS = read_plans(Path(__file__).parent.parent / "configs" / "plans" / "scenes.yaml")
