"""Typed events: the single source of truth about what a node did and saw.

Metrics, `shoal status`, the live view, logs and test assertions are all projections of this stream; nothing parses
log lines. An event is a frozen dataclass; `Bus.emit` hands it synchronously, in order, to every sink. Peers appear by
PeerID (base58 string); times are seconds of the node's own clock, carried by the `Stamped` envelope.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class Reason(enum.StrEnum):
    """Why something was refused or failed. Closed: a new failure gets a name here, help below, and a test."""

    STALE = "stale"
    AHEAD = "ahead"
    WRONG_RUN = "wrong_run"
    WRONG_STAGE = "wrong_stage"
    NOT_MEMBER = "not_member"
    NOT_READY = "not_ready"
    FROZEN = "frozen"
    BUSY = "busy"
    MALFORMED = "malformed"
    TOO_LARGE = "too_large"
    NOT_FINITE = "not_finite"
    BAD_SIGNATURE = "bad_signature"
    BAD_DIGEST = "bad_digest"
    EXPIRED = "expired"
    UNREACHABLE = "unreachable"
    DEADLINE = "deadline"
    TORN_STREAM = "torn_stream"
    UNKNOWN_METHOD = "unknown_method"
    INTERNAL = "internal"
    NOT_FOUND = "not_found"
    REDUCE_INCOMPLETE = "reduce_incomplete"
    DIGEST_MISMATCH = "digest_mismatch"
    OUTVOTED = "outvoted"
    DATA_MISMATCH = "data_mismatch"
    DAEMON_DIED = "daemon_died"
    LEFT = "left"
    OBSTRUCTS = "obstructs"


REASON_HELP: dict[Reason, str] = {
    Reason.STALE: "the request belongs to a round that is over; the sender must learn the newer log entry",
    Reason.AHEAD: "the request belongs to a round this node has not reached yet; it is catching up",
    Reason.WRONG_RUN: "the request names another run",
    Reason.WRONG_STAGE: "this node does not serve the stage that was asked for",
    Reason.NOT_MEMBER: "the sender is not a member of the run in the current log entry",
    Reason.NOT_READY: "this node has not finished loading the state of its stage",
    Reason.FROZEN: "the server has reported its ledger and takes work only from the newest plan",
    Reason.BUSY: "the server's queue is full; try another server",
    Reason.MALFORMED: "the message does not match its schema",
    Reason.TOO_LARGE: "the message is larger than its declared bound",
    Reason.NOT_FINITE: "a tensor held NaN or infinity",
    Reason.BAD_SIGNATURE: "a signature does not verify",
    Reason.BAD_DIGEST: "bytes do not match their announced digest",
    Reason.EXPIRED: "the record or certificate is past its lifetime",
    Reason.UNREACHABLE: "no connection to the peer could be made",
    Reason.DEADLINE: "the peer did not answer in time",
    Reason.TORN_STREAM: "the stream ended before the whole message arrived",
    Reason.UNKNOWN_METHOD: "the peer does not offer this call",
    Reason.INTERNAL: "the peer failed while it handled the call; its own log says why",
    Reason.NOT_FOUND: "the peer does not hold what was asked for",
    Reason.REDUCE_INCOMPLETE: "a member's part of an all-reduce was missing; nobody uses the result",
    Reason.DIGEST_MISMATCH: "replicas that should be bit-equal are not",
    Reason.OUTVOTED: "another proposal was decided for this log entry, or a higher ballot is under way",
    Reason.DATA_MISMATCH: "the local copy of the training data is not the one the manifest names",
    Reason.DAEMON_DIED: "the node's own libp2p daemon stopped",
    Reason.LEFT: "the peer asked to be let out of the run",
    Reason.OBSTRUCTS: "the peer answers but rounds fail on it again and again: its links to others, or its disk",
}


class Phase(enum.StrEnum):
    """What a duration was spent on (`OperationTimed`)."""

    FORWARD = "forward"
    BACKWARD = "backward"
    ENCODE = "encode"
    DECODE = "decode"
    CALL_FORWARD = "call_forward"
    CALL_BACKWARD = "call_backward"
    FREEZE = "freeze"
    REPAIR = "repair"
    REDUCE = "reduce"
    COMMIT = "commit"
    APPLY = "apply"
    STATE_TRANSFER = "state_transfer"


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events; carries nothing."""


# --- the node's own life ---------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class NodeStarted(Event):
    peer: str
    name: str  # short readable name of the identity
    run: str
    mode: str
    version: str


@dataclass(frozen=True, slots=True)
class LifecycleChanged(Event):
    old: str
    new: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class NodeStopped(Event):
    exit_code: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Problem(Event):
    """Something a person should know about; `fix` says what to do."""

    reason: Reason
    detail: str
    fix: str = ""


# --- the network -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class BytesMoved(Event):
    """Payload and framing bytes of one call, counted at our end of the stream. direction: 'sent' or 'received'."""

    direction: str
    method: str
    codec: str
    count: int


@dataclass(frozen=True, slots=True)
class CallFailed(Event):
    """A call that this node made did not succeed."""

    peer: str
    method: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class RequestRefused(Event):
    """A request that this node received was refused without effect."""

    peer: str
    method: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class PeerSuspected(Event):
    peer: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class OperationTimed(Event):
    phase: Phase
    seconds: float


# --- the run log -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class LeadershipTaken(Event):
    """This node starts to lead the round; rank 0 is the first in the order, a higher rank is a takeover."""

    round: int
    rank: int


