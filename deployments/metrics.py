"""The metrics of the server: what each counts, in what unit, and by which tags.

Ray exports them at the metrics port of the node that they were measured on, with `ray_` before the name. Serve adds
the tags `application`, `deployment` and `replica` to those of a replica. No tag's value is a client's text. Ray hands
on how many values are in each bucket of a histogram, not their sum, so `_sum` is an estimate; what must be exact is a
counter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from ray.serve import metrics

TAGS = {
    "adapter": "an adapter of the model's config",
    "component": "`encoder`, `transformer` or `decoder`",
    "direction": "`sent` to the deployment or `received` from it",
    "endpoint": "`generations`, `jobs`, `files`, `models`, `plans` or `other`",
    "lost_in": "a deployment",
    "outcome": "of images `done`, `refused`, `cancelled`, `not_finite` or `failed`; "
    "of requests `ok`, `invalid`, `refused`, `cancelled` or `failed`",
    "plan": "a plan of the model's config, or `inline` for a request's own",
    "priority": "`interactive` or `batch`",
    "reason": "of refused images `overloaded` or `too_short`; of lost hops `died`, `stalled` or `hung`; "
    "of requests the code of the error, `other` for one of another application, empty without one",
    "size": "a size of the model's config, or `other`",
    "stage": "`encode`, `base`, `bridge`, `distilled` or `decode`",
    "target": "a deployment",
}

# Codes of errors; any other one is counted as `other`.
REASONS = frozenset({
    "above_limit", "access_unavailable", "body_too_large", "client_disconnected", "content_policy_violation",
    "deadline_exceeded", "http_error", "idempotency_key_reused", "image_not_found", "images_not_kept",
    "images_unavailable", "insufficient_scope", "internal_error", "invalid_api_key", "invalid_json", "invalid_link",
    "invalid_value", "job_cancelled", "job_failed", "job_finished", "job_not_completed", "job_not_finished",
    "job_not_found", "jobs_not_configured", "jobs_unavailable", "method_not_allowed", "missing_required_parameter",
    "model_not_found", "moderation_unavailable", "not_finite", "not_found", "not_ready", "other_version", "overloaded",
    "prompt_too_long", "rate_limit_exceeded", "replica_died", "replica_lost", "too_many_jobs", "unknown_parameter",
    "unsupported_content_type",
})  # fmt: skip

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
_STEP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_IMAGES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Metric:
    """A metric; it is made in each process that uses it, when it first does.

    Attributes:
        name: name, with the unit, and `_total` for a counter.
        help: what it is.
        tags: its tags, of `TAGS`.
    """

    name: str
    help: str
    tags: tuple[str, ...] = ()
    kind: ClassVar[str]

    @property
    def exported(self) -> str:
        """Name at the metrics port; of a histogram, that of its `_bucket`, `_count` and `_sum`."""
        return f"ray_{self.name}"


class Counter(Metric):
    """A number that grows."""

    kind = "counter"

    def add(self, amount: float = 1.0, **tags: str) -> None:
        """Add to it; 0 has no effect."""
        if amount > 0:
            self._made.inc(amount, tags=tags)

    @cached_property
    def _made(self) -> Any:
        return metrics.Counter(self.name, self.help, self.tags)


class Gauge(Metric):
    """A number as it is now; Ray forgets it if it is not set for twice the period of its reports, of 10 s each."""

    kind = "gauge"

    def set(self, value: float, **tags: str) -> None:
        """Set it."""
        self._made.set(value, tags=tags)

    @cached_property
    def _made(self) -> Any:
        return metrics.Gauge(self.name, self.help, self.tags)


@dataclass(frozen=True)
class Histogram(Metric):
    """Numbers of values up to each of the bounds.

    Attributes:
        bounds: the bounds.
    """

    bounds: tuple[float, ...] = _SECONDS
    kind = "histogram"

    def observe(self, value: float, **tags: str) -> None:
        """Count a value."""
        self._made.observe(value, tags=tags)

    @cached_property
    def _made(self) -> Any:
        return metrics.Histogram(self.name, self.help, list(self.bounds), self.tags)


class LevelGauge:
    """Sets a gauge of two tags for whatever combinations there are, and to 0 for those that are gone."""

    def __init__(self, gauge: Gauge) -> None:
        self._gauge = gauge
        self._known: set[tuple[str, str]] = set()

    def expect(self, first: str, second: str) -> None:
        """Set these tags to 0 from now on while they have no level."""
        self._known.add((first, second))

    def set(self, levels: Mapping[tuple[str, str], float]) -> None:
        """Set the levels, by the values of the gauge's two tags."""
        self._known |= levels.keys()
        for values in self._known:
            self._gauge.set(levels.get(values, 0.0), **dict(zip(self._gauge.tags, values, strict=True)))


