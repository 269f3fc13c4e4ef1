"""Getting an entry decided: the proposer's side of single-decree Paxos (`protocol.paxos`) among the named committee."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.protocol import paxos
from shoal.protocol.events import ProposalFailed, Reason, WaitingForQuorum
from shoal.protocol.runlog import VOTE_DOMAIN, Decided, Vote, digest_of, majority, vote_payload
from shoal.swarm.pipeline.acceptor import Acceptor
from shoal.swarm.pipeline.asking import Answers, Asker
from shoal.swarm.pipeline.context import Context
from shoal.swarm.pipeline.history import History
from shoal.swarm.pipeline.messages import Accept, AcceptVote, Prepare, Promise, Round


class Proposer:
    """Proposes for this peer. It asks its own acceptor first: what that has on disk keeps ballots from being reused."""

    def __init__(self, context: Context, history: History, acceptor: Acceptor, asker: Asker) -> None:
        self._context = context
        self._history = history
        self._acceptor = acceptor
        self._asker = asker

    async def decide(self, where: Round, rank: int, own: bytes) -> tuple[bytes, Decided] | None:
        """Decide the entry of this round: `own`, or one that may already have been chosen. None: try again later."""
        state = await self._acceptor.state(where)
        ballot = paxos.next_ballot(state.promised, rank)
        value: bytes | None = own
        if ballot > 0:
            value = await self._prepare(where, ballot, own)
        return None if value is None else await self._accept(where, ballot, value)

    async def _prepare(self, where: Round, ballot: int, own: bytes) -> bytes | None:
        """Phase 1: the value that must be proposed at `ballot`, or None without a majority of promises."""
        message = Prepare(at=where, ballot=ballot)
        answered = 0
        granted: dict[str, tuple[Promise, bytes]] = {}
        for group in self._in_turn():
            answers: Answers[Promise] = await self._asker.ask(group, self._context.calls.prepare, lambda _: message)
            answered += len(answers.replies)
            granted |= {p: (r.header, r.body) for p, r in answers.replies.items() if r.header.promised}
            if self._context.me not in granted:
                self._fail(where, Reason.OUTVOTED)
                return None
        if len(granted) < majority(self._history.head.committee):
            self._short(where, answered)
            return None
        accepted = [paxos.Accepted(p.accepted, body) if p.accepted >= 0 else None for p, body in granted.values()]
        return paxos.choose(accepted, own)

    async def _accept(self, where: Round, ballot: int, value: bytes) -> tuple[bytes, Decided] | None:
        """Phase 2: a majority of valid signed accepts decides."""
        head = self._history.head
        message = Accept(at=where, ballot=ballot)
        payload = vote_payload(where.run, where.round, ballot, digest_of(value))
        answered = 0
        votes: dict[str, Vote] = {}
        for group in self._in_turn():
            answers: Answers[AcceptVote] = await self._asker.ask(
                group, self._context.calls.accept, lambda _: message, value
            )
            answered += len(answers.replies)
            for peer, vote in answers.headers.items():
                if vote.accepted and self._is_valid(peer, payload, vote.signature):
                    votes[peer] = self._acceptor.vote(vote, peer)
            if self._context.me not in votes:
                self._fail(where, Reason.OUTVOTED)
                return None
        if len(votes) < majority(head.committee):
            self._short(where, answered)
            return None
        return value, Decided(ballot=ballot, votes=tuple(votes[p] for p in head.committee if p in votes))

    def _in_turn(self) -> tuple[Sequence[str], Sequence[str]]:
        committee = self._history.head.committee
        return [self._context.me], [p for p in committee if p != self._context.me]

    def _is_valid(self, peer: str, payload: bytes, signature: str) -> bool:
        member = self._history.head.member(peer)
        try:
            raw = bytes.fromhex(signature)
        except ValueError:
            return False
        return member is not None and self._context.verify(member.public_key, VOTE_DOMAIN, payload, raw)

    def _short(self, where: Round, answered: int) -> None:
        """No majority: of the living, or among them."""
        committee = self._history.head.committee
        if answered < majority(committee):
            self._context.emit(WaitingForQuorum(where.round, answered, len(committee)))
        else:
            self._fail(where, Reason.OUTVOTED)

    def _fail(self, where: Round, reason: Reason) -> None:
        self._context.emit(ProposalFailed(where.round, reason))
