"""An all-reduce that is complete for a member or fails for it: nobody ever sees a partial sum (DESIGN 4.2).

The flat vector is cut into one contiguous part per member, as long as the member's share of bandwidth; that member is
the part's *reducer* (butterfly / reduce-scatter + all-gather, as in Moshpit SGD, Ryabinin et al. 2021, and hivemind). A
part travels in chunks, one call `allreduce.part` each: member i sends reducer j its encoded chunk; the reducer waits
until every contributing member's chunk is there, sums them in the plan's dtype in plan order, encodes the *sum* once
and answers those bytes to everyone. Everyone, the reducer included, decodes those same bytes: all end bit-equal.

    result = Σ_i weight_i · decode(encode(contribution_i))     then once more through the codec

What we changed against hivemind's `AllReduceRunner`: reducers send results, not deltas; a missing, wrong or non-finite
chunk fails the attempt, with the culprit's name, for everyone who still waits; nothing is retried with fewer members
(a new plan is a new attempt with a new key). Memory beyond input and output: windows of chunks, and the encoded
results of this node's own part, which stay answerable until `cancel` for members whose reply was lost.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from shoal.protocol import events
from shoal.protocol.codecs import CODECS, decode, encode, max_encoded_bytes
from shoal.protocol.events import Event, OperationTimed, Phase, Reason, ReducePartServed, ReduceStarted
from shoal.protocol.transport import Empty, Message, Method, Refused, Reply, Request, Transport, Unanswered

CHUNK_VALUES = 2**18  # values per call; a multiple of the codecs' block
MAX_CALLS_PER_PART = 4  # four parallel streams fill a long link; more only hold memory
MAX_CALLS = 16  # over all parts, where there are no more parts than that
MAX_REPEATS = 4  # calls of one member that may wait here, in units of what a member has under way without losses
MAX_DIALS = 3  # attempts to reach a reducer that refuses connections
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 0.5  # between attempts of one call
REPORT_SHARE, REPORT_LIMIT_S = 0.2, 5.0  # a reducer gives up this much before the deadline, so that names still arrive
MAX_HELD_ATTEMPTS = 4  # ended attempts whose results stay answerable, if nobody cancels them
MAX_REMEMBERED_KEYS = 256  # cancelled keys that are refused at once instead of NOT_READY

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float64": torch.float64}


class ReduceFailed(Exception):
    """The attempt failed for this member; it has no result. `missing`: PeerIDs (plan order) whose part was missing or
    refused, as far as known; empty after `cancel`. What to do: make a new plan without them, under a new key.

    reason: REDUCE_INCOMPLETE (missing or late parts, cancelled), NOT_FINITE / MALFORMED / TOO_LARGE (`missing` sent
    such values; NOT_FINITE without a name: the sum itself overflowed), or what a reducer refused with. Names come from
    reducers: a hint for the next plan, not a proof."""

    def __init__(self, reason: Reason, missing: tuple[str, ...] = (), detail: str = "") -> None:
        super().__init__(": ".join(part for part in (str(reason), detail, ", ".join(missing)) if part))
        self.reason = reason
        self.missing = missing


def split_by_shares(numel: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Bounds (len(shares) + 1) that cut [0, numel) into contiguous parts as long as the shares, each within one value.

    Exact arithmetic: the same on every machine. A share of 0 gives an empty part. Raises ValueError for a negative or
    non-finite share and if all are 0."""
    if numel < 0 or not shares or any(not math.isfinite(share) or share < 0 for share in shares) or not any(shares):
        raise ValueError("shares must be finite, ≥ 0 and not all 0")
    exact = [Fraction(share) for share in shares]
    total, passed, bounds = sum(exact), Fraction(0), [0]
    for share in exact:
        passed += share
        bounds.append(math.floor(numel * passed / total + Fraction(1, 2)))
    return tuple(bounds)


