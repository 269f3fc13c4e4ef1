"""Leading a round: wait for the feeders, freeze, plan, repair, reduce, and propose the entry (DESIGN 4.4).

Any committee member may lead; the order says who begins. Leading needs no state of its own: everything a successor
must know is asked again from the servers, and Paxos keeps two leaders from deciding two different entries.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from shoal.protocol import paxos
from shoal.protocol.deadlines import Deadline
from shoal.protocol.events import (
    LeadershipTaken,
    MemberAdmitted,
    MemberDropped,
    OperationTimed,
    PeerSuspected,
    Phase,
    PlanMade,
    ProposalFailed,
    Reason,
    RoundFrozen,
)
from shoal.protocol.events import StageUncovered as StageUncoveredEvent
from shoal.protocol.runlog import (
    Commit,
    Decided,
    Decision,
    Entry,
    Member,
    Pin,
    Reconfigure,
    Rollback,
    StageCommit,
)
from shoal.protocol.sampling import beacon_for, next_beacon, order
from shoal.protocol.transport import CallError, Empty, Refused, Reply, Request
from shoal.swarm.pipeline.acceptor import Acceptor
from shoal.swarm.pipeline.asking import Asker
from shoal.swarm.pipeline.context import Context
from shoal.swarm.pipeline.decide import StageState, needs_rollback, next_pins, survey, uncovered
from shoal.swarm.pipeline.history import History
from shoal.swarm.pipeline.messages import (
    Adopt,
    Contribution,
    Discard,
    FeederDone,
    Freeze,
    Hole,
    Learn,
    Ping,
    Pong,
    PreparedReport,
    Reduce,
    Repair,
    Report,
    Round,
)
from shoal.swarm.pipeline.proposer import Proposer
from shoal.swarm.pipeline.roles import next_members

RETRY_S = 0.1  # between two attempts to decide the same round; grows to LONGEST_RETRY_S
LONGEST_RETRY_S = 1.0
BLAMES = 3
FRUITLESS = 25  # attempts at one round after which waiting newcomers are let in, whatever stands in the way
PATIENT = 120  # attempts, of about a second, for which the first round waits until everybody is ready
HOLES_PER_REPAIR = 512  # for one feeder at a time; the next freeze shows the rest


class Outbid(Exception):
    """Servers are frozen for a newer plan: another leader's, or ours before we were restarted."""

    def __init__(self, plan: int) -> None:
        super().__init__(f"plan {plan}")
        self.plan = plan

    @property
    def rank(self) -> int:
        """Whose plan it is, by its place in the order of leaders."""
        return self.plan % paxos.RANKS


class _Trouble:
    """Who stood in the way of this round so far. Pure but for being counted up.

    A peer that answers can still make every attempt fail: two servers that reach the leader but not each other, a disk
    that takes nothing. The most blamed one is left out of the round after BLAMES failures; of equals, the last one.
    """

    def __init__(self) -> None:
        self.silent: set[str] = set()  # asked twice without an answer; asked again once they answer a ping
        self.excluded: set[str] = set()
        self._blames: Counter[str] = Counter()

    def blame(self, peers: Iterable[str], order_: Sequence[str]) -> str | None:
        """Count one failed attempt; who is left out because of it, if anybody."""
        self._blames.update(peers)
        worst = max(self._blames, key=lambda p: (self._blames[p], order_.index(p) if p in order_ else -1), default=None)
        if worst is None or self._blames[worst] < BLAMES:
            return None
        self._blames.clear()
        self.excluded.add(worst)
        return worst


