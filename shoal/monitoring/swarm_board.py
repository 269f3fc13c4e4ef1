"""The live view over many nodes' event streams: who is there, what they do, what the swarm waits for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from shoal.monitoring.board import KILLED, STATE_STYLE, Fitted, Journal, Note
from shoal.monitoring.projection import Projection, RateWindow, Snapshot
from shoal.monitoring.wording import (
    bar,
    bytes_text,
    columns,
    count_text,
    duration_text,
    number_text,
    plain_line,
    plural,
    rate_text,
    sparkline,
)
from shoal.protocol.events import (
    BackwardServed,
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
    PlanMade,
    Problem,
    ReduceFailed,
    ReduceStarted,
    ReplicaDrift,
    RoundFrozen,
    SnapshotWritten,
    StageUncovered,
    Stamped,
    StepApplied,
    SyncFinished,
    SyncStarted,
    WaitingForQuorum,
)

WIDE = 116  # columns from which there is room for whole words


def _words(event: Event) -> str:
    """What a node did last, in a few words; empty for what says nothing to a person."""
    match event:
        case ForwardServed(microbatch=m):
            return f"forward of {m}"
        case BackwardServed(microbatch=m, accumulated=accumulated):
            return f"backward of {m}" if accumulated else f"repeated backward of {m}"
        case MicrobatchStarted(microbatch=m):
            return f"feeds {m}"
        case MicrobatchFinished(microbatch=m, seconds=seconds):
            return f"fed {m} in {seconds:.2f} s"
        case MicrobatchRetried(microbatch=m, reason=reason):
            return f"resent {m} ({reason})"
        case LedgerReported(microbatches=count):
            return f"ledger of {count}"
        case ReduceStarted(members=members):
            return f"reduces with {members}"
        case ReduceFailed(reason=reason):
            return f"reduce failed ({reason})"
        case GradientPrepared():
            return "gradient prepared"
        case StepApplied(step=step):
            return f"applied step {step}"
        case RoundFrozen(answered=answered, asked=asked):
            return f"froze, {answered} of {asked} answered"
        case PlanMade(plan=plan):
            return f"made plan {plan}"
        case SnapshotWritten(step=step):
            return f"snapshot of step {step}"
        case SyncStarted(to_step=step):
            return f"fetches state of step {step}"
        case SyncFinished(step=step):
            return f"has state of step {step}"
        case LifecycleChanged(new=new):
            return new
        case _:
            return ""


@dataclass(slots=True)
class _Node:
    name: str
    projection: Projection = field(default_factory=Projection)
    killed: bool = False
    doing: str = ""

    def state(self, now: Snapshot) -> str:
        if self.killed:
            return KILLED
        if now.exit_code:
            return "failed"
        return "left" if now.exit_code == 0 else now.state or "starting"

    def alive(self, now: Snapshot) -> bool:
        return self.state(now) not in (KILLED, "failed", "left")


class SwarmBoard:
    """A swarm as its nodes' event streams tell it.

    run, rounds (0: endless) and stages come from the manifest. `feed` takes events in any interleaving of the nodes;
    `started`, `joined`, `killed` and `note` mark what events cannot say (who starts and kills processes knows it)."""

    def __init__(self, run: str, *, rounds: int = 0, stages: int = 1, mode: str = "pipeline") -> None:
        self._run = run
        self._rounds = rounds
        self._stages = stages
        self._mode = mode
        self._nodes: dict[str, _Node] = {}
        self._by_peer: dict[str, str] = {}
        self._committee: frozenset[str] = frozenset()
        self._journal = Journal()
        self._counted: dict[object, set[object]] = {}
        self._origin_s: float | None = None
        self._rate = RateWindow()
        self._losses: list[float] = []
        self._loss_stride = 1
        self._entry: EntryDecided | None = None
        self._loss = self._loss_first = math.nan
        self._commits = 0
        self._first_commit_round: int | None = None
        self._last_commit_s: float | None = None

    # --- what goes in ------------------------------------------------------------------------------------------------
    def started(self, node: str, at_s: float) -> None:
        """A process for this node begins (again): it is not dead."""
        self._origin(at_s)
        self._nodes[node] = _Node(node)

    def joined(self, node: str, at_s: float) -> None:
        """A newcomer begins while the swarm trains."""
        self.started(node, at_s)
        self._journal.add(Note(at_s, "+", "bold green", f"{node} comes as a new volunteer"))

    def killed(self, node: str, at_s: float, how: str = "SIGKILL") -> None:
        self._origin(at_s)
        self._nodes.setdefault(node, _Node(node)).killed = True
        self._journal.add(Note(at_s, "✖", "bold red", f"killed {node} ({how})"))

    def note(self, text: str, at_s: float) -> None:
        self._origin(at_s)
        self._journal.add(Note(at_s, "·", "cyan", text))

    def set_committee(self, peers: Iterable[str]) -> None:
        """PeerIDs or node names of the current committee; events do not carry them."""
        self._committee = frozenset(peers)

    def feed(self, node: str, stamped: Stamped) -> None:
        at_s, event = stamped.at_s, stamped.event
        self._origin(at_s)
        known = self._nodes.setdefault(node, _Node(node))
        known.projection.apply(stamped)
        known.doing = _words(event) or known.doing
        match event:
            case NodeStarted():
                self._by_peer[event.peer] = node
            case EntryDecided():
                self._decided(at_s, event)
            case _:
                self._notable(node, at_s, event)

    def _origin(self, at_s: float) -> None:
        self._origin_s = at_s if self._origin_s is None else min(self._origin_s, at_s)

    def _decided(self, at_s: float, entry: EntryDecided) -> None:
        if self._entry is not None and entry.round <= self._entry.round:
            return  # another node learned it first
        self._entry = entry
        if entry.kind == "rollback":
            self._journal.add(
                Note(at_s, "↶", "bold yellow", f"rolled back to step {entry.step}: a stage had lost its state")
            )
        if entry.kind != "commit":
            return
        self._commits += 1
        if self._first_commit_round is None:
            self._first_commit_round = entry.round
            self._loss_first = entry.loss
        self._loss = entry.loss
        self._last_commit_s = at_s
        self._rate.add(at_s, entry.samples)
        if self._commits % self._loss_stride == 0:
            self._losses.append(entry.loss)
        if len(self._losses) > 1024:
            self._losses = self._losses[::2]
            self._loss_stride *= 2
        line = plain_line(
            step=entry.step, rounds=self._rounds, loss=entry.loss, samples_per_s=self._rate.samples_per_s,
            elapsed_s=at_s - (self._origin_s or 0.0), left_s=self._left_s(), peers=self._peers_alive(),
        )  # fmt: skip
        self._journal.print_line(at_s, line)

    def _notable(self, node: str, at_s: float, event: Event) -> None:
        match event:
            case LeadershipTaken(rank=rank) if rank > 0:
                self._say(at_s, "★", "bold yellow", f"{node} takes over the lead of round {event.round}", node, event)
            case MemberDropped():
                who = self._name(event.peer)
                self._say(
                    at_s, "-", "red", f"the swarm goes on without {who} ({event.reason})", event.round, event.peer
                )
            case MemberAdmitted():
                if self._first_commit_round is not None and event.round > self._first_commit_round:
                    where = "" if event.stage is None else f" to stage {event.stage}"
                    text = f"the swarm admits {self._name(event.peer)}{where}"
                    self._say(at_s, "+", "green", text, event.round, event.peer)
            case HoleRepaired():
                count = self._tally(("repair", event.round, event.stage), event.microbatch)
                text = f"stage {event.stage} repaired {plural(count, 'microbatch')} of round {event.round}"
                self._count(at_s, "↻", "bold cyan", text, event.round, "repair", event.stage)
            case MicrobatchRetried():
                count = self._tally(("retry", event.round), (node, at_s, event.microbatch, event.stage))
                text = f"{plural(count, 'microbatch')} of round {event.round} sent to another server ({event.reason})"
                self._count(at_s, "↷", "yellow", text, event.round, "retry")
            case ReduceFailed():
                text = f"round {event.round}: the all-reduce of stage {event.stage} failed ({event.reason})"
                self._say(at_s, "!", "yellow", text, "reduce", event.round, event.plan, event.stage)
            case WaitingForQuorum():
                text = f"waiting for a quorum: {event.reachable} of {event.committee} committee members answer"
                self._say(at_s, "!", "bold red", text, "quorum", event.round)
            case StageUncovered():
                self._say(
                    at_s, "!", "bold red", f"stage {event.stage} has no server", "uncovered", event.round, event.stage
                )
            case SyncFinished():
                donors = "a peer" if event.donors == 1 else f"{event.donors} peers"
                size = bytes_text(event.size_bytes).strip()
                text = f"{node} caught up to step {event.step} in {event.seconds:.1f} s ({size} from {donors})"
                self._say(at_s, "✓", "bold green", text, node, at_s)
            case ReplicaDrift():
                text = f"{node} had drifted by {event.max_abs:.1e} at stage {event.stage} and loaded the pinned state"
                self._say(at_s, "≈", "yellow", text, node, event.step)
            case Problem():
                fix = f" → {event.fix}" if event.fix else ""
                self._say(at_s, "!", "bold red", f"{node}: {event.detail}{fix}", node, event.reason, event.detail)
            case NodeStopped():
                detail = f": {event.detail}" if event.detail else ""
                if event.exit_code:
                    self._say(
                        at_s, "!", "bold red", f"{node} stopped with exit code {event.exit_code}{detail}", node, at_s
                    )
                else:
                    self._say(at_s, "·", "dim", f"{node} left", node, at_s)

    def _say(self, at_s: float, glyph: str, style: str, text: str, *key: object) -> None:
        self._journal.add(Note(at_s, glyph, style, text), (glyph, *key))

    def _count(self, at_s: float, glyph: str, style: str, text: str, round_: int, *key: object) -> None:
        self._journal.add(Note(at_s, glyph, style, text, round_), (glyph, round_, *key))

    def _tally(self, key: object, item: object) -> int:
        items = self._counted.setdefault(key, set())
        items.add(item)
        return len(items)

    def _name(self, peer: str) -> str:
        return self._by_peer.get(peer, f"…{peer[-6:]}")

    # --- what comes out ----------------------------------------------------------------------------------------------
    @property
    def step(self) -> int:
        return self._entry.step if self._entry else 0

    def _left_s(self) -> float | None:
        if not self._rounds or self._rate.rounds_per_s <= 0:
            return None
        return max(0, self._rounds - self.step) / self._rate.rounds_per_s

    def _peers_alive(self) -> int:
        return sum(node.alive(node.projection.snapshot()) for node in self._nodes.values())

    def plain_lines(self, *, final: bool = False) -> list[str]:
        """What happened since the last call, as text. `final` also gives what was still being counted."""
        round_ = self._entry.round if self._entry else None
        return self._journal.take_plain(self._origin_s or 0.0, round_, final)

    def render(self, now_s: float) -> RenderableType:
        """The board at `now_s` (the clock of the events), for rich's `Live` or `Console.print`."""
        return Fitted(self, now_s)

    def lines(self, now_s: float, width: int, height: int) -> list[RenderableType]:
        seen = {name: node.projection.snapshot() for name, node in self._nodes.items()}
        inner = width - 2
        head = self._head(now_s, inner, seen)
        rows = max(2, min(len(seen), height - len(head) - 6))
        lines: list[RenderableType] = [Text(" ").append_text(line) for line in head]
        lines += [Text(""), self._table(seen, width, rows), Text("")]
        room = height - len(head) - 3 - min(rows, len(seen)) - 1
        notes = list(self._journal.notes)[-room:] if room > 0 else []
        for note in notes:
            line = note.line(self._origin_s or 0.0)
            line.truncate(width - 1, overflow="ellipsis")
            lines.append(line)
        return lines

    def _head(self, now_s: float, width: int, seen: dict[str, Snapshot]) -> list[Text]:
        alive = sum(self._nodes[name].alive(now) for name, now in seen.items())
        coverage = self._entry.servers_per_stage if self._entry else ()
        servers = f" · servers per stage {' + '.join(map(str, coverage))}" if coverage else ""
        at = f"round {self._entry.round} · " if self._entry else ""
        title = Text.assemble(("shoal", "bold cyan"), "  ", (self._run, "bold"), (f" · {self._mode}", "dim"))
        lines = [columns(title, Text(f"{at}{plural(alive, 'peer')}{servers}", "dim"), width)]

        elapsed = f"{duration_text(now_s - (self._origin_s if self._origin_s is not None else now_s)):>5}"
        left_s = self._left_s()
        stalled_s = now_s - self._last_commit_s if self._last_commit_s is not None else 0.0
        if left_s is not None:
            left_s = max(0.0, left_s - min(stalled_s, 1 / self._rate.rounds_per_s))
        done = self._rounds and self.step >= self._rounds
        ending = " done" if done else f" · {duration_text(left_s):>4} to go" if left_s is not None else ""
        right = Text(elapsed + ending)
        label = f"step   {self.step}" + (f"/{self._rounds} " if self._rounds else "")
        room = width - len(label) - right.cell_len - 3
        progress = bar(self.step, self._rounds, max(0, room)) if self._rounds else Text()
        lines.append(columns(Text.assemble(label, " ", progress), right, width))

        if self._commits:
            speed = f"{rate_text(self._rate.samples_per_s)} samples/s" if self._rate.samples_per_s else ""
            total = self._entry.samples_total if self._entry else 0
            right = Text.assemble((speed, "bold"), (f" · {total:,} samples", "dim"))
            losses = f"loss   {number_text(self._loss_first, 2)} → {number_text(self._loss)} "
            spark = sparkline(self._losses, min(40, width - len(losses) - right.cell_len - 3))
            left = Text.assemble(f"loss   {number_text(self._loss_first, 2)} → ", (number_text(self._loss), "bold"))
            lines.append(columns(Text.assemble(left, "  ", (spark, "cyan")), right, width))
        else:
            waiting = "the first step begins when every stage has enough servers"
            lines.append(columns(Text(f"loss   - {waiting}", "dim"), Text(""), width))
        lines += self._stuck(now_s, seen)
        for line in lines:
            line.truncate(width, overflow="ellipsis")
        return lines

    def _stuck(self, now_s: float, seen: dict[str, Snapshot]) -> list[Text]:
        """At most two lines on what the swarm waits for."""
        lines = []
        living = [now for name, now in seen.items() if self._nodes[name].alive(now)]
        entry_round = self._entry.round if self._entry else -1
        waits = [now.waiting_for_quorum for now in living if now.waiting_for_quorum]
        if waits and max(wait.round for wait in waits) > entry_round:
            wait = max(waits, key=lambda wait: wait.round)
            lines.append(
                Text(
                    f"wait   {wait.reachable} of {wait.committee} committee members answer, for "
                    f"{duration_text(now_s - wait.since_s)}; a majority must come back",
                    "bold red",
                )
            )
        uncovered: dict[int, float] = {}
        for now in living:
            for stage, since_s in now.stages_uncovered.items():
                uncovered[stage] = min(since_s, uncovered.get(stage, since_s))
        if uncovered:
            names = ", ".join(str(stage) for stage in sorted(uncovered))
            since = duration_text(now_s - min(uncovered.values()))
            lines.append(
                Text(f"wait   no server for stage {names}, for {since}; a new volunteer will take it", "bold red")
            )
        return lines

    def _roles(self, name: str, now: Snapshot, wide: bool) -> str:
        words = []
        if now.feeds:
            words.append("feeder" if wide else "feed")
        if now.leader:
            words.append("leader" if wide else "lead")
        if name in self._committee or now.peer in self._committee:
            words.append("committee" if wide else "vote")
        return " ".join(words)

    def _table(self, seen: dict[str, Snapshot], width: int, rows: int) -> Table:
        wide = width >= WIDE
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim", show_edge=False, expand=False)
        table.add_column(" stage", width=6)
        table.add_column("peer", width=16 if wide else 12, no_wrap=True)
        table.add_column("role", width=23 if wide else 14, no_wrap=True)
        table.add_column("state", width=8, no_wrap=True)
        for title in ("forward", "backward", "resent") if wide else ("fwd", "bwd", "retry"):
            table.add_column(title, justify="right", width=8 if wide else 5, no_wrap=True)
        table.add_column("out", justify="right", width=8, no_wrap=True)
        table.add_column("in", justify="right", width=8, no_wrap=True)
        if wide:
            table.add_column(" doing", width=width - 104, no_wrap=True)
        order = sorted(seen, key=lambda name: (seen[name].stage is None, seen[name].stage or 0))
        shown, before = order if len(order) <= rows else order[: rows - 1], object()
        for name in shown:
            now, node = seen[name], self._nodes[name]
            state = node.state(now)
            alive = node.alive(now)
            stage = "-" if now.stage is None else str(now.stage)
            cells = [
                Text(f" {stage}" if stage != before else "", "bold"),
                Text(name, "" if alive else "strike"),
                Text(self._roles(name, now, wide) if alive else "", "yellow" if now.leader else ""),
                Text(state, STATE_STYLE.get(state, "yellow")),
                Text(count_text(now.forwards)),
                Text(count_text(now.backwards)),
                Text(count_text(sum(now.retries.values())) if now.retries else "-"),
                Text(bytes_text(now.bytes_sent)),
                Text(bytes_text(now.bytes_received)),
            ]
            if wide:
                cells.append(Text(f" {node.doing}" if alive else "", "dim"))
            table.add_row(*cells, style="" if alive else "dim")
            before = stage
        if len(order) > len(shown):
            working = sum(self._nodes[name].state(seen[name]) == "working" for name in order[len(shown) :])
            table.add_row("", Text(f"+{len(order) - len(shown)} more", "dim"), Text(f"{working} working", "dim"))
        return table
