"""What a node looks like now: a fold of its event stream into one snapshot.

`shoal status --json`, the `/status` endpoint, the live views and test assertions read this and nothing else. Time is
event time (`Stamped.at_s`); there is no clock here, so replaying a node's event file gives the same snapshot.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from shoal.protocol.events import (
    REASON_HELP,
    BackwardServed,
    BytesMoved,
    CallFailed,
    ChunkFetched,
    EntryDecided,
    Event,
    ForwardServed,
    GradientPrepared,
    HoleRepaired,
    LeadershipTaken,
    LedgerReported,
    LifecycleChanged,
    MemberAdmitted,
    MemberDropped,
    MicrobatchFinished,
    MicrobatchRetried,
    MicrobatchStarted,
    NodeStarted,
    NodeStopped,
    PeerSuspected,
    PlanMade,
    Problem,
    ProposalFailed,
    ReduceFailed,
    ReplicaDrift,
    RequestRefused,
    SnapshotWritten,
    StageUncovered,
    Stamped,
    StepApplied,
    SyncFinished,
    SyncStarted,
    WaitingForQuorum,
)

LOSS_HISTORY = 512  # newest (round, loss) pairs that a snapshot carries
RATE_WINDOW_S = 60.0
NOT_YET_WORKING = frozenset({"starting", "checking", "joining", "syncing"})


class RateWindow:
    """Samples and rounds per second over the newest `window_s` of event time, and over at least the last two rounds.

    A rate is (what came after the first entry of the window) / (time between its first and last entry); 0 until there
    are two entries."""

    def __init__(self, window_s: float = RATE_WINDOW_S) -> None:
        self._window_s = window_s
        self._entries: deque[tuple[float, int]] = deque(maxlen=100_000)

    def add(self, at_s: float, samples: int) -> None:
        self._entries.append((at_s, samples))
        while len(self._entries) > 2 and self._entries[0][0] < at_s - self._window_s:
            self._entries.popleft()

    @property
    def samples_per_s(self) -> float:
        return self._per_second(sum(samples for _, samples in list(self._entries)[1:]))

    @property
    def rounds_per_s(self) -> float:
        return self._per_second(len(self._entries) - 1)

    def _per_second(self, amount: int) -> float:
        if len(self._entries) < 2:
            return 0.0
        elapsed_s = self._entries[-1][0] - self._entries[0][0]
        return amount / elapsed_s if elapsed_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Trouble:
    """The newest thing that a person should know about, and what to do."""

    at_s: float
    reason: str
    detail: str
    fix: str


@dataclass(frozen=True, slots=True)
class QuorumWait:
    """The committee has no majority of reachable peers: nothing commits until it has."""

    since_s: float
    round: int
    reachable: int
    committee: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One node, now. Losses are nats per token (NaN before the first commit), `*_s` seconds, `*_bytes` bytes.

    Counts are of what this node did or saw since it started, except `samples_total`, which is the run's history."""

    at_s: float = 0.0  # time of the newest event
    # the node
    peer: str = ""
    name: str = ""
    run: str = ""
    mode: str = ""
    version: str = ""
    started_at_s: float | None = None
    state: str = ""
    state_since_s: float | None = None
    state_detail: str = ""
    exit_code: int | None = None
    stage: int | None = None
    feeds: bool = False  # it drove a microbatch in the current round or the one before
    leader: bool = False  # it leads the round that is under way
    # the run
    round: int | None = None  # of the newest log entry
    term: int | None = None
    step: int = 0
    members: int = 0
    servers_per_stage: tuple[int, ...] = ()
    loss: float = math.nan
    loss_first: float = math.nan
    loss_history: tuple[tuple[int, float], ...] = ()
    perplexity: float = math.nan
    samples_total: int = 0
    samples_per_s: float = 0.0
    last_commit_at_s: float | None = None
    entries: Mapping[str, int] = field(default_factory=dict)
    # what stands in the way
    waiting_for_quorum: QuorumWait | None = None
    stages_uncovered: Mapping[int, float] = field(default_factory=dict)  # stage → since (s)
    problem: Trouble | None = None
    # what this node did
    microbatches_started: int = 0
    microbatches_finished: int = 0
    samples_fed: int = 0
    forwards: int = 0
    backwards: int = 0
    backwards_accumulated: int = 0
    samples_served: int = 0  # samples whose gradient this node added up
    steps_applied: Mapping[str, int] = field(default_factory=dict)  # by source
    ledgers_reported: int = 0
    gradients_prepared: int = 0
    takeovers: int = 0
    plans: int = 0
    holes: int = 0
    wasted: int = 0
    repaired: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    # what went wrong
    retries: Mapping[str, int] = field(default_factory=dict)  # by reason
    failures: Mapping[str, int] = field(default_factory=dict)  # calls of ours, by reason
    refusals: Mapping[str, int] = field(default_factory=dict)  # requests that we refused, by reason
    reduce_failures: Mapping[str, int] = field(default_factory=dict)
    proposals_failed: Mapping[str, int] = field(default_factory=dict)
    members_dropped: Mapping[str, int] = field(default_factory=dict)
    peers_suspected: Mapping[str, int] = field(default_factory=dict)
    drifts: int = 0
    last_drift: float = 0.0
    # state
    snapshots: int = 0
    last_snapshot_step: int | None = None
    syncing_to_step: int | None = None
    sync_bytes: int = 0  # fetched by all state transfers
    syncs: int = 0
    last_sync_s: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; NaN and infinities become null, keys are the attribute names."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Trouble | QuorumWait):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return value


