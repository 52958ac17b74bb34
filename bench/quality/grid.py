"""Draw a sheet that compares plans side by side, on the same prompts and seeds."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from backends import get_backend
from bench.models import add_backend_argument
from stages.config import ModelConfig
from stages.pipeline import Pipeline, Prompted
from stages.plan import Plan

PROMPTS = ("a large star", "a furry heart on a white background", "a red circle left of a blue square")
_MARGIN = 12
_LABEL = 16


def draw_grid(pipeline: Pipeline, plans: Mapping[str, Plan], rows: Mapping[str, Sequence[Prompted]]) -> Image.Image:
    """Draw images of a model as a labelled sheet.

    Args:
        pipeline: the model.
        plans: plans by their labels, which become blocks of columns.
        rows: images by the labels of the rows; every row has the same number.
    """
    cells = {
        (label, name): [result.image for result in pipeline.run_batch(plan, prompted)]
        for label, prompted in rows.items()
        for name, plan in plans.items()
    }
    first = next(iter(cells.values()))
    width, height = first[0].size
    block = len(first) * width + _MARGIN
    sheet = Image.new("RGB", (len(plans) * block - _MARGIN, _LABEL + len(rows) * (height + _LABEL)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, name in enumerate(plans):
        pen.text((column * block, 2), name, fill="black")
    for row, label in enumerate(rows):
        top = _LABEL + row * (height + _LABEL)
        pen.text((0, top + 2), label, fill="black")
        for column, name in enumerate(plans):
            for place, image in enumerate(cells[label, name]):
                sheet.paste(image, (column * block + place * width, top + _LABEL))
    return sheet


def draw_figures(pipeline: Pipeline, plans: Mapping[str, Plan], output: Path) -> dict[str, Path]:
    """Draw the quality report's sheets as files in the directory `output`; return the files by their captions."""
    figures = {
        "Prompts and seeds": (
            "prompts.webp",
            {
                prompt: [Prompted(prompt, seed) for seed in range(3)]
                for prompt in (*PROMPTS, "a small moon and a cross")
            },
        ),
        "Diversity: one prompt, many seeds": (
            "diversity.webp",
            {
                f"a heart, seeds from {first}": [Prompted("a heart", first + i) for i in range(4)]
                for first in (0, 4, 8, 12)
            },
        ),
        "Negative prompts": (
            "negative.webp",
            {
                f"a star{f', negative prompt {negative}' if negative else ''}": [
                    Prompted("a star", seed, negative) for seed in range(4)
                ]
                for negative in (None, "a striped shape", "a shape on a beige background", "a furry shape")
            },
        ),
    }
    written = {}
    for caption, (name, rows) in figures.items():
        written[caption] = output / name
        draw_grid(pipeline, plans, rows).save(written[caption], quality=80)
    return written


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to `parser`."""
    parser.add_argument("config", type=Path)
    parser.add_argument("output", type=Path, help="image file")
    parser.add_argument("--plans", nargs="+", default=["base", "distilled", "hybrid"])
    parser.add_argument("--seeds", type=int, default=4)
    add_backend_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    """Draw a row for each of `PROMPTS` and write the sheet."""
    config = ModelConfig.read(arguments.config)
    plans = {name: config.plan(name) for name in arguments.plans}
    pipeline = Pipeline(config, get_backend(arguments.backend))
    rows = {prompt: [Prompted(prompt, seed) for seed in range(arguments.seeds)] for prompt in PROMPTS}
    draw_grid(pipeline, plans, rows).save(arguments.output)
