"""What a server's gradient sums hold, per bucket (DESIGN 4.4).

A bucket is one gradient sum and the set of microbatches in it; a plan takes a bucket whole or leaves it. First
attempts of a round share bucket 0, since nobody else can hold them unless they are retried elsewhere. Retries and
repairs, the only microbatches that two servers may both hold, get a bucket of their own while `max_buckets` allows it
and share the last one afterwards: so a conflict costs the retry, not the round.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bucket:
    """One gradient sum: its id, the microbatches in it, and the sum of their losses (0 unless the last stage)."""

    id: int
    microbatches: tuple[int, ...]
    loss_sum: float


class Ledger:
    """The buckets of one server in one round. Says where a microbatch belongs; the sums themselves live elsewhere."""

    def __init__(self, max_buckets: int) -> None:
        if max_buckets < 1:
            raise ValueError("a server needs at least one bucket")
        self._max = max_buckets
        self._buckets: dict[int, dict[int, float]] = {}

    def holds(self, microbatch: int) -> bool:
        return any(microbatch in bucket for bucket in self._buckets.values())

    def place(self, *, first: bool) -> int:
        """The bucket for a microbatch; `first`: first attempt, before any plan."""
        if first or self._max == 1:
            return 0
        free = (id_ for id_ in range(1, self._max) if id_ not in self._buckets)
        return next(free, self._max - 1)

    def add(self, bucket: int, microbatch: int, loss: float) -> None:
        if self.holds(microbatch):
            raise ValueError(f"microbatch {microbatch} is already in the ledger")
        self._buckets.setdefault(bucket, {})[microbatch] = loss

    def discard(self, bucket: int) -> None:
        """Forget a bucket that a plan left out; its microbatches may be added again."""
        self._buckets.pop(bucket, None)

    def buckets(self) -> tuple[Bucket, ...]:
        return tuple(
            Bucket(id_, tuple(sorted(held)), sum(held[m] for m in sorted(held)))
            for id_, held in sorted(self._buckets.items())
        )

    def __len__(self) -> int:
        return sum(len(held) for held in self._buckets.values())