# In Serve's proxies.
READY = Gauge("images_ready", "1 while images can be made, as each proxy sees it, else 0.")
REQUESTS = Counter(
    "images_requests_total",
    "Requests by what their clients got; an error within a stream of events counts.",
    ("endpoint", "outcome", "reason"),
)
REQUEST_SECONDS = Histogram(
    "images_request_seconds",
    "Seconds from a request to the end of its answer.",
    ("endpoint", "outcome"),
)
RESENT = Counter(
    "images_resent_requests_total", "Requests that were sent again, because the replica of Ingress that had them died."
)

# In the replicas of Ingress.
WAITING = Gauge("images_waiting", "Images that wait for their turn.", ("priority", "size"))
WAIT_SECONDS = Histogram("images_wait_seconds", "Seconds that images waited for their turn.", ("priority", "size"))
REFUSED = Counter("images_refused_total", "Images refused because they would have been late.", ("reason", "size"))
IMAGES = Counter(
    "images_total", "Images by what became of them, once they had their turn.", ("plan", "size", "outcome")
)
MEGAPIXELS = Counter("images_megapixels_total", "Millions of pixels of images that are done.", ("plan", "size"))
STAGE_SECONDS = Histogram(
    "images_stage_seconds", "Seconds that a stage took of an image that is done.", ("stage", "size")
)
STAGE_WAIT_SECONDS = Histogram(
    "images_stage_wait_seconds",
    "Seconds that an image that is done waited for a stage after the one before, on its way and in queues.",
    ("stage", "size"),
)
HANDOVER_BYTES = Counter(
    "images_handover_bytes_total", "Bytes of packets and files between Ingress and the stages.", ("target", "direction")
)
RESUMED = Counter(
    "images_resumed_hops_total",
    "Hops that were lost and tried again.",
    ("lost_in", "reason"),  # Serve keeps `deployment` for that of the router
)

# In the replicas of stages.
IN_STAGE = Gauge("images_in_stage", "Images that are in a stage or wait for it in a replica.", ("stage", "size"))
STEP_SECONDS = Histogram("images_step_seconds", "Seconds of a denoising step of a batch.", bounds=_STEP_SECONDS)
BATCH_SIZE = Histogram("images_batch_size", "Images in a denoising step.", bounds=_IMAGES)
EVALUATIONS = Counter(
    "images_evaluations_total", "Network evaluations; blocks that a cache spared are not counted.", ("stage",)
)
CACHED_EVALUATIONS = Counter(
    "images_cached_evaluations_total", "Network evaluations, or shares of them, that step caches spared.", ("stage",)
)
BUSY_SECONDS = Counter("images_busy_seconds_total", "Seconds that a component was at work.", ("component",))
LOADED_ADAPTERS = Gauge("images_loaded_adapters", "1 for each adapter that a replica has loaded.", ("adapter",))

ALL: Sequence[Metric] = (
    READY, REQUESTS, REQUEST_SECONDS, RESENT, WAITING, WAIT_SECONDS, REFUSED, IMAGES, MEGAPIXELS, STAGE_SECONDS,
    STAGE_WAIT_SECONDS, HANDOVER_BYTES, RESUMED, IN_STAGE, STEP_SECONDS, BATCH_SIZE, EVALUATIONS, CACHED_EVALUATIONS,
    BUSY_SECONDS, LOADED_ADAPTERS,
)  # fmt: skip
