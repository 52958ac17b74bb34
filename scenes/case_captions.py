"""Captions of the committed cases, as the data set's captions were when the cases were drawn.

`scenes.captions.caption` has changed since: it lists values and omits some articles. The cases' prompts must not
change, or results would not be comparable over time. New cases should use the data set's captions.
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
    """Draw a caption of `scene`: 12 % are empty, 8 % one or two bare values ("red", "furry, star"), the rest phrases.

    See `scenes.captions.caption` for why most empty captions and bare values belong to scenes of a single object.
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
