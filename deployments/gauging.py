"""What a replica of stages tells the metrics of its work, now and then, so that no step waits for a metric."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from deployments import metrics
from stages.batching import StepReport
from stages.pulse import Pulse

_MOST_STEPS = 65536  # that are kept until they are told


class WorkGauge:
    """Collects steps on the device's thread, and tells of them and of the rest when asked to."""

    def __init__(self) -> None:
        self._steps: deque[StepReport] = deque(maxlen=_MOST_STEPS)
        self._told_busy: dict[str, float] = defaultdict(float)
        self._levels = metrics.LevelGauge(metrics.IN_STAGE)
        self._here: Counter[tuple[str, str]] = Counter()

    def note_step(self, step: StepReport) -> None:
        """Take note of a step; takes less than a microsecond."""
        self._steps.append(step)

    @contextmanager
    def staying(self, stage: str, size: str) -> Iterator[None]:
        """Count an image as in a stage, or waiting for it, within the block."""
        self._here[stage, size] += 1
        try:
            yield
        finally:
            self._here[stage, size] -= 1

    def tell(
        self, pulses: Mapping[str, Pulse], denoising: Mapping[tuple[str, str], int], adapters: tuple[str, ...]
    ) -> None:
        """Tell the metrics.

        Args:
            pulses: the pulse of each component.
            denoising: number of images that are denoised or wait for it, by stage and size.
            adapters: names of the adapters that are loaded.
        """
        evaluations: dict[str, float] = defaultdict(float)
        spared: dict[str, float] = defaultdict(float)
        while self._steps:
            step = self._steps.popleft()
            metrics.STEP_SECONDS.observe(step.seconds)
            metrics.BATCH_SIZE.observe(len(step.shares))
            for stage, done, cached in step.shares:
                evaluations[stage] += done
                spared[stage] += cached
        for stage, amount in evaluations.items():
            metrics.EVALUATIONS.add(amount, stage=stage)
            metrics.CACHED_EVALUATIONS.add(spared[stage], stage=stage)
        for component, pulse in pulses.items():
            busy = pulse.busy
            metrics.BUSY_SECONDS.add(busy - self._told_busy[component], component=component)
            self._told_busy[component] = busy
        self._levels.set({**self._here, **denoising})
        for adapter in adapters:
            metrics.LOADED_ADAPTERS.set(1.0, adapter=adapter)
