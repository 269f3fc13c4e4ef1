"""How long to wait for an operation: learned from how long it took, robust to outliers, honest about what hangs.

    value = clamp(median + k * spread, floor_s, ceiling_s),   spread = max(MAD, median / 10)

over a bounded window of measured durations (MAD = median absolute deviation: Hampel, "The influence curve and its role
in robust estimation", 1974). The tenth of the median keeps identical measurements from giving a deadline without
slack. What we add: an operation that has not ended (`pending`) or was given up (`expire`) is a *censored* measurement,
"at least this long". It can raise the estimate and never lowers it; a peer that hangs looks slow, never fast. After a
give-up the deadline at least doubles (Karn and Partridge, SIGCOMM 1987) and comes back by halves as operations succeed.

Pure: no clock of its own, no I/O.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median

WINDOW = 32
WARM = 3  # until this many measurements the initial value is the least that is used


class Deadline:
    """A deadline estimator for one kind of operation at one peer. All numbers are seconds."""

    def __init__(self, initial_s: float, floor_s: float, ceiling_s: float, k: float = 6.0) -> None:
        if not (0 < floor_s <= initial_s <= ceiling_s < math.inf and 0 <= k < math.inf):
            given = f"{floor_s=} {initial_s=} {ceiling_s=} {k=}"
            raise ValueError(f"need 0 < floor_s <= initial_s <= ceiling_s and k >= 0, all finite; got {given}")
        self.initial_s = initial_s
        self.floor_s = floor_s
        self.ceiling_s = ceiling_s
        self.k = k
        self._window: deque[float] = deque(maxlen=WINDOW)
        self._hold_s = 0.0  # after a give-up: the deadline is at least this
        self._running_s = 0.0  # in a `pending` view: the typical duration is at least this

    def observe(self, seconds: float) -> None:
        """An operation ended well after `seconds`. Raises ValueError unless it is a finite number >= 0."""
        _check(seconds)
        if seconds <= self._estimate_s():
            self._hold_s /= 2
        self._window.append(seconds)

    def expire(self, elapsed: float) -> None:
        """An operation was given up after `elapsed` seconds without an answer: the deadline doubles, never falls."""
        _check(elapsed)
        before = self.value()
        self._window.append(max(elapsed, self.typical()))
        self._hold_s = min(self.ceiling_s, 2 * max(before, min(elapsed, self.ceiling_s)))

    def pending(self, elapsed: float) -> Deadline:
        """What this estimator would say knowing that an operation has been running for `elapsed` seconds, unfinished.

        A copy: this object does not change. Its `value` and `typical` are never below ours and grow with `elapsed`.
        """
        _check(elapsed)
        view = Deadline(self.initial_s, self.floor_s, self.ceiling_s, self.k)
        view._window = self._window.copy()
        view._hold_s = self._hold_s
        view._running_s = max(self._running_s, elapsed)
        return view

    def typical(self) -> float:
        """The median duration, or the initial value when nothing was measured; for ranking peers."""
        return max(median(self._window) if self._window else self.initial_s, self._running_s)

    def value(self) -> float:
        """How long to wait for the next operation."""
        return min(max(self._estimate_s(), self._hold_s, self.floor_s), self.ceiling_s)

    @property
    def measurements(self) -> int:
        """How many measurements are in the window (at most WINDOW)."""
        return len(self._window)

    def _estimate_s(self) -> float:
        if not self._window:
            return max(self.initial_s, self._running_s)
        middle = median(self._window)
        spread = max(median([abs(seconds - middle) for seconds in self._window]), middle / 10)
        estimate = max(middle, self._running_s) + self.k * spread
        return estimate if len(self._window) >= WARM else max(estimate, self.initial_s)


def _check(seconds: float) -> None:
    if not (0 <= seconds < math.inf):
        raise ValueError(f"a duration must be a finite number >= 0, got {seconds}")
