"""Plans: what is accepted, what is refused and with which words."""

from __future__ import annotations

import re
from typing import Any

import pytest
from plans import PLANS
from pydantic import ValidationError

from stages.plan import FirstBlockSpec, Plan, StageSpec


def base(**changes: Any) -> dict[str, Any]:
    return {"name": "base", "sigma_start": 1.0, "sigma_end": 0.0, "steps": 10, "guidance_scale": 4.0, **changes}


def bridge(**changes: Any) -> dict[str, Any]:
    return {
        "name": "bridge",
        "sigma_start": 0.9,
        "sigma_end": 0.5,
        "steps": 1,
        "shift": 3.0,
        "adapter": "bridge",
        **changes,
    }


def distilled(**changes: Any) -> dict[str, Any]:
    return {
        "name": "distilled",
        "sigma_start": 1.0,
        "sigma_end": 0.0,
        "steps": 4,
        "shift": 3.0,
        "adapter": "distilled",
        **changes,
    }


def plan_of(*stages: dict[str, Any]) -> Plan:
    return Plan.model_validate({"stages": stages})


VALID = [
    [base()],
    [distilled()],
    [base(sigma_end=0.9), bridge(sigma_end=0.0)],
    [base(sigma_end=0.9), distilled(sigma_start=0.9)],
    [base(sigma_end=0.9), bridge(), distilled(sigma_start=0.5)],
    [base(cache={"kind": "first_block", "threshold": 0.1})],
    [base(cache={"kind": "teacache", "threshold": 0.2})],
    [base(cache={"kind": "seacache", "threshold": 0.2, "order": 0})],
    [base(cache={"kind": "magcache", "threshold": 0.2, "ratios": [1, 0.9]}, skip_blocks=[0, 3])],
    [base(shift="dynamic")],
    [base(steps=1000, guidance_scale=20, shift=100)],
    [base(steps=1, guidance_scale=1, shift=0.1)],
]

