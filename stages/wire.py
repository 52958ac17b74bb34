"""What versions of the project that talk to each other have in common.

What is sent has a version of two numbers. A field that is added has a default, and raises the minor number. A field
that is removed, gets another default or means something else raises the major number. The sender leaves out fields that
have their default, so another minor version is understood as long as nobody uses what it added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_ALWAYS = {"version", "kind"}  # by which a reader tells what it has


class Version(NamedTuple):
    """A version of what is sent."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


class OtherVersion(ValueError):
    """Something that another version of the project sent, and that this one cannot read."""

    def __init__(self, what: str, theirs: Version, ours: Version, reason: str = "") -> None:
        super().__init__(what, theirs, ours, reason)

    def __str__(self) -> str:
        what, theirs, ours, reason = self.args
        return f"a {what} of version {theirs}, where version {ours} is read" + (f" ({reason})" if reason else "")


def used_fields(value: BaseModel | DataclassInstance) -> dict[str, Any]:
    """Return the fields of a model or dataclass that do not have their default, and those that say what it is."""
    if isinstance(value, BaseModel):
        defaults = {name: field.default for name, field in type(value).model_fields.items()}
    else:
        defaults = {field.name: field.default for field in fields(value)}
    return {
        name: getattr(value, name)
        for name, default in defaults.items()
        if name in _ALWAYS or getattr(value, name) != default
    }


def to_plain(value: Any) -> Any:
    """Return a model, a dataclass or a collection of such as what JSON has, without fields that have their default."""
    if isinstance(value, BaseModel) or (is_dataclass(value) and not isinstance(value, type)):
        return {name: to_plain(each) for name, each in used_fields(value).items()}
    if isinstance(value, Mapping):
        return {key: to_plain(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(each) for each in value]
    return to_jsonable_python(value)
