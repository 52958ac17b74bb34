"""The replicas of a deployment, which run consecutive stages of an image on one device."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from deployments import console, tracing
from deployments.autoscaling import WorkMeter
from deployments.messages import Call, RefusalReply, StalledReply, Start, StepReply, Wire
from stages.errors import NotFinite, PromptTooLong
from stages.wire import OtherVersion

if TYPE_CHECKING:
    from deployments.workers import HandOut
    from stages.packet import LatentPacket


class StageReplica:
    """Holds the components that its stages need; encoding, denoising and decoding of different images overlap."""

    def __init__(self, start: str) -> None:
        """Load the components.

        Args:
            start: JSON of a `Start`.

        Raises:
            stages.wire.OtherVersion: the application was built by another version of the project.
        """
        console.attach()
        # With torch and diffusers, which take seconds, and which the process that builds the application goes without.
        from deployments.components import Components

        message = Start.from_json(start)
        self._stall_timeout_s = message.stall_timeout_s
        self._at_work: set[asyncio.Task[Any]] = set()
        self._meter = WorkMeter()
        self._components = Components(message)

    async def check_health(self) -> None:
        """Raise if the replica cannot work; Serve calls this, and replaces a replica that raises several times.

        The calls to a stalled device end at once, since Serve lets a replica that it replaces end its work. Metrics are
        told here, too, for which Serve's period is short enough.
        """
        self._components.tell()
        self._components.check_health()
        if self._stalled:
            for task in self._at_work:
                task.cancel()
            raise RuntimeError(f"the device has been at one piece of work for longer than {self._stall_timeout_s:g} s")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what `deployments.autoscaling.ExpectedWait` goes by; Serve calls this."""
        return self._meter.stats

    async def run(self, call: str, packet: bytes) -> Wire:
        """Run a hop of an image; a caller that cancels stops the work before its next step.

        Args:
            call: JSON of a `Call`.
            packet: the packet after the previous hop; empty for the first hop, which encodes the prompt.

        Returns:
            A reply's JSON, and the packet or, if the hop decodes, the image's file.

        Raises:
            RuntimeError: work failed; the message names the error, whose own class the caller may not know.
        """
        return await self._reply(call, packet, hand_out=lambda reply, packet: None)

    async def stream(self, call: str, packet: bytes) -> AsyncGenerator[Wire]:
        """Yield the hop's replies to steps, each as soon as its step is done, then what `run` would return."""
        handed_out: asyncio.Queue[tuple[StepReply, LatentPacket | None] | None] = asyncio.Queue()
        result = asyncio.create_task(
            self._reply(call, packet, hand_out=lambda reply, packet: handed_out.put_nowait((reply, packet)))
        )
        result.add_done_callback(lambda _: handed_out.put_nowait(None))
        try:
            while item := await handed_out.get():
                reply, current = item
                yield reply.to_json(), current.to_bytes() if current else b""
            yield await result
        finally:
            result.cancel()

    @property
    def _stalled(self) -> bool:
        return any(pulse.seconds > self._stall_timeout_s for pulse in self._components.pulses.values())

    async def _reply(self, call: str, packet: bytes, hand_out: HandOut) -> Wire:
        """Run a call; errors of a single image become replies, since Serve would log a traceback of an exception."""
        if self._stalled:
            return StalledReply(begun=False).to_json(), b""
        task = asyncio.current_task()
        assert task
        self._at_work.add(task)
        try:
            message = Call.from_json(call)
            with tracing.within(message.traceparent):
                wire = await self._components.run(message, packet, hand_out)
            self._meter.end_call(sum(pulse.busy for pulse in self._components.pulses.values()))
            return wire
        except asyncio.CancelledError:
            if not self._stalled:
                raise
            task.uncancel()
            return StalledReply(begun=True).to_json(), b""
        except PromptTooLong as error:
            refusal = RefusalReply(code="prompt_too_long", message=str(error), param=error.parameter)
        except NotFinite as error:
            refusal = RefusalReply(code="not_finite", message=str(error))
        except OtherVersion as error:
            refusal = RefusalReply(code="other_version", message=str(error))
        except Exception as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        finally:
            self._at_work.discard(task)
        return refusal.to_json(), b""
