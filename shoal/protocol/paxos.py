"""Single-decree Paxos, one instance per log entry (Lamport 2001, "Paxos Made Simple"), as pure functions.

Ballots are integers `number * 8 + rank`, rank being the proposer's place in the round's leader order, so no two
proposers share one. Ballot 0 belongs to the first leader and needs no promises, since nothing lower exists: the usual
round costs one exchange. A proposer is an acceptor too and asks itself first: its own durable state is what keeps it,
after a restart, from using a ballot twice.

The caller must make a returned state durable *before* it sends the answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

RANKS = 8


@dataclass(frozen=True, slots=True)
class Accepted:
    ballot: int
    value: bytes


@dataclass(frozen=True, slots=True)
class AcceptorState:
    """What an acceptor must never forget about one instance. promised = -1: nothing yet."""

    promised: int = -1
    accepted: Accepted | None = None


def prepare(state: AcceptorState, ballot: int) -> tuple[AcceptorState, bool]:
    """Phase 1b: promise to accept nothing below `ballot`. Returns (new state, promised?)."""
    if ballot < state.promised:
        return state, False
    return AcceptorState(ballot, state.accepted), True


def accept(state: AcceptorState, ballot: int, value: bytes) -> tuple[AcceptorState, bool]:
    """Phase 2b: accept unless a higher ballot was promised, or this ballot already carried another value."""
    if ballot < state.promised:
        return state, False
    if state.accepted is not None and state.accepted.ballot == ballot and state.accepted.value != value:
        return state, False
    return AcceptorState(ballot, Accepted(ballot, value)), True


def choose(promised: Iterable[Accepted | None], own: bytes) -> bytes:
    """Phase 2a: the value of the highest ballot that a promiser accepted; one's own where none did."""
    best = max((a for a in promised if a is not None), key=lambda a: a.ballot, default=None)
    return own if best is None else best.value


def next_ballot(seen: int, rank: int) -> int:
    """A ballot of `rank` above `seen`, the highest one seen (-1: none); 0 only for rank 0 that saw nothing."""
    if seen < 0 and rank == 0:
        return 0
    number = max(seen // RANKS + 1, 1)
    return number * RANKS + rank