# Each differs from a valid plan in one thing; the name of the field at fault must be in the message.
INVALID = {
    "no stages": ([], "stages"),
    "too many stages": (
        [base(sigma_start=(9 - part) / 9, sigma_end=(8 - part) / 9) for part in range(9)],
        "at most 8",
    ),
    "starts below pure noise": ([base(sigma_start=0.99)], r"stages\.0\.sigma_start"),
    "ends before clean": ([base(sigma_end=0.01)], r"stages\.0\.sigma_end"),
    "last of two ends before clean": (
        [base(sigma_end=0.9), distilled(sigma_start=0.9, sigma_end=0.1)],
        r"stages\.1\.sigma_end",
    ),
    "gap between stages": ([base(sigma_end=0.9), distilled(sigma_start=0.8)], r"stages\.1\.sigma_start must be 0.9"),
    "overlap of stages": ([base(sigma_end=0.8), distilled(sigma_start=0.9)], r"stages\.1\.sigma_start must be 0.8"),
    "sigmas rise": ([base(sigma_start=0.0, sigma_end=1.0)], r"sigma_end must be below sigma_start, 0\.0, not 1\.0"),
    "sigmas stay": ([base(sigma_start=1.0, sigma_end=1.0)], r"sigma_end must be below sigma_start, 1\.0, not 1\.0"),
    "sigma above one": ([base(sigma_start=1.1)], "stages.0.sigma_start"),
    "sigma below zero": ([base(sigma_end=-0.1)], "stages.0.sigma_end"),
    "sigma is no number": ([base(sigma_end=float("nan"))], "stages.0.sigma_end"),
    "no steps": ([base(steps=0)], "stages.0.steps"),
    "too many steps": ([base(steps=1001)], "stages.0.steps"),
    "half a step": ([base(steps=2.5)], "stages.0.steps"),
    "steps missing": ([{"name": "base", "sigma_start": 1.0, "sigma_end": 0.0}], "stages.0.steps"),
    "unknown key": ([base(step=10)], "stages.0.step\n"),
    "unknown stage": ([base(name="refiner")], "stages.0.name"),
    "wrong order": (
        [distilled(sigma_end=0.9), bridge(sigma_end=0.0)],
        r"stages\.1\.name must not be before distilled in base, bridge, distilled",
    ),
    "guidance with an adapter": ([distilled(guidance_scale=4.0)], "guidance_scale must be 1 with adapter 'distilled'"),
    "guidance below one": ([base(guidance_scale=0.5)], "stages.0.guidance_scale"),
    "guidance too strong": ([base(guidance_scale=20.5)], "stages.0.guidance_scale"),
    "guidance is no number": ([base(guidance_scale=float("nan"))], "stages.0.guidance_scale"),
    "unknown shift": ([base(shift="linear")], "stages.0.shift"),
    "shift of zero": ([base(shift=0.0)], "stages.0.shift"),
    "negative strength": ([distilled(adapter_scale=-0.1)], "stages.0.adapter_scale"),
    "too strong": ([distilled(adapter_scale=2.1)], "stages.0.adapter_scale"),
    "unknown cache": (
        [base(cache={"kind": "last_block", "threshold": 0.1})],
        "stages.0.cache\n.*'first_block', 'taylorseer', 'teacache', 'magcache', 'seacache'",
    ),
    "magcache without ratios": ([base(cache={"kind": "magcache", "threshold": 0.1})], "stages.0.cache.magcache.ratios"),
    "magcache with a ratio beyond reason": (
        [base(cache={"kind": "magcache", "threshold": 0.1, "ratios": [1e308]})],
        "stages.0.cache.magcache.ratios.0",
    ),
    "magcache with a ratio that is no number": (
        [base(cache={"kind": "magcache", "threshold": 0.1, "ratios": [float("nan")]})],
        "stages.0.cache.magcache.ratios.0",
    ),
    "teacache with a coefficient that is no number": (
        [base(cache={"kind": "teacache", "threshold": 0.1, "coefficients": [float("nan")]})],
        "stages.0.cache.teacache.coefficients.0",
    ),
    "teacache with an infinite coefficient": (
        [base(cache={"kind": "teacache", "threshold": 0.1, "coefficients": [1.0, float("inf")]})],
        "stages.0.cache.teacache.coefficients.1",
    ),
    "infinite shift": ([base(shift=float("inf"))], "stages.0.shift"),
    "adapter with a dot": ([distilled(adapter="a.b")], "stages.0.adapter"),
    "adapter without a name": ([distilled(adapter="")], "stages.0.adapter"),
    "adapter with a long name": ([distilled(adapter="a" * 65)], "stages.0.adapter"),
    "block that cannot be": ([base(skip_blocks=[-1])], "stages.0.skip_blocks"),
    "first block skipped under its cache": (
        [base(cache={"kind": "first_block", "threshold": 0.1}, skip_blocks=[0])],
        "skip_blocks",
    ),
    "cache that never hits": (
        [base(cache={"kind": "first_block", "threshold": 0.0})],
        "stages.0.cache.first_block.threshold",
    ),
    "cache that always hits": (
        [base(cache={"kind": "first_block", "threshold": 1.0})],
        "stages.0.cache.first_block.threshold",
    ),
    "cache that evaluates every step": (
        [base(cache={"kind": "taylorseer", "interval": 1})],
        "stages.0.cache.taylorseer.interval",
    ),
    "unknown key of the cache": (
        [base(cache={"kind": "first_block", "threshold": 0.1, "warmup": 2})],
        "stages.0.cache.first_block.warmup",
    ),
}


@pytest.mark.parametrize("stages", VALID)
def test_valid_plans_are_accepted_and_keep_their_stages(stages: list[dict[str, Any]]) -> None:
    plan = plan_of(*stages)
    assert [stage.name for stage in plan.stages] == [stage["name"] for stage in stages]
    assert [stage.steps for stage in plan.stages] == [stage["steps"] for stage in stages]


