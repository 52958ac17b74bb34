"""Families of models, each in a room of its own; adding one is that room and a line here."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from stages.families.base import Family

_ROOMS = ("qwen_image", "z_image")


def get_family(name: str) -> Family:
    """The family called `name`; raises ValueError that lists those there are."""
    if name not in _ROOMS:
        raise ValueError(f"must be one of {', '.join(_ROOMS)}, not {name!r}")
    return _load(name)


@cache
def _load(name: str) -> Family:
    family: Family = import_module(f"stages.families.{name}").FAMILY
    return family
