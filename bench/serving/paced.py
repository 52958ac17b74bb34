"""The application with pools of any speed: a step takes as long as its replica's environment says.

What a machine of few cores can do at once is no limit then, as long as its own steps take less. For `serve run`.
"""

# No postponed annotations: Serve reads those of `build` to parse the config's `args`.
import os
import time
from collections.abc import Sequence
from typing import Any

from ray.serve import Application

from deployments import app
from deployments.replica import StageReplica
from deployments.settings import Settings
from stages.stage import Denoiser, StageRun

SECONDS = "PACED_SECONDS"  # variable of a pool's environment: seconds of a step for each image in it


class PacedReplica(StageReplica):
    """Waits after each step of its denoiser for the rest of the step's time."""

    def __init__(self, *arguments: Any) -> None:
        seconds, step = float(os.environ.get(SECONDS, "0")), Denoiser.step

        def paced(denoiser: Denoiser, runs: Sequence[StageRun]) -> None:
            end = time.monotonic() + seconds * len(runs)
            step(denoiser, runs)
            time.sleep(max(0.0, end - time.monotonic()))

        Denoiser.step = paced  # type: ignore[assignment, method-assign]  # of this process, which has one replica
        super().__init__(*arguments)


def build(settings: Settings) -> Application:
    """Build the application; its settings are those of `deployments.app`."""
    vars(app)["StageReplica"] = PacedReplica
    return app.build(settings)