class Projection:
    """Folds events into a `Snapshot`. Deterministic; callable, so that a `Bus` takes it as a sink.

    Entries that a node learns before it works (it is catching up) move round, step and loss but not the rate: they
    were not trained in the time it took to read them."""

    def __init__(self) -> None:
        self._now: dict[str, Any] = {}
        self._counts: dict[str, Counter[str]] = {}
        self._loss: deque[tuple[int, float]] = deque(maxlen=LOSS_HISTORY)
        self._rate = RateWindow()
        self._uncovered: dict[int, tuple[int, float]] = {}  # stage → (round, since)
        self._fed_round: int | None = None
        self._led_round: int | None = None

    def __call__(self, stamped: Stamped) -> None:
        self.apply(stamped)

    def apply(self, stamped: Stamped) -> None:
        self._now["at_s"] = stamped.at_s
        self._fold(stamped.at_s, stamped.event)

    def _set(self, **values: Any) -> None:
        self._now.update(values)

    def _add(self, name: str, amount: int = 1) -> None:
        self._now[name] = self._now.get(name, 0) + amount

    def _count(self, name: str, key: str) -> None:
        self._counts.setdefault(name, Counter())[key] += 1

    def _fold(self, at_s: float, event: Event) -> None:
        match event:
            case BytesMoved(direction=direction, count=count):
                self._add("bytes_sent" if direction == "sent" else "bytes_received", count)
            case NodeStarted():
                self._set(
                    peer=event.peer, name=event.name, run=event.run, mode=event.mode, version=event.version,
                    started_at_s=at_s, exit_code=None,
                )  # fmt: skip
            case LifecycleChanged():
                self._set(state=event.new, state_since_s=at_s, state_detail=event.detail)
            case NodeStopped():
                self._set(exit_code=event.exit_code)
            case Problem():
                fix = event.fix or REASON_HELP[event.reason]
                self._set(problem=Trouble(at_s, str(event.reason), event.detail, fix))
            case CallFailed():
                self._count("failures", event.reason)
            case RequestRefused():
                self._count("refusals", event.reason)
            case PeerSuspected():
                self._count("peers_suspected", event.reason)
            case LeadershipTaken():
                self._led_round = event.round
                self._add("takeovers", int(event.rank > 0))
            case ProposalFailed():
                self._count("proposals_failed", event.reason)
            case EntryDecided():
                self._entry(at_s, event)
            case WaitingForQuorum():
                old: QuorumWait | None = self._now.get("waiting_for_quorum")
                since_s = old.since_s if old else at_s
                self._set(waiting_for_quorum=QuorumWait(since_s, event.round, event.reachable, event.committee))
            case StageUncovered():
                _, since_s = self._uncovered.get(event.stage, (0, at_s))
                self._uncovered[event.stage] = (event.round, since_s)
            case MemberAdmitted():
                if event.peer == self._now.get("peer"):
                    self._set(stage=event.stage)
            case MemberDropped():
                self._count("members_dropped", event.reason)
            case MicrobatchStarted():
                self._fed_round = event.round
                self._add("microbatches_started")
            case MicrobatchRetried():
                self._count("retries", event.reason)
            case MicrobatchFinished():
                self._fed_round = event.round
                self._add("microbatches_finished")
                self._add("samples_fed", event.samples)
            case ForwardServed():
                self._set(stage=event.stage)
                self._add("forwards")
            case BackwardServed():
                self._set(stage=event.stage)
                self._add("backwards")
                self._add("backwards_accumulated", int(event.accumulated))
                self._add("samples_served", event.samples if event.accumulated else 0)
            case LedgerReported():
                self._add("ledgers_reported")
            case GradientPrepared():
                self._add("gradients_prepared")
            case StepApplied():
                self._set(stage=event.stage)
                self._count("steps_applied", event.source)
            case ReduceFailed():
                self._count("reduce_failures", event.reason)
            case PlanMade():
                self._add("plans")
                self._add("holes", event.holes)
                self._add("wasted", event.wasted)
            case HoleRepaired():
                self._add("repaired")
            case SnapshotWritten():
                self._add("snapshots")
                self._set(last_snapshot_step=event.step)
            case SyncStarted():
                self._set(stage=event.stage, syncing_to_step=event.to_step)
            case ChunkFetched():
                self._add("sync_bytes", event.size_bytes)
            case SyncFinished():
                self._add("syncs")
                self._set(stage=event.stage, syncing_to_step=None, last_sync_s=event.seconds)
            case ReplicaDrift():
                self._add("drifts")
                self._set(last_drift=event.max_abs)

    def _entry(self, at_s: float, entry: EntryDecided) -> None:
        self._count("entries", entry.kind)
        self._set(
            round=entry.round, term=entry.term, step=entry.step, members=entry.members,
            servers_per_stage=entry.servers_per_stage, samples_total=entry.samples_total,
        )  # fmt: skip
        waiting: QuorumWait | None = self._now.get("waiting_for_quorum")
        if waiting and entry.round >= waiting.round:
            self._set(waiting_for_quorum=None)
        for stage, (since_round, _) in list(self._uncovered.items()):
            covered = stage < len(entry.servers_per_stage) and entry.servers_per_stage[stage] > 0
            if covered and entry.round >= since_round:
                del self._uncovered[stage]
        if entry.kind == "commit":
            if not self._loss:
                self._set(loss_first=entry.loss)
            self._loss.append((entry.round, entry.loss))
            self._set(loss=entry.loss, last_commit_at_s=at_s)
            if self._now.get("state", "") not in NOT_YET_WORKING:
                self._rate.add(at_s, entry.samples)

    def snapshot(self) -> Snapshot:
        last_round: int | None = self._now.get("round")
        return Snapshot(
            **{**self._now, **{name: dict(counts) for name, counts in self._counts.items()}},
            feeds=self._fed_round is not None and (last_round is None or self._fed_round >= last_round),
            leader=self._led_round is not None and (last_round is None or self._led_round > last_round),
            loss_history=tuple(self._loss),
            perplexity=perplexity(self._now.get("loss", math.nan)),
            samples_per_s=self._rate.samples_per_s,
            stages_uncovered={stage: since_s for stage, (_, since_s) in sorted(self._uncovered.items())},
        )


def perplexity(loss: float) -> float:
    """exp(loss), loss in nats per token; infinity where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def project(events: Iterable[Stamped]) -> Snapshot:
    """The snapshot after these events."""
    projection = Projection()
    for stamped in events:
        projection.apply(stamped)
    return projection.snapshot()
