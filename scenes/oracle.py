"""Reads a scene's attributes off its image, by measuring: nothing here is learned.

Pixels unlike the background fall into connected parts. A part's outline is compared with those of the renderer's
shapes, its colour is the hue that most of it has, and its fill follows from how much of it is darker and lighter
than its colour.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product
from random import Random
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from scenes.renderer import render
from scenes.scene import BACKGROUNDS, COLORS, RELATIONS, RGB, SHAPES, SIZES, Scene, SceneObject

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

# Images are read at this length of the shorter side; every other length and area below is in its pixels.
_SIDE = 128
_CONTRAST = 22.0  # from the background, in RGB; the lightest pink dot on white has 29
_DOT_AREA = 24  # larger than a dot, which may look like a hole, and smaller than the hole of a ring
_SPECK_AREA = 40  # the smallest star has 200
_CORE_DEPTH = 2  # nearer to the outline, colours mix with the background
_GRID = 40  # cells along the side of a view
_REACH = 2.6  # from the centre of a view to its side, in deviations of the outline


@dataclass(frozen=True)
class Reading:
    """What an image shows; objects are in the order of their topmost pixels."""

    objects: tuple[SceneObject, ...]
    background: str


def read(image: Image.Image) -> Reading:
    """Read an image of any size; below 128 pixels plain objects may pass for furry.

    Objects that touch read as one. The process's first reading takes a second longer.
    """
    scale = _SIDE / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR), dtype=np.float64)
    ground = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
    background = min(BACKGROUNDS, key=lambda name: float(np.linalg.norm(ground - BACKGROUNDS[name])))
    return Reading(tuple(_read_object(pixels, part) for part in _parts(pixels, ground)), background)


def largest(reading: Reading) -> SceneObject | None:
    """The object of the largest radius, if there is any."""
    return max(reading.objects, key=lambda thing: thing.radius, default=None)


def matches(reading: Reading, shape: str, color: str) -> bool:
    """Whether some object has that shape and that colour."""
    return any((thing.shape, thing.color) == (shape, color) for thing in reading.objects)


def holds(reading: Reading, first: tuple[str, str], relation: str, second: tuple[str, str]) -> bool:
    """Whether some object of the shape and colour `first` is in `relation` to another one, of `second`.

    It is where the larger of the horizontal and the vertical distance points the way of the relation.

    Raises:
        KeyError: `relation` is none of `RELATIONS`.
    """
    across, down = RELATIONS[relation]

    def related(one: SceneObject, other: SceneObject) -> bool:
        dx, dy = one.x - other.x, one.y - other.y
        along, aside = (dx, dy) if across else (dy, dx)
        return along * (across + down) > 0 and abs(along) > abs(aside)

    return any(
        (one.shape, one.color) == first and (other.shape, other.color) == second and related(one, other)
        for one, other in permutations(reading.objects, 2)
    )


def _read_object(pixels: Floats, part: Mask) -> SceneObject:
    """Read the object that covers `part` (H, W) of `pixels` (H, W, 3)."""
    shape, radius = _outlines().identify(part)
    color = _color(pixels[part])
    depth = ndimage.distance_transform_cdt(part, "chessboard")
    core = depth > min(_CORE_DEPTH, depth.max() - 1)
    rows, columns = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
    return SceneObject(
        shape=shape,
        color=color,
        size=_size(radius / _SIDE),
        fill=_fill(pixels[core], COLORS[color]),
        x=float(columns[0] + columns[-1] + 1) / 2 / part.shape[1],
        y=float(rows[0] + rows[-1] + 1) / 2 / part.shape[0],
        radius=radius / _SIDE,
    )


def _parts(pixels: Floats, ground: Floats) -> Iterator[Mask]:
    """Masks (H, W) of what stands out from the background colour `ground` (3,) in `pixels` (H, W, 3)."""
    mask = np.linalg.norm(pixels - ground, axis=-1) > _CONTRAST
    holes, _ = ndimage.label(~mask)
    mask |= (np.bincount(holes.ravel()) < _DOT_AREA)[holes]
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    for label in range(1, count + 1):
        part = labels == label
        if part.sum() >= _SPECK_AREA:
            yield part


def _view(part: Mask) -> tuple[Floats, float]:
    """`part` about its centroid at a common scale (_GRID, _GRID), and its deviation in pixels.

    Moments are steadier than a bounding box, which a single hair moves.
    """
    rows, columns = part.nonzero()
    deviation = float(np.sqrt(rows.var() + columns.var()))
    step = 2 * _REACH * deviation / _GRID
    corner = np.array([rows.mean(), columns.mean()]) - step * (_GRID - 1) / 2
    return ndimage.affine_transform(part.astype(np.float64), [step, step], corner, (_GRID, _GRID), order=1), deviation


@dataclass(frozen=True)
class _Outlines:
    """What outlines of known shapes look like.

    Attributes:
        shapes: (N,) names; a shape has several rows.
        radii: (N,), over the outline's deviation.
        inside: (N, cells), the probability that a cell of the view lies inside.
    """

    shapes: tuple[str, ...]
    radii: Floats
    inside: Floats

    @classmethod
    def render(cls, samples: int) -> Self:
        """Average over `samples` renderings a row."""
        rng = Random(0)
        shapes, radii, inside = [], [], []
        for shape, fill, size in product(SHAPES, ("plain", "furry"), SIZES):
            rendered = [_render_part(shape, fill, size, rng) for _ in range(samples)]
            for parts in (rendered, [(_blunt(part), radius) for part, radius in rendered]):
                views, deviations = zip(*(_view(part) for part, _ in parts), strict=True)
                shapes.append(shape)
                radii.append(np.mean([radius / own for (_, radius), own in zip(parts, deviations, strict=True)]))
                inside.append(np.clip(np.mean(views, axis=0), 0.03, 0.97).ravel())
        return cls(tuple(shapes), np.array(radii), np.stack(inside))

    def identify(self, part: Mask) -> tuple[str, float]:
        """The likeliest shape of `part` (H, W) and its radius in pixels."""
        view, deviation = _view(part)
        cells = view.ravel()
        best = int((np.log(self.inside) @ cells + np.log1p(-self.inside) @ (1 - cells)).argmax())
        return self.shapes[best], float(self.radii[best]) * deviation


@cache
def _outlines() -> _Outlines:
    return _Outlines.render(samples=4)


def _render_part(shape: str, fill: str, size: str, rng: Random) -> tuple[Mask, float]:
    """One such object's mask and its radius in pixels."""
    radius = rng.uniform(*SIZES[size])
    x, y = (0.5 + rng.uniform(-0.01, 0.01) for _ in range(2))
    scene = Scene((SceneObject(shape, "red", size, fill, x, y, radius),), "white")
    pixels = np.asarray(render(scene, rng, _SIDE, _SIDE), dtype=np.float64)
    (part,) = _parts(pixels, np.array(BACKGROUNDS["white"], dtype=np.float64))
    return part, radius * _SIDE


