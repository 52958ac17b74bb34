"""API keys: what they are made of, and what they permit.

A key is `sk-ID-SECRET`. The id is no secret: it finds the key's row, and stands in logs and in the ledger. The secret
has 256 random bits, so a plain SHA-256 keeps it as well as a slow hash, which is for what people choose.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from typing import Literal, get_args

Scope = Literal["images", "jobs", "models"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

CHARGE_ID = re.compile(r"imgreq_[0-9a-f]{32}")  # what `new_charge_id` returns
_KEY = re.compile(r"sk-([0-9a-f]{12})-([A-Za-z0-9_-]{43})")
_NOBODYS = hashlib.sha256(b"").hexdigest()  # no secret is empty


@dataclass(frozen=True)
class Limits:
    """What a key may have; None for no limit.

    Attributes:
        requests_per_minute: most requests for images, jobs among them, in any 60 seconds.
        megapixels_per_minute: most millions of pixels that were served or are in the making, likewise.
        concurrent_images: most images in the making at once.
    """

    requests_per_minute: int | None = None
    megapixels_per_minute: float | None = None
    concurrent_images: int | None = None


@dataclass(frozen=True)
class Presented:
    """A key as a client presents it."""

    key_id: str
    secret: str

    @classmethod
    def read(cls, key: str) -> Presented | None:
        """Take a key apart; None if it does not look like one."""
        match = _KEY.fullmatch(key)
        return cls(match[1], match[2]) if match else None

    @classmethod
    def draw(cls) -> Presented:
        """Draw a new key."""
        return cls(secrets.token_hex(6), secrets.token_urlsafe(32))

    def __str__(self) -> str:
        return f"sk-{self.key_id}-{self.secret}"

    @property
    def digest(self) -> str:
        """Hash of the secret, in hexadecimal."""
        return hashlib.sha256(self.secret.encode()).hexdigest()

    def matches(self, digest: str | None) -> bool:
        """Whether the secret has this hash, in a time that does not say where it differs, nor whether there is one."""
        return hmac.compare_digest(self.digest, digest or _NOBODYS)


def new_charge_id() -> str:
    """Return an id for a row of the ledger that is no job's."""
    return f"imgreq_{secrets.token_hex(16)}"
