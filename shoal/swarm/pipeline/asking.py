"""Asking several peers at once, with deadlines that follow how long each kind of call takes.

A peer that does not answer is simply not in the result; why one refused is kept for the caller that wants to know.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic

from shoal.protocol.deadlines import Deadline
from shoal.protocol.events import Reason
from shoal.protocol.transport import A, CallError, Method, Q, Refused, Reply
from shoal.swarm.pipeline.context import Context
from shoal.swarm.pipeline.history import History

LEAST = 0.2  # of the first guess: a deadline never gets shorter than that


@dataclass(frozen=True, slots=True)
class Answers(Generic[A]):
    """Replies in the order of the peers asked, and the reason of everyone who refused or could not be asked."""

    replies: dict[str, Reply[A]]
    failures: dict[str, CallError] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, A]:
        return {peer: reply.header for peer, reply in self.replies.items()}

    def refused(self, reason: Reason) -> bool:
        return any(isinstance(e, Refused) and e.reason is reason for e in self.failures.values())


class Asker:
    """Calls for one leader. Deadlines are per method, over all peers: the slowest that still answers sets them."""

    def __init__(self, context: Context, history: History) -> None:
        self._context = context
        self._history = history
        patience, calls = context.patience, context.calls
        guesses = {
            calls.freeze.name: patience.freeze_s,
            calls.discard.name: patience.freeze_s,
            calls.reduce.name: patience.reduce_s + patience.pong_s,
            calls.adopt.name: patience.reduce_s + patience.pong_s,
            calls.repair.name: patience.reduce_s,
            calls.prepare.name: patience.paxos_s,
            calls.accept.name: patience.paxos_s,
        }
        self._deadlines = {
            name: Deadline(guess, guess * LEAST, max(guess, patience.ceiling_s)) for name, guess in guesses.items()
        }

    def timeout_s(self, method: Method[Q, A]) -> float:
        """How long a call of this kind may take. Looks and news (ping, learn) have a fixed bound: they do no work."""
        deadline = self._deadlines.get(method.name)
        return self._context.patience.pong_s if deadline is None else deadline.value()

    async def ask(
        self, peers: Sequence[str], method: Method[Q, A], header: Callable[[str], Q], body: bytes = b""
    ) -> Answers[A]:
        """Call all of `peers` at once and wait for every answer or its deadline."""
        replies: dict[str, Reply[A]] = {}
        failures: dict[str, CallError] = {}
        timeout_s = self.timeout_s(method)

        async def one(peer: str) -> None:
            started = self._context.now()
            try:
                replies[peer] = await self._context.transport.call(
                    peer, method, header(peer), body, timeout_s=timeout_s
                )
            except CallError as error:
                failures[peer] = error
                if isinstance(error, Refused) and error.reason is Reason.STALE:
                    await self._history.pull(peer)
                return
            deadline = self._deadlines.get(method.name)
            if deadline is not None and peer != self._context.me:
                deadline.observe(self._context.now() - started)

        async with asyncio.TaskGroup() as group:
            for peer in peers:
                group.create_task(one(peer))
        if method.name in self._deadlines and any(e.reason is Reason.DEADLINE for e in failures.values()):
            self._deadlines[method.name].expire(timeout_s)
        return Answers({p: replies[p] for p in peers if p in replies}, {p: failures[p] for p in peers if p in failures})
