"""Prometheus metrics, projected from the event stream.

`Metrics` is a sink: every event that a node emits moves some metric (or stands on `NO_METRIC` with the reason why
not). Names are `shoal_*` in base units; labels are bounded, whatever peers send: a value outside its list becomes
"other", and no label holds a peer id. `run` and `mode` are added to every sample when it is scraped, from NodeStarted.

`python -m shoal.monitoring.metrics` prints docs/metrics.md.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shoal.monitoring.projection import NOT_YET_WORKING, perplexity
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
    OperationTimed,
    PeerSuspected,
    Phase,
    PlanMade,
    Problem,
    ProposalFailed,
    Reason,
    ReduceFailed,
    ReducePartServed,
    ReduceStarted,
    ReplicaDrift,
    RequestRefused,
    RoundFrozen,
    SnapshotWritten,
    StageUncovered,
    Stamped,
    StepApplied,
    SyncFinished,
    SyncStarted,
    WaitingForQuorum,
    WorkArrived,
)

OTHER = "other"
MAX_STAGES = 64  # a stage beyond this is "other"

LABEL_VALUES: dict[str, tuple[str, ...]] = {
    "mode": ("pipeline", "experts", "replicas", "zeroth"),
    "state": ("starting", "checking", "joining", "syncing", "working", "paused", "draining", "left"),
    "kind": ("genesis", "commit", "reconfigure", "rollback"),
    "direction": ("sent", "received"),
    "method": ("forward", "backward", "reduce", "state", "log", "plan", "membership"),
    "codec": ("none", "fp16", "bf16", "blockwise8", "topk", "powersgd", "sign"),
    "reason": tuple(Reason),
    "phase": tuple(Phase),
    "source": ("prepared", "fetched", "replayed"),
    "accumulated": ("true", "false"),
    "turn": ("first", "takeover"),
    "process": ("node", "children"),
}
LABEL_HELP: dict[str, str] = {
    "run": "the run, as the node announced it when it started; one per node",
    "mode": "how the run trains",
    "stage": f"pipeline stage, 0 to {MAX_STAGES - 1}",
    "state": "where the node is in its life",
    "kind": "what a log entry does",
    "direction": "seen from this node",
    "method": "what a call is about; many protocol methods fall into one class",
    "codec": "how tensors are packed on the wire",
    "reason": "why something was refused or failed",
    "phase": "what time was spent on",
    "source": "where an applied gradient came from",
    "accumulated": "whether a backward added to the gradient; a repeat or replay does not",
    "turn": "whether the first in the leader order took the round, or a later one",
    "process": "the node itself, or what it started (libp2p daemon)",
    "name": "short readable name of the node's identity; one per node",
    "version": "shoal's version; one per node",
}

# Words of a method's name → class; the first line that shares a word with the name wins.
_METHOD_WORDS: tuple[tuple[str, str], ...] = (
    ("forward", "forward"),
    ("backward", "backward"),
    ("reduce", "reduce allreduce part contribute"),
    ("log", "log paxos promise accept decided decide learn entry entries propose ballot"),
    ("plan", "plan freeze ledger repair replay prepare prepared adopt discard feeder"),
    ("state", "state blob snapshot chunk index gradient fetch manifest"),
    ("membership", "membership member members view join leave hello status redeem admit certificate ping announce "
                   "gossip ready address"),
)  # fmt: skip

SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

NO_METRIC: dict[type[Event], str] = {
    NodeStopped: "the exporter stops with the node: nobody could scrape it (the exit code is in the event file)",
}


def method_class(method: str) -> str:
    """The bounded class of a protocol method's name: one of LABEL_VALUES["method"], or "other"."""
    words = {word for word in re.split(r"[^a-z0-9]+", method.lower()) if word}
    return next((name for name, known in _METHOD_WORDS if words & set(known.split())), OTHER)


def bounded(label: str, value: str) -> str:
    """`value` if it is one that the label may have, else "other"."""
    return value if value in LABEL_VALUES[label] else OTHER


def stage_label(stage: int) -> str:
    return str(stage) if 0 <= stage < MAX_STAGES else OTHER


@dataclass(frozen=True, slots=True)
class Spec:
    """One metric as the documentation shows it. `kind`: counter, gauge, histogram."""

    section: str
    name: str
    kind: str
    labels: tuple[str, ...]
    help: str


