"""Continuous batching by denoising step: packets join and leave a device's batch between two steps."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition

from stages.packet import LatentPacket
from stages.plan import Plan
from stages.pulse import Pulse
from stages.stage import Denoiser, StageRun


@dataclass(frozen=True)
class StepReport:
    """A step that a device has done.

    Attributes:
        seconds: how long it took.
        shares: for each image, its stage, the network evaluations of the step, and those that its cache spared.
    """

    seconds: float
    shares: tuple[tuple[str, float, float], ...]


def _ignore(step: int, packet: LatentPacket) -> None:
    pass


def _ignore_report(report: StepReport) -> None:
    pass


@dataclass(order=True)
class _Entry:
    """A packet that waits or is being denoised, ordered by urgency."""

    deadline: float
    number: int  # in order of arrival
    packet: LatentPacket = field(compare=False)
    plan: Plan = field(compare=False)
    end: int = field(compare=False)  # position of the packet when it leaves
    previews: Collection[int] = field(compare=False)
    checkpoints: Collection[int] = field(compare=False)
    show: Callable[[int, LatentPacket], object] = field(compare=False)
    keep: Callable[[int, LatentPacket], object] = field(compare=False)
    tell: Callable[[int], object] | None = field(compare=False)
    done: int = field(compare=False)  # steps of the plan
    future: Future[LatentPacket] = field(compare=False, default_factory=Future)
    run: StageRun | None = field(compare=False, default=None)

    @property
    def tokens(self) -> int:
        """Image tokens that one step takes."""
        return len(self.packet.latent) * self.plan.stages[self.packet.position].evaluations


class StepBatcher:
    """Shares one device's steps between packets of any plans, stages and sizes.

    Before each step the most urgent packet is chosen: the one with the earliest deadline, and among equals the first
    to arrive. Others of its grid, in the same order, fill the batch up to a number of image tokens. Packets with
    another grid wait until every more urgent packet has finished; less urgent newcomers never overtake them.

    Attributes:
        pulse: how long the step at hand has taken, of `run`.
    """

    def __init__(
        self, denoiser: Denoiser, max_tokens: int, report: Callable[[StepReport], object] = _ignore_report
    ) -> None:
        """Batch for one device.

        Args:
            denoiser: the device's.
            max_tokens: most image tokens in a forward pass, where guided packets count twice; a single packet may
                exceed it.
            report: called on the device's thread after each step; the next one waits for it.
        """
        self._denoiser = denoiser
        self._max_tokens = max_tokens
        self._report = report
        self._entries: list[_Entry] = []
        self._numbers = itertools.count()
        self._changed = Condition()
        self._closed = False
        self.pulse = Pulse()

    def submit(
        self,
        packet: LatentPacket,
        plan: Plan,
        *,
        stages: int = 1,
        previews: Collection[int] = (),
        checkpoints: Collection[int] = (),
        show: Callable[[int, LatentPacket], object] = _ignore,
        keep: Callable[[int, LatentPacket], object] = _ignore,
        tell: Callable[[int], object] | None = None,
        deadline: float = math.inf,
    ) -> Future[LatentPacket]:
        """Queue a packet for its next stages, from any thread.

        Cancelling the future takes the packet off the device before the next step.

        Args:
            packet: the packet to denoise.
            plan: the plan whose stage number `packet.position` is the next one, after `packet.step` of its steps.
            stages: number of stages to run, each part counted.
            previews: steps, counted from 1 over the plan, after which to call `show`.
            checkpoints: steps, counted likewise, after which to call `keep`; see `StageRun.checkpoint`.
            show: called on the device's thread with the step and a packet to decode, see `StageRun.preview`.
            keep: called on the device's thread with the step and a packet from which the image goes on.
            tell: called on the device's thread with each step, once it is done.
            deadline: seconds since the epoch; the earliest goes first.

        Returns:
            A future of the packet after these stages; it may raise NotFinite and the errors of `Denoiser.begin`,
            `StageRun.checkpoint`, `show`, `keep` and `tell`.

        Raises:
            RuntimeError: the batcher is closed.
        """
        entry = _Entry(
            deadline,
            next(self._numbers),
            packet,
            plan,
            end=packet.position + stages,
            previews=previews,
            checkpoints=checkpoints,
            show=show,
            keep=keep,
            tell=tell,
            done=sum(stage.steps for stage in plan.stages[: packet.position]) + packet.step,
        )
        with self._changed:
            if self._closed:
                raise RuntimeError("this replica takes no more work")
            self._entries.append(entry)
            self._changed.notify()
        return entry.future

    def run(self) -> None:
        """Run steps until closed and empty; for the one thread that uses the device."""
        step = self.pulse.during(self.step)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._entries or self._closed)
                if not self._entries:
                    return
            step()

    def close(self) -> None:
        """Take no more packets, and let `run` return once those that are here are done."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def census(self) -> Counter[tuple[str, tuple[int, int]]]:
        """Count the packets that are here by stage and by the grid that their image has in full; for any thread."""
        counts: Counter[tuple[str, tuple[int, int]]] = Counter()
        for entry in self._entries:
            packet = entry.packet
            stage = entry.plan.stages[packet.position]
            rows, columns = packet.grid
            counts[stage.name, (round(rows / stage.scale), round(columns / stage.scale))] += 1
        return counts

    def step(self) -> list[LatentPacket]:
        """Run one step of the most urgent batch; return its packets as they arrived, none if nothing waits."""
        batch = self._choose()
        packets = [entry.packet for entry in batch]
        runs = [entry.run for entry in batch if entry.run]
        if runs:
            before = [run.state.nfe for run in runs]
            started = time.monotonic()
            try:
                self._denoiser.step(runs)
            except Exception as error:
                self._leave(batch, error)
            else:
                self._report(self._report_of(time.monotonic() - started, runs, before))
                for entry in batch:
                    if entry.run:
                        self._advance(entry, entry.run)
        return packets

    def _report_of(self, seconds: float, runs: Sequence[StageRun], before: Sequence[float]) -> StepReport:
        """Report a step of runs, of which each had so many evaluations before."""
        shares = []
        for run, evaluated in zip(runs, before, strict=True):
            done, spared = run.state.nfe - evaluated, 0.0
            if run.state.cache:
                whole = 1 - len(run.state.skip_blocks) / self._denoiser.blocks
                spared = (2 if run.state.guided else 1) * whole - done
            shares.append((run.stage.name, done, spared))
        return StepReport(seconds, tuple(shares))

    def _advance(self, entry: _Entry, run: StageRun) -> None:
        """Count a step and hand out what is due after it; at a stage's end, the entry goes on to the next or leaves."""
        entry.done += 1
        keeps = entry.done in entry.checkpoints
        try:
            if entry.tell:
                entry.tell(entry.done)
            if entry.done in entry.previews:
                entry.show(entry.done, run.preview())
            if not (keeps or run.state.done):
                return
            packet = run.finish() if run.state.done else run.checkpoint()
            if keeps and packet.position < entry.end:
                entry.keep(entry.done, packet)
        except Exception as error:
            self._leave([entry], error)
            return
        if packet.position == entry.end:
            self._leave([entry], packet)
        elif run.state.done:  # the next stage begins with the next step
            entry.packet, entry.run = packet, None

    def _choose(self) -> list[_Entry]:
        with self._changed:
            self._entries = sorted(entry for entry in self._entries if not entry.future.cancelled())
            waiting = list(self._entries)
        batch: list[_Entry] = []
        tokens = 0
        for entry in waiting:
            if batch and (entry.packet.grid != batch[0].packet.grid or tokens + entry.tokens > self._max_tokens):
                continue
            if self._begin(entry):
                batch.append(entry)
                tokens += entry.tokens
        return batch

    def _begin(self, entry: _Entry) -> bool:
        """Begin the entry's stage unless it has begun; return False if that fails, with the error in its future."""
        if entry.run is None:
            try:
                entry.run = self._denoiser.begin(entry.packet, entry.plan)
            except Exception as error:
                self._leave([entry], error)
                return False
        return True

    def _leave(self, entries: Sequence[_Entry], result: LatentPacket | Exception) -> None:
        """Take entries off the device, and resolve the futures that were not cancelled."""
        left = {entry.number for entry in entries}
        with self._changed:
            self._entries = [entry for entry in self._entries if entry.number not in left]
        for entry in entries:
            if entry.future.set_running_or_notify_cancel():
                if isinstance(result, Exception):
                    entry.future.set_exception(result)
                else:
                    entry.future.set_result(result)
