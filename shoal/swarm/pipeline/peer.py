"""One peer of a pipeline run: history, votes, stage state, server, feeder and leader under one roof.

`run` is the whole life of the peer: it follows the log, asks to join when it is not a member, keeps its stage's state
at the log's step, feeds and leads the rounds that the log gives it, and returns when the run has had its rounds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from shoal.protocol.allreduce import AllReduce
from shoal.protocol.blobs import BlobStore, serve_blobs
from shoal.protocol.events import PeerSuspected, Problem, Reason
from shoal.protocol.runlog import Entry, Member
from shoal.protocol.sampling import beacon_for, order
from shoal.protocol.transport import CallError, Refused, Reply, Request
from shoal.swarm.pipeline.acceptor import Acceptor
from shoal.swarm.pipeline.context import BatchSource, Context
from shoal.swarm.pipeline.disk import WatchedStore
from shoal.swarm.pipeline.feeder import Feeder
from shoal.swarm.pipeline.history import History
from shoal.swarm.pipeline.leader import Leader, Outbid
from shoal.swarm.pipeline.messages import Join, Joined, Ping, Pong, Round
from shoal.swarm.pipeline.server import StageServer
from shoal.swarm.pipeline.state import StateKeeper
from shoal.swarm.stage import StageProgram

MAX_PARAMETERS = 1 << 36  # of one stage; what is reduced is cut into small chunks
ASKS = 8  # how many times a joiner may stay silent before it is forgotten
# Opens a sealed record of a candidate: (bytes, sender) -> member. Raises Refused.
OpenRecord = Callable[[bytes, str], Member]


class PipelinePeer:
    """A peer of one run. `contacts` gives peers to ask for entries and admission while this node is not a member."""

    def __init__(
        self,
        context: Context,
        genesis: Entry,
        *,
        data: BatchSource | None,
        build: Callable[[int], StageProgram],
        record: Callable[[], bytes],
        open_record: OpenRecord,
        contacts: Callable[[], tuple[str, ...]],
    ) -> None:
        self._disk = WatchedStore(context.store)
        context = self._context = replace(context, store=self._disk, blobs=BlobStore(self._disk))
        self._record = record
        self._open_record = open_record
        self._contacts = contacts
        self._joiners: dict[str, Member] = {}
        self._leaving: set[str] = set()
        self._wants_out = False
        self.history = History(context, genesis)
        self.acceptor = Acceptor(context, self.history)
        self.allreduce = AllReduce(
            context.transport,
            run_in_thread=context.run_in_thread,
            emit=context.emit,
            max_elements=MAX_PARAMETERS,
        )
        self.server = StageServer(context, self.history, self.allreduce)
        self.state = StateKeeper(context, self.history, self.server, build)
        self.feeder = Feeder(context, self.history, data)
        self.leader = Leader(
            context, self.history, self.acceptor, lambda: dict(self._joiners), lambda: frozenset(self._leaving)
        )

    async def open(self, *, forgetful: bool = False) -> None:
        """Load what the disk holds and start to answer. `forgetful`: this identity voted before, with another disk."""
        await self.history.open()
        await self.state.open()
        self._fresh = self.history.head.round == 0
        await self.acceptor.open(forgetful=forgetful)
        for part in (self.history, self.acceptor, self.server, self.feeder, self.leader):
            part.serve()
        calls = self._context.calls
        self._context.transport.serve(calls.join, self._on_join)
        self._context.transport.serve(calls.ping, self._on_ping)
        serve_blobs(
            self._context.transport,
            self._context.blobs,
            max_chunk_bytes=self._context.spec.max_body_bytes,
            allow=lambda _: True,  # what a blob may be read by is decided when the connection is admitted
        )

    async def run(self) -> None:
        """Until the run has had its rounds. Cancel to stop earlier; state on disk is whole at any time."""
        async with asyncio.TaskGroup() as group:
            disk = group.create_task(self._disk.failure(), name="disk")
            keeper = group.create_task(self.state.run(), name="state")
            follower = group.create_task(self._follow(), name="follow")
            await self._rounds()
            follower.cancel()
            await self._settle()
            keeper.cancel()
            disk.cancel()

    async def _settle(self) -> None:
        """After the last round: have its state, if it is still to be had."""
        try:
            async with asyncio.timeout(self._context.patience.ceiling_s):
                await self.server.settled()
                await self.state.idle.wait()
        except TimeoutError:
            self._context.emit(
                Problem(
                    Reason.NOT_FOUND,
                    "the run is over and the last state of this stage is not to be had any more",
                    "nothing to do here; others have it",
                )
            )

    @property
    def finished(self) -> bool:
        rounds = self._context.spec.rounds
        return bool(rounds) and self.history.head.step >= rounds

    # --- rounds -------------------------------------------------------------------------------------------------
    async def _rounds(self) -> None:
        while not self.finished:
            head = self.history.head
            async with asyncio.TaskGroup() as group:  # what fails in the round ends the peer at once
                work = group.create_task(self._round(head))
                await self.history.beyond(head.round)
                work.cancel()
            await self._entered(self.history.head)

    async def _round(self, head: Entry) -> None:
        """What the log asks of this peer in the round after `head`."""
        async with asyncio.TaskGroup() as group:
            if self._context.me in head.feeders() and self.feeder.able:
                group.create_task(self.feeder.feed(head), name="feed")
            if self._context.me in head.committee and not self.acceptor.abstains:
                group.create_task(self._watch_and_lead(head), name="lead")

    async def _entered(self, head: Entry) -> None:
        """A new round began: clean up after the old ones."""
        members = {m.peer for m in head.members}
        self._joiners = {p: m for p, m in self._joiners.items() if p not in members}
        self._leaving &= members
        self.feeder.forget_before(head.round)
        await self.acceptor.forget(head.round + 1)

    async def _watch_and_lead(self, head: Entry) -> None:
        """Lead at once if first in order, else when everybody before us is silent or takes far too long.

        Two that lead at a time undo each other's freezes: who meets a newer plan steps back for as long as an attempt
        may take, longer by its rank, and then looks again whether it is needed at all.
        """
        where = self.history.here()
        leaders = order(head.committee, head.run, where.round, beacon_for(self.history.chain, where.round), "leader")
        rank = leaders.index(self._context.me)
        wait_s = self.leader.usual_s() * rank
        while True:
            await self._await_turn(where, leaders[:rank], wait_s)
            try:
                return await self.leader.lead(rank)
            except Outbid as outbid:
                other = leaders[outbid.rank % len(leaders)]
                if other == self._context.me or await self._ping(other) is None:
                    wait_s = 0.0  # the plan of somebody who is gone, or ours before a restart: go above it
                    continue
                await asyncio.sleep(self.leader.attempt_s() * (1 + rank))
                wait_s = max(wait_s, self.leader.attempt_s()) * 2

    async def _await_turn(self, where: Round, before: Sequence[str], wait_s: float) -> None:
        """Until everybody `before` us is away, or `wait_s` have passed."""
        patience = self._context.patience
        deadline = self._context.now() + wait_s
        misses = dict.fromkeys(before, 0)
        while any(n < patience.misses for n in misses.values()) and self._context.now() < deadline:
            for peer in misses:
                pong = await self._ping(peer)
                misses[peer] = 0 if pong is not None else misses[peer] + 1
                if misses[peer] == patience.misses:
                    self._context.emit(PeerSuspected(peer, Reason.UNREACHABLE))
                if pong is not None and pong.round > where.round:
                    await self.history.pull(peer)
            await asyncio.sleep(patience.ping_s)

    async def _ping(self, peer: str) -> Pong | None:
        try:
            reply = await self._context.transport.call(
                peer,
                self._context.calls.ping,
                Ping(run=self._context.spec.run),
                timeout_s=self._context.patience.pong_s,
            )
        except CallError:
            return None
        return reply.header

    async def _on_ping(self, request: Request[Ping]) -> Reply[Pong]:
        where = self.history.here()
        if request.header.run != where.run:
            raise Refused(Reason.WRONG_RUN)
        return Reply(
            Pong(
                round=where.round,
                leading=self.leader.leading == where,
                ready=self.server.ready,
                stuck=self.server.stuck,
                fed=self.feeder.fed == where,
                stage=self.server.stage,
            )
        )

    # --- following ------------------------------------------------------------------------------------------------
    async def _follow(self) -> None:
        """For ever: when no entry came for a while, look whether one was missed; when not a member, ask to join."""
        if self._fresh:
            await self._look_for_ourselves()
        turn = 0
        while True:
            head = self.history.head
            me = head.member(self._context.me)
            others = [p for p in self._others(head) if p != self._context.me]
            asks = me is None or self._wants_out or self.acceptor.abstains
            try:
                wait = self._context.patience.ping_s * (1 if asks else 3)
                if asks and others:
                    await self._ask_in({*head.committee, others[turn % len(others)]})
                await self.history.beyond(head.round, wait)
            except TimeoutError:
                if others:
                    await self.history.pull(others[turn % len(others)])
            turn += 1

    async def _look_for_ourselves(self) -> None:
        """A peer without a log that the log already knows has lost its disk, and with it its votes."""
        for peer in self._others(self.history.head):
            if peer != self._context.me and await self.history.pull(peer):
                break
        member = self.history.head.member(self._context.me)
        if self.history.head.round > 0 and member is not None:
            await self.acceptor.abstain(member.since)
        await self.acceptor.learned(self.history.head)

    def _others(self, head: Entry) -> tuple[str, ...]:
        """Whom to ask: the committee first, then other members, then contacts from outside the log."""
        seen = dict.fromkeys((*head.committee, *(m.peer for m in head.members), *self._contacts()))
        return tuple(seen)

    async def _ask_in(self, peers: Collection[str]) -> None:
        """Ask peers to be let in (or out); whoever leads next must have heard it, so the whole committee is asked."""
        message = Join(run=self._context.spec.run, leave=self._wants_out or self.acceptor.abstains)

        async def one(peer: str) -> None:
            try:
                reply = await self._context.transport.call(
                    peer, self._context.calls.join, message, self._record(), timeout_s=self._context.patience.pong_s
                )
            except CallError:
                return
            if reply.header.head > self.history.head.round:
                await self.history.pull(peer)

        async with asyncio.TaskGroup() as group:
            for peer in sorted(set(peers) - {self._context.me}):
                group.create_task(one(peer))

    async def _on_join(self, request: Request[Join]) -> Reply[Joined]:
        if request.header.run != self._context.spec.run:
            raise Refused(Reason.WRONG_RUN)
        member = self._open_record(request.body, request.sender)
        known = self.history.head.member(member.peer) is not None
        if request.header.leave:
            self._joiners.pop(member.peer, None)
            if known:
                self._leaving.add(member.peer)
        else:
            self._leaving.discard(member.peer)
            room = member.peer in self._joiners or len(self._joiners) < self._context.spec.shape.max_peers
            if not known and room:
                self._joiners[member.peer] = member
                # who wants in asks every ping_s: who stopped asking is away, and must not be given a place
                asyncio.get_running_loop().call_later(ASKS * self._context.patience.ping_s, self._expire, member)
            known = known or room
        if known:
            self._context.transport.learn_address(member.peer, member.maddrs)
        return Reply(Joined(head=self.history.head.round))

    def _expire(self, joiner: Member) -> None:
        """Forget a joiner unless it has asked again since."""
        if self._joiners.get(joiner.peer) is joiner:
            del self._joiners[joiner.peer]

    async def leave(self, timeout_s: float) -> bool:
        """Ask to be left out of the next round and wait for the entry that does so. False if none came in time."""
        self._wants_out = True
        try:
            async with asyncio.timeout(timeout_s):
                while self.history.head.member(self._context.me) is not None and not self.finished:
                    await self._ask_in(self.history.head.committee)
                    await self.history.beyond(self.history.head.round)
        except TimeoutError:
            return False
        return True

    def joiners(self) -> Mapping[str, Member]:
        return dict(self._joiners)
