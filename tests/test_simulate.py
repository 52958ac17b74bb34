"""The simulator against queues whose answer is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.costs import Device
from cluster.plan import read_scenarios
from cluster.simulate import Scenario, Stage, circulate, plan_replicas, replay, simulate

ROOT = Path(__file__).parent.parent


def scenario(rate: float, deadline: float = 100.0, hop: float = 0.0, **stages: Stage) -> Scenario:
    return Scenario(
        devices={"gpu": Device(price=36.0)}, stages=stages, rate=rate, megapixels=2.0, deadline=deadline, hop=hop
    )


def stage(
    per_image: float, *, fixed: float = 0.0, max_batch: int = 1, steps: int = 1, replicas: int | None = None
) -> Stage:
    return Stage(device="gpu", per_image=per_image, fixed=fixed, max_batch=max_batch, steps=steps, replicas=replicas)


def mean_wait(rate: float) -> float:
    """Of an image that needs one step of a second, beyond that second."""
    outcomes = [simulate(scenario(rate, one=stage(1.0, replicas=1)), images=4000, seed=seed) for seed in range(3)]
    return sum(outcome.mean for outcome in outcomes) / 3 - 1.0


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_device_waits_as_pollaczek_and_khinchine_say(load: float) -> None:
    """M/D/1: load / (2 (1 - load)) services."""
    assert mean_wait(load) == pytest.approx(load / (2 * (1 - load)), rel=0.12)


def test_an_idle_system_takes_its_steps_and_hops() -> None:
    outcome = simulate(scenario(1e-6, base=stage(0.5, steps=4, fixed=0.25), decode=stage(0.1), hop=0.01), images=20)
    assert (outcome.p50, outcome.p99) == pytest.approx((3.12, 3.12))  # 4 x 0.75 + 0.1 + 2 x 0.01
    assert outcome.busy["base"] < 1e-4


def test_stages_pipeline_so_that_the_slowest_alone_bounds_the_throughput() -> None:
    outcome = simulate(scenario(50.0, base=stage(0.5), bridge=stage(0.25), distilled=stage(0.4)), images=400)
    assert outcome.throughput == pytest.approx(2.0, rel=0.02)
    assert outcome.busy["base"] == pytest.approx(1.0, abs=0.02)
    assert outcome.busy["bridge"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("clients", "latency"), [(1, 3.0), (3, 3.0), (6, 6.0)])
def test_clients_that_wait_for_their_image_keep_as_many_in_the_system(clients: int, latency: float) -> None:
    """Little's law; three stages of a second hold three without a queue."""
    outcome = circulate(scenario(1.0, base=stage(1.0), bridge=stage(1.0), distilled=stage(1.0)), clients, 600)
    assert outcome.mean == pytest.approx(latency, rel=0.02)
    assert outcome.throughput == pytest.approx(clients / latency, rel=0.02)


def test_a_batch_shares_the_fixed_part_of_a_step() -> None:
    """Full batches of 8: 8 images in 3 steps of 0.8 + 8 x 0.1 s."""
    outcome = simulate(scenario(50.0, base=stage(0.1, fixed=0.8, steps=3, max_batch=8)), images=800)
    assert outcome.throughput == pytest.approx(8 / 4.8, rel=0.02)


def test_replicas_take_turns_on_the_devices_that_there_are() -> None:
    """Three stages of a second each keep one device busy for three, and two for one and a half."""
    own = scenario(50.0, base=stage(1.0), bridge=stage(1.0), distilled=stage(1.0))
    for count, images_a_second in ((1, 1 / 3), (2, 2 / 3)):
        shared = own.model_copy(update={"devices": {"gpu": Device(price=36.0, count=count)}})
        assert simulate(shared, images=400).throughput == pytest.approx(images_a_second, rel=0.02)
        assert shared.price == 36.0 * count


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_processes_on_one_device_wait_as_processor_sharing_says(load: float) -> None:
    """M/G/1-PS: load / (1 - load) services, twice what taking turns image by image costs."""
    outcomes = []
    for seed in range(3):
        many = scenario(load * 10, one=stage(0.1, replicas=50)).model_copy(
            update={"devices": {"gpu": Device(price=36.0, count=1)}}
        )
        outcomes.append(simulate(many, images=2000, seed=seed))
    waits = sum(outcome.mean for outcome in outcomes) / 3 - 0.1
    assert waits == pytest.approx(0.1 * load / (1 - load), rel=0.12)


def test_busy_neighbours_slow_a_device_down() -> None:
    """Two stages that always have work, each 1.5 times as slow beside the other; one alone is not."""
    device = Device(price=36.0, count=2, contention=1.5)
    both = scenario(50.0, base=stage(1.0), distilled=stage(1.0)).model_copy(update={"devices": {"gpu": device}})
    one = scenario(50.0, base=stage(1.0)).model_copy(update={"devices": {"gpu": device}})
    assert simulate(both, images=400).throughput == pytest.approx(1 / 1.5, rel=0.02)
    assert simulate(one, images=400).throughput == pytest.approx(1.0, rel=0.02)


