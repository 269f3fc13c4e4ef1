"""A committee member's vote: Paxos answers made durable before they are sent (DESIGN 4.3.2).

A vote that was given must never be forgotten while its round is open. Three things see to that: an answer is on disk
before it leaves; votes are deleted only for rounds whose entry is on disk, below a durable floor; and a peer that may
have voted before its disk was lost or damaged abstains, in that round or until the log has let it out and in again.
"""

from __future__ import annotations

import asyncio

from shoal.protocol import paxos
from shoal.protocol.codecs import pack, unpack
from shoal.protocol.events import Problem, Reason
from shoal.protocol.runlog import VOTE_DOMAIN, Entry, Vote, digest_of, vote_payload
from shoal.protocol.transport import Refused, Reply, Request
from shoal.swarm.pipeline.context import Context
from shoal.swarm.pipeline.history import History
from shoal.swarm.pipeline.messages import Accept, AcceptVote, Prepare, Promise, Round

FLOOR = "vote-floor"  # votes of rounds up to here were deleted
ABSTAINS = "vote-abstains"
NEVER = 2**62  # promised to nobody in particular: this acceptor takes no ballot of the round any more


class Acceptor:
    """One Paxos acceptor for the entry under way. State of decided entries is deleted: the log is the proof."""

    def __init__(self, context: Context, history: History) -> None:
        self._context = context
        self._history = history
        self._lock = asyncio.Lock()
        self._floor = -1
        self._forgetful_since: int | None = None  # our admission under which earlier votes may be lost

    async def open(self, *, forgetful: bool) -> None:
        """Load what must not be forgotten. `forgetful`: the disk is not the one that this identity voted with."""
        floor = await self._context.store.get(FLOOR)
        self._floor = int(floor) if floor is not None else -1
        abstains = await self._context.store.get(ABSTAINS)
        self._forgetful_since = int(abstains) if abstains is not None else None
        if forgetful:
            member = self._history.head.member(self._context.me)
            # a log that was just begun cannot tell under which admission we voted: any that it shows is suspect
            await self.abstain(member.since if member is not None else NEVER)

    async def abstain(self, since: int) -> None:
        """Votes given under our admission in entry `since` may be lost: give none until the log admits us anew."""
        if self._forgetful_since != since:
            await self._context.store.put(ABSTAINS, str(since).encode())
            self._context.emit(
                Problem(
                    Reason.NOT_FOUND,
                    "this node's votes of before are not on its disk: it abstains until it was let out and in again",
                    "nothing to do; next time keep the whole directory together",
                )
            )
        self._forgetful_since = since

    @property
    def abstains(self) -> bool:
        """Must this peer leave and be admitted again before it may vote?"""
        member = self._history.head.member(self._context.me)
        return self._forgetful_since is not None and member is not None and member.since <= self._forgetful_since

    def serve(self) -> None:
        self._context.transport.serve(self._context.calls.prepare, self._on_prepare)
        self._context.transport.serve(self._context.calls.accept, self._on_accept)

    async def state(self, where: Round) -> paxos.AcceptorState:
        """What this acceptor promised and accepted for the round under way.

        Bound to the round's number only: a vote for round r is a vote for entry r, whatever came to light since.
        """
        if self.abstains or where.round <= self._floor:
            return paxos.AcceptorState(NEVER)
        key = self._key(where)
        present = self._context.store.size(key) is not None
        data = await self._context.store.get(key)
        if data is None and not present:
            return paxos.AcceptorState()
        if data is None:  # damaged: what it said is unknown, so nothing more may be said in this round
            state = paxos.AcceptorState(NEVER)
            await self._save(where, state)
            return state
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
        if self.abstains:
            raise Refused(Reason.NOT_READY, "this peer's earlier votes are lost")

    async def learned(self, head: Entry) -> None:
        """The log has come to us anew: the admission that it shows now is the one under which votes may be lost."""
        if self._forgetful_since == NEVER and head.round > 0:
            member = head.member(self._context.me)
            await self.abstain(member.since if member is not None else head.round)

    async def forget(self, before: int) -> None:
        """Delete the votes on entries that are decided and on disk."""
        old = [key for key in self._context.store.keys("paxos/") if int(key.rsplit("-", 1)[1]) < before]
        if not old:
            return
        self._floor = max(self._floor, before - 1)
        await self._context.store.put(FLOOR, str(self._floor).encode())
        for key in old:
            await self._context.store.delete(key)
