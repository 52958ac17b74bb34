"""Traces by OpenTelemetry, and the ids of traces in logs.

All spans are made in the replicas of Ingress, those of stages from the times that come with an image. So replicas of
stages, which run in other environments, need no exporter; a call takes the context along for their logs alone.

Without a variable that asks for an exporter the API makes spans that nobody keeps, and no SDK is set up. The trace of a
client that sends a `traceparent` is in the logs all the same.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Any

from opentelemetry import context, trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from deployments.http.errors import APIError

_SERVICE = "images"
_EXPORTER, _ENDPOINTS = "OTEL_TRACES_EXPORTER", ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_OTLP = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}  # as their packages call them
_SHUTDOWN_MS = 5000

_TRACER = trace.get_tracer("deployments")
_HEADERS = TraceContextTextMapPropagator()


def load_exporter() -> Any:
    """Return the class of the exporter that OpenTelemetry's variables ask for, or None if they ask for none.

    Raises:
        ValueError: there is no such exporter here; the message names the variable.
    """
    asked = os.environ.get(_EXPORTER) or ("otlp" if any(os.environ.get(name) for name in _ENDPOINTS) else "none")
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or asked == "none":
        return None
    if "," in asked:
        raise ValueError(f"{_EXPORTER}: must be one exporter, not a list: one of {asked}")
    variable, name = _EXPORTER, asked
    if asked == "otlp":
        variable = next((each for each in _PROTOCOLS if os.environ.get(each)), _PROTOCOLS[-1])
        protocol = os.environ.get(variable) or "http/protobuf"
        if protocol not in _OTLP:
            raise ValueError(f"{variable}: must be one of {', '.join(_OTLP)}, not {protocol!r}")
        name = _OTLP[protocol]
    found = {each.name: each for each in entry_points(group="opentelemetry_traces_exporter")}
    if name not in found:
        raise ValueError(f"{variable}: no package here has the exporter {name}; there are {', '.join(sorted(found))}")
    return found[name].load()


def check() -> None:
    """Raise ValueError if `begin` would."""
    if load_exporter():
        _processor().shutdown()


def _processor() -> Any:
    """Return what exports spans; raises ValueError."""
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    try:
        exporter = load_exporter()()
    except Exception as error:  # of whatever exporter it is
        raise ValueError(f"OTEL_EXPORTER_*: {error}") from error
    try:
        return BatchSpanProcessor(exporter)
    except ValueError as error:
        raise ValueError(f"OTEL_BSP_*: {error}") from error


def begin() -> None:
    """Export this process's spans from now on, if OpenTelemetry's variables ask for it; raises ValueError."""
    if load_exporter():
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider

        resource = Resource.create()
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):  # no variable names it
            resource = resource.merge(Resource({SERVICE_NAME: _SERVICE}))
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(_processor())
        trace.set_tracer_provider(provider)


def end() -> None:
    """Export what is left; takes seconds if nobody receives it."""
    provider = trace.get_tracer_provider()
    if hasattr(provider, "force_flush"):  # it is the SDK's
        provider.force_flush(_SHUTDOWN_MS)


@contextmanager
def span(
    name: str,
    attributes: Mapping[str, Any],
    *,
    kind: SpanKind = SpanKind.INTERNAL,
    parent: Context | None = None,
    start: float | None = None,
) -> Iterator[Span]:
    """Make a span of the block, which has neither messages nor stacks of errors: they may quote a request.

    Args:
        name: what is done.
        attributes: more about it.
        kind: its kind.
        parent: its parent's context; by default that of the span around it.
        start: seconds since the epoch, if it began before the block.
    """
    with _TRACER.start_as_current_span(
        name,
        context=parent,
        kind=kind,
        attributes=attributes,
        start_time=None if start is None else _nanoseconds(start),
        record_exception=False,
        set_status_on_exception=False,
    ) as made:
        try:
            yield made
        except Exception as error:
            fail(made, error)
            raise


def fail(failed: Span, error: BaseException) -> None:
    """Mark a span as failed."""
    failed.set_status(StatusCode.ERROR, error.code if isinstance(error, APIError) else type(error).__name__)


def record(name: str, start: float, end: float, parent: Span, attributes: Mapping[str, Any]) -> None:
    """Record what another process has done, by its times in seconds since the epoch."""
    made = _TRACER.start_span(
        name, context=trace.set_span_in_context(parent), attributes=attributes, start_time=_nanoseconds(start)
    )
    made.end(_nanoseconds(max(start, end)))


def header() -> str | None:
    """Return the `traceparent` of the current span, if there is one."""
    carrier: dict[str, str] = {}
    _HEADERS.inject(carrier)
    return carrier.get("traceparent")


def context_of(headers: Mapping[str, str]) -> Context:
    """Return the context that headers of W3C's Trace Context describe; an empty one for those that cannot be read."""
    return _HEADERS.extract(headers, context=Context())


@contextmanager
def within(traceparent: str | None) -> Iterator[None]:
    """Let the block, and its logs, belong to another process's span."""
    token = context.attach(context_of({"traceparent": traceparent} if traceparent else {}))
    try:
        yield
    finally:
        context.detach(token)


def stamp_logs() -> None:
    """Give all records of this process's logs that belong to a trace its id, as `trace_id`."""
    make = logging.getLogRecordFactory()

    def stamped(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        current = trace.get_current_span().get_span_context()
        if current.is_valid:
            record.trace_id = trace.format_trace_id(current.trace_id)
        return record

    logging.setLogRecordFactory(stamped)


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
