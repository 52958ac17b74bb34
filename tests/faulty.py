"""The application with replicas that stop and die as tests say; for `serve run` in tests alone.

A directory tells both sides of each other: a replica says there that it began and which images it has, and stops its
device for as long as it finds a file that says so.
"""

# No postponed annotations: Serve reads those of `build` to parse the config's `args`.
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application

from deployments import app
from deployments.messages import Call, Wire
from deployments.replica import StageReplica
from deployments.settings import Settings
from deployments.workers import HandOut

DIRECTORY = "FAULTY_DIRECTORY"  # variable of the environment
# Request ids of images that kill replicas begin with one of these, and go on with the deployment's name.
POISON = "poison"  # kills each that begins with it, or takes its fourth step
LATE = "late"  # kills the one that takes its 26th step first


class FaultyReplica(StageReplica):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._name = serve.get_replica_context().deployment
        self._directory = Path(os.environ[DIRECTORY])
        if self._components.encoder:
            encoder = self._components.encoder._encoder
            encoder.begin = self._faulty(  # type: ignore[method-assign]
                encoder.begin, lambda request_id, *_: self._is_deadly(request_id, 3)
            )
        if self._components.transformer:
            denoiser = self._components.transformer._batcher._denoiser
            denoiser.step = self._faulty(  # type: ignore[method-assign]
                denoiser.step,
                lambda runs: any(self._is_deadly(run.packet.request_id, run.state.index) for run in runs),
            )
        if self._components.decoder:
            decoder = self._components.decoder._decoder
            decoder.decode = self._faulty(decoder.decode, lambda *_: False)  # type: ignore[method-assign]
        began(self._directory, self._name, os.getpid()).touch()

    async def _reply(self, call: str, packet: bytes, hand_out: HandOut) -> Wire:
        (self._directory / f"has-{os.getpid()}-{Call.from_json(call).route.image.request_id}").touch()
        return await super()._reply(call, packet, hand_out)

    def _is_deadly(self, request_id: str, step: int) -> bool:
        if request_id.startswith(f"{POISON}-{self._name}"):
            return step == 3
        if request_id.startswith(f"{LATE}-{self._name}") and step == 25:
            died = self._directory / f"died-{request_id}"
            first = not died.exists()
            died.touch()
            return first
        return False

    def _faulty(self, work: Callable[..., Any], deadly: Callable[..., bool]) -> Callable[..., Any]:
        def stop_or_die(*args: Any) -> Any:
            while stops(self._directory, os.getpid()).exists():
                time.sleep(0.02)
            if deadly(*args):
                os.kill(os.getpid(), signal.SIGKILL)
            return work(*args)

        return stop_or_die


def began(directory: Path, deployment: str, pid: int | str) -> Path:
    return directory / f"began-{deployment}-{pid}"


def stops(directory: Path, pid: int) -> Path:
    return directory / f"stops-{pid}"


def build(settings: Settings) -> Application:
    vars(app)["StageReplica"] = FaultyReplica
    return app.build(settings)
