"""What scenes are captioned as: a caption leaves most of a scene unsaid."""

from __future__ import annotations

from random import Random

from scenes.scene import ATTRIBUTES, Scene, SceneObject


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
