"""An oracle that reads a scene's attributes off its image by measurements; nothing is learned.

Pixels that differ from the background form connected parts, one for each object. The outline of a part is compared
with those of the renderer's shapes. Its colour is the most common hue, and its fill follows from how much of it is
darker or lighter than that colour.
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

# Images are resized to this shorter side; all lengths and areas below are in pixels of that size.
_SIDE = 128
_CONTRAST = 22.0  # from the background, in RGB; the lightest pink dot on white has 29
_DOT_AREA = 24  # larger than a dot, which may look like a hole, but smaller than the hole of a ring
_SPECK_AREA = 40  # the smallest star has 200
_CORE_DEPTH = 2  # closer to the outline, colours blend with the background
_GRID = 40  # cells along the side of a view
_REACH = 2.6  # distance from the centre of a view to its side, in standard deviations of the outline


@dataclass(frozen=True)
class Reading:
    """What an image shows.

    Attributes:
        objects: the objects, in the order of their topmost pixels.
        background: name of the background's colour.
    """

    objects: tuple[SceneObject, ...]
    background: str


def read(image: Image.Image) -> Reading:
    """Read an image of any size.

    Objects that touch are read as one. In images smaller than 128 pixels, plain objects may be read as furry. The first
    call in a process takes a second longer than others.
    """
    scale = _SIDE / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR), dtype=np.float64)
    ground = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
    background = min(BACKGROUNDS, key=lambda name: float(np.linalg.norm(ground - BACKGROUNDS[name])))
    return Reading(tuple(_read_object(pixels, part) for part in _parts(pixels, ground)), background)


def largest(reading: Reading) -> SceneObject | None:
    """Return the object with the largest radius, or None if there is no object."""
    return max(reading.objects, key=lambda thing: thing.radius, default=None)


def matches(reading: Reading, shape: str, color: str) -> bool:
    """Return whether some object has that shape and that colour."""
    return any((thing.shape, thing.color) == (shape, color) for thing in reading.objects)


def holds(reading: Reading, first: tuple[str, str], relation: str, second: tuple[str, str]) -> bool:
    """Return whether some object has a relation to another.

    The larger of the horizontal and the vertical distance must be in the direction of the relation.

    Args:
        reading: what the image shows.
        first: shape and colour of the first object.
        relation: relation of the first object to the second, such as "left of".
        second: shape and colour of the second object.

    Raises:
        KeyError: `relation` is not one of `RELATIONS`.
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
    """Yield a mask (H, W) of each part of `pixels` (H, W, 3) that differs from the background colour `ground` (3,)."""
    mask = np.linalg.norm(pixels - ground, axis=-1) > _CONTRAST
    holes, _ = ndimage.label(~mask)
    mask |= (np.bincount(holes.ravel()) < _DOT_AREA)[holes]
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    for label in range(1, count + 1):
        part = labels == label
        if part.sum() >= _SPECK_AREA:
            yield part


def _view(part: Mask) -> tuple[Floats, float]:
    """Normalise a part's position and scale: a view (_GRID, _GRID), and the part's standard deviation in pixels.

    Moments are more robust than a bounding box, which a single hair changes.
    """
    rows, columns = part.nonzero()
    deviation = float(np.sqrt(rows.var() + columns.var()))
    step = 2 * _REACH * deviation / _GRID
    corner = np.array([rows.mean(), columns.mean()]) - step * (_GRID - 1) / 2
    return ndimage.affine_transform(part.astype(np.float64), [step, step], corner, (_GRID, _GRID), order=1), deviation


@dataclass(frozen=True)
class _Outlines:
    """Templates of the known shapes' outlines.

    Attributes:
        shapes: (N,), names of the shapes, each of which has several templates.
        radii: (N,), radius over the outline's standard deviation.
        inside: (N, cells), probability that a cell of the view lies inside the outline.
    """

    shapes: tuple[str, ...]
    radii: Floats
    inside: Floats

    @classmethod
    def render(cls, samples: int) -> Self:
        """Make templates, each an average over `samples` renders."""
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
        """Return the likeliest shape of `part` (H, W), and its radius in pixels."""
        view, deviation = _view(part)
        cells = view.ravel()
        best = int((np.log(self.inside) @ cells + np.log1p(-self.inside) @ (1 - cells)).argmax())
        return self.shapes[best], float(self.radii[best]) * deviation


@cache
def _outlines() -> _Outlines:
    return _Outlines.render(samples=4)


def _render_part(shape: str, fill: str, size: str, rng: Random) -> tuple[Mask, float]:
    """Render an object of these attributes; return its mask (H, W), and its radius in pixels."""
    radius = rng.uniform(*SIZES[size])
    x, y = (0.5 + rng.uniform(-0.01, 0.01) for _ in range(2))
    scene = Scene((SceneObject(shape, "red", size, fill, x, y, radius),), "white")
    pixels = np.asarray(render(scene, rng, _SIDE, _SIDE), dtype=np.float64)
    (part,) = _parts(pixels, np.array(BACKGROUNDS["white"], dtype=np.float64))
    return part, radius * _SIDE


def _blunt(part: Mask) -> Mask:
    """Round corners and shorten thin tips of `part` (H, W), as an autoencoder does."""
    return ndimage.gaussian_filter(part.astype(np.float64), 1.5) > 0.5


def _chroma(pixels: Floats) -> NDArray[np.complex128]:
    """Return hue as angle and chroma as length of `pixels` (..., 3); shading changes only the length."""
    red, green, blue = np.moveaxis(pixels, -1, 0)
    return red - (green + blue) / 2 + 1j * np.sqrt(3) / 2 * (green - blue)


def _color(pixels: Floats) -> str:
    """Return the colour with the most common hue among `pixels` (N, 3), each weighted by its chroma."""
    hues = _chroma(np.array(list(COLORS.values()), dtype=np.float64))
    chroma = _chroma(pixels)
    votes = np.outer(chroma, (hues / abs(hues)).conj()).real.argmax(axis=1)
    return list(COLORS)[np.bincount(votes, abs(chroma)).argmax()]


def _size(radius: float) -> str:
    """Return the size whose range of radii is nearest to `radius`, a fraction of the shorter side."""
    return min(SIZES, key=lambda size: max(SIZES[size][0] - radius, radius - SIZES[size][1]))


def _fill(pixels: Floats, color: RGB) -> str:
    """Return the fill of an object's inner `pixels` (N, 3): stripes are darker than `color`, dots lighter, fur both."""
    brightness, own = pixels.sum(axis=-1), sum(color)
    shades = np.where(brightness < own, brightness / own, 1 + (brightness - own) / (3 * 255 - own)) - 1
    if -shades.clip(max=0).mean() > 0.12:  # stripes are -0.5 over half of the area
        return "striped"
    if shades.clip(min=0).mean() > 0.1:  # dots are +0.7 over about a third of the area
        return "dotted"
    return "furry" if shades.std() > 0.04 else "plain"
