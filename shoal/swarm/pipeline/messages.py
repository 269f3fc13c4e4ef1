"""Every call of pipeline mode: headers and bounds. Bodies are packed tensors (`protocol.codecs`) or log entries.

All headers that touch a round carry `Round`: (run, term, round r, hash of entry r-1). A server refuses a mismatch as
STALE or AHEAD without effect (DESIGN 4.3.4).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from shoal.protocol.manifest import MAX_MICROBATCHES
from shoal.protocol.runlog import MAX_ENTRY_BYTES, MAX_MEMBERS, Count, Decided, Digest, PeerStr, Small
from shoal.protocol.transport import Empty, Message, Method

MIB = 1024 * 1024
MAX_ENTRIES_PER_CALL = 16


class Round(Message):
    """Which round of which history a request belongs to."""

    run: Digest
    term: Count
    round: Count
    previous: Digest


class Work(Message):
    """Forward or backward of one microbatch through one stage.

    plan: 0 before any freeze, else the plan that asks for a repair; attempt: how often this (stage, microbatch) was
    sent for accumulation; accumulate: add the gradient to the ledger. The body is x, and for backward dy or labels.
    """

    at: Round
    stage: Small
    microbatch: Annotated[int, Field(ge=0, lt=MAX_MICROBATCHES)]
    plan: Count = 0
    attempt: Count = 0
    accumulate: bool = False


class Computed(Message):
    """loss: sum over the microbatch's samples (last stage), 0 elsewhere. Body: y, or dx (empty at stage 0)."""

    loss: float
    accumulated: bool


class Freeze(Message):
    at: Round
    plan: Count


Microbatches = Annotated[tuple[int, ...], Field(max_length=MAX_MICROBATCHES)]


class BucketReport(Message):
    id: Small
    microbatches: Microbatches
    loss_sum: Annotated[float, Field(allow_inf_nan=False)]


class PreparedReport(Message):
    """A whole reduced gradient of the round, stored. loss_sum: of the samples in it (last stage)."""

    gradient: Digest
    plan: Count
    loss_sum: Annotated[float, Field(allow_inf_nan=False)]
    wasted: Count = 0


class SnapshotReport(Message):
    step: Count
    stage: Small
    digest: Digest


class Report(Message):
    """What a peer says when it is frozen. A peer that serves no ready stage reports no buckets."""

    stage: Small | None
    ready: bool
    stuck: bool  # its stage's state is not to be had from anybody it asked
    newer_plan: Count = 0  # not 0: frozen already, for this newer plan, and nothing else is reported
    previous_plan: Count = 0  # the plan that this freeze replaced: whose work it undid
    step: Count
    buckets: Annotated[tuple[BucketReport, ...], Field(max_length=64)] = ()
    prepared: Annotated[tuple[PreparedReport, ...], Field(max_length=64)] = ()
    snapshots: Annotated[tuple[SnapshotReport, ...], Field(max_length=256)] = ()
    samples_per_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


class Discard(Message):
    at: Round
    plan: Count
    buckets: Annotated[tuple[Small, ...], Field(max_length=64)]


class Contribution(Message):
    peer: PeerStr
    buckets: Annotated[tuple[Small, ...], Field(max_length=64)]  # empty: only receives


class Reduce(Message):
    """Reduce exactly these buckets of one stage over these members, in this order, then store the result."""

    at: Round
    plan: Count
    stage: Small
    members: Annotated[tuple[Contribution, ...], Field(min_length=1, max_length=MAX_MEMBERS)]
    loss_sum: float
    wasted: Count = 0
    timeout_s: Annotated[float, Field(gt=0, le=86400)]  # adapts: what this took before decides


class Adopt(Message):
    """Store a reduced gradient that others already hold."""

    at: Round
    stage: Small
    prepared: PreparedReport
    donors: Annotated[tuple[PeerStr, ...], Field(max_length=MAX_MEMBERS)]


class Hole(Message):
    stage: Small
    microbatch: Annotated[int, Field(ge=0, lt=MAX_MICROBATCHES)]
    server: PeerStr


class Repair(Message):
    """The leader asks a feeder to replay microbatches into the stages that miss them."""

    at: Round
    plan: Count
    holes: Annotated[tuple[Hole, ...], Field(max_length=MAX_MICROBATCHES)]


class Repaired(Message):
    done: Count


class FeederDone(Message):
    at: Round
    microbatches: Microbatches  # finished by this feeder


class Prepare(Message):
    at: Round
    ballot: Count


class Promise(Message):
    """promised: False means a higher ballot (`ballot`) was seen. Body: the value accepted at `accepted`, if any."""

    promised: bool
    ballot: int
    accepted: int = -1


class Accept(Message):
    at: Round
    ballot: Count


class AcceptVote(Message):
    accepted: bool
    ballot: int
    signature: Annotated[str, Field(max_length=256, pattern=r"^[0-9a-f]*$")] = ""


class Learn(Message):
    """A decided entry, pushed. The body is the entry."""

    proof: Decided


class EntriesFrom(Message):
    run: Digest
    round: Count


class Entries(Message):
    """Decided entries from the asked round on, as packed bytes in the body; `head`: the sender's newest round."""

    head: Count
    proofs: Annotated[tuple[Decided, ...], Field(max_length=MAX_ENTRIES_PER_CALL)]


class Join(Message):
    """A candidate, or (leave=True) a member that wants out. The body is its sealed peer record."""

    run: Digest
    leave: bool = False


class Joined(Message):
    """How far the log is, so that the candidate can see whether it was admitted."""

    head: Count


class Ping(Message):
    run: Digest


class Pong(Message):
    """round: the round the peer is in; leading: it drives this round; ready: its stage can work; stuck: nobody has the
    state that it needs; fed: it has fed its share of this round."""

    round: Count
    leading: bool
    ready: bool
    stuck: bool
    fed: bool
    stage: Small | None


class Methods:
    """The calls, with tensor bodies bounded by the manifest's limit."""

    def __init__(self, max_body_bytes: int) -> None:
        big = max_body_bytes
        self.forward = Method("forward", Work, Computed, big, big)
        self.backward = Method("backward", Work, Computed, big, big)
        self.freeze = Method("freeze", Freeze, Report)
        self.discard = Method("discard", Discard, Empty)
        self.reduce = Method("reduce", Reduce, PreparedReport)
        self.adopt = Method("adopt", Adopt, PreparedReport)
        self.repair = Method("repair", Repair, Repaired)
        self.feeder_done = Method("feeder_done", FeederDone, Empty)
        self.prepare = Method("paxos_prepare", Prepare, Promise, 0, MAX_ENTRY_BYTES)
        self.accept = Method("paxos_accept", Accept, AcceptVote, MAX_ENTRY_BYTES, 0)
        self.learn = Method("learn", Learn, Empty, MAX_ENTRY_BYTES, 0)
        self.entries = Method("entries", EntriesFrom, Entries, 0, MAX_ENTRIES_PER_CALL * MAX_ENTRY_BYTES)
        self.join = Method("join", Join, Joined, 8192, 0)
        self.ping = Method("ping", Ping, Pong)
