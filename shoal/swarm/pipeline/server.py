"""A stage server: forward, backward into ledger buckets, freeze, reduce, prepare, apply (DESIGN 4.4).

Forward has no effect. An accumulating backward adds at most once per microbatch; a repeat recomputes the reply without
adding. Once frozen for plan p, the server accumulates only for plan p. Reduced gradients are stored, parameters stay
untouched until the log entry that commits them is known.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shoal.protocol.allreduce import AllReduce, ReduceFailed, ReducePlan, split_by_shares
from shoal.protocol.blob_fetch import FetchResult, fetch
from shoal.protocol.blobs import BlobError
from shoal.protocol.codecs import decode, encode, pack, unpack
from shoal.protocol.events import (
    BackwardServed,
    ForwardServed,
    GradientPrepared,
    LedgerReported,
    Phase,
    Reason,
    WorkArrived,
)
from shoal.protocol.runlog import Commit
from shoal.protocol.transport import Empty, Refused, Reply, Request
from shoal.swarm.data import microbatch_seed
from shoal.swarm.pipeline.context import Context
from shoal.swarm.pipeline.history import History
from shoal.swarm.pipeline.ledger import Ledger
from shoal.swarm.pipeline.messages import (
    Adopt,
    BucketReport,
    Computed,
    Discard,
    Freeze,
    PreparedReport,
    Reduce,
    Report,
    Round,
    SnapshotReport,
    Work,
)
from shoal.swarm.stage import StageProgram

MAX_BLOB_BYTES = 1 << 38  # a stage's state or gradient; chunks are bounded one by one


@dataclass(slots=True)
class _RoundWork:
    """What this server did in the round under way; thrown away whole when the round ends."""

    where: Round
    ledger: Ledger
    plan: int = 0  # newest freeze; 0: none
    # bucket id -> flat gradient sum (numel,) in float64: sums of float32 gradients come out the same in any order and
    # grouping, so who computed what leaves no trace in the parameters
    sums: dict[int, Tensor] = field(default_factory=dict)
    prepared: dict[str, PreparedReport] = field(default_factory=dict)  # gradient digest -> report
    totals: dict[str, Tensor] = field(default_factory=dict)  # reduced gradients made here, so that none is read back
    reduced: dict[int, str] = field(default_factory=dict)  # plan -> key of the reduction that was asked of us
    adding: asyncio.Future[None] | None = None  # done when the computation that adds to a sum has ended


class StageServer:
    """Serves one stage of the pipeline while `program` is loaded and caught up with the log."""

    def __init__(self, context: Context, history: History, allreduce: AllReduce) -> None:
        self._context = context
        self._history = history
        self._allreduce = allreduce
        self.program: StageProgram | None = None
        self.step = -1  # optimizer steps in the program's state
        self.origin = ""  # digest of the commit that the state follows: which history it belongs to
        self.stuck = False
        self.snapshots: dict[tuple[int, int], str] = {}  # (step, stage) -> digest of what this node holds
        self._work: _RoundWork | None = None
        self._computing = asyncio.Lock()  # one computation at a time, in arrival order
        self._queued = 0
        self._moved = asyncio.Condition()  # readiness changed

    def serve(self) -> None:
        serve, calls = self._context.transport.serve, self._context.calls
        serve(calls.forward, self._on_forward)
        serve(calls.backward, self._on_backward)
        serve(calls.freeze, self._on_freeze)
        serve(calls.discard, self._on_discard)
        serve(calls.reduce, self._on_reduce)
        serve(calls.adopt, self._on_adopt)

    # --- readiness ----------------------------------------------------------------------------------------------
    @property
    def stage(self) -> int | None:
        """The stage that the log gives this node."""
        member = self._history.head.member(self._context.me)
        return member.stage if member else None

    @property
    def ready(self) -> bool:
        """Is the state of the stage that the log gives us loaded and at the log's step?"""
        program, chain = self.program, self._history.chain
        here = program is not None and program.index == self.stage and self.step == chain.head.step
        return here and self.origin == chain.commit_digest(chain.head.step)

    async def settled(self) -> None:
        """Wait until the state is at the log's step, or the log gives this node no stage."""
        async with self._moved:
            await self._moved.wait_for(lambda: self.ready or self.stage is None)

    async def set_program(self, program: StageProgram | None, step: int, origin: str) -> None:
        """Install (or drop) the stage's state. Waits for the computation under way."""
        async with self._computing:
            self.program, self.step, self.origin = program, step, origin
        await self.moved()

    async def moved(self) -> None:
        async with self._moved:
            self._moved.notify_all()

    async def apply(self, gradient: Tensor, samples: int, origin: str) -> None:
        """One optimizer step on the loaded program: the gradient sum (numel,) over `samples` samples that the commit
        with the digest `origin` decided."""
        program = self.program
        assert program is not None

        async def step() -> None:
            async with self._computing:
                await self._context.run_in_thread(program.apply, gradient, samples)
                self.step, self.origin = self.step + 1, origin

        await self._context.finish(step())
        await self.moved()

    async def _ready_for(self, request: Request[Work]) -> StageProgram:
        """The program, if it can work on this round; waits a moment for an entry or a step that is under way."""
        work = request.header
        await self._history.reach(work.at, self._context.patience.pong_s, request.sender)
        if self._history.head.member(request.sender) is None:
            raise Refused(Reason.NOT_MEMBER)
        if self.stage != work.stage:
            raise Refused(Reason.WRONG_STAGE, f"serves {self.stage}")
        nearly = self.program is not None and self.program.index == self.stage and not self.stuck
        if not self.ready and nearly and self.step >= self._history.head.step - 1:
            try:
                async with asyncio.timeout(self._context.patience.pong_s), self._moved:
                    await self._moved.wait_for(lambda: self.ready)
            except TimeoutError:
                pass
        self._history.check(work.at)
        if not self.ready or self.program is None:
            raise Refused(Reason.NOT_READY, f"at step {self.step} of {self._history.head.step}")
        return self.program

    def _round(self, where: Round) -> _RoundWork:
        """The work of the round under way, started afresh when the round changed."""
        if self._work is None or self._work.where != where:
            self._cancel_reductions()
            self._work = _RoundWork(where, Ledger(self._context.spec.max_buckets))
        return self._work

    def _cancel_reductions(self) -> None:
        """Reductions of an older round or plan are over: release whoever waits in them."""
        for key in self._work.reduced.values() if self._work is not None else ():
            self._allreduce.cancel(key)

    def abandoned(self) -> tuple[str, ...]:
        """Gradients that were prepared in rounds that are over and that no entry committed; each is told once."""
        work = self._work
        if work is None or work.where == self._history.here():
            return ()
        self._work = None
        entry = self._history.chain.entry(work.where.round)
        kept = {s.gradient for s in entry.decision.stages} if isinstance(entry.decision, Commit) else set()
        return tuple(sorted(set(work.prepared) - kept))

    # --- work ---------------------------------------------------------------------------------------------------
    async def _on_forward(self, request: Request[Work]) -> Reply[Computed]:
        work = request.header
        program = await self._ready_for(request)
        if work.stage == self._context.spec.shape.stages - 1:
            raise Refused(Reason.MALFORMED, "the last stage has only a backward")
        self._context.emit(WorkArrived(Phase.FORWARD, work.at.round, work.microbatch, work.stage))
        parts = unpack(request.body, max_parts=1)
        seed = microbatch_seed(self._context.spec.seed, self._history.head.step, work.microbatch)
        started = self._context.now()

        def compute() -> bytes:
            (x,) = (decode(part, max_elements=self._max_elements) for part in parts)
            return pack([encode(program.forward(x, seed=seed, keep=True), self._codec)])

        async with self._turn():
            self._history.check(work.at)
            body = await self._context.run_in_thread(compute)
        self._context.emit(
            ForwardServed(
                work.at.round,
                work.microbatch,
                work.stage,
                self._context.spec.microbatch_samples,
                self._context.now() - started,
            )
        )
        return Reply(Computed(loss=0.0, accumulated=False), body)

    async def _on_backward(self, request: Request[Work]) -> Reply[Computed]:
        # the caller may go away while a thread adds to a sum: the ledger must hear of it all the same
        return await self._context.finish(self._backward(request))

    async def _backward(self, request: Request[Work]) -> Reply[Computed]:
        work = request.header
        program = await self._ready_for(request)
        self._context.emit(WorkArrived(Phase.BACKWARD, work.at.round, work.microbatch, work.stage))
        parts = unpack(request.body, max_parts=2)
        if len(parts) != 2:
            raise Refused(Reason.MALFORMED, "backward wants x and dy or labels")
        seed = microbatch_seed(self._context.spec.seed, self._history.head.step, work.microbatch)
        started = self._context.now()
        if work.microbatch >= self._context.spec.microbatches:
            raise Refused(Reason.MALFORMED, f"no microbatch {work.microbatch} in a round")

        async with self._turn():
            self._history.check(work.at)
            held = self._round(work.at)
            adds = work.accumulate and not held.ledger.holds(work.microbatch)
            if adds and work.plan != held.plan:
                raise Refused(Reason.FROZEN, f"plan {held.plan}")
            bucket = held.ledger.place(first=work.plan == 0 and work.attempt == 0)

            def compute() -> tuple[bytes, float]:
                x, second = (decode(part, max_elements=self._max_elements) for part in parts)
                result = (
                    program.backward(x, seed=seed, labels=second)
                    if program.last
                    else program.backward(x, seed=seed, dy=second)
                )
                body = b"" if result.dx is None else pack([encode(result.dx, self._codec)])
                if adds:  # last: nothing can fail between the sum and the ledger
                    into = held.sums.get(bucket)
                    if into is None:
                        held.sums[bucket] = result.gradient.to(torch.float64, copy=True)
                    else:
                        into.add_(result.gradient)
                return body, result.losses

            if adds:
                held.adding = asyncio.get_running_loop().create_future()
            try:
                body, loss = await self._context.run_in_thread(compute)
                if adds:
                    held.ledger.add(bucket, work.microbatch, loss)
            finally:
                if adds and held.adding is not None:
                    held.adding.set_result(None)
                    held.adding = None
        self._context.emit(
            BackwardServed(
                work.at.round,
                work.microbatch,
                work.stage,
                self._context.spec.microbatch_samples,
                adds,
                self._context.now() - started,
            )
        )
        return Reply(Computed(loss=loss, accumulated=adds), body)

    @property
    def _codec(self) -> str:
        return self._context.spec.activation_codec

    @property
    def _max_elements(self) -> int:
        return self._context.spec.max_body_bytes

    def _turn(self) -> _Turn:
        if self._queued >= self._context.spec.max_queue:
            raise Refused(Reason.BUSY, f"{self._queued} requests wait")
        return _Turn(self)

    # --- freeze, reduce, prepare --------------------------------------------------------------------------------
    async def _on_freeze(self, request: Request[Freeze]) -> Reply[Report]:
        where, plan = request.header.at, request.header.plan
        await self._from_committee(request.sender, where)
        snapshots = tuple(
            SnapshotReport(step=step, stage=stage, digest=digest)
            for (step, stage), digest in sorted(self.snapshots.items())
        )
        if not self.ready:
            return Reply(
                Report(stage=self.stage, ready=False, stuck=self.stuck, step=max(0, self.step), snapshots=snapshots)
            )
        work = self._round(where)
        previous = work.plan
        if plan > work.plan:
            work.plan = plan  # from here on nothing for an older plan is added
            self._cancel_reductions()
        if work.adding is not None:
            await asyncio.wait([work.adding])  # it was let in before; what still queues will find us frozen
        self._history.check(where)
        if work.plan != plan:
            return Reply(Report(stage=self.stage, ready=True, stuck=False, step=self.step, newer_plan=work.plan))
        buckets = tuple(
            BucketReport(id=b.id, microbatches=b.microbatches, loss_sum=b.loss_sum) for b in work.ledger.buckets()
        )
        self._context.emit(LedgerReported(where.round, plan, self.stage or 0, len(work.ledger)))
        return Reply(
            Report(
                stage=self.stage,
                ready=True,
                stuck=False,
                step=self.step,
                buckets=buckets,
                prepared=tuple(work.prepared.values()),
                previous_plan=previous,
                snapshots=snapshots,
            )
        )

    async def _on_discard(self, request: Request[Discard]) -> Reply[Empty]:
        await self._from_committee(request.sender, request.header.at)
        work = self._planned(request.header.at, request.header.plan)
        async with self._computing:
            for bucket in request.header.buckets:
                work.ledger.discard(bucket)
                work.sums.pop(bucket, None)
        return Reply(Empty())

    async def _on_reduce(self, request: Request[Reduce]) -> Reply[PreparedReport]:
        order = request.header
        await self._from_committee(request.sender, order.at)
        work = self._planned(order.at, order.plan)
        program = self.program
        if program is None or not self.ready or order.stage != self.stage:
            raise Refused(Reason.WRONG_STAGE)
        mine = next((c for c in order.members if c.peer == self._context.me), None)
        if mine is None:
            raise Refused(Reason.NOT_MEMBER, "not in this reduction")
        if not set(mine.buckets) <= set(work.sums):
            raise Refused(Reason.MALFORMED, "the plan names a bucket that is not here")
        if order.plan in work.reduced:
            raise Refused(Reason.BUSY, f"plan {order.plan} was asked for before")
        key = f"{order.at.run}/{order.at.term}/{order.at.round}/{order.at.previous}/{order.stage}/{order.plan}"
        work.reduced[order.plan] = key

        def contribution() -> Tensor | None:
            total: Tensor | None = None
            for bucket in mine.buckets:
                total = work.sums[bucket].clone() if total is None else total.add_(work.sums[bucket])
            return None if total is None else total.cpu()

        async with self._computing:
            part = await self._context.run_in_thread(contribution)
        plan = ReducePlan(
            key=key,
            members=tuple(c.peer for c in order.members),
            weights=tuple(1.0 if c.buckets else 0.0 for c in order.members),
            bounds=split_by_shares(program.numel, [1.0] * len(order.members)),
            dtype="float64",
            codec=self._context.spec.gradient_codec,
            round=order.at.round,
            plan=order.plan,
            stage=order.stage,
        )
        try:
            timeout_s = min(order.timeout_s, self._context.patience.ceiling_s)
            total = await self._allreduce.reduce(plan, part, timeout_s=timeout_s)
        except ReduceFailed as failure:
            raise Refused(Reason.REDUCE_INCOMPLETE, ",".join(failure.missing)[:200]) from failure
        report = PreparedReport(
            gradient=await self._store_gradient(total), plan=order.plan, loss_sum=order.loss_sum, wasted=order.wasted
        )
        return self._prepared(order.at, report)

    async def _on_adopt(self, request: Request[Adopt]) -> Reply[PreparedReport]:
        order = request.header
        await self._from_committee(request.sender, order.at)
        if not self.ready or order.stage != self.stage:
            raise Refused(Reason.WRONG_STAGE)
        await self.fetch_blob(order.prepared.gradient, [p for p in order.donors if p != self._context.me])
        return self._prepared(order.at, order.prepared)

    def _prepared(self, where: Round, report: PreparedReport) -> Reply[PreparedReport]:
        self._history.check(where)
        self._round(where).prepared[report.gradient] = report
        self._context.emit(GradientPrepared(where.round, report.plan, self.stage or 0, report.gradient))
        return Reply(report)

    def _planned(self, where: Round, plan: int) -> _RoundWork:
        if not self.ready:
            raise Refused(Reason.NOT_READY)
        work = self._round(where)
        if work.plan != plan:
            raise Refused(Reason.FROZEN, f"plan {work.plan}")
        return work

    async def _from_committee(self, sender: str, where: Round) -> None:
        await self._history.reach(where, self._context.patience.pong_s, sender)
        if sender not in self._history.head.committee:
            raise Refused(Reason.NOT_MEMBER, "only the committee leads a round")

    # --- gradients as blobs -------------------------------------------------------------------------------------
    async def _store_gradient(self, total: Tensor) -> str:
        # without a codec the float64 sum itself is what everybody applies; a codec's output fits the stage's own dtype
        program = self.program
        exact = self._context.spec.gradient_codec == "none" or program is None
        dtype = total.dtype if exact or program is None else program.dtype
        data = await self._context.run_in_thread(lambda: encode(total.to(dtype), "none"))
        digest = await self._context.blobs.put(data)
        if self._work is not None:
            self._work.totals = {digest: total.to(dtype)}
        return digest

    async def fetch_blob(self, digest: str, donors: list[str]) -> FetchResult | None:
        """See `have_blob`."""
        return await have_blob(self._context, digest, donors)

    async def gradient(self, digest: str) -> Tensor:
        """The reduced gradient sum (numel,), from this disk. Raises Refused(NOT_FOUND)."""
        if self._work is not None and digest in self._work.totals:
            return self._work.totals[digest]
        data = await self._context.blobs.get(digest)
        if data is None or self.program is None:
            raise Refused(Reason.NOT_FOUND, digest)
        numel = self.program.numel
        return await self._context.run_in_thread(lambda: decode(data, max_elements=numel))


async def have_blob(context: Context, digest: str, donors: list[str]) -> FetchResult | None:
    """Have a blob on this disk, from whoever gives it. None: it was here. Raises Refused(NOT_FOUND) if nobody does."""
    if context.blobs.has(digest):
        return None
    try:
        return await fetch(
            context.transport,
            context.blobs,
            digest,
            donors,
            emit=context.emit,
            max_bytes=MAX_BLOB_BYTES,
        )
    except BlobError as error:
        raise Refused(Reason.NOT_FOUND, str(error)[:200]) from error


class _Turn:
    """Entering waits for the server's turn to compute; the queue's length is what makes it say BUSY."""

    def __init__(self, server: StageServer) -> None:
        self._server = server

    async def __aenter__(self) -> None:
        self._server._queued += 1
        try:
            await self._server._computing.acquire()
        finally:
            self._server._queued -= 1

    async def __aexit__(self, *_: object) -> None:
        self._server._computing.release()
