"""The live view of one's own node, which `shoal join` shows."""

from __future__ import annotations

import math

from rich.console import RenderableType
from rich.text import Text

from shoal.monitoring.board import STATE_STYLE, Fitted, Journal, Note
from shoal.monitoring.projection import Projection, Snapshot
from shoal.monitoring.wording import (
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
    EntryDecided,
    LeadershipTaken,
    LifecycleChanged,
    MicrobatchRetried,
    NodeStopped,
    Problem,
    SnapshotWritten,
    StageUncovered,
    Stamped,
    SyncFinished,
    WaitingForQuorum,
)

PROBLEM_SHOWN_S = 120.0
NOW = {
    "": "starting",
    "starting": "starting",
    "checking": "checking this machine",
    "joining": "looking for the swarm",
    "syncing": "fetching the model's state",
    "working": "ready; the swarm decides what to do next",
    "paused": "paused; the swarm goes on without this node",
    "draining": "finishing the work in hand, then leaving",
    "left": "left the run",
}


class NodeBoard:
    """What `shoal join` shows: what my node does now, what it gave, what is wrong and how to fix it, how to stop.

    rounds: length of the run from the manifest (0: endless or unknown). url: where the node exports, if it does."""

    def __init__(self, run: str = "", *, rounds: int = 0, url: str = "") -> None:
        self._run = run
        self._rounds = rounds
        self._url = url
        self._projection = Projection()
        self._journal = Journal()
        self._origin_s: float | None = None
        self._retries: dict[int, int] = {}

    def __call__(self, stamped: Stamped) -> None:
        self.feed(stamped)

    def feed(self, stamped: Stamped) -> None:
        at_s, event = stamped.at_s, stamped.event
        self._origin_s = at_s if self._origin_s is None else min(self._origin_s, at_s)
        self._projection.apply(stamped)
        match event:
            case LifecycleChanged():
                detail = f" ({event.detail})" if event.detail else ""
                text = f"{NOW.get(event.new, event.new)}{detail}" if event.new != "working" else "working"
                self._journal.add(Note(at_s, "·", "cyan", text))
            case SyncFinished():
                size = bytes_text(event.size_bytes).strip()
                text = f"caught up to step {event.step} in {event.seconds:.1f} s ({size})"
                self._journal.add(Note(at_s, "✓", "bold green", text))
            case LeadershipTaken(rank=rank) if rank > 0:
                text = f"took over the lead of round {event.round}"
                self._journal.add(Note(at_s, "★", "bold yellow", text), ("lead", event.round))
            case MicrobatchRetried():
                count = self._retries[event.round] = self._retries.get(event.round, 0) + 1
                text = f"{plural(count, 'microbatch')} of round {event.round} sent to another server ({event.reason})"
                self._journal.add(Note(at_s, "↷", "yellow", text, event.round), ("retry", event.round))
            case WaitingForQuorum():
                text = f"waiting for a quorum: {event.reachable} of {event.committee} committee members answer"
                self._journal.add(Note(at_s, "!", "bold red", text), ("quorum", event.round))
            case StageUncovered():
                text = f"stage {event.stage} has no server"
                self._journal.add(Note(at_s, "!", "bold red", text), ("uncovered", event.round, event.stage))
            case Problem():
                fix = f" → {event.fix}" if event.fix else ""
                self._journal.add(Note(at_s, "!", "bold red", event.detail + fix), ("problem", event.detail))
            case SnapshotWritten():
                text = f"saved step {event.step} ({bytes_text(event.size_bytes).strip()})"
                self._journal.add(Note(at_s, "·", "dim", text))
            case NodeStopped() if event.exit_code:
                detail = f": {event.detail}" if event.detail else ""
                self._journal.add(Note(at_s, "!", "bold red", f"stopped with exit code {event.exit_code}{detail}"))
            case EntryDecided(kind="commit"):
                self._commit_line(at_s, event)

    def _commit_line(self, at_s: float, entry: EntryDecided) -> None:
        now = self._projection.snapshot()
        line = plain_line(
            step=entry.step, rounds=self._rounds, loss=entry.loss, samples_per_s=now.samples_per_s,
            elapsed_s=at_s - (self._origin_s or 0.0), left_s=None, peers=entry.members,
        )  # fmt: skip
        self._journal.print_line(at_s, f"{line}  you gave {plural(now.samples_served, 'sample')}")

    def plain_lines(self, *, final: bool = False) -> list[str]:
        """What happened since the last call, as text."""
        return self._journal.take_plain(self._origin_s or 0.0, self._projection.snapshot().round, final)

    def render(self, now_s: float) -> RenderableType:
        return Fitted(self, now_s)

    def lines(self, now_s: float, width: int, height: int) -> list[RenderableType]:
        now = self._projection.snapshot()
        state = "failed" if now.exit_code else now.state or "starting"
        since_s = now.state_since_s if now.state_since_s is not None else now_s
        title = Text.assemble(("shoal", "bold cyan"), "  ", (now.name or "your node", "bold"))
        right = Text.assemble(
            (state, STATE_STYLE.get(state, "bold yellow")), (f" for {duration_text(now_s - since_s)}", "dim")
        )
        body = [
            columns(title, right, width - 2),
            Text(""),
            self._label("run", self._run_text(now, width)),
            self._label("now", self._doing(now)),
            self._label("swarm", self._swarm(now)),
            self._label("you gave", self._gave(now)),
            self._label("", self._passes(now)),
            self._label("traffic", self._traffic(now)),
            *self._health(now, now_s),
            Text(""),
            self._label("stop", self._how_to_stop(now)),
        ]
        if self._url:
            body.append(self._label("look", Text(f"shoal status · {self._url}/metrics", "dim")))
        body.append(Text(""))
        room = height - len(body) - 1
        notes = [note.line(self._origin_s or 0.0) for note in list(self._journal.notes)[-room:]] if room > 0 else []
        lines: list[RenderableType] = []
        for line in [*(Text(" ").append_text(line) for line in body), *notes]:
            line.no_wrap = True
            line.truncate(width - 1, overflow="ellipsis")
            lines.append(line)
        return lines

    @staticmethod
    def _label(label: str, text: Text) -> Text:
        return Text.assemble((f"{label:<10}", "dim"), text)

    def _run_text(self, now: Snapshot, width: int) -> Text:
        of = f"/{self._rounds}" if self._rounds else ""
        name = self._run or (now.run if len(now.run) <= 32 else now.run[:12])
        parts = [part for part in (name, now.mode, f"step {now.step}{of}") if part]
        text = Text(" · ".join(parts))
        if math.isfinite(now.loss):
            text.append(f" · loss {number_text(now.loss_first, 2)} → ").append(number_text(now.loss), "bold").append(
                "  "
            )
            text.append(sparkline([loss for _, loss in now.loss_history], min(30, width - text.cell_len - 14)), "cyan")
        return text

    @staticmethod
    def _doing(now: Snapshot) -> Text:
        if now.exit_code is not None:
            return Text("stopped" if now.exit_code == 0 else f"stopped with exit code {now.exit_code}")
        if now.state == "syncing" and now.syncing_to_step is not None:
            got = bytes_text(now.sync_bytes).strip()
            return Text(f"fetching stage {now.stage} at step {now.syncing_to_step}, {got} so far")
        if now.state != "working" or (now.stage is None and not now.feeds):
            return Text(NOW.get(now.state, now.state))
        does = [f"serving stage {now.stage}"] if now.stage is not None else []
        does += ["feeding"] if now.feeds else []
        does += ["leading the round"] if now.leader else []
        return Text(", ".join(does))

    @staticmethod
    def _swarm(now: Snapshot) -> Text:
        if not now.members:
            return Text("not joined yet", "dim")
        speed = f" · {rate_text(now.samples_per_s)} samples/s together" if now.samples_per_s else ""
        servers = f" · servers per stage {' + '.join(map(str, now.servers_per_stage))}" if now.servers_per_stage else ""
        return Text(f"{plural(now.members, 'member')}{servers}{speed}")

    @staticmethod
    def _gave(now: Snapshot) -> Text:
        fed = f" · {plural(now.microbatches_finished, 'microbatch')} fed" if now.microbatches_finished else ""
        steps = plural(sum(now.steps_applied.values()), "step")
        return Text.assemble((plural(now.samples_served, "sample"), "bold"), f" · {steps}{fed}")

    @staticmethod
    def _passes(now: Snapshot) -> Text:
        return Text(f"{count_text(now.forwards)} forward and {count_text(now.backwards)} backward passes")

    @staticmethod
    def _traffic(now: Snapshot) -> Text:
        resent = f" · {plural(sum(now.retries.values()), 'resend')}" if now.retries else ""
        out, in_ = bytes_text(now.bytes_sent).strip(), bytes_text(now.bytes_received).strip()
        return Text(f"{out} out · {in_} in{resent}")

    def _health(self, now: Snapshot, now_s: float) -> list[Text]:
        lines = []
        if now.waiting_for_quorum:
            wait = now.waiting_for_quorum
            lines.append((f"{wait.reachable} of {wait.committee} committee members answer, for "
                          f"{duration_text(now_s - wait.since_s)}",
                          "nothing to do here: training goes on when a majority is back"))  # fmt: skip
        for stage, since_s in now.stages_uncovered.items():
            lines.append((f"stage {stage} has no server, for {duration_text(now_s - since_s)}",
                          "invite more volunteers; the first to come takes it"))  # fmt: skip
        if now.problem and (now_s - now.problem.at_s < PROBLEM_SHOWN_S or now.exit_code):
            lines.append((now.problem.detail or now.problem.reason, now.problem.fix))
        if not lines:
            return [self._label("health", Text("all well", "green"))]
        texts = []
        for what, fix in lines:
            texts.append(self._label("health", Text(what, "bold red")))
            texts.append(self._label("", Text(f"→ {fix}")))
        return texts

    @staticmethod
    def _how_to_stop(now: Snapshot) -> Text:
        if now.exit_code is not None or now.state == "left":
            return Text("stopped; run the same command to come back")
        if now.state == "draining":
            return Text("Ctrl-C again stops at once; nothing that was committed is lost")
        return Text("Ctrl-C finishes the work in hand and leaves; come back at any time")
