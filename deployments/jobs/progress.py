"""How far the images of a job are."""

from __future__ import annotations

from collections import Counter
from typing import Any

from stages.plan import Plan


class Progress:
    """Counts the steps that are done of a job's images."""

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._steps: list[int | None] = []  # done of each image's plan; None before it is encoded
        self._decoded = 0

    def begin(self, plan: Plan, images: int) -> None:
        """Begin with so many images of a plan, of which nothing is done."""
        self._plan, self._steps = plan, [None] * images

    def note_step(self, image: int, steps: int) -> None:
        """Note that so many steps of an image's plan are done, 0 once it is encoded."""
        self._steps[image] = steps

    def note_image(self) -> None:
        """Note that an image is done."""
        self._decoded += 1

    @property
    def percentage(self) -> int:
        """Share of the work that is done, 0 to 99: what remains is to keep the images."""
        if self._plan is None:
            return 0
        done = sum(
            (stage.steps - left) * stage.step_work
            for steps in self._steps
            for stage, left in zip(self._plan.stages, self._plan.steps_left(steps or 0), strict=True)
        )
        return min(99, int(100 * done / (self._plan.work * len(self._steps))))

    @property
    def stages(self) -> list[dict[str, Any]]:
        """Steps of each stage, and how many of them are done, of all images together; parts count as one stage."""
        if self._plan is None:
            return []
        encoded = sum(steps is not None for steps in self._steps)
        total, done = {"encode": len(self._steps)}, Counter({"encode": encoded, "decode": self._decoded})
        for steps in self._steps:
            for stage, left in zip(self._plan.stages, self._plan.steps_left(steps or 0), strict=True):
                total[stage.name] = total.get(stage.name, 0) + stage.steps
                done[stage.name] += stage.steps - left
        total["decode"] = len(self._steps)
        return [{"stage": name, "steps": steps, "done": done[name]} for name, steps in total.items()]