class Leader:
    """Leads rounds when told to. One instance per peer; `lead` is cancelled when the round is decided."""

    def __init__(
        self,
        context: Context,
        history: History,
        acceptor: Acceptor,
        joiners: Callable[[], Mapping[str, Member]],
        leaving: Callable[[], frozenset[str]],
    ) -> None:
        self._context = context
        self._history = history
        self._asker = Asker(context, history)
        self._proposer = Proposer(context, history, acceptor, self._asker)
        self._joiners = joiners
        self._leaving = leaving
        self._done: dict[str, Round] = {}
        self._trouble = _Trouble()
        self._attempts = 0  # freezes since we began to lead
        self._led: Round | None = None  # the round that `_newest` is about
        self._newest = 0  # the newest plan of the round that another leader was seen to have
        self._fed: set[str] = set()  # feeders of the round under way that said so when they were looked at
        self._usual = Deadline(context.patience.round_s, context.patience.freeze_s, context.patience.ceiling_s)
        self._news = asyncio.Event()
        self.leading: Round | None = None

    def serve(self) -> None:
        self._context.transport.serve(self._context.calls.feeder_done, self._on_feeder_done)

    async def _on_feeder_done(self, request: Request[FeederDone]) -> Reply[Empty]:
        await self._history.reach(request.header.at, self._context.patience.pong_s, request.sender)
        feeders = self._history.head.feeders()
        if request.sender not in feeders:
            raise Refused(Reason.NOT_MEMBER, "not a feeder of this round")
        self._done = {p: where for p, where in self._done.items() if p in feeders} | {request.sender: request.header.at}
        self._news.set()
        return Reply(Empty())

    async def lead(self, rank: int) -> None:
        """Drive the round under way to its entry. Returns when an entry was decided (by us or by another).

        Raises Outbid when servers take their plans from somebody else.
        """
        where = self._history.here()
        if self._led != where:
            self._led, self._newest = where, 0
        self.leading = where
        self._fed = set()
        self._trouble = _Trouble()
        self._attempts = 0
        self._context.emit(LeadershipTaken(where.round, rank))
        turn = 0
        try:
            if self._history.head.round > 0:
                await self._await_feeders(where)
            while self._history.here() == where:
                turn = max(turn, self._newest // paxos.RANKS) + 1
                if not await self._attempt(where, rank, turn * paxos.RANKS + rank):
                    await self._pause(where, turn)
        except Outbid as outbid:
            self._newest = max(self._newest, outbid.plan)
            raise
        finally:
            self.leading = None

    async def _pause(self, where: Round, turn: int) -> None:
        with contextlib.suppress(TimeoutError):
            await self._history.beyond(where.round - 1, min(LONGEST_RETRY_S, RETRY_S * 1.2 ** min(turn, 20)))

    def usual_s(self) -> float:
        """How long to leave a round to a leader that answers: longer than rounds usually take."""
        return 2 * self._usual.value()

    def attempt_s(self) -> float:
        """How long one attempt at a round may take: enough for the leader that we step back for."""
        return self._asker.timeout_s(self._context.calls.reduce)

    # --- waiting for the feeders ------------------------------------------------------------------------------------
    async def _await_feeders(self, where: Round) -> None:
        """Until every feeder is done or away, or a stage has nobody who works, or rounds usually end much sooner."""
        head = self._history.head
        started = self._context.now()
        misses: dict[str, int] = {}
        idle: dict[int, int] = {}
        stages = range(self._context.spec.shape.stages)
        while self._history.here() == where:
            if self._context.now() - started > self._usual.value():
                self._usual.expire(self._context.now() - started)
                return
            waiting = [p for p in head.feeders() if not self._finished(p, where) and misses.get(p, 0) < self._limit]
            if not waiting:
                self._usual.observe(self._context.now() - started)
                return
            self._news.clear()
            try:
                async with asyncio.timeout(self._context.patience.ping_s):
                    await self._news.wait()
                continue
            except TimeoutError:
                pass
            pongs = await self._ping([m.peer for m in head.members])
            for member in head.members:
                misses[member.peer] = 0 if member.peer in pongs else misses.get(member.peer, 0) + 1
            for stage in stages:
                works = any(p.stage == stage and not p.stuck for p in pongs.values())  # or will, once it has synced
                idle[stage] = 0 if works else idle.get(stage, 0) + 1
            if max(idle.values()) >= self._limit:
                return
            self._fed |= {peer for peer, pong in pongs.items() if pong.fed and pong.round == where.round}

    @property
    def _limit(self) -> int:
        return self._context.patience.misses

    def _finished(self, feeder: str, where: Round) -> bool:
        return feeder in self._fed or self._done.get(feeder) == where

    async def _ping(self, peers: Sequence[str]) -> dict[str, Pong]:
        ping = Ping(run=self._context.spec.run)
        return (await self._asker.ask(peers, self._context.calls.ping, lambda _: ping)).headers

    # --- one attempt ------------------------------------------------------------------------------------------------
    async def _attempt(self, where: Round, rank: int, plan: int) -> bool:
        """Freeze, and do the next thing. True if that was a decision. Raises Outbid."""
        head, spec = self._history.head, self._context.spec
        ranked = order(
            (m.peer for m in head.members), head.run, where.round, beacon_for(self._history.chain, where.round)
        )
        reports = await self._freeze(where, plan, ranked)
        states = survey(spec.shape.stages, spec.microbatches, reports, ranked, plan // paxos.RANKS)
        missing = uncovered(states)
        if missing:
            return await self._cover(where, rank, plan, reports, missing)
        if head.step == 0 and plan // paxos.RANKS < PATIENT and not self._enough_to_start(states, reports):
            return False
        plans = [s.plan for s in states if s.plan is not None]
        holes = [Hole(stage=p.stage, microbatch=m, server=server) for p in plans for m, server in p.holes]
        self._context.emit(PlanMade(where.round, plan, len(holes), sum(p.wasted for p in plans)))
        fruitless = plan // paxos.RANKS % FRUITLESS == 0
        if self._joiners() and (fruitless or (holes and not self._feeders(reports))):
            return await self._propose(where, rank, reports, Reconfigure(), (head.pin, head.candidate))
        if holes:
            await self._repair(where, plan, states, holes, reports)
            return False
        prepared = await self._prepare_stages(where, plan, states, ranked)
        if any(len(prepared.get(s.stage, ())) < s.enough for s in states):
            return False
        return await self._commit(where, rank, plan, reports, prepared, ranked)

    def _enough_to_start(self, states: Sequence[StageState], reports: Mapping[str, Report]) -> bool:
        """The first round waits for every member server to be ready, so that all of them share the work from there."""
        return all(r.ready or r.stage is None for r in reports.values()) and all(s.servers for s in states)

    async def _freeze(self, where: Round, plan: int, peers: Sequence[str]) -> dict[str, Report]:
        """Reports of those that answer; the silent are asked twice: a lost reply must not cost a member its place.
        Raises Outbid if anybody says FROZEN: who does is alive, and must not be taken for away."""
        started = self._context.now()
        freeze = Freeze(at=where, plan=plan)
        self._trouble.silent -= (await self._ping(sorted(self._trouble.silent))).keys()
        asked = [p for p in peers if p not in self._trouble.silent]
        answers = await self._asker.ask(asked, self._context.calls.freeze, lambda _: freeze)
        silent = [p for p, e in answers.failures.items() if e.reason is Reason.DEADLINE]
        again = await self._asker.ask(silent, self._context.calls.freeze, lambda _: freeze)
        self._trouble.silent |= {p for p, e in again.failures.items() if e.reason is Reason.DEADLINE}
        heard = answers.headers | again.headers
        self._look_for_rivals(plan, heard)
        reports = {peer: heard[peer] for peer in peers if peer in heard and peer not in self._trouble.excluded}
        self._context.emit(OperationTimed(Phase.FREEZE, self._context.now() - started))
        self._context.emit(RoundFrozen(where.round, plan, len(reports), len(peers)))
        return reports

    def _look_for_rivals(self, plan: int, heard: Mapping[str, Report]) -> None:
        """Raises Outbid if another leader froze the servers since our last attempt; taking over is not that."""
        newer = max((report.newer_plan for report in heard.values()), default=0)
        if newer:
            raise Outbid(newer)
        others = [r.previous_plan for r in heard.values() if r.previous_plan % paxos.RANKS != plan % paxos.RANKS]
        rival, first = max(others, default=0), not self._attempts
        self._attempts += 1
        if rival > self._newest and not first:
            raise Outbid(rival)
        self._newest = max(self._newest, rival)

    async def _cover(
        self, where: Round, rank: int, plan: int, reports: Mapping[str, Report], missing: Sequence[int]
    ) -> bool:
        """Some stage has no ready server: admit joiners, wait for those that catch up, or go back to the snapshot."""
        head, spec = self._history.head, self._context.spec
        joiners = {p: m for p, m in self._joiners().items() if p not in reports}
        wanted = spec.servers_per_stage * spec.shape.stages
        if len(head.members) == 1 and head.step == 0 and len(joiners) < wanted:
            return False  # the run has not begun: wait for the volunteers it wants
        for stage in missing if head.step > 0 else ():
            self._context.emit(StageUncoveredEvent(where.round, stage))
        if needs_rollback(head, reports, missing):
            step = head.pin.step if head.pin else 0
            return await self._propose(where, rank, reports, Rollback(to_step=step), (head.pin, None))
        assigned = {s for s in missing if any(r.stage == s and not r.stuck for r in reports.values())}
        idle = any(r.stage is None and peer != spec.shape.coordinator for peer, r in reports.items())
        late = plan // paxos.RANKS % FRUITLESS == 0  # those that are assigned do not get ready
        if (joiners or idle) and (assigned != set(missing) or late):
            return await self._propose(where, rank, reports, Reconfigure(), (head.pin, head.candidate))
        return False

    async def _repair(
        self,
        where: Round,
        plan: int,
        states: Sequence[StageState],
        holes: Sequence[Hole],
        reports: Mapping[str, Report],
    ) -> None:
        """Let servers drop what the plan leaves out, then have live feeders replay the holes."""
        started = self._context.now()
        drops = {peer: buckets for s in states if s.plan for peer, buckets in s.plan.discard}
        await self._asker.ask(
            list(drops), self._context.calls.discard, lambda peer: Discard(at=where, plan=plan, buckets=drops[peer])
        )
        feeders = self._feeders(reports)
        if not feeders:
            return
        turn = plan // paxos.RANKS  # another feeder every time: one that never manages must not keep the last hole
        shares = {
            peer: tuple(holes[(i + turn) % len(feeders) :: len(feeders)][:HOLES_PER_REPAIR])
            for i, peer in enumerate(feeders)
        }
        await self._asker.ask(
            [peer for peer in feeders if shares[peer]],
            self._context.calls.repair,
            lambda peer: Repair(at=where, plan=plan, holes=shares[peer]),
        )
        self._context.emit(OperationTimed(Phase.REPAIR, self._context.now() - started))

    def _feeders(self, reports: Mapping[str, Report]) -> list[str]:
        """Who can replay microbatches: the round's feeders that answered, else any member that has the data."""
        head = self._history.head
        return [p for p in head.feeders() if p in reports] or [
            m.peer for m in head.members if m.can_feed and m.peer in reports
        ]

    async def _prepare_stages(
        self, where: Round, plan: int, states: Sequence[StageState], ranked: Sequence[str]
    ) -> dict[int, dict[str, PreparedReport]]:
        """Have every live server of every stage hold the stage's reduced gradient. stage -> holder -> report."""
        started = self._context.now()
        results: dict[int, dict[str, PreparedReport]] = {}

        async def one(state: StageState) -> None:
            results[state.stage] = await self._prepare_stage(where, plan, state, ranked)

        async with asyncio.TaskGroup() as group:
            for state in states:
                group.create_task(one(state))
        self._context.emit(OperationTimed(Phase.REDUCE, self._context.now() - started))
        return results

    async def _prepare_stage(
        self, where: Round, plan: int, state: StageState, ranked: Sequence[str]
    ) -> dict[str, PreparedReport]:
        if state.prepared is not None:
            report, holders = state.prepared
            held = dict.fromkeys(holders, report)
            lacking = [p for p in state.servers if p not in held]
            adopt = Adopt(at=where, stage=state.stage, prepared=report, donors=holders)
            adopted = await self._asker.ask(lacking, self._context.calls.adopt, lambda _: adopt)
            self._note_trouble(where, adopted.failures, ranked)
            return held | adopted.headers
        assert state.plan is not None
        chosen = dict(state.plan.chosen)
        margin_s = self._context.patience.pong_s  # servers give up before we do, and say who was missing
        message = Reduce(
            at=where,
            plan=plan,
            stage=state.stage,
            members=tuple(Contribution(peer=p, buckets=chosen.get(p, ())) for p in state.servers),
            loss_sum=state.plan.loss_sum,
            wasted=state.plan.wasted,
            timeout_s=max(self._context.patience.pong_s, self._asker.timeout_s(self._context.calls.reduce) - margin_s),
        )
        answers = await self._asker.ask(state.servers, self._context.calls.reduce, lambda _: message)
        self._note_trouble(where, answers.failures, ranked)
        replies = answers.headers
        digests = {report.gradient for report in replies.values()}
        if len(digests) > 1:  # bit-equality is the all-reduce's contract; never decide on top of a breach
            self._context.emit(ProposalFailed(where.round, Reason.DIGEST_MISMATCH))
            return {}
        return replies

    def _note_trouble(self, where: Round, failures: Mapping[str, CallError], ranked: Sequence[str]) -> None:
        """One failed attempt: blame who was missed, or else who failed; leave out who fails again and again."""
        if not failures:
            return
        missed = {
            peer
            for error in failures.values()
            if error.reason is Reason.REDUCE_INCOMPLETE
            for peer in error.detail.split(",")
            if peer in ranked
        }
        failed = {p for p, e in failures.items() if e.reason is not Reason.REDUCE_INCOMPLETE}
        worst = self._trouble.blame(sorted(failed or missed), ranked)
        if worst is not None:
            self._context.emit(PeerSuspected(worst, Reason.OBSTRUCTS))

    # --- deciding ---------------------------------------------------------------------------------------------------
    async def _commit(
        self,
        where: Round,
        rank: int,
        plan: int,
        reports: Mapping[str, Report],
        prepared: Mapping[int, Mapping[str, PreparedReport]],
        ranked: Sequence[str],
    ) -> bool:
        stages = self._context.spec.shape.stages
        commit = Commit(
            plan=plan,
            samples=self._context.spec.samples,
            loss_sum=next(iter(prepared[stages - 1].values())).loss_sum,
            stages=tuple(
                StageCommit(
                    stage=s,
                    gradient=next(iter(prepared[s].values())).gradient,
                    holders=tuple(sorted(prepared[s])),
                )
                for s in range(stages)
            ),
        )
        pins = next_pins(self._history.chain, stages, reports, ranked)
        return await self._propose(where, rank, reports, commit, pins)

    async def _propose(
        self,
        where: Round,
        rank: int,
        reports: Mapping[str, Report],
        decision: Decision,
        pins: tuple[Pin | None, Pin | None],
    ) -> bool:
        head, spec = self._history.head, self._context.spec
        members, committee = next_members(head, spec.shape, set(reports), self._joiners(), self._leaving())
        step, cursor, total = head.step, head.next_sample, head.samples_total
        if isinstance(decision, Commit):
            step, cursor, total = step + 1, cursor + decision.samples, total + decision.samples
        elif isinstance(decision, Rollback):
            old = head.pin
            step, cursor, total = (old.step, old.next_sample, old.samples_total) if old else (0, 0, 0)
        entry = Entry(
            run=head.run,
            term=head.term,
            round=where.round,
            previous=where.previous,
            members=members,
            committee=committee,
            next_sample=cursor,
            samples_total=total,
            step=step,
            beacon=next_beacon(head, head.run),
            decision=decision,
            pin=pins[0],
            candidate=pins[1],
        )
        started = self._context.now()
        decided = await self._proposer.decide(where, rank, entry.to_bytes())
        self._context.emit(OperationTimed(Phase.COMMIT, self._context.now() - started))
        if decided is None:
            return False
        await self._context.finish(self._announce(head, *decided))
        return True

    async def _announce(self, old: Entry, value: bytes, proof: Decided) -> None:
        """Learn the entry and tell everybody it concerns: members before and after, and those that asked to join."""
        entry = Entry.from_bytes(value)
        await self._history.learn(value, proof)
        before, after = {m.peer: m for m in old.members}, {m.peer: m for m in entry.members}
        for peer in sorted(after.keys() - before.keys()):
            self._context.emit(MemberAdmitted(entry.round, peer, after[peer].stage))
        leaving = self._leaving()
        for peer in sorted(before.keys() - after.keys()):
            reason = Reason.LEFT if peer in leaving else Reason.UNREACHABLE
            reason = Reason.OBSTRUCTS if peer in self._trouble.excluded else reason
            self._context.emit(MemberDropped(entry.round, peer, reason))
        listeners = sorted((before.keys() | after.keys() | self._joiners().keys()) - {self._context.me})
        await self._asker.ask(listeners, self._context.calls.learn, lambda _: Learn(proof=proof), value)
