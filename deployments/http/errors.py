"""Answers that are not images, in the shape of the OpenAI API."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError

from deployments.messages import RefusalReply
from stages.plan import PlanError

logger = logging.getLogger("ray.serve")

# Fields that are unions: after them, pydantic's locations name the member that was tried, which no client wrote.
_UNIONS = {"plan", "cache", "shift"}
_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "json_invalid": "invalid_json",
}
REPLICA_DIED = "the replica that had the request died; try again"
_LONGEST = 1000  # characters of a message or a parameter, which may repeat what the client wrote


def error_body(status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """Body of an answer that is not an image."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message[:_LONGEST], "type": kind, "param": param and param[:_LONGEST], "code": code}
    return {"error": error}


class APIError(Exception):
    """An answer that is not an image.

    Attributes:
        status: of HTTP.
        code: for programs.
        body: in the API's shape.
        headers: of the answer.
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
        """The error of the first field that pydantic complains about, under that field's name."""
        found = [(_field(error), _message(error)) for error in errors]
        param = found[0][0]
        message = " or ".join(message for field, message in found if field == param)
        code = _CODES.get(errors[0]["type"], "invalid_value")
        return cls(400, code, f"{param}: {message}" if param else message, param)

    @classmethod
    def from_refusal(cls, reply: RefusalReply) -> APIError:
        """The error of an image that a stage could not make."""
        if reply.code == "not_finite":
            logger.error(reply.message)
            return cls(500, reply.code, reply.message)
        return cls(400, reply.code, reply.message, reply.param)

    @classmethod
    def from_failure(cls, error: BaseException) -> APIError:
        """What a client is told of a failure; the log has the rest of those that are the server's."""
        while isinstance(error, RayTaskError | ExceptionGroup):  # each hop between deployments wraps it once more
            error = error.cause if isinstance(error, RayTaskError) else error.exceptions[0]
        if isinstance(error, APIError):
            return error
        if isinstance(error, BackPressureError):
            return cls(503, "overloaded", "all queues are full; try again later", headers={"Retry-After": "1"})
        if isinstance(error, ActorDiedError | ActorUnavailableError):
            logger.warning(f"a replica died: {str(error).splitlines()[0]}")
            return cls(503, "replica_died", REPLICA_DIED, headers={"Retry-After": "1"})
        if isinstance(error, TimeoutError):
            return cls(504, "deadline_exceeded", "not done in the time that a request may take")
        logger.error("request failed", exc_info=error)
        return cls(500, "internal_error", "the request failed; the server's log has the reason")


def _field(error: Any) -> str | None:
    """The field that one of pydantic's errors is about as a client writes it, `plan.stages.0.shift`; None for none."""
    location = error["loc"]
    parts = [str(part) for before, part in zip((None, *location), location, strict=False) if before not in _UNIONS]
    if plan_error := _plan_error(error):
        parts.append(plan_error.field)
    return ".".join(parts) or None


def _message(error: Any) -> str:
    plan_error = _plan_error(error)
    return plan_error.message if plan_error else error["msg"]


def _plan_error(error: Any) -> PlanError | None:
    """What pydantic caught, where a plan's own check raised it."""
    cause = error.get("ctx", {}).get("error")
    return cause if isinstance(cause, PlanError) else None
