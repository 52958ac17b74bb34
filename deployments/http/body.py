"""Reading of request bodies, up to a limit."""

from __future__ import annotations

from ray.exceptions import TaskCancelledError
from starlette.requests import ClientDisconnect, Request

from deployments.http.errors import APIError


async def read_json(request: Request, limit: int) -> bytes:
    """Read a body whose content type is JSON.

    Args:
        request: the request.
        limit: most bytes, also for a body of undeclared length.

    Raises:
        APIError: the body is of another type (415), longer (413), or not all of it came (400).
    """
    content_type = request.headers.get("content-type")
    media_type = (content_type or "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        told = f", not {content_type}" if content_type else "; there is none"
        raise APIError(415, "unsupported_content_type", f"Content-Type must be application/json{told}")
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise APIError(413, "body_too_large", f"the body must be at most {limit} bytes")
    except (ClientDisconnect, TaskCancelledError) as error:  # the client went away, by whoever notices first
        raise APIError(400, "client_disconnected", "the body ended before its length") from error
    return bytes(body)