class ReducePlan(Message):
    """Who sums what. Equal on every member, small enough for a header. Member i reduces [bounds[i], bounds[i+1])."""

    key: str = Field(min_length=1, max_length=512)  # names the attempt: run, round, plan, stage, entry hash …
    members: tuple[str, ...] = Field(min_length=1, max_length=1024)  # PeerIDs; the order of summation
    weights: tuple[float, ...]  # factor of each member's contribution; 0: contributes nothing, only receives
    bounds: tuple[int, ...]  # len(members) + 1, from 0 to numel
    dtype: Literal["float32", "float64"] = "float32"
    codec: Literal["none", "fp16", "blockwise8"] = "none"
    round: int = 0  # the next three only label events
    plan: int = 0
    stage: int = 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.members)) != len(self.members) or any(not 0 < len(peer) <= 128 for peer in self.members):
            raise ValueError("members must be distinct PeerIDs")
        if len(self.weights) != len(self.members) or not all(math.isfinite(weight) for weight in self.weights):
            raise ValueError("one finite weight per member")
        if not any(self.weights):
            raise ValueError("nobody contributes")
        if len(self.bounds) != len(self.members) + 1 or self.bounds[0] != 0 or list(self.bounds) != sorted(self.bounds):
            raise ValueError("bounds must rise from 0, one more than members")
        return self

    @property
    def numel(self) -> int:
        return self.bounds[-1]

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def digest(self) -> str:
        """sha256 (hex) of the whole plan: two members under one key must mean the same."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def chunks(self, part: int) -> int:
        """How many chunks the part has; 0 for an empty one."""
        return -(-(self.bounds[part + 1] - self.bounds[part]) // CHUNK_VALUES)

    def chunk(self, part: int, index: int) -> slice:
        """Where a chunk lies in the flat vector."""
        start = self.bounds[part] + index * CHUNK_VALUES
        return slice(start, min(start + CHUNK_VALUES, self.bounds[part + 1]))

    def calls_per_part(self) -> int:
        """How many chunks of one part a member may have under way."""
        parts = sum(self.chunks(part) > 0 for part in range(len(self.members)))
        return max(1, min(MAX_CALLS_PER_PART, MAX_CALLS // max(parts, 1)))


class PartRequest(Message):
    """Header of one chunk. The body is the encoded contribution, or empty from a member of weight 0."""

    key: str = Field(max_length=512)
    plan: str = Field(max_length=64)  # ReducePlan.digest()
    chunk: int = Field(ge=0)  # within the callee's own part


_MAX_BODY = max(max_encoded_bytes((CHUNK_VALUES,), torch.float64, codec) for codec in CODECS)
PART: Method[PartRequest, Empty] = Method("allreduce.part", PartRequest, Empty, _MAX_BODY, _MAX_BODY)


_encode_unchecked = functools.partial(encode, check=False)


def _decode(plan: ReducePlan, numel: int, data: bytes) -> Tensor:
    """A chunk (numel,) of the plan's dtype. Raises Refused for anything else."""
    return decode(
        data, max_elements=numel, expect_shape=(numel,), expect_dtype=plan.torch_dtype, allow_codecs=(plan.codec,)
    )


def _decode_into(out: Tensor, plan: ReducePlan, where: slice, data: bytes) -> None:
    out[where] = _decode(plan, where.stop - where.start, data)


def _sum_encoded(plan: ReducePlan, numel: int, bodies: Sequence[bytes]) -> tuple[bytes, list[bytes]]:
    """The encoded weighted sum of one chunk and the bodies' digests. bodies: in plan order, b"" where weight is 0.

    Raises ReduceFailed that names the first member (plan order) whose body is refused."""
    total: Tensor | None = None
    for peer, weight, body in zip(plan.members, plan.weights, bodies, strict=True):
        if not weight:
            continue
        try:
            values = _decode(plan, numel, body)
        except Refused as refusal:
            raise ReduceFailed(refusal.reason, (peer,), refusal.detail) from refusal
        if weight != 1:
            values *= weight
        total = values if total is None else total.add_(values)
    assert total is not None  # the plan has a contributor
    try:
        encoded = encode(total, plan.codec)
    except Refused as refusal:
        raise ReduceFailed(refusal.reason, (), "the sum overflows") from refusal
    return encoded, [hashlib.sha256(body).digest() for body in bodies]


