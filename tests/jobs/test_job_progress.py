"""Progress of a job's images by stage and step."""

from __future__ import annotations

from deployments.jobs.progress import Progress
from stages.plan import Plan

PLAN = Plan.model_validate({
    "stages": [
        {"name": "base", "sigma_start": 1, "sigma_end": 0.7, "steps": 4, "guidance_scale": 4},
        {"name": "base", "sigma_start": 0.7, "sigma_end": 0.5, "steps": 2},
        {"name": "distilled", "sigma_start": 0.5, "sigma_end": 0, "steps": 2},
    ]
})  # fmt: skip


def done(progress: Progress) -> dict[str, tuple[int, int]]:
    return {stage["stage"]: (stage["done"], stage["steps"]) for stage in progress.stages}


def test_nothing_is_done_before_it_begins() -> None:
    assert (Progress().percentage, Progress().stages) == (0, [])


def test_parts_of_a_stage_and_all_images_are_counted_together() -> None:
    progress = Progress()
    progress.begin(PLAN, 2)
    assert done(progress) == {"encode": (0, 2), "base": (0, 12), "distilled": (0, 4), "decode": (0, 2)}
    progress.note_step(0, 0)
    assert (progress.percentage, done(progress)["encode"]) == (0, (1, 2))
    progress.note_step(0, 5)
    progress.note_step(1, 2)
    assert done(progress) == {"encode": (2, 2), "base": (7, 12), "distilled": (0, 4), "decode": (0, 2)}
    assert progress.percentage == 100 * (9 + 4) // 24  # a guided step is two evaluations of the plan's twelve
    progress.note_step(0, 8)
    progress.note_step(1, 8)
    progress.note_image()
    assert progress.percentage == 99
    assert done(progress) == {"encode": (2, 2), "base": (12, 12), "distilled": (4, 4), "decode": (1, 2)}