class _WithRun(Collector):
    """Adds run and mode to every sample of `inner` and leaves out the `_created` samples that nobody charts."""

    def __init__(self, inner: CollectorRegistry, labels: Callable[[], dict[str, str]]) -> None:
        self._inner = inner
        self._labels = labels

    def collect(self) -> Iterable[Metric]:
        labels = self._labels()
        for metric in self._inner.collect():
            metric.samples = [
                sample._replace(labels={**labels, **sample.labels})
                for sample in metric.samples
                if not sample.name.endswith("_created")
            ]
            yield metric


class _Process(Collector):
    """Memory, processor time and open files, read when somebody scrapes."""

    SPECS = (
        ("shoal_process_resident_memory_bytes", "gauge", "Resident memory."),
        ("shoal_process_cpu_seconds_total", "counter", "Processor time, user and system."),
        ("shoal_process_open_fds", "gauge", "Open file descriptors."),
    )

    def __init__(self) -> None:
        self._me = psutil.Process(os.getpid())

    def collect(self) -> Iterator[Metric]:
        memory = GaugeMetricFamily(self.SPECS[0][0], self.SPECS[0][2], labels=["process"])
        cpu = CounterMetricFamily(self.SPECS[1][0], self.SPECS[1][2], labels=["process"])
        files = GaugeMetricFamily(self.SPECS[2][0], self.SPECS[2][2], labels=["process"])
        children = []
        with contextlib.suppress(psutil.Error):
            children = self._me.children(recursive=True)
        for label, processes in (("node", [self._me]), ("children", children)):
            rss, seconds, fds = 0, 0.0, 0
            for process in processes:
                with contextlib.suppress(psutil.Error), process.oneshot():
                    times = process.cpu_times()
                    rss += process.memory_info().rss
                    seconds += times.user + times.system
                    fds += process.num_fds()
            memory.add_metric([label], rss)
            cpu.add_metric([label], seconds)
            files.add_metric([label], fds)
        yield from (memory, cpu, files)