def _blunt(part: Mask) -> Mask:
    """`part` (H, W) as an autoencoder leaves it, which rounds corners and eats thin tips."""
    return ndimage.gaussian_filter(part.astype(np.float64), 1.5) > 0.5


def _chroma(pixels: Floats) -> NDArray[np.complex128]:
    """Hue as angle and chroma as length of `pixels` (..., 3); shading changes the length alone."""
    red, green, blue = np.moveaxis(pixels, -1, 0)
    return red - (green + blue) / 2 + 1j * np.sqrt(3) / 2 * (green - blue)


def _color(pixels: Floats) -> str:
    """The colour whose hue most of `pixels` (N, 3) have, each voting with its chroma."""
    hues = _chroma(np.array(list(COLORS.values()), dtype=np.float64))
    chroma = _chroma(pixels)
    votes = np.outer(chroma, (hues / abs(hues)).conj()).real.argmax(axis=1)
    return list(COLORS)[np.bincount(votes, abs(chroma)).argmax()]


def _size(radius: float) -> str:
    """The size whose radii, as fractions of the shorter side, are nearest."""
    return min(SIZES, key=lambda size: max(SIZES[size][0] - radius, radius - SIZES[size][1]))


def _fill(pixels: Floats, color: RGB) -> str:
    """The fill of `pixels` (N, 3) of an object's inside: stripes are darker than `color`, dots lighter, hairs both."""
    brightness, own = pixels.sum(axis=-1), sum(color)
    shades = np.where(brightness < own, brightness / own, 1 + (brightness - own) / (3 * 255 - own)) - 1
    if -shades.clip(max=0).mean() > 0.12:  # half of it stripes of -0.5
        return "striped"
    if shades.clip(min=0).mean() > 0.1:  # about a third of it dots of +0.7
        return "dotted"
    return "furry" if shades.std() > 0.04 else "plain"
