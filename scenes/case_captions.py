"""Captions of the committed cases, as the data set's were when these were drawn.

`scenes.captions.caption` has since learned to list values and to leave out articles. Prompts of cases must stay while
results are compared over time; new cases take the data set's own.
"""

from __future__ import annotations

from random import Random

from scenes.captions import name_value, relate, with_article
from scenes.scene import Scene, SceneObject


def _describe(thing: SceneObject, rng: Random) -> str:
    words = [
        thing.size if rng.random() < 0.35 else "",
        thing.fill if rng.random() < 0.35 else "",
        thing.color if rng.random() < 0.7 else "",
        thing.shape if rng.random() < 0.8 else "shape",
    ]
    return with_article(" ".join(word for word in words if word))


def caption(scene: Scene, rng: Random) -> str:
    """Tell part of `scene`: 12 % empty, 8 % one or two bare attributes, the rest a phrase.

    Bare attributes ("red", "furry, star") are what users write into a negative prompt. They and empty captions are
    mostly of single objects: guidance against scenes of more objects than the prompt's takes the only one away.
    """
    chance = rng.random()
    empty, bare = (0.21, 0.35) if len(scene.objects) == 1 else (0.03, 0.05)
    if chance < empty:
        return rng.choice(("", " "))
    first = scene.objects[0]
    background = name_value("background", scene.background)
    if chance < bare:
        attributes = [first.color, first.shape, first.fill, first.size, background]
        return ", ".join(rng.sample(attributes, rng.choice((1, 1, 2))))
    return relate(scene, [_describe(thing, rng) for thing in scene.objects], rng)
