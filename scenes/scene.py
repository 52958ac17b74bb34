"""Captioned scenes of simple objects: an infinite, licence-free data set with a known distribution.

A scene holds one to three objects on a plain background. Every attribute is drawn uniformly and
independently, and a caption leaves most of them unsaid, so that what a model draws for the unsaid ones
can be compared with a known truth. Images are drawn at four times their size and averaged down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

RGB = tuple[int, int, int]

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
SIZES: dict[str, tuple[float, float]] = {  # radius over the shorter side
    "small": (0.1, 0.115),
    "medium": (0.145, 0.16),
    "large": (0.195, 0.21),
}
FILLS = ("plain", "striped", "dotted", "furry")
POSITIONS: dict[str, tuple[float, float]] = {
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
_OVERSAMPLING = 4


def _regular(corners: int, inner: float = 1.0) -> list[tuple[float, float]]:
    """Corners of a regular polygon, or of a star when `inner` < 1, on the unit circle, tip up."""
    radii = (1.0,) if inner == 1.0 else (1.0, inner)
    count = corners * len(radii)
    return [
        (
            radii[k % len(radii)] * math.sin(2 * math.pi * k / count),
            -radii[k % len(radii)] * math.cos(2 * math.pi * k / count),
        )
        for k in range(count)
    ]


def _heart() -> list[tuple[float, float]]:
    angles = [2 * math.pi * k / 80 for k in range(80)]
    xs = [16 * math.sin(t) ** 3 for t in angles]
    ys = [-(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) for t in angles]
    return [(x / 16.5, (y - 2.5) / 16.5) for x, y in zip(xs, ys, strict=True)]


_ARM = 0.36
_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": _regular(3),
    "star": _regular(5, inner=0.42),
    "heart": _heart(),
    "cross": [
        (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
        (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM),
    ],
}  # fmt: skip
SHAPES = ("circle", "ring", "moon", *_POLYGONS)

# What an object or its scene has one value of, all equally likely.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "size": tuple(SIZES),
    "fill": FILLS,
    "background": tuple(BACKGROUNDS),
}


def shape_mask(shape: str, radius: float, margin: float = 0.0) -> Image.Image:
    """Silhouette of `shape` as an `L` image, 255 inside, of side 2 * (radius + margin) pixels."""
    side = round(2 * (radius + margin))
    centre = side / 2
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)

    def disc(x: float, y: float, r: float, value: int) -> None:
        draw.ellipse((x - r, y - r, x + r, y + r), fill=value)

    if shape in _POLYGONS:
        draw.polygon([(centre + x * radius, centre + y * radius) for x, y in _POLYGONS[shape]], fill=255)
    else:
        disc(centre, centre, radius, 255)
        if shape == "ring":
            disc(centre, centre, 0.55 * radius, 0)
        elif shape == "moon":
            disc(centre + 0.5 * radius, centre, 0.8 * radius, 0)
    return mask


@dataclass(frozen=True)
class SceneObject:
    """One object; `x`, `y` are its centre as fractions of width and height, `radius` of the shorter side."""

    shape: str
    color: str
    size: str
    fill: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """What is in the picture: the truth that a caption tells in part.

    `position` is set for one object, `relation` (of the first object to the second) for two.
    """

    objects: tuple[SceneObject, ...]
    background: str
    position: str | None = None
    relation: str | None = None


def sample_scene(rng: Random, count: int | None = None) -> Scene:
    """Draw a scene; `count` (1 to 3) objects, or half one, 35 % two, 15 % three."""
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


def _shade(color: RGB, factor: float) -> RGB:
    """Darken (`factor` < 1) towards black or lighten (> 1) towards white."""
    if factor <= 1:
        red, green, blue = (round(c * factor) for c in color)
    else:
        red, green, blue = (round(c + (255 - c) * (factor - 1)) for c in color)
    return red, green, blue


def _plain(layer: Image.Image, mask: Image.Image, color: RGB, unit: float, rng: Random) -> Image.Image:
    return mask


def _striped(layer: Image.Image, mask: Image.Image, color: RGB, unit: float, rng: Random) -> Image.Image:
    draw, period = ImageDraw.Draw(layer), 0.06 * unit
    y = rng.uniform(0, period)
    while y < layer.height:
        draw.rectangle((0, y, layer.width, y + period / 2), fill=_shade(color, 0.5))
        y += period
    return mask


def _dotted(layer: Image.Image, mask: Image.Image, color: RGB, unit: float, rng: Random) -> Image.Image:
    draw, period = ImageDraw.Draw(layer), 0.065 * unit
    radius, left, top = 0.3 * period, rng.uniform(0, period), rng.uniform(0, period)
    for row in range(-1, math.ceil(layer.height / period)):
        for column in range(-1, math.ceil(layer.width / period)):
            x, y = left + (column + row % 2 / 2) * period, top + row * period
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_shade(color, 1.7))
    return mask


def _furry(layer: Image.Image, mask: Image.Image, color: RGB, unit: float, rng: Random) -> Image.Image:
    """Hairs of lighter and darker shades inside the outline and across it."""
    draw, outline = ImageDraw.Draw(layer), ImageDraw.Draw(mask)
    inside, hairs = mask.copy(), []
    centre, length, width = layer.width / 2, 0.035 * unit, max(1, round(0.007 * unit))
    for _ in range(round(0.006 * layer.width * layer.height / (unit / 512) ** 2)):
        x, y = rng.uniform(0, layer.width - 1), rng.uniform(0, layer.height - 1)
        if not inside.getpixel((int(x), int(y))):
            continue
        angle = math.atan2(y - centre, x - centre) + rng.uniform(-0.6, 0.6)
        hairs.append((x, y, x + length * math.cos(angle), y + length * math.sin(angle)))
    for hair in hairs:
        draw.line(hair, fill=_shade(color, rng.choice((0.5, 0.72, 1.25, 1.5))), width=width)
        outline.line(hair, fill=255, width=width)
    return mask


_PAINTERS: dict[str, Callable[[Image.Image, Image.Image, RGB, float, Random], Image.Image]] = {
    "plain": _plain,
    "striped": _striped,
    "dotted": _dotted,
    "furry": _furry,
}


def render(scene: Scene, rng: Random, width: int = 128, height: int = 128) -> Image.Image:
    """Draw `scene` as an RGB image; `rng` places stripes, dots and hairs."""
    scale = _OVERSAMPLING
    canvas = Image.new("RGB", (width * scale, height * scale), BACKGROUNDS[scene.background])
    unit = min(width, height) * scale
    for thing in scene.objects:
        mask = shape_mask(thing.shape, thing.radius * unit, margin=0.04 * unit)
        layer = Image.new("RGB", mask.size, COLORS[thing.color])
        mask = _PAINTERS[thing.fill](layer, mask, COLORS[thing.color], unit, rng)
        corner = (round(thing.x * canvas.width - mask.width / 2), round(thing.y * canvas.height - mask.height / 2))
        canvas.paste(layer, corner, mask)
    return canvas.reduce(scale)


def name_value(attribute: str, value: str) -> str:
    """As captions say a value of one of `ATTRIBUTES`."""
    return f"{value} background" if attribute == "background" else value


def describe_value(attribute: str, value: str) -> str:
    """A caption that tells nothing but a value of one of `ATTRIBUTES`."""
    if attribute == "background":
        return f"a shape on a {name_value(attribute, value)}"
    return with_article(value if attribute == "shape" else f"{value} shape")


def with_article(phrase: str) -> str:
    """`phrase` after "a" or "an"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _describe(thing: SceneObject, rng: Random) -> str:
    """Name what a caption tells of an object: usually a part, in a quarter of the cases all but the size.

    What is told depends on no value, so that images of a caption stay as varied as the scenes are; told in full more
    often, rare combinations are learned as well as others.
    """
    full = rng.random() < 0.25
    words = [
        thing.size if rng.random() < 0.35 else "",
        thing.fill if full or rng.random() < 0.35 else "",
        thing.color if full or rng.random() < 0.7 else "",
        thing.shape if full or rng.random() < 0.8 else "shape",
    ]
    phrase = " ".join(word for word in words if word)
    return phrase if rng.random() < 0.1 else with_article(phrase)


