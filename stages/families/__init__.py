"""Families of models, each in a package of its own; adding one takes that package and its name in `_FAMILIES`."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from stages.families.base import Family

_FAMILIES = ("qwen_image", "z_image")


def get_family(name: str) -> Family:
    """Return the family called `name`; raises a ValueError that lists all names."""
    if name not in _FAMILIES:
        raise ValueError(f"must be one of {', '.join(_FAMILIES)}, not {name!r}")
    return _load(name)


@cache
def _load(name: str) -> Family:
    family: Family = import_module(f"stages.families.{name}").FAMILY
    return family
