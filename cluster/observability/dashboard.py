"""The Grafana dashboard: `python -m cluster.observability.dashboard > cluster/observability/dashboard.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deployments import metrics
from deployments.metrics import Counter, Gauge, Histogram

_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 3
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Panel:
    """A graph.

    Attributes:
        title: its title.
        unit: Grafana's name of the unit.
        lines: PromQL by the legend of what it returns.
    """

    title: str
    unit: str
    lines: dict[str, str]


def _rate(counter: Counter, by: str, where: str = "") -> str:
    return f"sum by ({by}) (rate({counter.exported}{where}[$__rate_interval]))"


def _quantile(share: float, histogram: Histogram, by: str = "", where: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    buckets = f"rate({histogram.exported}_bucket{where}[$__rate_interval])"
    return f"histogram_quantile({share}, sum by ({labels}) ({buckets}))"


def _level(gauge: Gauge, by: str) -> str:
    return f"sum by ({by}) ({gauge.exported})"


_DONE = '{endpoint="generations", outcome="ok"}'
_SPARED = _rate(metrics.CACHED_EVALUATIONS, "stage")

ROWS: dict[str, Sequence[Panel]] = {
    "Requests": (
        Panel("Ready", "short", {"worst proxy": f"min({metrics.READY.exported})"}),
        Panel("Requests by outcome", "reqps", {"{{outcome}}": _rate(metrics.REQUESTS, "outcome")}),
        Panel(
            "Refusals and errors by reason", "reqps", {"{{reason}}": _rate(metrics.REQUESTS, "reason", '{reason!=""}')}
        ),
        Panel(
            "Seconds of answered requests for images",
            "s",
            {f"p{share}": _quantile(share / 100, metrics.REQUEST_SECONDS, where=_DONE) for share in (50, 95, 99)},
        ),
        Panel(
            "Images waiting for their turn",
            "short",
            {"{{priority}} {{size}}": _level(metrics.WAITING, "priority, size")},
        ),
        Panel(
            "Wait for a turn, 95 %",
            "s",
            {"{{priority}} {{size}}": _quantile(0.95, metrics.WAIT_SECONDS, "priority, size")},
        ),
    ),
    "Images": (
        Panel("Images by outcome", "ops", {"{{outcome}}": _rate(metrics.IMAGES, "outcome")}),
        Panel(
            "Images cancelled",
            "ops",
            {"{{plan}} {{size}}": _rate(metrics.IMAGES, "plan, size", '{outcome="cancelled"}')},
        ),
        Panel("Images refused for being late", "ops", {"{{reason}} {{size}}": _rate(metrics.REFUSED, "reason, size")}),
        Panel("Megapixels a second", "short", {"{{plan}} {{size}}": _rate(metrics.MEGAPIXELS, "plan, size")}),
        Panel(
            "Bytes handed over a second",
            "Bps",
            {"{{direction}} {{target}}": _rate(metrics.HANDOVER_BYTES, "direction, target")},
        ),
        Panel(
            "Hops resumed, and requests sent again",
            "ops",
            {
                "{{lost_in}} {{reason}}": _rate(metrics.RESUMED, "lost_in, reason"),
                "sent again": f"sum(rate({metrics.RESENT.exported}[$__rate_interval]))",
            },
        ),
    ),
    "Stages": (
        Panel(
            "Images in a stage or its queue", "short", {"{{stage}} {{size}}": _level(metrics.IN_STAGE, "stage, size")}
        ),
        Panel(
            "Wait for a stage, 95 %",
            "s",
            {"{{stage}} {{size}}": _quantile(0.95, metrics.STAGE_WAIT_SECONDS, "stage, size")},
        ),
        Panel(
            "Seconds of a stage, 95 %",
            "s",
            {"{{stage}} {{size}}": _quantile(0.95, metrics.STAGE_SECONDS, "stage, size")},
        ),
        Panel(
            "Devices at work, mean of replicas",
            "percentunit",
            {
                "{{deployment}} {{component}}": "avg by (deployment, component) "
                f"(rate({metrics.BUSY_SECONDS.exported}[$__rate_interval]))"
            },
        ),
        Panel(
            "Seconds of a step",
            "s",
            {
                f"{{{{deployment}}}} p{share}": _quantile(share / 100, metrics.STEP_SECONDS, "deployment")
                for share in (50, 95)
            },
        ),
        Panel(
            "Images in a step, median", "short", {"{{deployment}}": _quantile(0.5, metrics.BATCH_SIZE, "deployment")}
        ),
        Panel("Network evaluations a second", "ops", {"{{stage}}": _rate(metrics.EVALUATIONS, "stage")}),
        Panel(
            "Share of evaluations that caches spare",
            "percentunit",
            {"{{stage}}": f"{_SPARED} / ({_SPARED} + {_rate(metrics.EVALUATIONS, 'stage')})"},
        ),
        Panel(
            "Replicas with an adapter",
            "short",
            {"{{deployment}} {{adapter}}": _level(metrics.LOADED_ADAPTERS, "deployment, adapter")},
        ),
    ),
}


def build() -> dict[str, Any]:
    """Build the dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS.items():
        grid = {"h": 1, "w": _WIDTH * _COLUMNS, "x": 0, "y": top}
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "collapsed": False, "gridPos": grid})
        top += 1
        for number, panel in enumerate(row):
            place = {"x": number % _COLUMNS * _WIDTH, "y": top + number // _COLUMNS * _HEIGHT}
            panels.append(_panel(len(panels) + 1, panel, {"h": _HEIGHT, "w": _WIDTH, **place}))
        top += -(-len(row) // _COLUMNS) * _HEIGHT
    return {
        "uid": "images",
        "title": "Images",
        "schemaVersion": 39,
        "timezone": "browser",
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}]},
        "panels": panels,
    }


def _panel(number: int, panel: Panel, grid: dict[str, int]) -> dict[str, Any]:
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "datasource": _SOURCE,
        "gridPos": grid,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": _SOURCE, "expr": line, "legendFormat": legend}
            for index, (legend, line) in enumerate(panel.lines.items())
        ],
    }


if __name__ == "__main__":
    print(json.dumps(build(), indent=2))
