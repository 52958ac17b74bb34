"""The oracle against scenes whose truth is known."""

from __future__ import annotations

from collections.abc import Iterator
from math import hypot
from random import Random

import pytest
from PIL import Image, ImageFilter

from scenes.oracle import Reading, holds, matches, read
from scenes.renderer import render
from scenes.scene import BACKGROUNDS, FILLS, RELATIONS, SHAPES, Scene, SceneObject, sample_scene


def _samples(seed: int, count: int, width: int = 128, height: int = 128) -> Iterator[tuple[Scene, Image.Image]]:
    rng = Random(seed)
    for _ in range(count):
        scene = sample_scene(rng)
        yield scene, render(scene, rng, width, height)


def _pairs(scene: Scene, reading: Reading) -> list[tuple[SceneObject, SceneObject]]:
    """Each object with the reading nearest to it."""
    return [
        (thing, min(reading.objects, key=lambda found: hypot(found.x - thing.x, found.y - thing.y)))
        for thing in scene.objects
    ]


def _right(scene: Scene, reading: Reading) -> bool:
    return (
        reading.background == scene.background
        and len(reading.objects) == len(scene.objects)
        and all((thing.shape, thing.color) == (found.shape, found.color) for thing, found in _pairs(scene, reading))
    )


def _share(outcomes: list[bool]) -> float:
    return sum(outcomes) / len(outcomes)


def _thing(
    shape: str, color: str, x: float = 0.5, y: float = 0.5, size: str = "medium", fill: str = "plain"
) -> SceneObject:
    return SceneObject(shape, color, size, fill, x, y, {"small": 0.11, "medium": 0.15, "large": 0.2}[size])


def _read(*things: SceneObject, background: str = "gray") -> Reading:
    return read(render(Scene(things, background), Random(0)))


def test_reads_scenes() -> None:
    samples = [(scene, read(image)) for scene, image in _samples(seed=100, count=1000)]
    assert _share([_right(scene, reading) for scene, reading in samples]) >= 0.99
    pairs = [pair for scene, reading in samples for pair in _pairs(scene, reading)]
    assert _share([thing.size == found.size for thing, found in pairs]) >= 0.99
    assert _share([thing.fill == found.fill for thing, found in pairs]) >= 0.97


@pytest.mark.parametrize(("width", "height"), [(256, 256), (192, 128), (128, 192), (64, 64)])
def test_reads_every_size_of_image(width: int, height: int) -> None:
    samples = _samples(seed=101, count=60, width=width, height=height)
    assert _share([_right(scene, read(image)) for scene, image in samples]) >= 0.98


def test_reads_blurred_scenes() -> None:
    samples = _samples(seed=102, count=200)
    blur = ImageFilter.GaussianBlur(1)
    assert _share([_right(scene, read(image.filter(blur))) for scene, image in samples]) >= 0.97


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_reads_every_attribute(shape: str, fill: str) -> None:
    reading = _read(_thing(shape, "blue", 0.3, 0.6, "large", fill), background="beige")
    (found,) = reading.objects
    assert reading.background == "beige"
    assert (found.shape, found.color, found.size, found.fill) == (shape, "blue", "large", fill)
    assert found.radius == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize("fill", FILLS)
def test_centres_the_bounding_box(fill: str) -> None:
    (found,) = _read(_thing("square", "blue", 0.3, 0.6, "large", fill)).objects
    assert (found.x, found.y) == pytest.approx((0.3, 0.6), abs=0.02)


@pytest.mark.parametrize(
    ("color", "fill", "background"),
    [
        ("pink", "dotted", "white"),  # the dots are nearly white
        ("red", "dotted", "beige"),  # and these nearly beige
        ("green", "striped", "black"),  # the stripes are nearly black
        ("yellow", "plain", "white"),
        ("pink", "furry", "gray"),
    ],
)
@pytest.mark.parametrize("shape", ["ring", "circle", "star"])
def test_sees_faint_contrasts(shape: str, color: str, fill: str, background: str) -> None:
    (found,) = _read(_thing(shape, color, fill=fill), background=background).objects
    assert (found.shape, found.color, found.fill) == (shape, color, fill)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_sees_no_object_in_plain_background(background: str) -> None:
    assert read(Image.new("RGB", (128, 128), BACKGROUNDS[background])) == Reading((), background)


def test_matches_shape_and_color_of_the_same_object() -> None:
    reading = _read(_thing("star", "red", 0.25), _thing("ring", "cyan", 0.75))
    assert matches(reading, "star", "red")
    assert matches(reading, "ring", "cyan")
    assert not matches(reading, "star", "cyan")


@pytest.mark.parametrize("relation", RELATIONS)
def test_holds_in_the_direction_of_the_relation(relation: str) -> None:
    dx, dy = RELATIONS[relation]
    first, second = ("moon", "orange"), ("cross", "purple")
    reading = _read(_thing(*first, 0.5 + dx / 2, 0.5 + dy / 2), _thing(*second, 0.5 - dx / 2, 0.5 - dy / 2))
    assert [name for name in RELATIONS if holds(reading, first, name, second)] == [relation]
    assert not holds(reading, first, relation, ("cross", "orange"))


def test_relation_is_that_of_the_larger_distance() -> None:
    reading = _read(_thing("star", "red", 0.3, 0.4), _thing("star", "red", 0.7, 0.6))
    same = ("star", "red")
    assert [name for name in RELATIONS if holds(reading, same, name, same)] == ["left of", "right of"]
    assert not holds(_read(_thing(*same)), same, "left of", same)
