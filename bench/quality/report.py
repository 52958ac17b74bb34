"""Results of the quality benchmark as JSON, Markdown and HTML."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.results import write_json

REPORT = "quality.json"


@dataclass(frozen=True)
class Measured:
    """Results for one method, or for the renderer; None if not measured.

    Attributes:
        group, name: group and name of the method.
        saturation: mean saturation in HSV, 0 to 1.
        frechet, kernel: Fréchet and kernel distance to held-out renders.
        clip, image_reward, hpsv2: mean scores of images against their prompts; see `bench.quality.scorers`.
        single, relation: accuracy on prompts of one object, and of two objects and their relation.
        entropy: entropy of the attributes that a prompt leaves open, relative to the renderer's; mean over prompts and
            attributes.
        spread: mean distance of two images of the same prompt in the embedding.
        texture: top-octave power of furry fills.
        named, named_negated: how often an attribute appears without and with the negative prompt that names it.
        removal: relative decrease from `named` to `named_negated`.
        shape, shape_negated: how often the prompt's own shape appears without and with the negative prompt.
        nfe, encode, denoise, decode, denoise_batched, speed_up, speed_up_batched: see `bench.quality.cost.Cost`.
    """

    group: str
    name: str
    saturation: float
    frechet: float | None = None
    kernel: float | None = None
    clip: float | None = None
    image_reward: float | None = None
    hpsv2: float | None = None
    single: float | None = None
    relation: float | None = None
    entropy: float | None = None
    spread: float | None = None
    texture: float | None = None
    named: float | None = None
    named_negated: float | None = None
    removal: float | None = None
    shape: float | None = None
    shape_negated: float | None = None
    nfe: float | None = None
    encode: float | None = None
    denoise: float | None = None
    denoise_batched: float | None = None
    decode: float | None = None
    speed_up: float | None = None
    speed_up_batched: float | None = None


# Fields of a row and their formats, by the column's heading.
_COLUMNS = {
    "NFE": ("nfe", "{:.1f}"),
    "encode, s": ("encode", "{:.3f}"),
    "denoise, s": ("denoise", "{:.3f}"),
    "decode, s": ("decode", "{:.3f}"),
    "speed-up": ("speed_up", "{:.1f}x"),
    "of 8, s": ("denoise_batched", "{:.4f}"),
    "speed-up of 8": ("speed_up_batched", "{:.1f}x"),
    "one object": ("single", "{:.1%}"),
    "relation": ("relation", "{:.1%}"),
    "entropy": ("entropy", "{:.1%}"),
    "spread": ("spread", "{:.2f}"),
    "Fréchet": ("frechet", "{:.2f}"),
    "kernel": ("kernel", "{:.3f}"),
    "saturation": ("saturation", "{:.3f}"),
    "CLIP score": ("clip", "{:.2f}"),
    "ImageReward": ("image_reward", "{:.3f}"),
    "HPSv2": ("hpsv2", "{:.3f}"),
    "texture": ("texture", "{:.2e}"),
    "removal": ("removal", "{:.1%}"),
    "shape": ("shape", "{:.1%}"),
    "shape, negated": ("shape_negated", "{:.1%}"),
}
_LEGEND = (
    "One image at a time, in seconds; of 8: denoising in batches of 8, in seconds an image; the speed-ups are of "
    "denoising, over base. One object, relation: the oracle's "
    "accuracy on one object's shape and colour and on two objects with a relation. Entropy: of what the prompt leaves "
    "open, over the renderer's; spread: mean distance of two images of a prompt. Fréchet and kernel: distances to "
    "held-out renders. Saturation: HSV's mean. Texture: power of furry fills in the top octave. Removal: of the "
    "attribute that a negative prompt names; shape: how often the prompt's own appears, without and with it."
)


def _cells(row: Measured) -> dict[str, str]:
    """Format a row's values by heading; those not measured are empty."""
    values = {heading: getattr(row, name) for heading, (name, _) in _COLUMNS.items()}
    return {heading: "" if value is None else _COLUMNS[heading][1].format(value) for heading, value in values.items()}


def summary(row: Measured) -> str:
    """Format a row as a line for the terminal."""
    return f"{row.group}/{row.name}: " + ", ".join(f"{name} {cell}" for name, cell in _cells(row).items() if cell)


def tables(rows: Sequence[Measured]) -> dict[str, list[list[str]]]:
    """Tabulate the rows of each group, headings first, with only the columns that have a value in the group."""
    made = {}
    for group, members in groupby(rows, key=lambda row: row.group):
        listed = list(members)
        cells = [_cells(row) for row in listed]
        kept = [heading for heading in _COLUMNS if any(line[heading] for line in cells)]
        lines = [[row.name, *(line[heading] for heading in kept)] for row, line in zip(listed, cells, strict=True)]
        made[group] = [["method", *kept], *lines]
    return made


def write_rows(path: Path, head: dict[str, Any], rows: Sequence[Measured]) -> None:
    """Write rows as JSON, after the entries of `head`, which apply to all of them."""
    write_json(path, {**head, "rows": [asdict(row) for row in rows]})


def read_rows(path: Path, drawn: dict[str, Any]) -> dict[tuple[str, str], Measured]:
    """Read what `write_rows` wrote, by group and name.

    Args:
        path: the JSON file.
        drawn: entries that the file's head must have.

    Raises:
        ValueError: the head has other values.
    """
    content = json.loads(path.read_text())
    if (other := {key: content[key] for key in drawn}) != drawn:
        raise ValueError(f"{path} is of {other}, and can't be resumed by a run of {drawn}")
    rows = [Measured(**row) for row in content["rows"]]
    return {(row.group, row.name): row for row in rows}


def write_report(output: Path, head: dict[str, Any], rows: Sequence[Measured], figures: dict[str, Path]) -> None:
    """Write the report as `REPORT`, `quality.md` and `quality.html`.

    Args:
        output: directory to write to.
        head: what was measured, and on which machine.
        rows: the results; those of a group are adjacent.
        figures: image files in `output`, by their captions.
    """
    write_rows(output / REPORT, head, rows)
    caption = ", ".join(f"{name} {value}" for name, value in head.items())
    made = tables(rows)

    lines = [f"Measured: {caption}.", "", _LEGEND]
    for group, (headings, *cells) in made.items():
        lines += ["", f"**{group}**", "", _line(headings), _line(["---"] * len(headings)), *map(_line, cells)]
    (output / "quality.md").write_text("\n".join(lines) + "\n")

    parts = [f"<p>Measured: {html.escape(caption)}.</p><p>{html.escape(_LEGEND)}</p>"]
    for group, table in made.items():
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in table)
        parts.append(f"<h2>{html.escape(group)}</h2><table>{body}</table>")
    for text, path in figures.items():
        parts.append(f'<h2>{html.escape(text)}</h2><img src="{path.name}">')
    style = "body{font:14px sans-serif;margin:2em}td{padding:2px 10px;text-align:right}td:first-child{text-align:left}"
    (output / "quality.html").write_text(
        f"<!doctype html><meta charset=utf-8><title>Quality</title><style>{style}</style>" + "\n".join(parts) + "\n"
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