@dataclass(eq=False, slots=True)
class _Chunk:
    """One chunk of this node's own part, as its reducer."""

    bodies: list[bytes | None]  # by member index; emptied when summed
    done: asyncio.Event = field(default_factory=asyncio.Event)  # there is a result, or the attempt has failed
    result: bytes | None = None
    digests: list[bytes] = field(default_factory=list)  # of the summed bodies, to recognise repeats


@dataclass(eq=False, slots=True)
class _Attempt:
    """What this node knows of one key, from its own `reduce` call until `cancel`."""

    plan: ReducePlan
    digest: str
    own: int  # this node's index in the plan
    outcome: asyncio.Future[None]  # of the local `reduce`
    chunks: dict[int, _Chunk] = field(default_factory=dict)
    waiting: list[int] = field(default_factory=list)  # calls that wait here for a sum, by member index
    unanswered: list[int] = field(default_factory=list)  # chunks that this member still has to get, by reducer's index
    served: int = 0  # own chunks that have a result
    failure: ReduceFailed | None = None
    tasks: list[asyncio.Task[None]] = field(default_factory=list)  # sums and calls under way; all owned by `reduce`

    def missing(self) -> tuple[str, ...]:
        """Contributing members (plan order) that an unfinished chunk of the own part still lacks. Chunks that nobody
        has begun are nobody's fault, unless a member has sent nothing at all."""
        lacking = [chunk for chunk in self.chunks.values() if chunk.result is None]
        untouched = len(self.chunks) < self.plan.chunks(self.own)
        return tuple(
            peer
            for index, (peer, weight) in enumerate(zip(self.plan.members, self.plan.weights, strict=True))
            if weight
            and (any(chunk.bodies[index] is None for chunk in lacking) or (untouched and self._sent_nothing(index)))
        )

    def _sent_nothing(self, index: int) -> bool:
        return not any(chunk.result is not None or chunk.bodies[index] is not None for chunk in self.chunks.values())

    def fail(self, failure: ReduceFailed) -> None:
        """No unfinished chunk will have a result any more; finished ones stay answerable. The first failure counts."""
        if self.failure is None:
            self.failure = failure
        for chunk in self.chunks.values():
            if chunk.result is None:
                chunk.bodies = []
                chunk.done.set()
        if not self.outcome.done():
            self.outcome.set_exception(self.failure)


