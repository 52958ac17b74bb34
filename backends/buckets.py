"""Few sizes for devices that compile for every shape."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Buckets:
    """The powers of two from `least` on, to which a size is rounded up."""

    least: int = 1

    def fit(self, size: int) -> int:
        """Return the smallest bucket that holds `size`."""
        return max(self.least, 1 << max(size - 1, 0).bit_length())

    def up_to(self, size: int) -> tuple[int, ...]:
        """Return all buckets that sizes up to `size` are rounded to, from the smallest on."""
        buckets = [self.fit(1)]
        while buckets[-1] < size:
            buckets.append(2 * buckets[-1])
        return tuple(buckets)
