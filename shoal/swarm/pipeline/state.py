"""Keeping a stage's state at the log's step: initialise, load a snapshot, apply committed gradients (DESIGN 4.8).

`next_action` is the pure decision; `StateKeeper` carries it out, for a restart, a late join, a missed round or a
rollback alike. Everything fetched is checked against digests that the log pins, never against a donor's word.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shoal.protocol.blob_fetch import FetchResult
from shoal.protocol.blobs import BlobError, decode_state, encode_state
from shoal.protocol.events import (
    Problem,
    Reason,
    ReplicaDrift,
    SnapshotWritten,
    StepApplied,
    SyncFinished,
    SyncStarted,
)
from shoal.protocol.runlog import Chain, Commit, Entry
from shoal.protocol.sampling import beacon_for, order
from shoal.protocol.transport import Refused
from shoal.swarm.pipeline.context import Context
from shoal.swarm.pipeline.history import History
from shoal.swarm.pipeline.server import StageServer
from shoal.swarm.stage import BadState, StageProgram

SNAPSHOTS_KEPT = 2
COPIES_ELSEWHERE = 2  # peers beyond a stage's servers that keep its pinned snapshot


@dataclass(frozen=True, slots=True)
class Have:
    """The state that is loaded: of which stage, after how many steps, in which history (digest of that commit)."""

    stage: int
    step: int
    history: str


@dataclass(frozen=True, slots=True)
class Ready:
    """Nothing to do."""


@dataclass(frozen=True, slots=True)
class Drop:
    """This node serves no stage."""


@dataclass(frozen=True, slots=True)
class Initialise:
    stage: int


@dataclass(frozen=True, slots=True)
class Load:
    """Load a snapshot blob: after `step`, `digest` names its bytes."""

    stage: int
    step: int
    digest: str


@dataclass(frozen=True, slots=True)
class Apply:
    stage: int
    step: int  # the step that this makes
    gradient: str
    holders: tuple[str, ...]
    samples: int


Action = Ready | Drop | Initialise | Load | Apply


def next_action(
    chain: Chain, stage: int | None, have: Have | None, snapshots: dict[int, str], local: Collection[str]
) -> Action:
    """What brings the state of `stage` one move closer to the head.

    have: what is loaded; snapshots: step -> digest of this stage's snapshots that this node holds in the current
    history; local: gradient digests on this disk (they make applying cheaper than loading).
    """
    head = chain.head
    if stage is None:
        return Drop()
    lost = have is None or have.stage != stage or have.step > head.step
    if not lost:
        assert have is not None
        lost = chain.commit_digest(have.step) != have.history
    pinned = {head.pin.step: head.pin.digests[stage]} if head.pin else {}
    usable = {step: digest for step, digest in {**snapshots, **pinned}.items() if step <= head.step}
    newest = max(usable, default=0)
    if lost:
        return Load(stage, newest, usable[newest]) if newest else Initialise(stage)
    assert have is not None
    if have.step == head.step:
        return Ready()
    entry = chain.commit_of(have.step + 1)
    assert entry is not None and isinstance(entry.decision, Commit)
    commit = entry.decision.stages[stage]
    if newest > have.step and commit.gradient not in local:
        return Load(stage, newest, usable[newest])
    return Apply(stage, have.step + 1, commit.gradient, commit.holders, entry.decision.samples)


def keepers(chain: Chain, entry: Entry, stage: int, coordinator: str) -> tuple[str, ...]:
    """Who beside the stage's servers keeps its pinned snapshot: the coordinator, then members by order."""
    others = [m.peer for m in entry.members if m.stage != stage]
    ranked = order(others, entry.run, entry.round, beacon_for(chain, entry.round), f"keep {stage}")
    return tuple(sorted(ranked, key=lambda p: p != coordinator)[:COPIES_ELSEWHERE])


def load_program(build: Callable[[int], StageProgram], stage: int, data: bytes) -> StageProgram:
    """The program of `stage` with the state that a blob holds.

    Raises Refused(MALFORMED | NOT_FINITE): a digest says which bytes they are, not that they are a state."""
    program = build(stage)
    try:
        program.load_state(decode_state(data, max_bytes=len(data)))
    except BlobError as error:
        raise Refused(error.reason, error.detail) from error
    except (BadState, RuntimeError) as error:
        raise Refused(Reason.MALFORMED, str(error)[:200]) from error
    return program


