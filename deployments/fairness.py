"""Fair queueing: flows share what serves them by weight, however much each of them has queued."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(order=True)
class _Entry(Generic[T]):
    start: float  # in virtual time
    number: int  # in order of arrival
    item: T = field(compare=False)


class FairQueue(Generic[T]):
    """A queue of items of any cost by start-time fair queueing (Goyal, Vin and Cheng, 1996).

    Every item starts, in virtual time, when its flow's item before it finishes, which is its cost over the flow's
    weight later; the item with the earliest start is the next. So a flow gets its share whatever the others do, and a
    flow that had nothing queued is served soon. Deficit round robin shares alike, but in turns as large as the largest
    item.
    """

    def __init__(self) -> None:
        self._entries: list[_Entry[T]] = []  # a heap
        self._numbers = itertools.count()
        self._now = 0.0  # start of the last item that was taken
        self._finished: dict[Hashable, float] = {}  # when the last item of each flow will be

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[T]:
        """Yield the items in any order."""
        return (entry.item for entry in self._entries)

    def push(self, item: T, flow: Hashable, cost: float, weight: float = 1.0) -> None:
        """Queue an item.

        Args:
            item: the item.
            flow: what it belongs to.
            cost: its work, in the unit of all costs.
            weight: share of its flow among the others.
        """
        start = self._start(flow)
        self._finished[flow] = start + cost / weight
        heapq.heappush(self._entries, _Entry(start, next(self._numbers), item))

    def pop(self) -> T:
        """Take the next item; raises IndexError if there is none."""
        entry = heapq.heappop(self._entries)
        self._now = entry.start
        self._finished = {flow: finish for flow, finish in self._finished.items() if finish > entry.start}
        return entry.item

    def discard(self, item: T) -> None:
        """Take an item out; its flow's others stay where they are. Nothing happens if it is not there."""
        self._entries = [entry for entry in self._entries if entry.item is not item]
        heapq.heapify(self._entries)

    def behind(self, flow: Hashable) -> Iterator[T]:
        """Yield the items that an item of this flow would overtake if it were queued now."""
        start = self._start(flow)
        return (entry.item for entry in self._entries if entry.start > start)

    def _start(self, flow: Hashable) -> float:
        return max(self._now, self._finished.get(flow, 0.0))
