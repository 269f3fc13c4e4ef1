"""Which server gets the next microbatch: interleaved weighted round robin on measured throughput (SWARM, appendix A).

Every server has a priority: the time at which it would finish everything it was given, at its measured speed. The
earliest wins, so over time servers get work in proportion to their throughput, interleaved. Differences from SWARM:
a call in flight counts with the time it has been waiting, so a hung peer looks slow, never fast; a failed server sits
out for a penalty that doubles with each failure in a row and is then probed by a single call; who could not be chosen
for a while gets its share from then on, not what it missed (virtual time, as in fair queueing: Golestani 1994).
Pure: time is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

SMOOTHING = 0.3  # weight of the newest measurement
FIRST_GUESS_S = 0.05
MAX_PENALTY_S = 60.0
MAX_DOUBLINGS = 16
SHORTEST_S = 1e-4  # no server counts as faster than this, so that even calls without duration are shared


@dataclass(slots=True)
class _Server:
    seconds: float | None = None  # smoothed time of one call, without waiting behind our own
    in_flight: dict[int, float] = field(default_factory=dict)  # ticket -> start
    failures: int = 0  # in a row; calls that were in flight together fail together, as one
    failed_at: float = -math.inf
    banned_until: float = 0.0
    last_done: float = -math.inf  # when it last finished a call of ours
    credit: float = 0.0  # virtual finish time of what it was given

    @property
    def known_s(self) -> float:
        return FIRST_GUESS_S if self.seconds is None else max(self.seconds, SHORTEST_S)


class Router:
    """Chooses among the servers of one stage."""

    def __init__(self, servers: Iterable[str] = ()) -> None:
        self._servers: dict[str, _Server] = {}
        self._tickets = 0
        self._clock = 0.0  # virtual time: the earliest finish that was on offer at the last start
        self.update(servers)

    def update(self, servers: Iterable[str]) -> None:
        """Set the servers of this stage; what is known of those that stay is kept."""
        self._servers = {peer: self._servers.get(peer) or _Server() for peer in servers}

    def estimate_s(self, peer: str, now: float) -> float:
        """Expected seconds of a call: the smoothed measurement, or longer if one in flight already takes longer."""
        server = self._servers[peer]
        return max([server.known_s, *(now - start for start in server.in_flight.values())])

    def choose(self, now: float, avoid: Sequence[str] = ()) -> str | None:
        """The server for the next call, or None if all are in `avoid`.

        Banned servers and those whose probe is under way come last: without a call in flight first, then soonest.
        """
        candidates = [peer for peer in self._servers if peer not in avoid]
        if not candidates:
            return None
        usable = [peer for peer in candidates if self._usable(peer, now)]
        if not usable:
            return min(candidates, key=lambda p: (*self._suspicion(self._servers[p]), p))
        return min(usable, key=lambda p: (self._begin(self._servers[p]) + self.estimate_s(p, now), p))

    @staticmethod
    def _suspicion(server: _Server) -> tuple[bool, float]:
        return bool(server.in_flight), server.banned_until

    def _begin(self, server: _Server) -> float:
        """When, in virtual time, the next call to it would begin: an idle server does not save up turns."""
        return max(server.credit, self._clock - server.known_s)

    def _usable(self, peer: str, now: float) -> bool:
        server = self._servers[peer]
        if server.banned_until > now:
            return False
        return not (server.failures and server.in_flight)  # on probation: one call at a time

    def start(self, peer: str, now: float) -> int:
        """A call to `peer` begins; returns its ticket."""
        self._tickets += 1
        server = self._servers.get(peer)
        if server is not None:
            offers = [self._begin(s) + s.known_s for p, s in self._servers.items() if self._usable(p, now)]
            self._clock = max(self._clock, min(offers, default=self._clock))
            server.credit = self._begin(server) + self.estimate_s(peer, now)
            server.in_flight[self._tickets] = now
        return self._tickets

    def succeeded(self, peer: str, ticket: int, now: float) -> None:
        server = self._servers.get(peer)
        if server is None or ticket not in server.in_flight:
            return
        # a call that waited behind others of ours says nothing about the server: count from when its turn came
        seconds = now - max(server.in_flight.pop(ticket), server.last_done)
        server.last_done = now
        server.seconds = seconds if server.seconds is None else (1 - SMOOTHING) * server.seconds + SMOOTHING * seconds
        server.failures = 0
        server.banned_until = 0.0

    def failed(self, peer: str, ticket: int, now: float, *, penalty_s: float = 1.0) -> None:
        """The call failed; `penalty_s` doubles with every failure in a row, at most to MAX_PENALTY_S."""
        server = self._servers.get(peer)
        if server is None or ticket not in server.in_flight:
            return
        start = server.in_flight.pop(ticket)
        if now - start > server.known_s:  # a quick refusal says nothing about its speed
            server.seconds = now - start
        if start >= server.failed_at:
            server.failures = min(server.failures + 1, MAX_DOUBLINGS)
            server.failed_at = now
        penalty_s = min(penalty_s * 2 ** (server.failures - 1), MAX_PENALTY_S)
        server.banned_until = max(server.banned_until, now + penalty_s)

    def cancelled(self, peer: str, ticket: int) -> None:
        """The call was given up by us; says nothing about the peer."""
        server = self._servers.get(peer)
        if server is not None:
            server.in_flight.pop(ticket, None)