@pytest.mark.parametrize(("stages", "message"), INVALID.values(), ids=INVALID)
def test_invalid_plans_are_refused_by_the_name_of_the_field(stages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        plan_of(*stages)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert {error["loc"][:2] for error in caught.value.errors()} <= {(), ("stages",), ("stages", 0)}


def test_unknown_key_of_the_plan_is_refused() -> None:
    with pytest.raises(ValidationError, match="seed"):
        Plan.model_validate({"stages": [base()], "seed": 1})


def test_presets_and_their_network_evaluations() -> None:
    assert {name: plan.nfe for name, plan in PLANS.items()} == {
        "base": 100,
        "cached": 100,
        "distilled": 4,
        "hybrid": 7,
    }
    assert all(plan.name == name for name, plan in PLANS.items())
    assert [stage.nfe for stage in PLANS["hybrid"].stages] == [1, 2, 2, 1, 1]
    assert PLANS["cached"].stages[0].cache == FirstBlockSpec(threshold=0.1)


def test_which_presets_are_guided() -> None:
    assert {name for name, plan in PLANS.items() if plan.guided} == {"base", "cached", "hybrid"}
    assert {name for name, plan in PLANS.items() if plan.needs_negative()} == {"base", "cached", "hybrid"}


def test_a_stage_may_read_the_negative_prompt_instead_of_being_guided_by_it() -> None:
    plan = plan_of(base(sigma_end=0.9, guidance_scale=1.0), bridge(sigma_end=0.0, reads_negative=True))
    assert (plan.guided, plan.needs_negative()) == (False, True)
    assert [stage.needs_negative() for stage in plan.stages] == [False, True]
    assert plan.needs_negative(avoids=False)  # it learned to read the empty one
    assert plan.nfe == 11
    with pytest.raises(ValidationError, match="reads_negative needs an adapter that learned it"):
        StageSpec(**base(guidance_scale=1.0, reads_negative=True))


def test_the_stand_in_for_a_bridge_that_reads_the_negative_prompt_does_not() -> None:
    plan = plan_of(base(sigma_end=0.9), bridge(sigma_end=0.0, reads_negative=True))
    assert not plan.with_adapters({"distilled"}).stages[1].reads_negative
    assert plan.with_adapters({"bridge"}) == plan


def test_a_stage_may_guide_attention_instead_of_velocities() -> None:
    avoiding = {"scale": 4.0, "tau": 2.0, "alpha": 0.5}
    plan = plan_of(base(sigma_end=0.9, guidance_scale=1.0), bridge(sigma_end=0.0, attention_guidance=avoiding))
    assert (plan.guided, plan.needs_negative(), plan.needs_negative(avoids=False)) == (False, True, False)
    assert [stage.needs_negative() for stage in plan.stages] == [False, True]
    assert plan.nfe == 11
    for other in ({"guidance_scale": 4.0}, {"guidance_scale": 1.0, "adapter": "bridge", "reads_negative": True}):
        with pytest.raises(ValidationError, match="attention_guidance takes the place of"):
            StageSpec(**base(**other, attention_guidance=avoiding))


@pytest.mark.parametrize(("name", "value"), [("scale", 0.0), ("tau", 0.5), ("alpha", 1.5), ("phi", 1.0)])
def test_attention_guidance_out_of_range_is_named(name: str, value: float) -> None:
    with pytest.raises(ValidationError, match=f"attention_guidance.{name}"):
        StageSpec(**base(guidance_scale=1.0, attention_guidance={name: value}))


def test_with_guidance_changes_guided_stages_alone() -> None:
    plan = PLANS["hybrid"].with_guidance(2.5)
    assert plan.name == "hybrid"
    assert [stage.guidance_scale for stage in plan.stages] == [1.0, 2.5, 1.0, 1.0, 1.0]
    assert plan.with_guidance(9.0) == PLANS["hybrid"]


def test_guidance_of_one_halves_the_network_evaluations() -> None:
    plan = PLANS["base"].with_guidance(1.0)
    assert (plan.nfe, plan.guided) == (50, False)


def test_with_guidance_refuses_plans_that_would_ignore_it() -> None:
    with pytest.raises(ValueError, match="guidance_scale has no effect on plan 'distilled'"):
        PLANS["distilled"].with_guidance(4.0)
    assert PLANS["distilled"].with_guidance(1.0) == PLANS["distilled"]


@pytest.mark.parametrize("scale", [0.5, 20.5])
def test_with_guidance_refuses_a_scale_out_of_range(scale: float) -> None:
    with pytest.raises(ValueError, match="guidance_scale"):
        PLANS["base"].with_guidance(scale)


def test_with_adapters_leaves_a_plan_that_the_model_can_run() -> None:
    assert PLANS["hybrid"].with_adapters({"bridge", "finish"}) == PLANS["hybrid"]
    assert PLANS["base"].with_adapters(set()) == PLANS["base"]


def test_without_a_trained_bridge_the_distilled_adapter_at_half_strength_stands_in() -> None:
    before = PLANS["hybrid"]
    after = before.with_adapters({"distilled", "finish"})
    *base, bridge, distilled = after.stages
    assert (bridge.adapter, bridge.adapter_scale) == ("distilled", 0.5)
    own = {"adapter": "bridge", "adapter_scale": 1.0, "reads_negative": True}
    assert (*base, bridge.model_copy(update=own), distilled) == before.stages


def test_the_stand_in_for_a_weakened_bridge_is_weakened_too() -> None:
    plan = plan_of(base(sigma_end=0.9), bridge(sigma_end=0.0, adapter_scale=0.6))
    assert plan.with_adapters({"distilled"}).stages[1].adapter_scale == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("preset", "available", "message"),
    [
        ("distilled", set(), r"stages\.0\.adapter must be one of \[\], not 'distilled'"),
        ("distilled", {"bridge"}, r"stages\.0\.adapter must be one of \['bridge'\], not 'distilled'"),
        ("hybrid", {"bridge"}, r"stages\.4\.adapter must be one of \['bridge'\], not 'finish'"),
        ("hybrid", set(), r"stages\.3\.adapter must be one of \[\], not 'bridge'"),
    ],
)
def test_a_missing_adapter_that_nothing_can_stand_in_for(preset: str, available: set[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PLANS[preset].with_adapters(available)


def test_the_stand_in_is_for_a_bridge_that_was_asked_for_by_its_name_and_is_not_there() -> None:
    asked = plan_of(base(sigma_end=0.9), bridge(sigma_end=0.0))
    assert asked.with_adapters({"distilled"}).stages[1].adapter == "distilled"
    other = plan_of(base(sigma_end=0.9), bridge(sigma_end=0.0, adapter="turbo"))
    for available in ({"distilled"}, {"bridge", "distilled"}):
        with pytest.raises(ValueError, match=r"stages\W1\W?.adapter must be one of .*, not 'turbo'"):
            other.with_adapters(available)
    misplaced = plan_of(distilled(adapter="bridge"))
    with pytest.raises(ValueError, match="must be one of"):
        misplaced.with_adapters({"distilled"})


@pytest.mark.parametrize("name", ["base", "cached", "distilled", "hybrid"])
def test_json_round_trip(name: str) -> None:
    plan = PLANS[name]
    again = Plan.model_validate_json(plan.model_dump_json())
    assert again == plan
    assert again != plan.model_copy(update={"name": "other"})


def test_plans_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        PLANS["base"].stages[0].steps = 1
    with pytest.raises(ValidationError, match="frozen"):
        PLANS["base"].name = "other"


def test_guided_means_a_scale_above_one() -> None:
    assert not StageSpec(**base(guidance_scale=1.0)).guided
    assert StageSpec(**base(guidance_scale=1.01)).guided
