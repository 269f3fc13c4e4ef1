"""A committee member's vote: Paxos answers made durable before they are sent (DESIGN 4.3.2)."""

from __future__ import annotations

import asyncio

from shoal.protocol import paxos
from shoal.protocol.codecs import pack, unpack
from shoal.protocol.events import Reason
from shoal.protocol.runlog import VOTE_DOMAIN, Entry, Vote, digest_of, vote_payload
from shoal.protocol.transport import Refused, Reply, Request
from shoal.swarm.pipeline.context import Context
from shoal.swarm.pipeline.history import History
from shoal.swarm.pipeline.messages import Accept, AcceptVote, Prepare, Promise, Round


class Acceptor:
    """One Paxos acceptor for the entry under way. State of decided entries is deleted: the log is the proof."""

    def __init__(self, context: Context, history: History) -> None:
        self._context = context
        self._history = history
        self._lock = asyncio.Lock()

    def serve(self) -> None:
        self._context.transport.serve(self._context.calls.prepare, self._on_prepare)
        self._context.transport.serve(self._context.calls.accept, self._on_accept)

    async def state(self, where: Round) -> paxos.AcceptorState:
        """What this acceptor promised and accepted for the round under way.

        Bound to the round's number only: a vote for round r is a vote for entry r, whatever came to light since.
        """
        data = await self._context.store.get(self._key(where))
        if data is None:
            return paxos.AcceptorState()
        parts = unpack(data, max_parts=3)
        promised = int.from_bytes(parts[0], "big", signed=True)
        if len(parts) == 1:
            return paxos.AcceptorState(promised)
        return paxos.AcceptorState(
            promised, paxos.Accepted(int.from_bytes(parts[1], "big", signed=True), bytes(parts[2]))
        )

    async def _save(self, where: Round, state: paxos.AcceptorState) -> None:
        parts = [state.promised.to_bytes(8, "big", signed=True)]
        if state.accepted is not None:
            parts += [state.accepted.ballot.to_bytes(8, "big", signed=True), state.accepted.value]
        await self._context.store.put(self._key(where), pack(parts))

    def _key(self, where: Round) -> str:
        return f"paxos/{where.term:06d}-{where.round:012d}"

    async def _on_prepare(self, request: Request[Prepare]) -> Reply[Promise]:
        where = request.header.at
        await self._admit(request.sender, where)
        async with self._lock:
            self._history.check(where)
            state, promised = paxos.prepare(await self.state(where), request.header.ballot)
            if not promised:
                return Reply(Promise(promised=False, ballot=state.promised))
            await self._save(where, state)
        accepted = state.accepted
        if accepted is None:
            return Reply(Promise(promised=True, ballot=state.promised))
        return Reply(Promise(promised=True, ballot=state.promised, accepted=accepted.ballot), accepted.value)

    async def _on_accept(self, request: Request[Accept]) -> Reply[AcceptVote]:
        where, ballot = request.header.at, request.header.ballot
        await self._admit(request.sender, where)
        entry = Entry.from_bytes(request.body)
        async with self._lock:
            self._history.check(where)
            self._history.chain.check_follows(entry)
            state, accepted = paxos.accept(await self.state(where), ballot, request.body)
            if not accepted:
                return Reply(AcceptVote(accepted=False, ballot=state.promised))
            await self._save(where, state)
        return Reply(AcceptVote(accepted=True, ballot=ballot, signature=self._sign(where, ballot, request.body)))

    def _sign(self, where: Round, ballot: int, value: bytes) -> str:
        payload = vote_payload(where.run, where.round, ballot, digest_of(value))
        return self._context.signer.sign(VOTE_DOMAIN, payload).hex()

    def vote(self, header: AcceptVote, peer: str) -> Vote:
        return Vote(peer=peer, signature=header.signature)

    async def _admit(self, sender: str, where: Round) -> None:
        """Only the named committee proposes, and only a member of it votes."""
        await self._history.reach(where, self._context.patience.pong_s, sender)
        head = self._history.head
        if self._context.me not in head.committee or sender not in head.committee:
            raise Refused(Reason.NOT_MEMBER, "not on the committee of this round")

    async def forget(self, before: int) -> None:
        """Delete the votes on entries that are decided."""
        for key in self._context.store.keys("paxos/"):
            if int(key.rsplit("-", 1)[1]) < before:
                await self._context.store.delete(key)
