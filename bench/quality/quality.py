"""Compare plans on the same prompts and seeds: quality, diversity, negative prompts and cost.

A file of cases holds the prompts and seeds, a file of methods (by default `bench/methods.yaml`) the plans.
`bench.quality.metrics` defines the metrics.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from backends import get_backend
from bench.machine import machine_name
from bench.methods import METHODS, read_methods
from bench.models import SCENES, add_backend_argument
from bench.quality import metrics
from bench.quality.cost import take_turns
from bench.quality.grid import draw_figures
from bench.quality.report import REPORT, Measured, read_rows, summary, write_report, write_rows
from bench.quality.scorers import Scorer, clip_scorer, hpsv2_scorer, image_reward_scorer
from bench.results import add_output_argument, output_directory
from bench.spread import SpreadPipeline
from scenes.cases import TEST, Cases, Named, Negated, Open
from scenes.embedding import embed
from scenes.oracle import Reading, holds, largest, matches, read
from scenes.renderer import render
from scenes.scene import ATTRIBUTES, COLORS, SIZES, Scene, sample_scene
from stages.config import ModelConfig
from stages.pipeline import Pipeline, Prompted
from stages.plan import Plan

_RENDERS = ("main", "renders")  # group and name of the row for the renderer itself
_FULL = ("main", "bridge")  # groups for which every metric is measured
_SWEEP_SHARE = 4  # the others run on every fourth case, so their distances are on another scale
_REFERENCES = 2000  # number of held-out renders that images are compared with


class QualityBench:
    """Measures plans of one model on one split of the cases."""

    def __init__(
        self,
        pipeline: Pipeline,
        cases: Cases,
        batch: int = 32,
        references: int = _REFERENCES,
        scorers: Mapping[str, Scorer] | None = None,
    ) -> None:
        """Set up the benchmark.

        Args:
            pipeline: the model.
            cases: the split.
            batch: largest number of images in a batch.
            references: number of renders to compare images with.
            scorers: scorers of images against their prompts, by the field of `Measured` that takes the score.
        """
        self._pipeline = pipeline
        self._cases = cases
        self._batch = batch
        self._scorers = scorers or {}
        self._reference_count = references

    @cached_property
    def _references(self) -> metrics.Floats:
        """Embeddings (references, width) of held-out renders; computed only if a model of scenes needs them."""
        rng = Random("references")
        return embed([_render(sample_scene(rng), rng) for _ in range(self._reference_count)])

    def renders(self) -> Measured:
        """Measure the renderer itself on as many images: what a perfect model would reach."""
        rng = Random("renders")
        plain = [_render(sample_scene(rng), rng) for _ in self._cases.plain]
        furry = [_render(_furry_square(rng), rng) for _ in self._cases.texture]
        alike = [[_render(sample_scene(rng, 1), rng) for _ in range(case.seeds)] for case in self._cases.diversity]
        group, name = _RENDERS
        return Measured(
            group,
            name,
            **self._distances(plain),
            texture=_texture(furry),
            spread=statistics.fmean(metrics.mean_pairwise_distance(embed(images)) for images in alike),
        )

    def measure(self, group: str, name: str, plan: Plan, *, everything: bool) -> Measured:
        """Measure a plan, except for its cost.

        Args:
            group: group of the method.
            name: name of the method.
            plan: the method's plan.
            everything: whether to run all cases and to measure diversity, texture and negative prompts too.
        """
        cases = self._cases if everything else self._cases.part(_SWEEP_SHARE)
        texture = None
        images = self._draw(plan, cases.plain)
        prompts = [case.prompt for case in cases.plain]
        figures = {name: scorer(images, prompts) for name, scorer in self._scorers.items()}
        if not cases.of_scenes:
            return Measured(group, name, saturation=metrics.saturation(images), **figures)
        figures |= self._distances(images) | self._accuracy(plan, cases.accuracy)
        if everything:
            figures |= self._diversity(plan)
            texture = _texture(self._draw(plan, self._cases.texture))
            if plan.needs_negative():
                figures |= self._removal(plan)
        return Measured(group, name, **figures, texture=texture)

    def _draw(self, plan: Plan, prompted: Sequence[Prompted]) -> list[Image.Image]:
        return [result.image for result in self._pipeline.run_in_batches(plan, prompted, self._batch)]

    def _readings(self, plan: Plan, prompted: Sequence[Prompted]) -> list[Reading]:
        return [read(image) for image in self._draw(plan, prompted)]

    def _distances(self, images: Sequence[Image.Image]) -> dict[str, float]:
        embeddings = embed(images)
        return {
            "frechet": metrics.frechet_distance(embeddings, self._references),
            "kernel": metrics.kernel_distance(embeddings, self._references),
            "saturation": metrics.saturation(images),
        }

    def _accuracy(self, plan: Plan, cases: Sequence[Named]) -> dict[str, float]:
        right: dict[str, list[bool]] = {"single": [], "relation": []}
        for case, reading in zip(cases, self._readings(plan, cases), strict=True):
            if case.relation and case.second:
                right["relation"].append(holds(reading, case.first, case.relation, case.second))
            else:
                right["single"].append(matches(reading, *case.first))
        return {name: metrics.share(outcomes) for name, outcomes in right.items()}

    def _diversity(self, plan: Plan) -> dict[str, float]:
        entropies: list[float] = []
        spreads: list[float] = []
        for case in self._cases.diversity:
            prompted = [Prompted(case.prompt, case.seed + index) for index in range(case.seeds)]
            images = self._draw(plan, prompted)
            entropies += _entropies(case, [read(image) for image in images])
            spreads.append(metrics.mean_pairwise_distance(embed(images)))
        return {"entropy": statistics.fmean(entropies), "spread": statistics.fmean(spreads)}

    def _removal(self, plan: Plan) -> dict[str, float]:
        cases = self._cases.negative

        def rates(prompted: Sequence[Prompted]) -> tuple[float, float]:
            pairs = list(zip(cases, self._readings(plan, prompted), strict=True))
            return (
                metrics.share([_shows(reading, case) for case, reading in pairs]),
                metrics.share([any(thing.shape == case.shape for thing in reading.objects) for case, reading in pairs]),
            )

        named, shape = rates([Prompted(case.prompt, case.seed) for case in cases])
        named_negated, shape_negated = rates(cases)
        return {
            "named": named,
            "named_negated": named_negated,
            "removal": 1 - named_negated / named if named else 0.0,
            "shape": shape,
            "shape_negated": shape_negated,
        }


def _render(scene: Scene, rng: Random) -> Image.Image:
    return render(scene, rng, 128, 128)


def _furry_square(rng: Random) -> Scene:
    """Draw a scene such as the prompts of the texture cases describe."""
    scene = sample_scene(rng, 1)
    (thing,) = scene.objects
    color, radius = rng.choice(list(COLORS)), rng.uniform(*SIZES["large"])
    return replace(
        scene, objects=(replace(thing, shape="square", color=color, size="large", fill="furry", radius=radius),)
    )


def _entropies(case: Open, readings: Sequence[Reading]) -> Iterable[float]:
    """Yield the relative entropy of each attribute that a case leaves open, over the readings that have an object."""
    for attribute in case.open:
        values = [
            reading.background if attribute == "background" else getattr(thing, attribute)
            for reading in readings
            if (thing := largest(reading)) is not None
        ]
        yield metrics.relative_entropy(values, ATTRIBUTES[attribute])


def _shows(reading: Reading, case: Negated) -> bool:
    if case.attribute == "background":
        return reading.background == case.value
    return any(getattr(thing, case.attribute) == case.value for thing in reading.objects)


def _texture(images: Sequence[Image.Image]) -> float | None:
    """Return the mean top-octave power at the centre of each image's largest object, or None if there is no object."""
    powers = []
    for image in images:
        thing = largest(read(image))
        if thing is None:
            continue
        half = round(0.6 * thing.radius * min(image.size))
        x, y = round(thing.x * image.width), round(thing.y * image.height)
        patch = image.convert("L").crop((x - half, y - half, x + half, y + half))
        powers.append(metrics.top_octave_power(np.asarray(patch, dtype=np.float64) / 255))
    return statistics.fmean(powers) if powers else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to `parser`."""
    parser.add_argument("config", type=Path, nargs="?", default=SCENES)
    parser.add_argument("--cases", type=Path, default=TEST)
    parser.add_argument("--methods", type=Path, default=METHODS)
    parser.add_argument("--groups", nargs="+", help="groups of methods to measure, by default all")
    parser.add_argument("--share", type=int, default=1, help="measure only every SHARE-th case")
    add_backend_argument(parser)
    parser.add_argument(
        "--colocated",
        action="store_true",
        help="hold one set of weights for all adapters, not a copy with each one fused in",
    )
    parser.add_argument("--batch", type=int, default=32, help="largest number of images in a batch")
    parser.add_argument("--clip", help="directory or repo id of a CLIP model, for the CLIP score")
    parser.add_argument(
        "--image-reward", action="store_true", help="also score by ImageReward, which must be installed"
    )
    parser.add_argument("--hpsv2", action="store_true", help="also score by HPSv2, which must be installed")
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="REPORT",
        help="quality.json of an interrupted run or of a faster machine; everything but times is taken from it",
    )
    add_output_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measure the methods, print a line for each, and write the report.

    Results are saved after every method, so that an interrupted run can be resumed.

    Raises:
        SystemExit: `--groups` names a group that the file of methods does not have.
        ValueError: `--resume` names a report on another model or other cases.
    """
    config = ModelConfig.read(arguments.config)
    methods = read_methods(config.plans, arguments.methods)
    groups = arguments.groups or list(methods)
    if unknown := set(groups) - set(methods):
        raise SystemExit(f"--groups must be of {', '.join(methods)}, not {', '.join(sorted(unknown))}")
    backend = get_backend(arguments.backend)
    make = Pipeline if arguments.colocated else SpreadPipeline
    pipeline = make(config, backend, remembered=0)  # no cache of prompts: encoding is measured, too
    cases = Cases.read(arguments.cases).part(arguments.share)
    scorers: dict[str, Scorer] = {}
    if arguments.clip:
        scorers["clip"] = clip_scorer(arguments.clip, backend.device)
    if arguments.image_reward:
        scorers["image_reward"] = image_reward_scorer()
    if arguments.hpsv2:
        scorers["hpsv2"] = hpsv2_scorer()
    bench = QualityBench(pipeline, cases, arguments.batch, scorers=scorers)
    output = output_directory(arguments)
    drawn = {"model": pipeline.config.name, "cases": arguments.cases.name, "share": f"1/{arguments.share}"}
    head = {"machine": machine_name(), **drawn}
    known = read_rows(arguments.resume, drawn) if arguments.resume else {}
    named = {(group, name): plan for group in groups for name, plan in methods[group].items()}
    if cases.of_scenes and _RENDERS not in known:
        known[_RENDERS] = bench.renders()
    costs = take_turns(pipeline, list(named.values()), cases.plain)
    for (key, plan), cost in zip(named.items(), costs, strict=True):
        measured = known.get(key) or bench.measure(*key, plan, everything=key[0] in _FULL)
        known[key] = replace(measured, **asdict(cost))
        print(summary(known[key]), flush=True)
        write_rows(output / REPORT, head, list(known.values()))  # with resumed rows whose turn is still to come
    rows = [known[key] for key in (_RENDERS, *named) if key in known]
    write_report(output, head, rows, draw_figures(pipeline, methods[groups[0]], output))