def _finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point())


def _largest_difference(pair: Sequence[bytes]) -> float:
    """Largest absolute difference between two states; infinite if they cannot be compared."""
    try:
        ours, theirs = (decode_state(data, max_bytes=len(data)) for data in pair)
        return max(
            float((ours[k].double() - theirs[k].double()).abs().max()) for k in ours if k in theirs and ours[k].numel()
        )
    except (BlobError, ValueError, RuntimeError):  # no state at all, nothing in common, other shapes
        return math.inf


def _snapshot_key(step: int, stage: int) -> str:
    return f"snapshot/{step:012d}-{stage:04d}"


class _Superseded(Exception):
    """The log asks for another action than the one under way."""


@dataclass(slots=True)
class _Sync:
    """What a catch-up has cost so far."""

    started: float
    donors: set[str] = field(default_factory=set)
    size_bytes: int = 0


class StateKeeper:
    """Runs `next_action` until the server is ready, again after every entry; writes, keeps and deletes snapshots."""

    def __init__(
        self,
        context: Context,
        history: History,
        server: StageServer,
        build: Callable[[int], StageProgram],
    ) -> None:
        self._context = context
        self._history = history
        self._server = server
        self._build = build
        self.idle = asyncio.Event()  # caught up, and the snapshot of the newest step is on disk
        self._have: Have | None = None
        self._origins: dict[tuple[int, int], str] = {}  # (step, stage) of a snapshot -> digest of the commit it follows
        self._sync: _Sync | None = None  # a catch-up under way
        self._forgotten = 0  # gradients of steps up to here are deleted

    async def open(self) -> None:
        """Find the snapshots that this disk holds."""
        for key in self._context.store.keys("snapshot/"):
            data = await self._context.store.get(key)
            if data is None:
                continue
            record = json.loads(data)
            where = (int(record["step"]), int(record["stage"]))
            if self._context.blobs.has(record["digest"]):
                self._server.snapshots[where] = str(record["digest"])
                self._origins[where] = str(record["origin"])

    async def run(self) -> None:
        """For ever: catch up after every entry, and beside that keep what others may ask for."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow())
            group.create_task(self._keep_house())

    async def _follow(self) -> None:
        while True:
            round_ = self._history.head.round
            self.idle.clear()
            await self.catch_up()
            self.idle.set()
            if self._history.head.round == round_:
                await self._history.beyond(round_)

    async def _keep_house(self) -> None:
        """Beside the catching up, which must not wait for somebody else's snapshot."""
        while True:
            round_ = self._history.head.round
            await self._keep_pinned()
            await self._forget()
            if self._history.head.round == round_:
                await self._history.beyond(round_)

    async def catch_up(self) -> None:
        while True:
            await self._prune()
            action = self._next()
            try:
                if await self._do(action):
                    return
                self._server.stuck = False
            except _Superseded:
                self._server.stuck = False
            except Refused as refusal:
                await self._stuck(action, refusal)

    def _next(self) -> Action:
        stage, chain = self._server.stage, self._history.chain
        mine = {
            step: digest
            for (step, s), digest in self._server.snapshots.items()
            if s == stage and self._origins.get((step, s)) == chain.commit_digest(step)
        }
        return next_action(chain, stage, self._have, mine, self._context.blobs.digests())

    async def _get(self, action: Action, digest: str, donors: list[str]) -> None:
        """Have the blob that an action needs. Raises Refused(NOT_FOUND), or _Superseded once the log asks for another
        action: nobody may have the state of a history that was rolled back, and looking for it takes long."""
        if self._context.blobs.has(digest):
            return
        fetching = asyncio.ensure_future(
            self._server.fetch_blob(digest, [peer for peer in donors if peer != self._context.me])
        )
        try:
            while True:
                grown = asyncio.ensure_future(self._history.beyond(self._history.head.round))
                try:
                    await asyncio.wait([fetching, grown], return_when=asyncio.FIRST_COMPLETED)
                finally:
                    grown.cancel()
                if fetching.done():
                    self._fetched(fetching.result())
                    return
                if self._next() != action:
                    raise _Superseded
        finally:
            fetching.cancel()
            await asyncio.wait([fetching])

    async def _prune(self) -> None:
        """Let go of snapshots that are not of the current history: rolled back, or unlike the pinned one."""
        chain, pin = self._history.chain, self._history.head.pin
        for (step, stage), digest in sorted(self._server.snapshots.items()):
            pinned = pin.digests[stage] if pin is not None and pin.step == step else digest
            if digest != pinned and self._have is not None and self._have.stage == stage:
                self._context.emit(ReplicaDrift(step, stage, await self._difference(digest, pinned)))
                self._have = None  # the first-ordered holder's state is canonical: load it
            if digest != pinned or self._origins.get((step, stage)) != chain.commit_digest(step):
                await self._drop_snapshot(step, stage)

    async def _difference(self, mine: str, pinned: str) -> float:
        """Largest absolute difference between two states; infinite if the other one is not to be had, or is none."""
        try:
            await self._server.fetch_blob(pinned, list(self._history.head.servers(self._server.stage or 0)))
        except Refused:
            return math.inf
        pair = [await self._context.blobs.get(digest) for digest in (mine, pinned)]
        here = [data for data in pair if data is not None]
        return await self._context.run_in_thread(_largest_difference, here) if len(here) == 2 else math.inf

    async def _drop_snapshot(self, step: int, stage: int) -> None:
        digest = self._server.snapshots.pop((step, stage))
        self._origins.pop((step, stage), None)
        await self._context.store.delete(_snapshot_key(step, stage))
        if digest not in self._server.snapshots.values():
            await self._context.blobs.delete(digest)

    async def _do(self, action: Action) -> bool:
        """Carry out one action. True if there is nothing left to do."""
        match action:
            case Ready():
                self._finished_sync()
                return True
            case Drop():
                await self._unload()
                return True
            case Initialise(stage):
                await self._unload()
                program = await self._context.run_in_thread(self._build, stage)
                await self._install(program, Have(stage, 0, self._history.chain.commit_digest(0)))
            case Load():
                self._started_sync(action.stage)
                if self._have is None or action.step <= self._have.step:
                    await self._unload()
                await self._load(action)
            case Apply():
                await self._apply(action)
        return False

    async def _unload(self) -> None:
        """Let go of a state of another history: it must not look ready when the log comes by its step again."""
        self._have = None
        if self._server.program is not None:
            await self._server.set_program(None, -1, "")

    async def _install(self, program: StageProgram, have: Have) -> None:
        await self._server.set_program(program, have.step, have.history)
        self._have = have

    async def _load(self, action: Load) -> None:
        head = self._history.head
        origin = self._history.chain.commit_digest(action.step)  # now: the log may roll back meanwhile
        have = Have(action.stage, action.step, origin)
        donors = [*head.servers(action.stage), *(m.peer for m in head.members if m.stage != action.stage)]
        try:
            await self._get(action, action.digest, donors)
            data = await self._context.blobs.get(action.digest)
            if data is None:
                raise Refused(Reason.NOT_FOUND, action.digest)
            program = await self._context.run_in_thread(load_program, self._build, action.stage, data)
        except Refused as refusal:
            pin = self._history.head.pin
            if pin is not None and pin.digests[action.stage] == action.digest:
                raise  # there is no other choice until the log pins another one
            self._context.emit(
                Problem(
                    refusal.reason,
                    f"this node's snapshot of step {action.step} cannot be used: {refusal.detail}",
                    "it is deleted, and the state is made from an older one",
                )
            )
            if self._server.snapshots.get((action.step, action.stage)) == action.digest:
                await self._drop_snapshot(action.step, action.stage)
            return
        await self._remember(have, action.digest)
        await self._install(program, have)

    async def _apply(self, action: Apply) -> None:
        source = "prepared" if self._context.blobs.has(action.gradient) else "fetched"
        if source == "fetched":
            self._started_sync(action.stage)
        head = self._history.head
        history = self._history.chain.commit_digest(action.step)  # now: the log may roll back meanwhile
        donors = [*action.holders, *(p for p in head.servers(action.stage) if p not in action.holders)]
        await self._get(action, action.gradient, donors)
        gradient = await self._server.gradient(action.gradient)
        started = self._context.now()
        await self._server.apply(gradient, action.samples, history)
        self._have = Have(action.stage, action.step, history)
        seconds = self._context.now() - started
        self._context.emit(StepApplied(self._history.head.round, action.step, action.stage, source, seconds))
        if self._context.spec.snapshot_every and action.step % self._context.spec.snapshot_every == 0:
            await self._write_snapshot(self._have)

    async def _write_snapshot(self, have: Have) -> None:
        program = self._server.program
        assert program is not None
        started = self._context.now()

        def encoded() -> bytes | None:
            state = program.state()
            return encode_state(state) if _finite(state.values()) else None

        data: bytes | None = await self._context.run_in_thread(encoded)
        if data is None:
            self._context.emit(
                Problem(
                    Reason.NOT_FINITE,
                    f"the state after step {have.step} holds NaN or infinity: no snapshot of it is kept",
                    "start a new run with a lower learning rate or a warm-up",
                )
            )
            return
        digest = await self._context.blobs.put(data)
        await self._remember(have, digest)
        self._context.emit(SnapshotWritten(have.step, have.stage, digest, len(data), self._context.now() - started))

    async def _remember(self, have: Have, digest: str) -> None:
        self._server.snapshots[(have.step, have.stage)] = digest
        self._origins[(have.step, have.stage)] = have.history
        record = {"step": have.step, "stage": have.stage, "digest": digest, "origin": have.history}
        await self._context.store.put(_snapshot_key(have.step, have.stage), json.dumps(record).encode())

    async def _keep_pinned(self) -> None:
        """Fetch the snapshots of other stages that the order gives this node to keep: of the pin and of the next one.
        Best effort."""
        entry = self._history.head
        pins = [pin for pin in (entry.pin, entry.candidate) if pin is not None]
        for pin, stage in itertools.product(pins, range(self._context.spec.shape.stages)):
            key, digest = (pin.step, stage), pin.digests[stage]
            origin = self._history.chain.commit_digest(pin.step)
            wanted = self._context.me in keepers(
                self._history.chain, entry, stage, self._context.spec.shape.coordinator
            )
            if not wanted or self._server.snapshots.get(key) == digest:
                continue
            try:
                await self._server.fetch_blob(digest, list(entry.servers(stage)))
            except Refused:
                continue
            await self._remember(Have(stage, pin.step, origin), digest)

    async def _forget(self) -> None:
        """Delete snapshots and gradients that nobody will ask for: older than the pin and than the newest ones."""
        head = self._history.head
        if head.pin is None:
            return
        steps = sorted({step for step, _ in self._server.snapshots} | {head.pin.step})
        keep_from = min(head.pin.step, steps[-SNAPSHOTS_KEPT:][0])
        for step, stage in [key for key in self._server.snapshots if key[0] < keep_from]:
            await self._drop_snapshot(step, stage)
        for step in range(self._forgotten + 1, keep_from + 1):
            entry = self._history.chain.commit_of(step)
            if entry is not None and isinstance(entry.decision, Commit):
                for commit in entry.decision.stages:
                    await self._context.blobs.delete(commit.gradient)
        self._forgotten = max(self._forgotten, keep_from)
        for digest in self._server.abandoned():
            await self._context.blobs.delete(digest)

    def _started_sync(self, stage: int) -> None:
        if self._sync is None:
            have = self._have.step if self._have and self._have.stage == stage else 0
            self._sync = _Sync(self._context.now())
            self._context.emit(SyncStarted(stage, have, self._history.head.step))

    def _fetched(self, result: FetchResult | None) -> None:
        if result is not None and self._sync is not None:
            self._sync.donors |= set(result.donors_used)
            self._sync.size_bytes += result.size_bytes

    def _finished_sync(self) -> None:
        if self._sync is not None and self._have is not None:
            sync, self._sync = self._sync, None
            seconds = self._context.now() - sync.started
            self._context.emit(
                SyncFinished(self._have.stage, self._have.step, len(sync.donors), sync.size_bytes, seconds)
            )

    async def _stuck(self, action: Action, refusal: Refused) -> None:
        """Nobody has what we need: say so (the leader may decide a rollback), try again after a while or an entry."""
        if not self._server.stuck:
            self._context.emit(
                Problem(
                    refusal.reason,
                    f"stage state not to be had: {refusal.detail}",
                    "waiting for a donor; a peer that holds it, or its disk, must come back",
                )
            )
        self._server.stuck = True
        try:
            await self._history.beyond(self._history.head.round, self._context.patience.ping_s)
        except TimeoutError:
            return
