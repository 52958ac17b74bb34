"""Webhooks: signed messages that tell of the end of jobs, after https://www.standardwebhooks.com."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import json
import logging
import socket
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from standardwebhooks import Webhook

from deployments.jobs.settings import WebhookSettings
from deployments.jobs.store import ImageJob, Store

logger = logging.getLogger("ray.serve")

_AT_ONCE = 8
_FIRST_RETRY_S, _RETRY_FACTOR, _LONGEST_RETRY_S = 5.0, 4, 6 * 3600.0


class ForbiddenAddress(OSError):
    """An address that is not on the public internet."""


def read_secret(path: Path) -> str:
    """Read the secret that signs messages.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no such secret.
    """
    secret = path.read_text(encoding="utf-8").strip()
    try:
        length = len(base64.b64decode(secret.removeprefix("whsec_"), validate=True))
    except ValueError:
        length = 0
    if not secret.startswith("whsec_") or not 24 <= length <= 64:
        raise ValueError(f"{path} must hold whsec_ and 24 to 64 bytes in base64")
    return secret


def check_url(url: str, *, allow_private: bool) -> None:
    """Raise ValueError if messages are not sent to a URL, as far as it shows; names are looked up when it is called."""
    try:
        parsed = urlsplit(url)
        _ = parsed.port
    except ValueError:
        raise ValueError("must be a URL") from None
    if parsed.scheme not in ("http", "https") or not parsed.hostname:
        raise ValueError("must begin with http:// or https:// and name a host")
    if parsed.username is not None or parsed.password is not None:
        raise ValueError("must not name a user")
    if not allow_private and not _is_public(parsed.hostname):
        raise ValueError("must name a host on the public internet")


def _is_public(host: str) -> bool:
    """Whether a host is not an address outside the public internet; a name may be."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return True
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_global and not address.is_multicast


class _PublicResolver(AbstractResolver):
    """Resolves names to public addresses alone; the connection goes to what was checked."""

    def __init__(self) -> None:
        self._resolver = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._resolver.resolve(host, port, family)
        if not all(_is_public(result["host"]) for result in found):
            raise ForbiddenAddress(f"{host} is not on the public internet")
        return found

    async def close(self) -> None:
        await self._resolver.close()


class Webhooks:
    """Delivers what the store says is due."""

    def __init__(self, store: Store, settings: WebhookSettings, secret: str) -> None:
        """Deliver from a store.

        Args:
            store: the store.
            settings: how often and where to.
            secret: the secret that signs messages, see `read_secret`.
        """
        self._store = store
        self._settings = settings
        self._signer = Webhook(secret)

    async def run(self, poll_s: float) -> None:
        """Deliver until cancelled; look for more every `poll_s`."""
        while True:
            try:
                delivered = await self.deliver()
            except Exception as error:  # the store's; what receivers do is no error here
                logger.error("the store of jobs does not answer", exc_info=error)
                delivered = 0
            if not delivered:
                await asyncio.sleep(poll_s)

    async def deliver(self) -> int:
        """Attempt what is due, as much as is sent at once; return how much that was."""
        due: list[ImageJob] = []
        while len(due) < _AT_ONCE and (job := await asyncio.to_thread(self._claim)):
            due.append(job)
        if due:
            resolver = None if self._settings.allow_private else _PublicResolver()
            async with aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(resolver=resolver, force_close=True),
                timeout=aiohttp.ClientTimeout(total=self._settings.timeout_s),
                cookie_jar=aiohttp.DummyCookieJar(),
            ) as session:
                await asyncio.gather(*(self._attempt(session, job) for job in due))
        return len(due)

    def _claim(self) -> ImageJob | None:
        return self._store.claim_webhook(self._retry_s, self._settings.attempts)

    def _retry_s(self, attempts: int) -> float:
        """Seconds from the beginning of an attempt to the next, which is after its end."""
        backoff = _FIRST_RETRY_S * _RETRY_FACTOR ** (attempts - 1)
        return self._settings.timeout_s + min(backoff, _LONGEST_RETRY_S)

    async def _attempt(self, session: aiohttp.ClientSession, job: ImageJob) -> None:
        assert job.webhook_url is not None
        try:
            check_url(job.webhook_url, allow_private=self._settings.allow_private)  # the settings may have changed
            body = _event(job)
            async with session.post(
                job.webhook_url, data=body, headers=self._headers(job, body), allow_redirects=False
            ) as response:
                outcome = str(response.status)
                heard = 200 <= response.status < 300
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            outcome, heard = type(error).__name__, False
        if heard:
            await asyncio.to_thread(self._store.note_delivered, job.id)
            return
        more = "" if job.webhook_due else ", the last one"
        logger.warning(f"{job.id}: attempt {job.webhook_attempts} at its webhook{more}: {outcome}")

    def _headers(self, job: ImageJob, body: str) -> dict[str, str]:
        now = datetime.now(UTC)
        message_id = _message_id(job)
        return {
            "content-type": "application/json",
            "webhook-id": message_id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": self._signer.sign(message_id, now, body),
        }


def _message_id(job: ImageJob) -> str:
    return f"evt_{job.id}"


def _event(job: ImageJob) -> str:
    """Return the body of a message, in the shape of OpenAI's events."""
    assert job.completed_at is not None
    return json.dumps({
        "id": _message_id(job),
        "object": "event",
        "created_at": int(job.completed_at),
        "type": f"image.job.{job.status}",
        "data": {"id": job.id},
    })  # fmt: skip