class Metrics:
    """A sink that keeps all `shoal_*` metrics of one node; scrape `registry`.

    `process=False` leaves out the metrics about this operating-system process (for projections of a recorded file).
    Counters with a reason are exported from zero on, so that `increase()` sees the first one."""

    def __init__(self, *, process: bool = True) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self.specs: list[Spec] = []
        self._inner = CollectorRegistry(auto_describe=False)
        self._section = ""
        self._run = ""
        self._mode = ""
        self._state = ""
        self._last_commit_s: float | None = None
        self._led_round: int | None = None
        self._quorum_round: int | None = None
        self._uncovered: dict[int, int] = {}  # stage → round
        self._register()
        if process:
            self._inner.register(_Process())
            self._section = "The process"
            for name, kind, text in _Process.SPECS:
                self.specs.append(Spec(self._section, name, kind, ("process",), text))
        self.registry.register(_WithRun(self._inner, lambda: {"run": self._run, "mode": self._mode}))

    # --- making metrics ----------------------------------------------------------------------------------------------
    def _note(self, name: str, kind: str, text: str, labels: tuple[str, ...]) -> None:
        self.specs.append(Spec(self._section, name, kind, labels, text))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        self._note(name, "counter", text, labels)
        counter = Counter(name, text, labels, registry=self._inner)
        if labels and len(labels) == 1 and labels[0] in LABEL_VALUES:
            for value in LABEL_VALUES[labels[0]]:
                counter.labels(value)
        return counter

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        self._note(name, "gauge", text, labels)
        return Gauge(name, text, labels, registry=self._inner)

    def _seconds(self, name: str, text: str, *labels: str) -> Histogram:
        self._note(name, "histogram", text, labels)
        return Histogram(name, text, labels, registry=self._inner, buckets=SECONDS_BUCKETS)

    def _register(self) -> None:
        self._section = "The node"
        self._info = self._gauge("shoal_node_info", "Always 1; says who this is.", "name", "version")
        self._started_at = self._gauge("shoal_node_start_time_seconds", "Unix time at which the node started.")
        self._lifecycle = self._gauge("shoal_lifecycle_state", "1 for the state the node is in, 0 for others.", "state")
        for state in LABEL_VALUES["state"]:
            self._lifecycle.labels(state).set(0)
        self._problems = self._counter(
            "shoal_problems_total",
            "Things a person should know about; `shoal status` says what and how to fix.",
            "reason",
        )

        self._section = "The run"
        self._round = self._gauge("shoal_round", "Round of the newest log entry that the node knows.")
        self._step = self._gauge("shoal_step", "Optimizer steps committed by the run.")
        self._term = self._gauge(
            "shoal_term", "Term of the newest log entry; it rises when a coordinator reforms the run."
        )
        self._loss = self._gauge("shoal_loss", "Mean training loss of the newest committed round, in nats per token.")
        self._perplexity = self._gauge("shoal_perplexity", "exp(loss) of the newest committed round.")
        self._entries = self._counter("shoal_entries_total", "Log entries learned.", "kind")
        self._committed = self._counter(
            "shoal_samples_committed_total",
            "Samples of the rounds that were committed while the node took part; its rate is the run's throughput.",
        )
        self._run_samples = self._gauge("shoal_run_samples", "Samples committed by the whole history of the run.")
        self._committed_at = self._gauge("shoal_last_commit_timestamp_seconds", "Unix time of the newest commit.")
        self._round_seconds = self._seconds("shoal_round_seconds", "Time from one commit to the next.")

        self._section = "Members and leadership"
        self._members = self._gauge("shoal_members", "Members in the newest log entry.")
        self._servers = self._gauge("shoal_stage_servers", "Servers of a stage in the newest log entry.", "stage")
        self._coverage = self._gauge("shoal_stage_servers_min", "Servers of the stage that has the fewest.")
        self._waiting = self._gauge("shoal_waiting_for_quorum", "1 while too few of the committee answer to commit.")
        self._waits = self._counter("shoal_quorum_waits_total", "Times the node saw too few of the committee answer.")
        self._reachable = self._gauge(
            "shoal_committee_reachable", "Committee members that answered at the last such wait."
        )
        self._committee = self._gauge("shoal_committee_size", "Size of the committee at the last such wait.")
        self._stage_uncovered = self._gauge("shoal_stage_uncovered", "1 while a stage has no server.", "stage")
        self._leads = self._gauge("shoal_leader", "1 while this node leads the round that is under way.")
        self._leaderships = self._counter("shoal_leadership_taken_total", "Rounds this node began to lead.", "turn")
        self._proposals = self._counter("shoal_proposals_failed_total", "Log entries proposed in vain.", "reason")
        self._admitted = self._counter("shoal_members_admitted_total", "Members that log entries admitted.")
        self._dropped = self._counter("shoal_members_dropped_total", "Members that log entries dropped.", "reason")
        self._suspected = self._counter(
            "shoal_peers_suspected_total", "Times this node began to suspect a peer.", "reason"
        )

        self._section = "Feeding"
        self._mb_started = self._counter("shoal_microbatches_started_total", "Microbatches this node began to drive.")
        self._mb_finished = self._counter(
            "shoal_microbatches_finished_total", "Microbatches driven through all stages."
        )
        self._mb_retried = self._counter("shoal_microbatches_retried_total", "Resends to another server.", "reason")
        self._mb_retried_stage = self._counter("shoal_stage_retries_total", "Resends, by stage that failed.", "stage")
        self._mb_samples = self._counter("shoal_samples_fed_total", "Samples of the microbatches driven to their end.")
        self._mb_seconds = self._seconds(
            "shoal_microbatch_seconds", "Time of a microbatch through all stages and back."
        )

        self._section = "Serving"
        self._arrived = self._counter(
            "shoal_work_arrived_total", "Requests that passed their checks.", "phase", "stage"
        )
        self._forwards = self._counter("shoal_forward_served_total", "Forward passes served.", "stage")
        self._backwards = self._counter(
            "shoal_backward_served_total", "Backward passes served.", "stage", "accumulated"
        )
        self._served_samples = self._counter(
            "shoal_samples_accumulated_total", "Samples whose gradient this node added up.", "stage"
        )
        self._served_seconds = self._seconds(
            "shoal_served_seconds", "Time to serve a request, queue included.", "phase"
        )
        self._operations = self._seconds("shoal_operation_seconds", "Time of an operation.", "phase")

        self._section = "Committing a round"
        self._frozen = self._counter("shoal_rounds_frozen_total", "Rounds this node froze as leader.")
        self._silent = self._counter("shoal_freeze_unanswered_total", "Servers that did not answer a freeze.")
        self._ledgers = self._counter("shoal_ledgers_reported_total", "Ledgers this node reported.", "stage")
        self._ledger_size = self._gauge("shoal_ledger_microbatches", "Microbatches in the newest ledger.", "stage")
        self._plans = self._counter("shoal_plans_total", "Plans this node made as leader.")
        self._holes = self._counter("shoal_plan_holes_total", "(stage, microbatch) pairs that plans had replayed.")
        self._wasted = self._counter(
            "shoal_plan_wasted_total", "Computed (stage, microbatch) pairs that plans left out."
        )
        self._repaired = self._counter("shoal_holes_repaired_total", "Holes that were filled again.", "stage")
        self._reduces = self._counter("shoal_reduces_started_total", "All-reduces begun.", "stage")
        self._reduce_members = self._gauge("shoal_reduce_members", "Members of the newest all-reduce.", "stage")
        self._parts = self._counter("shoal_reduce_parts_served_total", "Parts this node summed for others.", "stage")
        self._reduce_failed = self._counter(
            "shoal_reduces_failed_total", "All-reduces that failed; nobody uses a part of one.", "reason"
        )
        self._prepared = self._counter("shoal_gradients_prepared_total", "Whole reduced gradients stored.", "stage")
        self._applied = self._counter("shoal_steps_applied_total", "Optimizer steps this node applied.", "source")
        self._apply_seconds = self._seconds("shoal_step_apply_seconds", "Time of one optimizer step.")

        self._section = "State"
        self._snapshots = self._counter("shoal_snapshots_written_total", "Snapshots written.", "stage")
        self._snapshot_step = self._gauge("shoal_snapshot_step", "Step of the newest snapshot.", "stage")
        self._snapshot_bytes = self._gauge("shoal_snapshot_bytes", "Size of the newest snapshot.", "stage")
        self._snapshot_seconds = self._seconds("shoal_snapshot_seconds", "Time to write a snapshot.")
        self._syncs_started = self._counter("shoal_syncs_started_total", "State transfers begun.", "stage")
        self._syncs_finished = self._counter("shoal_syncs_finished_total", "State transfers completed.", "stage")
        self._sync_seconds = self._seconds("shoal_sync_seconds", "Time of a whole state transfer.")
        self._sync_bytes = self._counter("shoal_sync_bytes_total", "Bytes of completed state transfers.")
        self._sync_donors = self._gauge("shoal_sync_donors", "Donors of the newest state transfer.")
        self._chunks = self._counter("shoal_chunks_fetched_total", "Chunks fetched and verified.")
        self._chunk_bytes = self._counter("shoal_chunk_bytes_total", "Bytes of the chunks fetched and verified.")
        self._drifts = self._counter(
            "shoal_replica_drifts_total",
            "Times this replica's state differed from the pinned one and was replaced.",
            "stage",
        )
        self._drift = self._gauge(
            "shoal_replica_drift_max_abs", "Largest parameter difference at the last drift.", "stage"
        )

        self._section = "The network"
        self._traffic = self._counter(
            "shoal_traffic_bytes_total", "Payload and framing bytes of calls.", "direction", "method", "codec"
        )
        self._failures = self._counter("shoal_calls_failed_total", "Calls of this node that did not succeed.", "reason")
        self._refusals = self._counter("shoal_requests_refused_total", "Requests this node refused.", "reason")

    # --- events ------------------------------------------------------------------------------------------------------
    def __call__(self, stamped: Stamped) -> None:
        event, at_s = stamped.event, stamped.at_s
        match event:
            case BytesMoved():
                direction, codec = bounded("direction", event.direction), bounded("codec", event.codec or "none")
                self._traffic.labels(direction, method_class(event.method), codec).inc(event.count)
            case OperationTimed():
                self._operations.labels(event.phase).observe(event.seconds)
            case WorkArrived():
                self._arrived.labels(event.phase, stage_label(event.stage)).inc()
            case ForwardServed():
                self._forwards.labels(stage_label(event.stage)).inc()
                self._served_seconds.labels(Phase.FORWARD).observe(event.seconds)
            case BackwardServed():
                stage = stage_label(event.stage)
                self._backwards.labels(stage, str(event.accumulated).lower()).inc()
                self._served_seconds.labels(Phase.BACKWARD).observe(event.seconds)
                self._served_samples.labels(stage).inc(event.samples if event.accumulated else 0)
            case MicrobatchStarted():
                self._mb_started.inc()
            case MicrobatchRetried():
                self._mb_retried.labels(event.reason).inc()
                self._mb_retried_stage.labels(stage_label(event.stage)).inc()
            case MicrobatchFinished():
                self._mb_finished.inc()
                self._mb_samples.inc(event.samples)
                self._mb_seconds.observe(event.seconds)
            case EntryDecided():
                self._entry(at_s, event)
            case _:
                self._life(at_s, event)
                self._agreement(event)
                self._gradients_and_state(event)

    def _life(self, at_s: float, event: Event) -> None:
        match event:
            case NodeStarted():
                self._run, self._mode = event.run, bounded("mode", event.mode)
                self._info.clear()
                self._info.labels(event.name, event.version).set(1)
                self._started_at.set(at_s)
            case LifecycleChanged():
                self._state = event.new
                for state in (*LABEL_VALUES["state"], OTHER):
                    if state != OTHER or bounded("state", event.new) == OTHER:
                        self._lifecycle.labels(state).set(state == bounded("state", event.new))
            case Problem():
                self._problems.labels(event.reason).inc()
            case CallFailed():
                self._failures.labels(event.reason).inc()
            case RequestRefused():
                self._refusals.labels(event.reason).inc()
            case PeerSuspected():
                self._suspected.labels(event.reason).inc()

    def _agreement(self, event: Event) -> None:
        match event:
            case LeadershipTaken():
                self._led_round = event.round
                self._leads.set(1)
                self._leaderships.labels("takeover" if event.rank else "first").inc()
            case ProposalFailed():
                self._proposals.labels(event.reason).inc()
            case WaitingForQuorum():
                self._quorum_round = event.round
                self._waiting.set(1)
                self._waits.inc()
                self._reachable.set(event.reachable)
                self._committee.set(event.committee)
            case StageUncovered():
                self._uncovered[event.stage] = event.round
                self._stage_uncovered.labels(stage_label(event.stage)).set(1)
            case MemberAdmitted():
                self._admitted.inc()
            case MemberDropped():
                self._dropped.labels(event.reason).inc()
            case RoundFrozen():
                self._frozen.inc()
                self._silent.inc(max(0, event.asked - event.answered))
            case PlanMade():
                self._plans.inc()
                self._holes.inc(event.holes)
                self._wasted.inc(event.wasted)
            case HoleRepaired():
                self._repaired.labels(stage_label(event.stage)).inc()

    def _gradients_and_state(self, event: Event) -> None:
        match event:
            case LedgerReported():
                self._ledgers.labels(stage_label(event.stage)).inc()
                self._ledger_size.labels(stage_label(event.stage)).set(event.microbatches)
            case ReduceStarted():
                self._reduces.labels(stage_label(event.stage)).inc()
                self._reduce_members.labels(stage_label(event.stage)).set(event.members)
            case ReducePartServed():
                self._parts.labels(stage_label(event.stage)).inc()
            case ReduceFailed():
                self._reduce_failed.labels(event.reason).inc()
            case GradientPrepared():
                self._prepared.labels(stage_label(event.stage)).inc()
            case StepApplied():
                self._applied.labels(bounded("source", event.source)).inc()
                self._apply_seconds.observe(event.seconds)
            case SnapshotWritten():
                stage = stage_label(event.stage)
                self._snapshots.labels(stage).inc()
                self._snapshot_step.labels(stage).set(event.step)
                self._snapshot_bytes.labels(stage).set(event.size_bytes)
                self._snapshot_seconds.observe(event.seconds)
            case SyncStarted():
                self._syncs_started.labels(stage_label(event.stage)).inc()
            case ChunkFetched():
                self._chunks.inc()
                self._chunk_bytes.inc(event.size_bytes)
            case SyncFinished():
                self._syncs_finished.labels(stage_label(event.stage)).inc()
                self._sync_seconds.observe(event.seconds)
                self._sync_bytes.inc(event.size_bytes)
                self._sync_donors.set(event.donors)
            case ReplicaDrift():
                self._drifts.labels(stage_label(event.stage)).inc()
                self._drift.labels(stage_label(event.stage)).set(event.max_abs)

    def _entry(self, at_s: float, entry: EntryDecided) -> None:
        self._entries.labels(bounded("kind", entry.kind)).inc()
        self._round.set(entry.round)
        self._step.set(entry.step)
        self._term.set(entry.term)
        self._members.set(entry.members)
        self._run_samples.set(entry.samples_total)
        self._servers.clear()
        for stage, servers in enumerate(entry.servers_per_stage[:MAX_STAGES]):
            self._servers.labels(stage_label(stage)).set(servers)
            if stage not in self._uncovered:
                self._stage_uncovered.labels(stage_label(stage)).set(0)
            elif servers > 0 and entry.round >= self._uncovered[stage]:
                del self._uncovered[stage]
                self._stage_uncovered.labels(stage_label(stage)).set(0)
        self._coverage.set(min(entry.servers_per_stage, default=0))
        if self._quorum_round is not None and entry.round >= self._quorum_round:
            self._quorum_round = None
            self._waiting.set(0)
        if self._led_round is not None and entry.round >= self._led_round:
            self._led_round = None
            self._leads.set(0)
        if entry.kind != "commit":
            return
        self._loss.set(entry.loss)
        self._perplexity.set(perplexity(entry.loss))
        if self._state in NOT_YET_WORKING:
            return  # catching up: these rounds were trained earlier, by others
        self._committed.inc(entry.samples)
        self._committed_at.set(at_s)
        if self._last_commit_s is not None:
            self._round_seconds.observe(max(0.0, at_s - self._last_commit_s))
        self._last_commit_s = at_s