@dataclass(frozen=True, slots=True)
class ProposalFailed(Event):
    round: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class EntryDecided(Event):
    """A log entry was learned. `kind`: genesis, commit, reconfigure, rollback. `step`: optimizer steps after it."""

    round: int
    term: int
    kind: str
    step: int
    digest: str
    members: int
    servers_per_stage: tuple[int, ...]
    samples: int  # samples that the entry commits (0 unless kind == commit)
    loss: float  # mean loss per sample in nats per token (NaN unless kind == commit)
    samples_total: int  # samples committed by the whole history up to here
    committee: tuple[str, ...] = ()  # who decides the next entry


@dataclass(frozen=True, slots=True)
class WaitingForQuorum(Event):
    round: int
    reachable: int
    committee: int


@dataclass(frozen=True, slots=True)
class StageUncovered(Event):
    round: int
    stage: int


@dataclass(frozen=True, slots=True)
class MemberAdmitted(Event):
    round: int
    peer: str
    stage: int | None


@dataclass(frozen=True, slots=True)
class MemberDropped(Event):
    round: int
    peer: str
    reason: Reason


# --- pipeline: feeder ------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class MicrobatchStarted(Event):
    round: int
    microbatch: int


@dataclass(frozen=True, slots=True)
class MicrobatchRetried(Event):
    round: int
    microbatch: int
    stage: int
    peer: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class MicrobatchFinished(Event):
    """All stages of a microbatch acknowledged their backward. seconds: wall time in the pipeline."""

    round: int
    microbatch: int
    samples: int
    loss: float
    seconds: float


# --- pipeline: server ------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class WorkArrived(Event):
    """A forward or backward request passed its checks and is about to be computed."""

    phase: Phase
    round: int
    microbatch: int
    stage: int


@dataclass(frozen=True, slots=True)
class ForwardServed(Event):
    round: int
    microbatch: int
    stage: int
    samples: int
    seconds: float


@dataclass(frozen=True, slots=True)
class BackwardServed(Event):
    """`accumulated` is False for a repeat or a replay without effect."""

    round: int
    microbatch: int
    stage: int
    samples: int
    accumulated: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class LedgerReported(Event):
    round: int
    plan: int
    stage: int
    microbatches: int


@dataclass(frozen=True, slots=True)
class ReduceStarted(Event):
    round: int
    plan: int
    stage: int
    members: int


@dataclass(frozen=True, slots=True)
class ReducePartServed(Event):
    """This node, as reducer, has summed one part and is about to answer the members."""

    round: int
    plan: int
    stage: int


@dataclass(frozen=True, slots=True)
class ReduceFailed(Event):
    round: int
    plan: int
    stage: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class GradientPrepared(Event):
    """The whole reduced gradient of the stage is stored; parameters are untouched."""

    round: int
    plan: int
    stage: int
    digest: str


@dataclass(frozen=True, slots=True)
class StepApplied(Event):
    """The committed gradient of the round was applied. `source`: prepared, fetched, or replayed (from the log)."""

    round: int
    step: int
    stage: int
    source: str
    seconds: float


# --- pipeline: leader ------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class RoundFrozen(Event):
    round: int
    plan: int
    answered: int
    asked: int


@dataclass(frozen=True, slots=True)
class PlanMade(Event):
    round: int
    plan: int
    holes: int  # (stage, microbatch) pairs to replay
    wasted: int  # accumulated (stage, microbatch) pairs that the plan leaves out


@dataclass(frozen=True, slots=True)
class HoleRepaired(Event):
    round: int
    plan: int
    stage: int
    microbatch: int


# --- state -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class SnapshotWritten(Event):
    step: int
    stage: int
    digest: str
    size_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class SyncStarted(Event):
    stage: int
    from_step: int
    to_step: int


@dataclass(frozen=True, slots=True)
class ChunkFetched(Event):
    peer: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class SyncFinished(Event):
    stage: int
    step: int
    donors: int
    size_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ReplicaDrift(Event):
    """This replica's state at a snapshot differed from the pinned one and was replaced. max_abs: largest difference."""

    step: int
    stage: int
    max_abs: float


@dataclass(frozen=True, slots=True)
class Stamped:
    """One line of a node's event file."""

    at_s: float
    event: Event


Sink = Callable[[Stamped], None]

EVENT_TYPES: dict[str, type[Event]] = {cls.__name__: cls for cls in Event.__subclasses__()}


class Bus:
    """Hands every event to every sink, synchronously and in order. `clock` returns seconds (unix time in a daemon)."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._sinks: list[Sink] = []

    def subscribe(self, sink: Sink) -> None:
        self._sinks.append(sink)

    def emit(self, event: Event) -> None:
        stamped = Stamped(self._clock(), event)
        for sink in self._sinks:
            sink(stamped)


def to_json(stamped: Stamped) -> dict[str, Any]:
    """One JSON object per event: {"at_s": …, "event": "ClassName", …fields}."""
    return {"at_s": stamped.at_s, "event": type(stamped.event).__name__, **dataclasses.asdict(stamped.event)}


def from_json(data: dict[str, Any]) -> Stamped:
    """Inverse of `to_json`. Raises KeyError or TypeError for an unknown event or field."""
    fields = dict(data)
    at_s = float(fields.pop("at_s"))
    cls = EVENT_TYPES[fields.pop("event")]
    hints = {f.name: f for f in dataclasses.fields(cls)}
    for name, value in fields.items():
        kind = str(hints[name].type)
        if kind == "Reason":
            fields[name] = Reason(value)
        elif kind == "Phase":
            fields[name] = Phase(value)
        elif kind.startswith("tuple"):
            fields[name] = tuple(value)
    return Stamped(at_s, cls(**fields))
