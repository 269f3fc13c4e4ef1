"""A feeder drives its microbatches through the stages and replays what a plan misses (DESIGN 4.4).

Per microbatch: forward through stages 0..S-2, backward at the last stage (which computes the loss), backward down to 0.
On failure another server gets the same input. A boundary cache (inputs and output gradients per stage) makes a repair
one call where the feeder still has them; it is bounded and may be dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from shoal.protocol.codecs import decode, encode, pack, unpack
from shoal.protocol.deadlines import Deadline
from shoal.protocol.events import (
    HoleRepaired,
    MicrobatchFinished,
    MicrobatchRetried,
    MicrobatchStarted,
    Problem,
    Reason,
)
from shoal.protocol.runlog import Entry
from shoal.protocol.sampling import beacon_for, order
from shoal.protocol.transport import CallError, Method, Refused, Reply, Request, Unanswered
from shoal.swarm.pipeline.context import BatchSource, Context
from shoal.swarm.pipeline.history import History
from shoal.swarm.pipeline.messages import Computed, FeederDone, Hole, Ping, Repair, Repaired, Round, Work
from shoal.swarm.pipeline.roles import microbatches_of
from shoal.swarm.pipeline.router import Router

T = TypeVar("T")
CACHED_MICROBATCHES = 64
OVER = frozenset({Reason.STALE, Reason.FROZEN, Reason.WRONG_RUN})  # this round takes no more work from us
BAD_INPUT = frozenset({Reason.MALFORMED, Reason.NOT_FINITE})  # what a server says of an input that it cannot use
MAX_REDONE = 4  # how often inputs of a microbatch are made again at once, before the servers that refuse are doubted
BACKOFF_S = (0.02, 0.05, 0.1, 0.2, 0.5)


class RoundOver(Exception):
    """The round takes no more work of this kind: it is frozen, or history has moved on."""

    def __init__(self, *, frozen: bool = False) -> None:
        super().__init__()
        self.frozen = frozen


class _InputRefused(Exception):
    """Servers of a stage agree that what an earlier call returned is no input for them."""


@dataclass(slots=True)
class _Boundaries:
    """What crossed the stage boundaries for one microbatch: x[s] went into stage s, dy[s] came back to it (encoded)."""

    labels: bytes
    x: dict[int, bytes] = field(default_factory=dict)
    dy: dict[int, bytes] = field(default_factory=dict)
    served_by: dict[int, str] = field(default_factory=dict)  # stage -> who ran the forward: who made x[stage + 1]
    dy_from: dict[int, str] = field(default_factory=dict)  # stage -> who made dy[stage]
    attempts: dict[int, int] = field(default_factory=dict)  # stage -> accumulating calls whose effect is not known
    redone: int = 0  # how often an input was found bad and made again
    loss: float = 0.0


class Feeder:
    """Feeds the rounds of this peer. Routers and deadlines persist across rounds; everything else is per round."""

    def __init__(self, context: Context, history: History, data: BatchSource | None) -> None:
        self._context = context
        self._history = history
        self._data = data
        stages = context.spec.shape.stages
        self._routers = [Router() for _ in range(stages)]
        self._deadlines = {
            (stage, call.name): Deadline(context.patience.work_s, context.patience.floor_s, context.patience.ceiling_s)
            for stage in range(stages)
            for call in (context.calls.forward, context.calls.backward)
        }
        self._diverged: Round | None = None  # the last round in which every server refused a microbatch as not finite
        self.fed: Round | None = None  # the last round to which this feeder adds nothing more by itself
        self._resumed = False  # the next round to feed may have been fed already, before this process was restarted
        self._first_attempt = 0  # in the round under way
        self._repair: tuple[Round, int, asyncio.Future[None]] | None = None  # the newest: round, plan, work
        self._cache: OrderedDict[tuple[Round, int], _Boundaries] = OrderedDict()

    def serve(self) -> None:
        """Begin to answer; the log on this disk has been loaded."""
        self._resumed = self._history.head.round > 0
        self._context.transport.serve(self._context.calls.repair, self._on_repair)

    @property
    def able(self) -> bool:
        """Does this node have the run's data?"""
        return self._data is not None

    async def feed(self, head: Entry) -> None:
        """Drive this peer's share of the round after `head`, then tell the committee. Cancelled when the round ends."""
        where = self._history.here()
        feeders = order(
            head.feeders(), head.run, where.round, beacon_for(self._history.chain, where.round), "microbatches"
        )
        mine = list(microbatches_of(self._context.me, feeders, self._context.spec.microbatches))
        self._update_routers(head)
        self._first_attempt, self._resumed = int(self._resumed), False
        finished: list[int] = []
        over = False

        async def drive(microbatch: int) -> None:
            await self._drive(where, head, microbatch)
            finished.append(microbatch)

        try:
            if head.decision.kind != "commit":  # who served a moment ago serves now; newcomers still load their state
                await self._await_servers(where, head)
            await self._in_parallel(head, mine, drive)
        except* RoundOver as ended:
            over = ended.subgroup(lambda error: isinstance(error, RoundOver) and error.frozen) is None
        if not over and self._history.here() == where:
            # a leader may die after its freeze: its successor need not wait for what no server takes any more
            self.fed = where
            await self._report(where, head, tuple(sorted(finished)))

    async def _in_parallel(
        self, head: Entry, items: Sequence[T], work: Callable[[T], Coroutine[Any, Any, None]]
    ) -> None:
        """`work` on all items, a window at a time: enough to keep our share of the servers busy, with one waiting."""
        servers = sum(len(head.servers(s)) for s in range(self._context.spec.shape.stages))
        window = max(2, -(-2 * servers // max(1, len(head.feeders()))))
        queue = list(items)[::-1]

        async def worker() -> None:
            while queue:
                await work(queue.pop())

        async with asyncio.TaskGroup() as group:
            for _ in range(min(window, len(queue))):
                group.create_task(worker())

    async def _await_servers(self, where: Round, head: Entry) -> None:
        """Until every stage has a server that is ready. Raises RoundOver when the round ends before."""
        calls, patience = self._context.calls, self._context.patience
        for stage in range(self._context.spec.shape.stages):
            looks = 0
            while True:
                for peer in head.servers(stage):
                    with contextlib.suppress(CallError):
                        ping = Ping(run=self._context.spec.run)
                        reply = await self._context.transport.call(peer, calls.ping, ping, timeout_s=patience.pong_s)
                        if reply.header.ready and reply.header.stage == stage:
                            break
                else:
                    await self._back_off(where, looks)
                    looks += 1
                    continue
                break

    async def _report(self, where: Round, head: Entry, microbatches: tuple[int, ...]) -> None:
        message = FeederDone(at=where, microbatches=microbatches)

        async def tell(peer: str) -> None:
            with contextlib.suppress(CallError):  # the leader looks after feeders that it does not hear from
                await self._context.transport.call(
                    peer, self._context.calls.feeder_done, message, timeout_s=self._context.patience.pong_s
                )

        async with asyncio.TaskGroup() as group:
            for peer in head.committee:
                group.create_task(tell(peer))

    def _update_routers(self, head: Entry) -> None:
        for stage, router in enumerate(self._routers):
            router.update(head.servers(stage))

    async def _boundaries(self, where: Round, head: Entry, microbatch: int) -> _Boundaries:
        key = (where, microbatch)
        known = self._cache.get(key)
        if known is None:
            if self._data is None:
                raise Refused(Reason.DATA_MISMATCH, "this node has no training data")
            first = head.next_sample + microbatch * self._context.spec.microbatch_samples
            ids = range(first, first + self._context.spec.microbatch_samples)
            x, labels = await self._context.run_in_thread(self._data.batch, ids)
            known = _Boundaries(labels=encode(labels, "none"), x={0: encode(x, "none")})
            self._cache[key] = known
            while len(self._cache) > CACHED_MICROBATCHES:
                self._cache.popitem(last=False)
        return known

    async def _drive(self, where: Round, head: Entry, microbatch: int) -> None:
        """One microbatch, forward and backward, accumulated once in every stage."""
        started = self._context.now()
        self._context.emit(MicrobatchStarted(where.round, microbatch))
        boundaries = await self._boundaries(where, head, microbatch)
        last = self._context.spec.shape.stages - 1
        await self._forward_to(where, boundaries, microbatch, last)
        for stage in range(last, -1, -1):
            await self._backward(where, boundaries, microbatch, stage, accumulate=True)
        self._context.emit(
            MicrobatchFinished(
                where.round,
                microbatch,
                self._context.spec.microbatch_samples,
                boundaries.loss / self._context.spec.microbatch_samples,
                self._context.now() - started,
            )
        )

    async def _forward_to(self, where: Round, known: _Boundaries, microbatch: int, stage: int) -> None:
        """Have x of `stage`: run the forwards that are not cached."""
        while stage not in known.x:
            s = max(i for i in known.x if i < stage)
            work = Work(at=where, stage=s, microbatch=microbatch)
            try:
                y, _, server = await self._call(work, known, None)
            except _InputRefused:
                self._drop_input(known, s, back=False)
            else:
                known.x[s + 1], known.served_by[s] = y, server

    async def _inputs(self, where: Round, known: _Boundaries, microbatch: int, stage: int) -> None:
        """Have x and dy of `stage`: run what is not cached, without adding to any gradient."""
        last = self._context.spec.shape.stages - 1
        while True:
            await self._forward_to(where, known, microbatch, stage)
            if stage == last or stage in known.dy:
                return
            await self._backward(where, known, microbatch, stage + 1, accumulate=False)

    async def _backward(
        self, where: Round, known: _Boundaries, microbatch: int, stage: int, *, accumulate: bool
    ) -> None:
        """Backward of one stage wherever the router says, preferably where the forward ran."""
        work = Work(at=where, stage=stage, microbatch=microbatch, accumulate=accumulate)
        while True:
            await self._inputs(where, known, microbatch, stage)
            try:
                dx, loss, server = await self._call(work, known, known.dy.get(stage, known.labels))
            except _InputRefused:
                self._drop_input(known, stage, back=True)
            else:
                return self._keep(known, stage, dx, loss, server)

    def _keep(self, known: _Boundaries, stage: int, dx: bytes, loss: float, server: str) -> None:
        if stage == self._context.spec.shape.stages - 1:
            known.loss = loss
        if stage > 0:
            known.dy[stage - 1], known.dy_from[stage - 1] = dx, server

    def _drop_input(self, known: _Boundaries, stage: int, *, back: bool) -> None:
        """Forget what a server gave us that `stage` cannot use, and give it less to do; it will be made elsewhere.

        A backward below the last stage is refused for its dy: its x went through the forward of the same stage."""
        known.redone += 1
        if back and stage < self._context.spec.shape.stages - 1:
            known.dy.pop(stage, None)
            self._blame(stage + 1, known.dy_from.pop(stage, None))
            known.served_by.pop(stage + 1, None)  # the same server would be preferred
        elif stage > 0:
            known.x.pop(stage, None)
            self._blame(stage - 1, known.served_by.pop(stage - 1, None))

    def _blame(self, stage: int, server: str | None) -> None:
        if server is not None:
            router, now = self._routers[stage], self._context.now()
            router.failed(server, router.start(server, now), now)

    async def _call(self, work: Work, known: _Boundaries, second: bytes | None) -> tuple[bytes, float, str]:
        """Send one piece of work until a server has done it; `second`: dy or labels for a backward, None: a forward.

        Returns (encoded result, loss, server). Raises RoundOver, or _InputRefused when two servers (or the only one)
        say that they cannot use what another server made. An answer that never came may have had its effect: the next
        attempt says so.
        """
        router = self._routers[work.stage]
        failures = 0
        refused_by: set[str] = set()
        made = work.stage > 0 or (second is not None and work.stage < self._context.spec.shape.stages - 1)
        call = self._context.calls.forward if second is None else self._context.calls.backward
        prefer = None if second is None else known.served_by.get(work.stage)
        x = known.x[work.stage]
        body = pack([x] if second is None else [x, second])
        while True:
            choice = prefer if prefer is not None and failures == 0 else router.choose(self._context.now())
            if choice is None:
                await self._back_off(work.at, failures)
                failures += 1
                continue
            attempt = self._first_attempt + known.attempts.get(work.stage, 0) if work.accumulate else 0
            header = work.model_copy(update={"attempt": attempt})
            try:
                result, loss = await self._send(router, choice, call, header, body)
            except CallError as error:
                if error.reason in OVER and isinstance(error, Refused):
                    raise RoundOver(frozen=error.reason is Reason.FROZEN) from error
                if isinstance(error, Unanswered) and work.accumulate:
                    known.attempts[work.stage] = known.attempts.get(work.stage, 0) + 1
                if isinstance(error, Refused) and error.reason in BAD_INPUT:
                    refused_by.add(choice)
                failures += 1
                self._notice_divergence(work, error, failures)
                self._context.emit(MicrobatchRetried(work.at.round, work.microbatch, work.stage, choice, error.reason))
                await self._back_off(work.at, failures - 1)
                servers = len(self._history.head.servers(work.stage))
                again = known.redone < MAX_REDONE or failures > 2 * servers
                if made and again and len(refused_by) >= min(2, servers):
                    raise _InputRefused from error
                continue
            return result, loss, choice

    def _notice_divergence(self, work: Work, error: CallError, failures: int) -> None:
        """One server's NaN is that server's trouble; everybody's is the run's. Told once a round."""
        if error.reason is not Reason.NOT_FINITE or failures <= len(self._history.head.servers(work.stage)):
            return
        if self._diverged != work.at:
            self._diverged = work.at
            self._context.emit(
                Problem(
                    Reason.NOT_FINITE,
                    f"microbatch {work.microbatch} gives NaN or infinity on every server: the run has diverged",
                    "start a new run with a lower learning rate or a warm-up",
                )
            )

    async def _send(
        self, router: Router, peer: str, call: Method[Work, Computed], work: Work, body: bytes
    ) -> tuple[bytes, float]:
        """One attempt at one server, measured: the encoded result (empty for the backward of stage 0) and the loss.
        Raises CallError; an answer without a usable tensor is none."""
        deadline = self._deadlines[work.stage, call.name]
        ticket = router.start(peer, self._context.now())
        started = self._context.now()
        try:
            reply = await self._context.transport.call(peer, call, work, body, timeout_s=deadline.value())
            seconds = self._context.now() - started
            result = b""
            if work.stage > 0 or call is self._context.calls.forward:
                result = await self._context.run_in_thread(_tensor_in, reply.body, self._context.spec.max_body_bytes)
        except CallError as error:
            router.failed(peer, ticket, self._context.now(), penalty_s=_PENALTY_S.get(error.reason, 1.0))
            if error.reason is Reason.DEADLINE:
                deadline.expire(self._context.now() - started)
            raise
        except asyncio.CancelledError:
            router.cancelled(peer, ticket)
            raise
        router.succeeded(peer, ticket, self._context.now())
        deadline.observe(seconds)
        return result, reply.header.loss

    async def _back_off(self, where: Round, failures: int) -> None:
        """Wait before the next attempt; a decided entry ends the wait, and with it the round."""
        if self._history.here() != where:
            raise RoundOver
        try:
            await self._history.beyond(where.round - 1, BACKOFF_S[min(failures, len(BACKOFF_S) - 1)])
        except TimeoutError:
            return
        raise RoundOver

    # --- repair ---------------------------------------------------------------------------------------------------
    async def _on_repair(self, request: Request[Repair]) -> Reply[Repaired]:
        order_ = request.header
        await self._history.reach(order_.at, self._context.patience.pong_s, request.sender)
        head = self._history.head
        if request.sender not in head.committee:
            raise Refused(Reason.NOT_MEMBER)
        if any(h.stage >= self._context.spec.shape.stages for h in order_.holes):
            raise Refused(Reason.MALFORMED, "no such stage")
        if any(h.microbatch >= self._context.spec.microbatches for h in order_.holes):
            raise Refused(Reason.MALFORMED, "no such microbatch")
        newest = self._repair
        if newest is not None and newest[0] == order_.at:
            if newest[1] > order_.plan:
                raise Refused(Reason.FROZEN, f"plan {newest[1]}")
            if newest[1] < order_.plan:
                newest[2].cancel()  # no server takes anything for that plan any more
        self._update_routers(head)
        done = 0

        async def fill(hole: Hole) -> None:
            nonlocal done
            with contextlib.suppress(CallError, RoundOver):  # the next freeze shows it as a hole again
                await self._fill(order_.at, head, order_.plan, hole)
                done += 1

        work = asyncio.ensure_future(self._in_parallel(head, order_.holes, fill))
        self._repair = (order_.at, order_.plan, work)
        try:
            await asyncio.wait([work])
        finally:
            work.cancel()
        if work.cancelled():
            raise Refused(Reason.FROZEN, "there is a newer plan")
        work.result()
        return Reply(Repaired(done=done))

    async def _fill(self, where: Round, head: Entry, plan: int, hole: Hole) -> None:
        """Forward 0..s-1 without effect, backward last..s+1 without accumulating, accumulating backward at s."""
        known = await self._boundaries(where, head, hole.microbatch)
        await self._inputs(where, known, hole.microbatch, hole.stage)
        work = Work(at=where, stage=hole.stage, microbatch=hole.microbatch, plan=plan, attempt=1, accumulate=True)
        body = pack([known.x[hole.stage], known.dy.get(hole.stage, known.labels)])
        try:
            dx, loss = await self._send(
                self._routers[hole.stage], hole.server, self._context.calls.backward, work, body
            )
        except Refused as refusal:
            if refusal.reason in BAD_INPUT:
                self._drop_input(known, hole.stage, back=True)  # for the next plan
            raise
        self._keep(known, hole.stage, dx, loss, hole.server)
        self._context.emit(HoleRepaired(where.round, plan, hole.stage, hole.microbatch))

    def forget_before(self, round_: int) -> None:
        for key in [key for key in self._cache if key[0].round < round_]:
            del self._cache[key]


def _tensor_in(body: bytes, max_elements: int) -> bytes:
    """The one encoded tensor of an answer. Raises Unanswered: what the server did besides is not known."""
    try:
        parts = unpack(body, max_parts=1)
        if len(parts) != 1:
            raise Refused(Reason.MALFORMED, f"{len(parts)} tensors where one belongs")
        decode(parts[0], max_elements=max_elements)
    except Refused as refusal:
        raise Unanswered(refusal.reason, refusal.detail) from refusal
    return bytes(parts[0])


_PENALTY_S = {Reason.BUSY: 0.05, Reason.NOT_READY: 0.2, Reason.WRONG_STAGE: 0.2, Reason.AHEAD: 0.2}
