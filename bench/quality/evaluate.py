"""Grade a scenes model by what the oracle reads off its images, and compare every rate with a threshold.

Accuracy: prompts name a colour and a shape; the image is right if it shows an object with both. Removal: prompts name
only a shape; the colour of the object that a seed draws becomes the negative prompt ("a red shape") of a second image
from the same seed. It is removed if that image shows an object, but none of that colour. A fifth as many images are
generated for removal as for accuracy. The exit status is 1 if a rate is below its threshold.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from random import Random

from backends import get_backend
from bench.models import SCENES, add_backend_argument
from bench.quality.metrics import share
from scenes.captions import describe_value, with_article
from scenes.oracle import Reading, largest, matches, read
from scenes.scene import COLORS, SHAPES
from stages.config import ModelConfig
from stages.pipeline import Pipeline, Prompted

# Lowest rates that pass, by plan and field of its report.
BARS: dict[str, dict[str, float]] = {
    "base": {"both": 0.90},
    "distilled": {"both": 0.85},
    "hybrid": {"removal": 0.50},
}


@dataclass(frozen=True)
class Report:
    """One plan's rates, 0 to 1.

    Attributes:
        plan: name of the plan.
        captions: number of prompts that name a colour and a shape.
        shape, color, both: share of their images with an object of the shape, of the colour, of both.
        removal: share of `measured` pairs in which the negative prompt removed the colour; None if the plan takes no
            negative prompt.
        measured: number of images with an object whose colour could be removed.
    """

    plan: str
    captions: int
    shape: float
    color: float
    both: float
    removal: float | None
    measured: int

    def misses(self) -> list[str]:
        """Return a sentence for each rate that is below its threshold."""
        rates = {name: getattr(self, name) or 0.0 for name in BARS.get(self.plan, {})}
        return [
            f"{self.plan}: {name} is {rate:.3f}, below {BARS[self.plan][name]}"
            for name, rate in rates.items()
            if rate < BARS[self.plan][name]
        ]


class Grader:
    """Generates images by a plan, batch by batch, and reads them."""

    def __init__(self, pipeline: Pipeline, plan: str, batch: int) -> None:
        self._pipeline = pipeline
        self._plan = plan
        self._batch = batch

    def grade(self, captions: int) -> Report:
        """Grade the plan on this number of captions."""
        wanted = list(zip(range(captions), _combinations(), strict=False))
        readings = self._read([Prompted(_phrase(color, shape), seed) for seed, (color, shape) in wanted])
        pairs = [(reading, color, shape) for reading, (_, (color, shape)) in zip(readings, wanted, strict=True)]
        removed = self._remove(-(-captions // 5)) if self._pipeline.config.plan(self._plan).needs_negative() else None
        return Report(
            plan=self._plan,
            captions=captions,
            shape=share([any(thing.shape == shape for thing in reading.objects) for reading, _, shape in pairs]),
            color=share([_has_color(reading, color) for reading, color, _ in pairs]),
            both=share([matches(reading, shape, color) for reading, color, shape in pairs]),
            removal=None if removed is None else share(removed),
            measured=len(removed or ()),
        )

    def _remove(self, count: int) -> list[bool]:
        """Return whether the negative prompt removes the colour, for each of `count` seeds that draws an object."""
        free = [Prompted(_phrase(SHAPES[seed % len(SHAPES)]), seed) for seed in range(count)]
        drawn = [
            (case, thing.color)
            for case, reading in zip(free, self._read(free), strict=True)
            if (thing := largest(reading)) is not None
        ]
        readings = self._read(
            [Prompted(case.prompt, case.seed, negative_prompt=describe_value("color", color)) for case, color in drawn]
        )
        return [
            bool(reading.objects) and not _has_color(reading, color)
            for reading, (_, color) in zip(readings, drawn, strict=True)
        ]

    def _read(self, cases: Sequence[Prompted]) -> list[Reading]:
        """Generate and read the images of `cases`, in their order."""
        return [read(result.image) for result in self._pipeline.run_in_batches(self._plan, cases, self._batch)]


def _combinations() -> Iterator[tuple[str, str]]:
    """Yield all pairs of a colour and a shape in a fixed random order, over and over."""
    combinations = list(product(COLORS, SHAPES))
    Random(0).shuffle(combinations)
    while True:
        yield from combinations


def _phrase(*words: str) -> str:
    return with_article(" ".join(words))


def _has_color(reading: Reading, color: str) -> bool:
    return any(thing.color == color for thing in reading.objects)


def _row(report: Report) -> str:
    removal = "-" if report.removal is None else f"{report.removal:.3f} of {report.measured}"
    return f"{report.plan:<12}{report.shape:>8.3f}{report.color:>8.3f}{report.both:>8.3f}  {removal}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to `parser`."""
    parser.add_argument("config", type=Path, nargs="?", default=SCENES)
    parser.add_argument("--plans", nargs="+", default=list(BARS), metavar="PLAN")
    parser.add_argument("--captions", type=int, default=200, help="number of prompts for accuracy")
    parser.add_argument("--batch", type=int, default=25, help="largest number of images in a batch")
    add_backend_argument(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the reports to this file")


def run(arguments: argparse.Namespace) -> None:
    """Print a row for each plan; raises SystemExit, with a message, if a rate is below its threshold."""
    pipeline = Pipeline(ModelConfig.read(arguments.config), get_backend(arguments.backend))
    print(f"{'plan':<12}{'shape':>8}{'color':>8}{'both':>8}  removal")
    reports = []
    for plan in arguments.plans:
        reports.append(Grader(pipeline, plan, arguments.batch).grade(arguments.captions))
        print(_row(reports[-1]), flush=True)
    misses = [miss for report in reports for miss in report.misses()]
    if arguments.json:
        content = {"reports": [asdict(report) for report in reports], "misses": misses}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    sys.exit("\n".join(misses) or None)
