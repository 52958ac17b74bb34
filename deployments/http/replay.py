"""Request bodies that can be read twice."""

from __future__ import annotations

from starlette.types import Message, Receive

_MOST_BYTES = 8 * 1024 * 1024


class Replay:
    """An ASGI `receive` that keeps the body, as long as it is short, so that it can be read again.

    Attributes:
        has_left: whether the client has gone away, as far as it was asked for.
    """

    def __init__(self, receive: Receive) -> None:
        self.has_left = False
        self._receive = receive
        self._kept: list[Message] = []
        self._bytes = 0
        self._next = 0  # of those kept

    async def __call__(self) -> Message:
        """Return the next message."""
        if self._next < len(self._kept):
            self._next += 1
            return self._kept[self._next - 1]
        message = await self._receive()
        self._bytes += len(message.get("body", b""))
        if self._bytes > _MOST_BYTES:
            self._kept.clear()
            self._next = 0
        elif message["type"] == "http.request":
            self._kept.append(message)
            self._next += 1
        self.has_left |= message["type"] == "http.disconnect"
        return message

    @property
    def content(self) -> bytes:
        """As much of the body as has come, or nothing if it is too long to be kept."""
        return b"".join(message.get("body", b"") for message in self._kept)

    async def read(self, enough: int) -> None:
        """Receive the body's messages, until that many bytes have come or it ends.

        Args:
            enough: so few bytes that they are kept.
        """
        more = True
        while more and self._bytes < enough:
            message = await self()
            more = message["type"] == "http.request" and message.get("more_body", False)

    def rewind(self) -> bool:
        """Begin anew, or return False if the body is too long for that, or nobody waits for the answer."""
        self._next = 0
        return self._bytes <= _MOST_BYTES and not self.has_left
