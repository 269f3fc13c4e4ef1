"""A peer's copy of the run log: loads it, learns entries, tells who waits for them, fills gaps from others."""

from __future__ import annotations

import asyncio
import json
import math

from pydantic import ValidationError

from shoal.protocol.codecs import pack, unpack
from shoal.protocol.events import EntryDecided, Reason
from shoal.protocol.runlog import Chain, Commit, Decided, Entry
from shoal.protocol.transport import CallError, Empty, Refused, Reply, Request
from shoal.swarm.pipeline.context import Context, at
from shoal.swarm.pipeline.messages import MAX_ENTRIES_PER_CALL, Entries, EntriesFrom, Learn, Round


class History:
    """The chain, on disk and in memory. `learn` is the only way in; every entry is verified."""

    def __init__(self, context: Context, genesis: Entry) -> None:
        self._context = context
        self.chain = Chain(genesis)
        self._lock = asyncio.Lock()
        self._grew = asyncio.Condition()
        self._pulls: dict[str, asyncio.Task[bool]] = {}  # by peer; one at a time each

    async def open(self) -> None:
        """Load what the disk holds; a bad or missing entry ends the prefix, the rest is fetched again."""
        for key in self._context.store.keys("log/"):
            data = await self._context.store.get(key)
            if data is None:
                return
            try:
                entry_bytes, proof = unpack(data, max_parts=2)
                self._take(bytes(entry_bytes), Decided.model_validate_json(bytes(proof)))
            except (Refused, ValidationError, ValueError):
                return

    def serve(self) -> None:
        calls = self._context.calls
        self._context.transport.serve(calls.learn, self._on_learn)
        self._context.transport.serve(calls.entries, self._on_entries)

    @property
    def head(self) -> Entry:
        return self.chain.head

    def here(self) -> Round:
        """The round under way."""
        return at(self.chain.head, self.chain.head_digest)

    def check(self, where: Round) -> None:
        """Refuse a request that does not belong to the round under way: STALE, AHEAD or WRONG_RUN."""
        here = self.here()
        if where.run != here.run:
            raise Refused(Reason.WRONG_RUN)
        if where.round > here.round or where.term > here.term:
            raise Refused(Reason.AHEAD, f"round {where.round}, here {here.round}")
        if where != here:
            raise Refused(Reason.STALE, f"round {where.round}, here {here.round}")

    async def reach(self, where: Round, timeout_s: float, source: str) -> None:
        """Like `check`, but a request from just ahead may wait for the entry that is on its way, and asks for it."""
        if where.run == self.head.run and where.round > self.head.round + 1:
            try:
                if where.round > self.head.round + 2:
                    raise TimeoutError
                await self.beyond(where.round - 2, timeout_s)
            except TimeoutError:
                await self._pull_from_member(source)
        self.check(where)

    async def _pull_from_member(self, peer: str) -> None:
        """Strangers do not make us fetch; whoever joined after our head is heard through the members we know."""
        if self.head.member(peer) is not None:
            await self.pull(peer)

    async def beyond(self, round_: int, timeout_s: float | None = None) -> Entry:
        """Wait until the head is past `round_`. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s), self._grew:
            await self._grew.wait_for(lambda: self.head.round > round_)
        return self.head

    async def learn(self, data: bytes, proof: Decided) -> bool:
        """Take a decided entry. False if it was known. Raises Refused if it does not follow or lacks votes."""
        return await self._context.finish(self._learn(data, proof))

    async def _learn(self, data: bytes, proof: Decided) -> bool:
        async with self._lock:
            try:
                entry = self.chain.verified(data, proof, self._context.verify)
            except Refused as refusal:
                if refusal.reason is Reason.STALE:
                    return False
                raise
            # on disk before anybody can see it: votes on the entry are forgotten as soon as it is seen
            await self._context.store.put(
                f"log/{entry.round:012d}", pack([data, json.dumps(proof.model_dump(mode="json")).encode()])
            )
            self._take(data, proof)
        async with self._grew:
            self._grew.notify_all()
        return True

    def _take(self, data: bytes, proof: Decided) -> Entry:
        entry = self.chain.extend(data, proof, self._context.verify)
        for member in entry.members:
            if member.peer != self._context.me:
                self._context.transport.learn_address(member.peer, member.maddrs)
        self._context.emit(summary(entry, self.chain.head_digest, self._context.spec.shape.stages))
        return entry

    async def pull(self, peer: str) -> bool:
        """Fetch the entries that we miss from one peer. True if anything new came. Never raises CallError."""
        task = self._pulls.get(peer)
        if task is None:
            task = self._pulls[peer] = asyncio.ensure_future(self._pull(peer))
            task.add_done_callback(lambda _: self._pulls.pop(peer, None))
        return await asyncio.shield(task)

    async def _pull(self, peer: str) -> bool:
        """As long as every answer brings something new."""
        grew = False
        while True:
            before = self.head.round
            try:
                reply = await self._context.transport.call(
                    peer,
                    self._context.calls.entries,
                    EntriesFrom(run=self.head.run, round=self.head.round + 1),
                    timeout_s=self._context.patience.freeze_s,
                )
                parts = unpack(reply.body, max_parts=MAX_ENTRIES_PER_CALL)
                for data, proof in zip(parts, reply.header.proofs, strict=True):
                    grew = await self.learn(bytes(data), proof) or grew
            except (CallError, ValueError):
                return grew
            if self.head.round >= reply.header.head or self.head.round == before:
                return grew

    async def _on_learn(self, request: Request[Learn]) -> Reply[Empty]:
        try:
            await self.learn(request.body, request.header.proof)
        except Refused as refusal:
            if refusal.reason is not Reason.AHEAD:
                raise
            await self._pull_from_member(request.sender)
        return Reply(Empty())

    async def _on_entries(self, request: Request[EntriesFrom]) -> Reply[Entries]:
        if request.header.run != self.head.run:
            raise Refused(Reason.WRONG_RUN)
        start = max(1, request.header.round)
        proofs = [self.chain.proof(r) for r in range(start, min(len(self.chain), start + MAX_ENTRIES_PER_CALL))]
        header = Entries(head=self.head.round, proofs=tuple(proof for _, proof in proofs))
        return Reply(header, pack([data for data, _ in proofs]))


def summary(entry: Entry, digest: str, stages: int) -> EntryDecided:
    """The event that tells of an entry."""
    commit = entry.decision if isinstance(entry.decision, Commit) else None
    return EntryDecided(
        round=entry.round,
        term=entry.term,
        kind=entry.decision.kind,
        step=entry.step,
        digest=digest,
        members=len(entry.members),
        servers_per_stage=tuple(len(entry.servers(s)) for s in range(stages)),
        samples=commit.samples if commit else 0,
        loss=commit.loss_sum / commit.samples if commit else math.nan,
        samples_total=entry.samples_total,
        committee=entry.committee,
    )
