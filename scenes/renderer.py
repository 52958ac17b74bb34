"""Renderer of scenes, which draws at four times the size and averages down."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

from PIL import Image, ImageDraw

from scenes.scene import BACKGROUNDS, COLORS, RGB, Scene

_OVERSAMPLING = 4


def _regular(corners: int, inner: float = 1.0) -> list[tuple[float, float]]:
    """Return the corners of a regular polygon in the unit circle, tip up; with `inner` < 1, those of a star."""
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


def shape_mask(shape: str, radius: float, margin: float = 0.0) -> Image.Image:
    """Draw a silhouette as an `L` image, 255 inside, whose side is 2 * (radius + margin) pixels.

    Args:
        shape: one of `SHAPES`.
        radius: radius of the shape in pixels.
        margin: pixels around it.
    """
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


def _shade(color: RGB, factor: float) -> RGB:
    """Darken `color` towards black (`factor` < 1) or lighten it towards white (`factor` > 1)."""
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
    """Draw lighter and darker hairs, inside the outline and across it."""
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
    """Render `scene` as an RGB image of `width` x `height` pixels; `rng` places stripes, dots and hairs."""
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
