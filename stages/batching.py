"""Continuous batching by denoising step: what is on a device joins and leaves its batch between two steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition

from stages.errors import NotFinite
from stages.packet import LatentPacket
from stages.plan import Plan
from stages.stage import Denoiser, StageRun


def _ignore(preview: LatentPacket) -> None:
    pass


@dataclass(order=True)
class _Entry:
    """A packet that waits or is under way, ordered by urgency."""

    deadline: float
    number: int  # by arrival
    packet: LatentPacket = field(compare=False)
    plan: Plan = field(compare=False)
    end: int = field(compare=False)  # position of the packet when it leaves
    previews: Collection[int] = field(compare=False)
    show: Callable[[LatentPacket], object] = field(compare=False)
    future: Future[LatentPacket] = field(compare=False, default_factory=Future)
    run: StageRun | None = field(compare=False, default=None)
    steps: int = field(compare=False, default=0)  # done since it came

    @property
    def tokens(self) -> int:
        """Image tokens of a step."""
        return len(self.packet.latent) * self.plan.stages[self.packet.position].evaluations


class StepBatcher:
    """Shares one device's steps between packets of any plans, stages and sizes.

    Before each step the most urgent packet is chosen, the one with the earliest deadline and among equals the one
    that came first; others of its grid, in the same order, fill the batch up to a number of image tokens. Packets
    with another grid wait until every more urgent packet has finished; less urgent newcomers never overtake them.
    """

    def __init__(self, denoiser: Denoiser, max_tokens: int) -> None:
        """Args:
        max_tokens: image tokens of a forward pass; guided packets count twice. One packet may be more.
        """
        self._denoiser = denoiser
        self._max_tokens = max_tokens
        self._entries: list[_Entry] = []
        self._numbers = itertools.count()
        self._changed = Condition()
        self._closed = False

    def submit(
        self,
        packet: LatentPacket,
        plan: Plan,
        *,
        stages: int = 1,
        previews: Collection[int] = (),
        show: Callable[[LatentPacket], object] = _ignore,
        deadline: float = math.inf,
    ) -> Future[LatentPacket]:
        """Queue a packet for the stages of `plan` from the one that it waits for; from any thread.

        Cancelling the future takes the packet off the device before the next step.

        Args:
            stages: how many to take it through, parts counted.
            previews: after which of the steps from here on, counted from 1, to call `show`.
            show: takes a packet to decode, see `StageRun.preview`, on the device's thread.
            deadline: seconds since the epoch; who has less time goes first.

        Returns:
            What also raises the errors of `Denoiser.begin`, and NotFinite.

        Raises:
            RuntimeError: closed.
        """
        entry = _Entry(deadline, next(self._numbers), packet, plan, packet.position + stages, previews, show)
        with self._changed:
            if self._closed:
                raise RuntimeError("this replica takes no more work")
            self._entries.append(entry)
            self._changed.notify()
        return entry.future

    def run(self) -> None:
        """Work until closed and empty; for the one thread that uses the device."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._entries or self._closed)
                if not self._entries:
                    return
            self.step()

    def close(self) -> None:
        """Take no more packets and let `run` return after those that are here."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def step(self) -> list[LatentPacket]:
        """One step of the most urgent batch; its packets as they came, none if nothing is here."""
        batch = self._choose()
        packets = [entry.packet for entry in batch]
        runs = [entry.run for entry in batch if entry.run]
        if runs:
            try:
                self._denoiser.step(runs)
            except Exception as error:
                self._leave(batch, error)
            else:
                for entry in batch:
                    if entry.run:
                        self._advance(entry, entry.run)
        return packets

    def _advance(self, entry: _Entry, run: StageRun) -> None:
        entry.steps += 1
        if entry.steps in entry.previews:
            entry.show(run.preview())
        if run.state.done:
            self._finish(entry, run)

    def _finish(self, entry: _Entry, run: StageRun) -> None:
        """End a stage: the entry goes on to its next, or leaves."""
        try:
            packet = run.finish()
        except NotFinite as error:
            self._leave([entry], error)
            return
        if packet.position < entry.end:
            entry.packet, entry.run = packet, None
        else:
            self._leave([entry], packet)

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
        """Whether the entry is under way; if it cannot be, its future says why."""
        if entry.run is None:
            try:
                entry.run = self._denoiser.begin(entry.packet, entry.plan)
            except Exception as error:
                self._leave([entry], error)
                return False
        return True

    def _leave(self, entries: Sequence[_Entry], result: LatentPacket | Exception) -> None:
        """Take entries off the device and tell their callers, if those have not gone away."""
        left = {entry.number for entry in entries}
        with self._changed:
            self._entries = [entry for entry in self._entries if entry.number not in left]
        for entry in entries:
            if entry.future.set_running_or_notify_cancel():
                if isinstance(result, Exception):
                    entry.future.set_exception(result)
                else:
                    entry.future.set_result(result)