class AllReduce:
    """One per node: the member's and the reducer's side of every all-reduce of this node.

    `run_in_thread(function, *args)` runs compute; a simulation passes an async function that runs it inline.
    `max_elements`: the longest vector that is ever reduced."""

    def __init__(
        self,
        transport: Transport,
        *,
        max_elements: int,
        run_in_thread: Callable[..., Awaitable[Any]] = asyncio.to_thread,
        emit: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self._transport = transport
        self._max_elements = max_elements
        self._run_in_thread = run_in_thread
        self._emit = emit
        self._attempts: dict[str, _Attempt] = {}
        self._cancelled: dict[str, None] = {}  # insertion-ordered set
        transport.serve(PART, self._answer)

    # --- the member's side -------------------------------------------------------------------------------------------
    async def reduce(self, plan: ReducePlan, contribution: Tensor | None, *, timeout_s: float) -> Tensor:
        """Σ weight_i · contribution_i, flat (numel,) of the plan's dtype on the CPU, bit-equal on every member.

        contribution: flat (numel,) of the plan's dtype, any device, unchanged during the call; None exactly if this
        member's weight is 0. Returns the complete sum or raises ReduceFailed, at most `timeout_s` after the call; a
        member that fails says so to those who wait for it. It may fail here and succeed elsewhere: agreement on what
        happened is the run log's work, not this one's. One call per key; ValueError for a second, or wrong arguments.
        Own results stay answerable until `cancel(plan.key)`, which the owner calls once nobody can need them."""
        if self._transport.peer not in plan.members:
            raise ValueError("this node is not a member of the plan")
        own = plan.members.index(self._transport.peer)
        if (contribution is not None) != bool(plan.weights[own]):
            raise ValueError("a contribution is wanted exactly from members of weight other than 0")
        if contribution is not None and (contribution.shape, contribution.dtype) != ((plan.numel,), plan.torch_dtype):
            raise ValueError(f"the contribution must be ({plan.numel},) of {plan.dtype}, flat")
        if plan.key in self._attempts:
            raise ValueError(f"key {plan.key!r} was used before")
        if plan.key in self._cancelled:
            raise ReduceFailed(Reason.REDUCE_INCOMPLETE, (), "cancelled before it started")
        if plan.numel > self._max_elements:
            raise ReduceFailed(Reason.TOO_LARGE, (), f"{plan.numel} values")

        loop = asyncio.get_running_loop()
        started = loop.time()
        deadline = started + timeout_s
        attempt = _Attempt(plan, plan.digest(), own, loop.create_future())
        attempt.waiting = [0] * len(plan.members)
        attempt.unanswered = [plan.chunks(part) for part in range(len(plan.members))]
        self._emit(ReduceStarted(plan.round, plan.plan, plan.stage, len(plan.members)))
        self._make_room()
        self._attempts[plan.key] = attempt
        report_at = deadline - min(REPORT_SHARE * timeout_s, REPORT_LIMIT_S)
        timers = (loop.call_at(report_at, self._give_up, attempt), loop.call_at(deadline, self._expire, attempt))
        try:
            result = torch.empty(plan.numel, dtype=plan.torch_dtype)
            orders = [iter(range(plan.chunks(part))) for part in range(len(plan.members))]
            lanes = [  # everyone walks a part's chunks in the same order: the oldest one under way is never blocked
                self._exchange(attempt, part, order, contribution, result, deadline, timeout_s)
                for _ in range(plan.calls_per_part())
                for part, order in enumerate(orders)
                if plan.chunks(part)
            ]
            attempt.tasks += [loop.create_task(lane) for lane in lanes]
            watcher = loop.create_task(self._watch(attempt, tuple(attempt.tasks)))
            attempt.tasks.append(watcher)
            await attempt.outcome
        except ReduceFailed as failure:
            self._emit(events.ReduceFailed(plan.round, plan.plan, plan.stage, failure.reason))
            raise
        finally:
            for timer in timers:
                timer.cancel()
            if not attempt.outcome.done() or attempt.outcome.cancelled():
                attempt.fail(ReduceFailed(Reason.REDUCE_INCOMPLETE, (self._transport.peer,), "the member stopped"))
            tasks, attempt.tasks = attempt.tasks, []
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self._emit(OperationTimed(Phase.REDUCE, loop.time() - started))
        return result

    def cancel(self, key: str) -> None:
        """Forget an attempt, whether or not it began here: a running `reduce` raises, waiting and later callers get
        REDUCE_INCOMPLETE, results are dropped."""
        attempt = self._attempts.pop(key, None)
        if attempt is not None:
            attempt.fail(ReduceFailed(Reason.REDUCE_INCOMPLETE, (), "cancelled"))
        self._cancelled[key] = None
        while len(self._cancelled) > MAX_REMEMBERED_KEYS:
            del self._cancelled[next(iter(self._cancelled))]

    def _make_room(self) -> None:
        """Forget the oldest ended attempts beyond MAX_HELD_ATTEMPTS."""
        ended = [key for key, attempt in self._attempts.items() if attempt.outcome.done()]
        for key in ended[: max(0, len(ended) - MAX_HELD_ATTEMPTS + 1)]:
            self.cancel(key)

    async def _watch(self, attempt: _Attempt, lanes: Sequence[asyncio.Task[None]]) -> None:
        """Turns the lanes' ends into the attempt's outcome: all returned, or the first failure."""
        try:
            await asyncio.gather(*lanes)
        except ReduceFailed as failure:
            attempt.fail(failure)
        except Exception as error:  # ours, never the network's: fail typed instead of hanging until the deadline
            attempt.fail(ReduceFailed(Reason.INTERNAL, (), repr(error)))
        else:
            if not attempt.outcome.done():
                attempt.outcome.set_result(None)

    async def _exchange(
        self,
        attempt: _Attempt,
        part: int,
        order: Iterator[int],
        contribution: Tensor | None,
        result: Tensor,
        deadline: float,
        timeout_s: float,
    ) -> None:
        """One lane of one part: chunk after chunk, encode, ask the reducer, decode into `result`."""
        plan = attempt.plan
        for index in order:
            where = plan.chunk(part, index)
            body = b""
            if contribution is not None:  # unchecked: the reducer refuses what is not finite, by name, for everyone
                body = await self._run_in_thread(_encode_unchecked, contribution[where], plan.codec)
            answer = await self._ask(attempt, part, index, body, deadline, timeout_s)
            try:
                await self._run_in_thread(_decode_into, result, plan, where, answer)
            except Refused as refusal:
                raise ReduceFailed(refusal.reason, (plan.members[part],), refusal.detail) from refusal
            attempt.unanswered[part] -= 1

    async def _ask(
        self, attempt: _Attempt, part: int, index: int, body: bytes, deadline: float, timeout_s: float
    ) -> bytes:
        """The encoded sum of one chunk. Asks again after a lost reply (the reducer recognises repeats) and while the
        reducer has not entered the attempt. Raises ReduceFailed."""
        plan, loop = attempt.plan, asyncio.get_running_loop()
        reducer = plan.members[part]
        header = PartRequest(key=plan.key, plan=attempt.digest, chunk=index)
        pause_s, dials = FIRST_PAUSE_S, 0
        while (left_s := deadline - loop.time()) > 0:
            try:  # never all the time that is left: a reply may get lost without a sign
                call_s = min(left_s, max(left_s / 2, timeout_s / 8))
                return (await self._transport.call(reducer, PART, header, body, timeout_s=call_s)).body
            except Refused as refusal:
                if refusal.reason not in (Reason.NOT_READY, Reason.BUSY):
                    raise self._failure(plan, reducer, refusal) from refusal
            except Unanswered as silence:
                dials += silence.reason is Reason.UNREACHABLE
                if dials == MAX_DIALS:
                    raise ReduceFailed(Reason.REDUCE_INCOMPLETE, (reducer,), "unreachable") from silence
            await asyncio.sleep(min(pause_s, max(deadline - loop.time(), 0)))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        raise ReduceFailed(Reason.REDUCE_INCOMPLETE, (reducer,), "no answer in time")

    @staticmethod
    def _failure(plan: ReducePlan, reducer: str, refusal: Refused) -> ReduceFailed:
        """What a reducer's refusal means: it names the culprits, or it is the culprit, or (cancelled) there is none."""
        named = refusal.detail.split()
        missing = tuple(peer for peer in plan.members if peer in named)
        if not missing and refusal.reason not in (Reason.REDUCE_INCOMPLETE, Reason.NOT_FINITE):
            missing = (reducer,)
        return ReduceFailed(refusal.reason, missing, f"said by {reducer}")

    # --- deadlines ---------------------------------------------------------------------------------------------------
    def _give_up(self, attempt: _Attempt) -> None:
        """Shortly before the deadline: a reducer whose part is incomplete names who is missing."""
        if not attempt.outcome.done() and (missing := attempt.missing()):
            attempt.fail(ReduceFailed(Reason.REDUCE_INCOMPLETE, missing, "late"))

    def _expire(self, attempt: _Attempt) -> None:
        silent = tuple(peer for peer, chunks in zip(attempt.plan.members, attempt.unanswered, strict=True) if chunks)
        attempt.fail(ReduceFailed(Reason.REDUCE_INCOMPLETE, attempt.missing() or silent, "out of time"))

    # --- the reducer's side ------------------------------------------------------------------------------------------
    async def _answer(self, request: Request[PartRequest]) -> Reply[Empty]:
        """One chunk of a member: waits (until this node's own deadline at most) for the others', answers the sum."""
        header = request.header
        attempt = self._attempts.get(header.key)
        if attempt is None:
            if header.key in self._cancelled:
                raise Refused(Reason.REDUCE_INCOMPLETE)
            raise Refused(Reason.NOT_READY, "this node has not entered that all-reduce")
        plan = attempt.plan
        if request.sender not in plan.members:
            raise Refused(Reason.NOT_MEMBER)
        if header.plan != attempt.digest or header.chunk >= plan.chunks(attempt.own):
            raise Refused(Reason.MALFORMED, "another plan, or no such chunk")
        member = plan.members.index(request.sender)
        if bool(request.body) != bool(plan.weights[member]):  # values are looked at when the chunk is summed
            raise Refused(Reason.MALFORMED, "a body is wanted exactly from members of weight other than 0")

        if attempt.waiting[member] >= MAX_REPEATS * plan.calls_per_part():
            raise Refused(Reason.BUSY, "too many calls at once")
        chunk = attempt.chunks.get(header.chunk)
        if (chunk is None or chunk.result is None) and attempt.failure is not None:
            raise self._refusal(attempt.failure)
        if chunk is None:
            chunk = attempt.chunks[header.chunk] = _Chunk([None if weight else b"" for weight in plan.weights])
        if chunk.result is not None:
            if hashlib.sha256(request.body).digest() != chunk.digests[member]:
                raise Refused(Reason.MALFORMED, "not the contribution that was summed")
        elif (held := chunk.bodies[member]) is None:
            chunk.bodies[member] = request.body
            if all(body is not None for body in chunk.bodies):
                task = asyncio.get_running_loop().create_task(self._sum(attempt, header.chunk, chunk))
                attempt.tasks.append(task)
        elif held != request.body:
            raise Refused(Reason.MALFORMED, "not the contribution that was sent before")

        attempt.waiting[member] += 1
        try:  # ended by the sum or by a failure: `reduce` has timers, and fails the attempt when it is cancelled itself
            await chunk.done.wait()
        finally:
            attempt.waiting[member] -= 1
        if chunk.result is None:
            raise self._refusal(attempt.failure)
        return Reply(Empty(), chunk.result)

    @staticmethod
    def _refusal(failure: ReduceFailed | None) -> Refused:
        """The failure as a waiting member hears it: the detail is the missing PeerIDs, nothing else."""
        if failure is None:
            return Refused(Reason.INTERNAL)
        return Refused(failure.reason, " ".join(failure.missing))

    async def _sum(self, attempt: _Attempt, index: int, chunk: _Chunk) -> None:
        """All contributions to a chunk are there: sum them and let everyone have the same bytes."""
        plan = attempt.plan
        where = plan.chunk(attempt.own, index)
        try:
            result, digests = await self._run_in_thread(
                _sum_encoded, plan, where.stop - where.start, tuple(chunk.bodies)
            )
        except ReduceFailed as failure:
            attempt.fail(failure)
            return
        except Exception as error:
            attempt.fail(ReduceFailed(Reason.INTERNAL, (self._transport.peer,), repr(error)))
            return
        if attempt.failure is not None:
            return
        attempt.served += 1
        if attempt.served == plan.chunks(attempt.own):
            self._emit(ReducePartServed(plan.round, plan.plan, plan.stage))
        chunk.bodies, chunk.digests, chunk.result = [], digests, result
        chunk.done.set()
