"""Captions of scenes, which leave most attributes unspecified."""

from __future__ import annotations

from random import Random

from scenes.scene import ATTRIBUTES, Scene, SceneObject


def name_value(attribute: str, value: str) -> str:
    """Return the words by which captions name a value of one of `ATTRIBUTES`."""
    return f"{value} background" if attribute == "background" else value


def describe_value(attribute: str, value: str) -> str:
    """Return a caption that specifies nothing but a value of one of `ATTRIBUTES`."""
    if attribute == "background":
        return f"a shape on a {name_value(attribute, value)}"
    return with_article(value if attribute == "shape" else f"{value} shape")


def with_article(phrase: str) -> str:
    """Return `phrase` after its indefinite article."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _describe(thing: SceneObject, rng: Random) -> str:
    """Describe an object by some of its attributes, in a quarter of the cases by all except perhaps the size.

    The choice does not depend on their values, so the images of a caption are as diverse as the scenes. Full
    descriptions are that frequent so that a model learns every combination of attributes.
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
    """Draw an attribute uniformly, then one of its values, as a word or as a caption."""
    attribute = rng.choice(list(ATTRIBUTES))
    return rng.choice((name_value, describe_value))(attribute, rng.choice(ATTRIBUTES[attribute]))


def _list_values(scene: Scene, rng: Random) -> str:
    """List one to three values, at least one of which the scene has: "red", "a furry shape", "blue, star, red".

    Users write such lists as negative prompts, which should match an image that has any of the values.
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
    """Join descriptions of a scene's objects into a phrase, sometimes with their relation or position and background.

    Args:
        scene: the scene.
        described: a description of each of its objects.
        rng: source of randomness.
    """
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
    """Draw a caption of `scene`: 12 % are empty, 13 % lists of values, the rest phrases.

    Guidance moves images away from what the model learned for empty captions and lists. Most of these belong to scenes
    of a single object, because guidance away from scenes of several would also remove the only object of a prompt.
    """
    chance = rng.random()
    empty, listed = (0.21, 0.43) if len(scene.objects) == 1 else (0.03, 0.07)
    if chance < empty:
        return rng.choice(("", " "))
    if chance < listed:
        return _list_values(scene, rng)
    text = relate(scene, [_describe(thing, rng) for thing in scene.objects], rng)
    return text + rng.choice((".", "!")) if rng.random() < 0.04 else text
