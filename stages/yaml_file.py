"""Strict reading of YAML configuration files; an error is one line that names the file and the key."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")

_KEYS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


class ConfigError(ValueError):
    """A configuration file that cannot be used; the message is one line that names the file and the key."""


class _Loader(yaml.SafeLoader):
    """PyYAML's loader, which refuses duplicate keys instead of keeping the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in _KEYS:
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def read_mapping(path: Path) -> dict[str, Any]:
    """Read the keys and values of a YAML file.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: the file is not YAML, has a key twice, or is not a mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
        raise ConfigError(f"{where}: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of a date that there is not, say
        raise ConfigError(f"{path}: is not YAML in UTF-8 that can be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must be keys with values, not {type(content).__name__}")
    return content


def validate(path: Path | str, kind: type[T], content: object, *, strict: bool = True) -> T:
    """Validate the content of a configuration file as a `kind`.

    Args:
        path: the file, or a key in one, which errors name.
        kind: type of the result.
        content: what was read.
        strict: whether to refuse to convert between numbers and strings.

    Raises:
        ConfigError: the content is invalid; the error names each key that is wrong.
    """
    try:
        text = json.dumps(content, default=str)
    except (ValueError, RecursionError) as error:  # it holds itself, or a number of thousands of digits
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    try:
        # From JSON, pydantic's strict mode accepts lists for tuples and strings for paths, but not true for 1.
        return TypeAdapter(kind).validate_json(text, strict=strict)
    except ValidationError as error:
        raise ConfigError("; ".join(f"{path}: {_sentence(each)}" for each in _told(error.errors()))) from error


def _told(errors: Sequence[Any]) -> list[Any]:
    """Errors without those of a list that is too short because its entries are wrong."""
    return [
        error
        for error in errors
        if error["type"] != "too_short"
        or not any(other["loc"][: len(error["loc"])] == error["loc"] for other in errors if other is not error)
    ]


def _sentence(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"] if "[" not in str(part))
    return ": ".join(filter(None, [key, error["msg"].removeprefix("Value error, ")]))
