"""Addresses of databases, as settings have them; `deployments.database` connects."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

_KINDS = ("sqlite:///", "postgresql://")
_SERVER = re.compile(r"(?:[^:/@]*(?::[^@]*)?@)?(?:\[[^]/?]+\]|[^/:?]*)(?::(?P<port>[^/?]*))?(?:[/?].*)?")


def _check(url: str) -> str:
    begin = next((kind for kind in _KINDS if url.startswith(kind)), "")
    rest = url.removeprefix(begin)
    if not begin or not rest or rest.startswith(":memory:"):
        # The message leaves it out, since it may hold a password.
        raise ValueError("must be sqlite:/// with a path, or begin with postgresql://")
    if begin == "postgresql://":
        server = _SERVER.fullmatch(rest)
        if server is None:
            raise ValueError("must be as postgresql://USER:PASSWORD@HOST:PORT/DATABASE, each of which may be left out")
        port = server["port"]
        if port and not (re.fullmatch("[0-9]{1,5}", port) and 1 <= int(port) <= 65535):
            raise ValueError("must have a port of 1 to 65535, and a password with a : or / in it as %3A or %2F")
    return url


DatabaseURL = Annotated[str, AfterValidator(_check)]  # SQLAlchemy's
