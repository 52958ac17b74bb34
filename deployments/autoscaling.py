"""Numbers of replicas by the wait that requests must expect, which a slow stage and a fast one reach at other queues.

In `autoscaling_config` of a deployment in `serve_config.yaml`:

    policy:
      policy_function: deployments.autoscaling:ExpectedWait
      policy_kwargs: {target_wait_s: 5.0}

Serve pickles the policy by value for its controller, which has Ray and need not have this project.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from ray.serve.config import AutoscalingContext

SECONDS_PER_CALL = "seconds_per_call"  # the metric that replicas report and the policy reads
_REMEMBERED = 64  # calls


class WorkMeter:
    """Measures the seconds of a device that a call takes, as a mean of the last ones; calls in a batch share theirs."""

    def __init__(self) -> None:
        self._busy = deque([0.0], maxlen=_REMEMBERED + 1)

    def end_call(self, busy: float) -> None:
        """Count a call that has ended.

        Args:
            busy: seconds that the device has been at work since the replica started.
        """
        self._busy.append(busy)

    @property
    def stats(self) -> dict[str, float]:
        """What to report to Serve, empty before the first call has ended."""
        calls = len(self._busy) - 1
        return {SECONDS_PER_CALL: (self._busy[-1] - self._busy[0]) / calls} if calls else {}


class ExpectedWait:
    """A policy of Serve's autoscaler: as many replicas as bring the expected wait to the target.

    The wait is the work of all requests that are running or queued, in seconds, divided among the replicas.
    """

    def __init__(self, target_wait_s: float = 5.0) -> None:
        """Aim at a wait.

        Args:
            target_wait_s: seconds until a request that arrives now is expected to be done.

        Raises:
            ValueError: it is not a number above 0.
        """
        if isinstance(target_wait_s, bool) or not isinstance(target_wait_s, int | float) or not target_wait_s > 0:
            raise ValueError(f"target_wait_s must be a number above 0, not {target_wait_s!r}")
        self._target_wait_s = target_wait_s

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Return the number of replicas to have, within whose bounds and delays Serve acts, and no state.

        It is as it was while no replica knows what a call takes.
        """
        known = (context.aggregated_metrics or {}).get(SECONDS_PER_CALL)
        if not known:
            return context.target_num_replicas, {}
        seconds_per_call = sum(known.values()) / len(known)
        return context.total_num_requests * seconds_per_call / self._target_wait_s, {}
