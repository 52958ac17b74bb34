"""Grade a scenes model by what its images show, against a bar for each rate.

Accuracy: captions name a colour and a shape; the oracle says whether the image has them. Removal: captions name a
shape alone, and the colour that a seed then draws is given to the same seed as its negative prompt ("a red shape", as
captions say it); it counts when the new image still has an object and none of that colour. A fifth as many images are
drawn for it. Ends with status 1 where a rate misses its bar.
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
from bench.models import SCENES
from bench.quality.metrics import share
from scenes.captions import describe_value, with_article
from scenes.oracle import Reading, largest, matches, read
from scenes.scene import COLORS, SHAPES
from stages.config import ModelConfig
from stages.pipeline import Pipeline, Prompted

# plan -> field of its report -> least rate.
BARS: dict[str, dict[str, float]] = {
    "base": {"both": 0.90},
    "distilled": {"both": 0.85},
    "hybrid": {"removal": 0.50},
}


@dataclass(frozen=True)
class Report:
    """One plan's rates, 0 to 1.

    Attributes:
        shape, color, both: of the captions, how many images have an object of the shape, of the colour, of both.
        removal: of `measured` images, how many lost their colour to the negative prompt; None if the plan looks at
            no negative prompt.
        measured: images without a negative prompt that have an object, whose colour can be taken away.
    """

    plan: str
    captions: int
    shape: float
    color: float
    both: float
    removal: float | None
    measured: int

    def misses(self) -> list[str]:
        """The bars that this report misses, each as a sentence."""
        rates = {name: getattr(self, name) or 0.0 for name in BARS.get(self.plan, {})}
        return [
            f"{self.plan}: {name} is {rate:.3f}, below {BARS[self.plan][name]}"
            for name, rate in rates.items()
            if rate < BARS[self.plan][name]
        ]


class Grader:
    """Runs a plan on cases, batch by batch, and reads the images."""

    def __init__(self, pipeline: Pipeline, plan: str, batch: int) -> None:
        self._pipeline = pipeline
        self._plan = plan
        self._batch = batch

    def grade(self, captions: int) -> Report:
        """Report on that many captions."""
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
        """Whether a negative prompt takes the colour away, for each of `count` images that have one."""
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
        """Readings in the order of `cases`."""
        return [read(result.image) for result in self._pipeline.run_in_batches(self._plan, cases, self._batch)]


def _combinations() -> Iterator[tuple[str, str]]:
    """Every colour with every shape, over and over, in an order whose beginning has some of each."""
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
    parser.add_argument("config", type=Path, nargs="?", default=SCENES)
    parser.add_argument("--plans", nargs="+", default=list(BARS), metavar="PLAN")
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--batch", type=int, default=25, help="most images at a time")
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the reports there")


def run(arguments: argparse.Namespace) -> None:
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