def draw_value(rng: Random) -> str:
    """Any value of any attribute, as a word or as a caption; each attribute as often, however many values it has."""
    attribute = rng.choice(list(ATTRIBUTES))
    return rng.choice((name_value, describe_value))(attribute, rng.choice(ATTRIBUTES[attribute]))


def _list_values(scene: Scene, rng: Random) -> str:
    """One to three values, of which the scene has at least one: "red", "a furry shape", "blue, star, red".

    This is what users write into a negative prompt: a picture that has any of it is meant.
    """
    first = scene.objects[0]
    own = {"shape": first.shape, "color": first.color, "size": first.size, "fill": first.fill}
    attribute = rng.choice(list(ATTRIBUTES))
    value = scene.background if attribute == "background" else own[attribute]
    items = [rng.choice((name_value, describe_value))(attribute, value)]
    items += [draw_value(rng) for _ in range(rng.choice((0, 0, 1, 1, 2)))]
    rng.shuffle(items)
    return ", ".join(items)


def relate(scene: Scene, described: list[str], rng: Random) -> str:
    """A phrase of the objects as `described`, with their relation or position and the background told or not."""
    if scene.relation and rng.random() < 0.7:
        text = f"{described[0]} {scene.relation} {described[1]}"
    elif len(described) == 1:
        text = described[0]
    else:
        text = f"{', '.join(described[:-1])} and {described[-1]}"
    if scene.position and rng.random() < 0.35:
        text = f"{text} {scene.position}"
    if rng.random() < 0.35:
        text = f"{text} on a {name_value('background', scene.background)}"
    return text


def caption(scene: Scene, rng: Random) -> str:
    """Tell part of `scene`: 12 % empty, 13 % a list of values, the rest a phrase.

    Lists and empty captions are what guidance leads away from; they are mostly of single objects: guidance against
    scenes of more objects than the prompt's takes the only one away.
    """
    chance = rng.random()
    empty, listed = (0.21, 0.43) if len(scene.objects) == 1 else (0.03, 0.07)
    if chance < empty:
        return rng.choice(("", " "))
    if chance < listed:
        return _list_values(scene, rng)
    text = relate(scene, [_describe(thing, rng) for thing in scene.objects], rng)
    return text + rng.choice((".", "!")) if rng.random() < 0.04 else text


def examples(seed: int, width: int = 128, height: int = 128) -> Iterator[tuple[Image.Image, str]]:
    """Endless (image, caption) pairs, the same for the same seed."""
    rng = Random(seed)
    while True:
        scene = sample_scene(rng)
        yield render(scene, rng, width, height), caption(scene, rng)
