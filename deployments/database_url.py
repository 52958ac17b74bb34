"""Addresses of databases, as settings have them; `deployments.database` connects."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

_KINDS = ("sqlite:///", "postgresql://")


def _check(url: str) -> str:
    begin = next((kind for kind in _KINDS if url.startswith(kind)), "")
    rest = url.removeprefix(begin)
    if not begin or not rest or rest.startswith(":memory:"):
        # The message leaves it out, since it may hold a password.
        raise ValueError("must be sqlite:/// with a path, or begin with postgresql://")
    return url


DatabaseURL = Annotated[str, AfterValidator(_check)]  # SQLAlchemy's