def describe() -> str:
    """docs/metrics.md: every metric and label, from the registry itself."""
    specs = Metrics().specs
    lines = [
        "# Metrics",
        "",
        "Generated by `python -m shoal.monitoring.metrics > docs/metrics.md`; a test keeps it in step with the code.",
        "",
        "Every node serves these at `/metrics` on its own machine (127.0.0.1; `shoal status` shows the port), beside",
        "`/status` (JSON: what the node does now) and `/healthz`. All of them are projections of the node's typed",
        "events. Each sample also carries `run` and `mode`. No label holds a peer id, and a value outside its list",
        "below is counted as `other`. Histograms have the usual `_bucket`, `_sum` and `_count` series with bounds at",
        f"{', '.join(f'{bound:g}' for bound in SECONDS_BUCKETS)} seconds.",
        "",
        "Some first questions:",
        "",
        "| question | PromQL |",
        "| --- | --- |",
        "| samples per second of the run | `max by (run) (rate(shoal_samples_committed_total[1m]))` |",
        "| upload by purpose, bytes per second | "
        '`sum by (method) (rate(shoal_traffic_bytes_total{direction="sent"}[1m]))` |',
        "| resends per microbatch | `sum(rate(shoal_microbatches_retried_total[5m])) "
        "/ sum(rate(shoal_microbatches_started_total[5m]))` |",
        "| does every stage have a spare server? | `min by (run) (shoal_stage_servers_min) >= 2` |",
    ]
    for section in dict.fromkeys(spec.section for spec in specs):
        lines += ["", f"## {section}", "", "| metric | type | labels | meaning |", "| --- | --- | --- | --- |"]
        for spec in specs:
            if spec.section == section:
                labels = ", ".join(f"`{label}`" for label in spec.labels)
                lines.append(f"| `{spec.name}` | {spec.kind} | {labels} | {spec.help} |")
    lines += ["", "## Labels", "", "| label | meaning | values |", "| --- | --- | --- |"]
    for label, text in LABEL_HELP.items():
        values = "see below" if label == "reason" else ", ".join(f"`{value}`" for value in LABEL_VALUES.get(label, ()))
        lines.append(f"| `{label}` | {text} | {values} |")
    lines += ["", "## Reasons", "", "| reason | meaning |", "| --- | --- |"]
    lines += [f"| `{reason}` | {text} |" for reason, text in REASON_HELP.items()]
    lines += ["", "## Events without a metric", ""]
    lines += [f"- `{event.__name__}`: {why}." for event, why in NO_METRIC.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(describe(), end="")
