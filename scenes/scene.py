"""Scenes: an infinite, licence-free data set with a known distribution.

A scene has one to three objects on a plain background. Every attribute is drawn uniformly and independently. A caption
leaves most of them unspecified, so what a model draws for those can be compared with the known distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

RGB = tuple[int, int, int]

SHAPES = ("circle", "ring", "moon", "square", "triangle", "star", "heart", "cross")
FILLS = ("plain", "striped", "dotted", "furry")
COLORS: dict[str, RGB] = {
    "red": (217, 38, 38),
    "orange": (245, 140, 20),
    "yellow": (240, 220, 40),
    "green": (40, 160, 60),
    "cyan": (40, 200, 210),
    "blue": (40, 80, 220),
    "purple": (130, 50, 180),
    "pink": (245, 130, 190),
}
BACKGROUNDS: dict[str, RGB] = {
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
    "black": (16, 16, 16),
    "beige": (222, 208, 178),
}
SIZES: dict[str, tuple[float, float]] = {  # range of the radius, over the shorter side
    "small": (0.1, 0.115),
    "medium": (0.145, 0.16),
    "large": (0.195, 0.21),
}
POSITIONS: dict[str, tuple[float, float]] = {  # centre of a single object, over width and height
    "in the center": (0.5, 0.5),
    "on the left": (0.25, 0.5),
    "on the right": (0.75, 0.5),
    "at the top": (0.5, 0.25),
    "at the bottom": (0.5, 0.75),
}
RELATIONS: dict[str, tuple[float, float]] = {  # offset of the first object from the second
    "left of": (-0.5, 0.0),
    "right of": (0.5, 0.0),
    "above": (0.0, -0.5),
    "below": (0.0, 0.5),
}
_QUADRANTS = ((0.26, 0.26), (0.74, 0.26), (0.26, 0.74), (0.74, 0.74))

# Values of every attribute of an object or its scene, all equally likely.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "size": tuple(SIZES),
    "fill": FILLS,
    "background": tuple(BACKGROUNDS),
}


@dataclass(frozen=True)
class SceneObject:
    """An object, as it was placed or as the oracle read it.

    Attributes:
        shape, color, size, fill: values of `ATTRIBUTES`.
        x, y: centre as fractions of width and height; if read, the centre of the bounding box.
        radius: radius as a fraction of the shorter side.
    """

    shape: str
    color: str
    size: str
    fill: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """The full description of an image.

    Attributes:
        objects: one to three objects; later ones are drawn over earlier ones.
        background: one of `BACKGROUNDS`.
        position: one of `POSITIONS` if there is one object, else None.
        relation: one of `RELATIONS`, of the first object to the second, if there are two objects, else None.
    """

    objects: tuple[SceneObject, ...]
    background: str
    position: str | None = None
    relation: str | None = None


def sample_scene(rng: Random, count: int | None = None) -> Scene:
    """Draw a scene of `count` (1 to 3) objects; by default 50 % have one, 35 % two and 15 % three."""
    if count is None:
        count = rng.choices((1, 2, 3), weights=(50, 35, 15))[0]
    position = relation = None
    if count == 1:
        position = rng.choice(list(POSITIONS))
        centres = [POSITIONS[position]]
    elif count == 2:
        relation = rng.choice(list(RELATIONS))
        dx, dy = RELATIONS[relation]
        centres = [(0.5 + 0.48 * dx, 0.5 + 0.48 * dy), (0.5 - 0.48 * dx, 0.5 - 0.48 * dy)]
    else:
        centres = rng.sample(_QUADRANTS, 3)
    return Scene(
        tuple(_sample_object(rng, x, y) for x, y in centres), rng.choice(list(BACKGROUNDS)), position, relation
    )


def _sample_object(rng: Random, x: float, y: float) -> SceneObject:
    size = rng.choice(list(SIZES))
    return SceneObject(
        shape=rng.choice(SHAPES),
        color=rng.choice(list(COLORS)),
        size=size,
        fill=rng.choice(FILLS),
        x=x + rng.uniform(-0.01, 0.01),
        y=y + rng.uniform(-0.01, 0.01),
        radius=rng.uniform(*SIZES[size]),
    )
