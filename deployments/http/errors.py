"""Error responses, in the format of the OpenAI API."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ray.exceptions import RayTaskError
from ray.serve.exceptions import BackPressureError

from deployments.messages import RefusalReply
from stages.plan import PlanError

logger = logging.getLogger("ray.serve")

# Fields that are unions. After them, pydantic's locations name the union's member, which is not in the request.
_UNIONS = {"plan", "cache", "shift"}
_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "json_invalid": "invalid_json",
}
REPLICA_DIED = "the replica that had the request died; try again"
REPLICA_LOST = "two replicas were lost with the image, one after the other; the request may be the reason"
RETRY = {"Retry-After": "1"}
_LONGEST = 1000  # characters of a message or a parameter, both of which may quote the request


def error_body(status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """Build the body of an error response."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message[:_LONGEST], "type": kind, "param": param and param[:_LONGEST], "code": code}
    return {"error": error}


class APIError(Exception):
    """An error response.

    Attributes:
        status: HTTP status.
        code: machine-readable reason.
        body: body in the API's format.
        headers: headers of the response.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers
        self.body = error_body(status, code, message, param)

    @classmethod
    def from_validation(cls, errors: Sequence[Any]) -> APIError:
        """Make the error of the first field that pydantic rejects, under that field's name."""
        found = [(_field(error), _message(error)) for error in errors]
        param = found[0][0]
        message = " or ".join(message for field, message in found if field == param)
        code = _CODES.get(errors[0]["type"], "invalid_value")
        return cls(400, code, f"{param}: {message}" if param else message, param)

    @classmethod
    def from_refusal(cls, reply: RefusalReply, deployment: str) -> APIError:
        """Make the error of an image that a deployment refused."""
        if reply.code == "other_version":
            message = f"{deployment} and the router are of versions that do not go together: {reply.message}"
            logger.error(message)
            return cls(500, reply.code, message)
        if reply.code == "not_finite":
            logger.error(reply.message)
            return cls(500, reply.code, reply.message)
        return cls(400, reply.code, reply.message, reply.param)

    @classmethod
    def from_failure(cls, error: BaseException) -> APIError:
        """Make the error that a client sees of an exception; the server's own failures are logged in full."""
        while isinstance(error, RayTaskError | ExceptionGroup):  # each hop wraps it once more
            error = error.cause if isinstance(error, RayTaskError) else error.exceptions[0]
        if isinstance(error, APIError):
            return error
        if isinstance(error, BackPressureError):
            return cls(503, "overloaded", "all queues are full; try again later", headers=RETRY)
        if isinstance(error, TimeoutError):
            return cls(504, "deadline_exceeded", "not done in the time that a request may take")
        logger.error("request failed", exc_info=error)
        return cls(500, "internal_error", "the request failed; the server's log has the reason")


def _field(error: Any) -> str | None:
    """Return the field of a pydantic error as clients write it (e.g. `plan.stages.0.shift`), or None if it has none."""
    location = error["loc"]
    parts = [str(part) for before, part in zip((None, *location), location, strict=False) if before not in _UNIONS]
    if plan_error := _plan_error(error):
        parts.append(plan_error.field)
    return ".".join(parts) or None


def _message(error: Any) -> str:
    plan_error = _plan_error(error)
    return plan_error.message if plan_error else error["msg"]


def _plan_error(error: Any) -> PlanError | None:
    """Return the PlanError that pydantic caught, if a plan's own check raised one."""
    cause = error.get("ctx", {}).get("error")
    return cause if isinstance(cause, PlanError) else None