def test_twice_the_replicas_bear_twice_the_load() -> None:
    one = simulate(scenario(50.0, base=stage(0.5, replicas=1)), images=400)
    two = simulate(scenario(50.0, base=stage(0.5, replicas=2)), images=400)
    assert two.throughput == pytest.approx(2 * one.throughput, rel=0.02)


def test_cost_is_the_price_of_all_replicas_over_the_megapixels_of_the_load() -> None:
    outcome = replay(scenario(0.5, base=stage(0.5, replicas=3), decode=stage(0.1)), [2.0 * i for i in range(500)])
    assert outcome.dollars_per_megapixel == pytest.approx(4 * 36 / 3600 / (0.5 * 2), rel=0.01)


def test_planned_replicas_meet_the_deadline_and_one_fewer_would_not() -> None:
    planned = plan_replicas(scenario(6.0, deadline=1.6, base=stage(0.5), distilled=stage(0.3)))
    counts = {name: stage.count for name, stage in planned.stages.items()}
    assert counts["base"] >= 4  # 6 a second need 3 at full load
    assert counts["distilled"] >= 2
    assert simulate(planned).p95 <= 1.6
    for name, count in counts.items():
        assert simulate(planned.with_replicas({name: count - 1})).p95 > 1.6


def two_pools(rate: float, fast: int | None = 1, slow: int | None = 1) -> Scenario:
    """A stage on two pools, one of which takes three times as long."""
    base, third = stage(0.3, replicas=fast), stage(0.9, replicas=slow).model_copy(update={"shares": "base"})
    return scenario(rate, base=base, slow=third, decode=stage(0.01, replicas=1 if fast else None))


def test_pools_of_a_stage_bear_together_what_each_bears() -> None:
    outcome = simulate(two_pools(50.0), images=800)
    assert outcome.throughput == pytest.approx(1 / 0.3 + 1 / 0.9, rel=0.02)
    assert min(outcome.busy[name] for name in ("base", "slow")) > 0.97


def test_an_image_goes_to_a_slow_pool_where_that_is_sooner() -> None:
    """Idle, it never is: the other has done two before."""
    idle = simulate(two_pools(1e-6), images=100)
    assert idle.p99 == pytest.approx(0.31)
    assert idle.busy["slow"] == 0
    both, alone = simulate(two_pools(2.5)), simulate(scenario(2.5, base=stage(0.3), decode=stage(0.01)))
    assert both.p95 < alone.p95
    assert 0 < both.busy["slow"] < both.busy["base"]


def test_replicas_are_planned_for_what_other_pools_leave() -> None:
    """Three slow replicas bear 3.3 of six images a second, and one fast one as many."""
    unplanned = two_pools(6.0, fast=None, slow=3)
    assert plan_replicas(unplanned.model_copy(update={"deadline": 5.0})).replicas == {"base": 1, "slow": 3, "decode": 1}
    assert plan_replicas(unplanned.model_copy(update={"deadline": 2.0})).replicas == {"base": 2, "slow": 3, "decode": 1}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"shares": "bass"}, r"stages\.slow\.shares must be one of \['base', 'decode'\], not 'bass'"),
        ({"shares": "slow"}, r"stages\.slow\.shares must be one of"),
        ({"replicas": None}, r"stages\.slow\.replicas must be given: only those of 'base' can be planned"),
    ],
)
def test_a_wrong_pool_of_a_stage_is_named(change: dict[str, object], complaint: str) -> None:
    content = two_pools(1.0).model_dump()
    content["stages"]["slow"].update(change)
    with pytest.raises(ValueError, match=complaint):
        Scenario.model_validate(content)


def test_a_deadline_that_an_idle_system_misses_is_refused() -> None:
    with pytest.raises(ValueError, match=r"deadline is 0\.4 s, but one image alone takes 0\.50 s"):
        plan_replicas(scenario(1.0, deadline=0.4, base=stage(0.5)))


def test_fixed_replicas_that_do_not_suffice_are_refused() -> None:
    with pytest.raises(ValueError, match=r"95 % of the images take .* with {'base': 1}"):
        plan_replicas(scenario(4.0, deadline=1.0, base=stage(0.5, replicas=1)))


def test_published_times_plan() -> None:
    scenarios = read_scenarios(ROOT / "cluster" / "published.yaml").by_name
    alone = {
        name: sum(stage.steps * stage.seconds(1) for stage in scenario.stages.values())
        for name, scenario in scenarios.items()
    }
    assert alone["distilled on h100"] == pytest.approx(1.35, abs=0.01)
    assert alone["hybrid on h100"] == pytest.approx(1.57, abs=0.01)
    assert alone["hybrid on gaudi2"] == pytest.approx(3.07, abs=0.01)
    planned = plan_replicas(scenarios["hybrid on h100"])
    assert sum(stage.replicas or 0 for stage in planned.stages.values()) in range(8, 16)  # 5 x 1.57 are 7.85
