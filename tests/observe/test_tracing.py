"""Which exporter the environment asks for, and what a context is between processes."""

from __future__ import annotations

import logging
import threading

import pytest

from deployments import tracing

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_TRACES_EXPORTER", "OTEL_SDK_DISABLED", *tracing._ENDPOINTS, *tracing._PROTOCOLS):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "exporter"),
    [
        ({}, None),
        (ENDPOINT, "OTLPSpanExporter"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318/v1/traces"}, "OTLPSpanExporter"),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "OTLPSpanExporter"),
        ({"OTEL_TRACES_EXPORTER": "console"}, "ConsoleSpanExporter"),
        ({**ENDPOINT, "OTEL_TRACES_EXPORTER": "none"}, None),
        ({**ENDPOINT, "OTEL_TRACES_EXPORTER": "", "OTEL_EXPORTER_OTLP_PROTOCOL": ""}, "OTLPSpanExporter"),
        ({"OTEL_TRACES_EXPORTER": ""}, None),
        ({**ENDPOINT, "OTEL_SDK_DISABLED": "True"}, None),
        ({**ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "OTLPSpanExporter"),
    ],
)
def test_the_standard_variables_choose_the_exporter(
    variables: dict[str, str], exporter: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = tracing.load_exporter()
    assert (found and found.__name__) == exporter


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"OTEL_TRACES_EXPORTER": "otlp,console"}, "OTEL_TRACES_EXPORTER: must be one exporter, not a list"),
        ({**ENDPOINT, "OTEL_BSP_MAX_QUEUE_SIZE": "-1"}, r"OTEL_BSP_\*: max_queue_size must be a positive"),
        ({**ENDPOINT, "OTEL_BSP_MAX_QUEUE_SIZE": "5"}, r"OTEL_BSP_\*: max_export_batch_size must be"),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER: no package here has the exporter zipkin"),
        (
            {**ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": "smoke"},
            "OTEL_EXPORTER_OTLP_PROTOCOL: must be one of http/protobuf, grpc, not 'smoke'",
        ),
        (
            {**ENDPOINT, "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "smoke"},
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL: must be one of http/protobuf, grpc, not 'smoke'",
        ),
    ],
)  # fmt: skip
def test_an_exporter_that_is_not_here_is_named(
    variables: dict[str, str], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=complaint):
        tracing.check()


def test_a_check_leaves_no_thread_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    before = set(threading.enumerate())
    tracing.check()
    assert set(threading.enumerate()) <= before


def test_a_context_comes_back_from_its_header_and_is_in_logs() -> None:
    before = logging.getLogRecordFactory()
    try:
        tracing.stamp_logs()
        make = logging.getLogRecordFactory()

        def stamp() -> str | None:
            return getattr(make("name", logging.INFO, "path", 1, "message", None, None), "trace_id", None)

        with tracing.within(PARENT):
            assert tracing.header() == PARENT
            assert stamp() == "4bf92f3577b34da6a3ce929d0e0e4736"
            with tracing.span("inner", {}):
                assert stamp() == "4bf92f3577b34da6a3ce929d0e0e4736"
            with tracing.within(None):
                assert (tracing.header(), stamp()) == (None, None)
        for unreadable in (None, "", "00-zz-00f067aa0ba902b7-01", "\n", "00-" + "0" * 32 + "-00f067aa0ba902b7-01"):
            with tracing.within(unreadable):
                assert (tracing.header(), stamp()) == (None, None)
    finally:
        logging.setLogRecordFactory(before)
