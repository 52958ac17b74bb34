"""Cases of the quality benchmark: prompts and seeds, fixed in a file, with the known properties of a right image.

`python -m bench cases scenes/cases` writes the files for the scenes model: a dev split to tune plans on, and a test
split whose results are only reported. No seed is in both.
"""

from __future__ import annotations

import argparse
from collections import deque
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field

from scenes.captions import describe_value, name_value, with_article
from scenes.case_captions import caption
from scenes.scene import ATTRIBUTES, BACKGROUNDS, COLORS, RELATIONS, SHAPES, sample_scene
from stages.pipeline import Prompted
from stages.yaml_file import read_mapping

_DIRECTORY = Path(__file__).with_suffix("")
DEV, TEST = _DIRECTORY / "scenes-dev.yaml", _DIRECTORY / "scenes-test.yaml"

Attribute = Literal["shape", "color", "size", "fill", "background"]


@dataclass(frozen=True, kw_only=True)
class Plain(Prompted):
    """An image with no known properties."""

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True)
class Named(Plain):
    """An image whose prompt names shape and colour of one object, or of two objects in a relation.

    Attributes:
        first: shape and colour of the first object.
        relation: one of `RELATIONS`, of the first object to the second, or None.
        second: shape and colour of the second object, or None.
    """

    first: tuple[str, str]
    relation: str | None = None
    second: tuple[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class Open(Plain):
    """Images of one prompt that leaves attributes unspecified.

    Attributes:
        open: the unspecified attributes.
        seeds: number of images, whose seeds count up from `seed`.
    """

    open: tuple[Attribute, ...]
    seeds: int


@dataclass(frozen=True, kw_only=True)
class Negated(Plain):
    """An image whose negative prompt names a value of an attribute that the prompt leaves unspecified.

    Attributes:
        shape: the shape that the prompt names.
        attribute: the attribute.
        value: the value to avoid.
    """

    shape: str
    attribute: Attribute
    value: str


class Cases(BaseModel):
    """A split of cases; for a model whose images the oracle cannot read, only `plain` ones.

    Attributes:
        accuracy: cases that the oracle grades.
        diversity: cases whose images of different seeds are compared with each other.
        plain: typical prompts, for distances between distributions of images.
        texture: prompts for furry objects.
        negative: cases to generate with and without the negative prompt.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    accuracy: tuple[Named, ...] = ()
    diversity: tuple[Open, ...] = ()
    plain: Annotated[tuple[Plain, ...], Field(min_length=1)]
    texture: tuple[Plain, ...] = ()
    negative: tuple[Negated, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a YAML file; raises pydantic.ValidationError, which names the key that is wrong."""
        return cls(**read_mapping(path))

    @property
    def of_scenes(self) -> bool:
        """Whether these are cases of scenes, whose images the oracle can grade."""
        return bool(self.accuracy)

    def part(self, share: int) -> Cases:
        """Return every `share`-th case of each kind; those of diversity also have fewer seeds, but at least 16."""
        kept = {name: getattr(self, name)[::share] for name in type(self).model_fields}
        kept["diversity"] = tuple(replace(case, seeds=max(16, case.seeds // share)) for case in kept["diversity"])
        return self.model_copy(update=kept)


def scene_cases(split: int) -> Cases:
    """Draw the cases of a split for the scenes model; each `split` has its own prompts and seeds."""
    rng = Random(f"cases {split}")
    seeds = iter(range(1_000_000 * split, 1_000_000 * (split + 1)))

    def thing() -> tuple[str, str]:
        return rng.choice(SHAPES), rng.choice(list(COLORS))

    def phrase(named: tuple[str, str]) -> str:
        return with_article(f"{named[1]} {named[0]}")

    accuracy = []
    for index in range(300):
        first, second = thing(), thing()
        if index < 200:
            accuracy.append(Named(prompt=phrase(first), seed=next(seeds), first=first))
        else:
            relation = rng.choice(list(RELATIONS))
            text = f"{phrase(first)} {relation} {phrase(second)}"
            accuracy.append(Named(prompt=text, seed=next(seeds), first=first, relation=relation, second=second))

    diversity: list[Open] = []

    def leave_open(prompt: str, *attributes: Attribute, count: int = 64) -> None:
        diversity.append(Open(prompt=prompt, seed=next(seeds), open=attributes, seeds=count))
        deque(islice(seeds, count), maxlen=0)

    for shape in SHAPES:
        if rng.random() < 0.5:
            background = name_value("background", rng.choice(list(BACKGROUNDS)))
            leave_open(f"{with_article(shape)} on a {background}", "color", "size", "fill")
        else:
            leave_open(with_article(shape), "color", "size", "fill", "background")
    for color in rng.sample(list(COLORS), 4):
        leave_open(with_article(f"{color} shape"), "shape", "size", "fill", "background")

    negative = []
    for index in range(100):
        attribute: Attribute = ("fill", "background", "fill", "color")[index % 4]
        value = rng.choice([value for value in ATTRIBUTES[attribute] if value != "plain"])
        shape = SHAPES[index % len(SHAPES)]
        for _ in range(4):
            negative.append(
                Negated(
                    prompt=with_article(shape),
                    seed=next(seeds),
                    shape=shape,
                    negative_prompt=describe_value(attribute, value),
                    attribute=attribute,
                    value=value,
                )
            )

    def plain(rng: Random, count: int) -> list[Plain]:
        return [Plain(prompt=caption(sample_scene(rng), rng), seed=next(seeds)) for _ in range(count)]

    some = plain(rng, 600)
    texture = [
        Plain(prompt=with_article(f"large furry {rng.choice(list(COLORS))} square"), seed=next(seeds))
        for _ in range(64)
    ]
    # With 600 images, the ratio of two Frechet distances has a standard deviation of 0.12. More are drawn, after all
    # others, so that those stay as they are.
    more = plain(Random(f"more cases {split}"), 1800)
    return Cases(
        accuracy=tuple(accuracy),
        diversity=tuple(diversity),
        plain=(*some, *more),
        texture=tuple(texture),
        negative=tuple(negative),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to `parser`."""
    parser.add_argument("output", type=Path, help="directory of the files")


def run(arguments: argparse.Namespace) -> None:
    """Write the files of both splits."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    for split, path in enumerate((DEV, TEST)):
        content = scene_cases(split).model_dump(mode="json", exclude_none=True)
        text = yaml.safe_dump(content, sort_keys=False, width=1000, default_flow_style=None)
        (arguments.output / path.name).write_text(text)
