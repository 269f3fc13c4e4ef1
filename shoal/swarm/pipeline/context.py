"""What every part of a pipeline peer is given: the run's fixed numbers and the effects it may have. No state."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from torch import Tensor

from shoal.protocol.blobs import BlobStore
from shoal.protocol.events import Event
from shoal.protocol.runlog import Entry, Genesis, Member, Verify
from shoal.protocol.sampling import next_beacon
from shoal.protocol.store import Store
from shoal.protocol.transport import Transport
from shoal.swarm.pipeline.messages import Methods, Round
from shoal.swarm.pipeline.roles import Shape

T = TypeVar("T")
CodecName = Literal["none", "fp16", "blockwise8"]
_UNFINISHED: set[asyncio.Task[Any]] = set()  # the loop itself keeps only weak references


def _finished(task: asyncio.Task[Any]) -> None:
    """Its error went to whoever awaits it; when a node shuts down, nobody does, and that is no news."""
    _UNFINISHED.discard(task)
    if not task.cancelled():
        task.exception()


RunInThread = Callable[..., Awaitable[Any]]


class Signer(Protocol):
    """The node's run key."""

    @property
    def public_key(self) -> str:
        """Ed25519 public key, hex."""
        ...

    def sign(self, domain: str, payload: bytes) -> bytes: ...


class BatchSource(Protocol):
    """Deterministic data: global sample ids in, tensors out."""

    def batch(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs (count, t) int64 and labels (count, t) int64 of these samples."""
        ...


@dataclass(frozen=True, slots=True)
class Spec:
    """The fixed numbers of a run, read off its manifest."""

    run: str
    seed: int
    shape: Shape
    microbatches: int  # per round
    microbatch_samples: int
    rounds: int  # the run ends after this many steps; 0: never
    snapshot_every: int
    servers_per_stage: int  # the first round waits for this many ready servers in each stage
    activation_codec: CodecName = "none"
    gradient_codec: CodecName = "none"
    max_body_bytes: int = 64 * 1024 * 1024
    max_buckets: int = 4
    max_queue: int = 64

    @property
    def samples(self) -> int:
        return self.microbatches * self.microbatch_samples


@dataclass(frozen=True, slots=True)
class Patience:
    """Bounds on waiting, in seconds. Deadlines adapt between floor and ceiling; the simulator uses the same values."""

    floor_s: float = 4.0
    work_s: float = 20.0  # first guess for forward or backward, before anything was measured
    freeze_s: float = 5.0
    reduce_s: float = 30.0
    paxos_s: float = 3.0
    ping_s: float = 1.0  # between two looks at a peer
    pong_s: float = 2.0  # for an answer to a look
    misses: int = 2  # looks in a row without an answer before a peer counts as away
    round_s: float = 120.0  # first guess for a whole round, before anything was measured
    ceiling_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Context:
    spec: Spec
    transport: Transport
    store: Store
    blobs: BlobStore
    emit: Callable[[Event], None]
    run_in_thread: RunInThread
    signer: Signer
    verify: Verify
    calls: Methods
    patience: Patience

    @property
    def me(self) -> str:
        return self.transport.peer

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` to its end even if the caller is cancelled meanwhile."""
        task = asyncio.get_running_loop().create_task(work)
        _UNFINISHED.add(task)
        task.add_done_callback(_finished)
        return await asyncio.shield(task)

    def now(self) -> float:
        """Seconds on the loop's clock: real in a daemon, virtual in the simulator."""
        return asyncio.get_running_loop().time()


def at(entry: Entry, digest: str) -> Round:
    """The round that follows `entry`."""
    return Round(run=entry.run, term=entry.term, round=entry.round + 1, previous=digest)


def genesis(run: str, coordinator: Member) -> Entry:
    """Entry 0: a pure function of the run and its coordinator, so everybody can compute its hash."""
    member = coordinator.model_copy(update={"stage": None, "feeder": False, "since": 0, "maddrs": (), "name": ""})
    return Entry(
        run=run,
        term=0,
        round=0,
        previous="",
        members=(member.model_copy(update={"can_feed": False}),),
        committee=(coordinator.peer,),
        next_sample=0,
        samples_total=0,
        step=0,
        beacon=next_beacon(None, run),
        decision=Genesis(),
        pin=None,
    )
