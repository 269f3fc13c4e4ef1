"""`shoal demo pipeline`: a real swarm on this machine, a killed volunteer, and the comparison with one machine.

Every number in the summary is measured: from the nodes' event files, from the coordinator's log on disk, from the
exported files. A promise that does not hold is named, and the exit code is not zero.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import Progress
from rich.table import Table

from shoal.monitoring.view import SwarmBoard
from shoal.node import measure
from shoal.node.coordinator import examine
from shoal.node.demo_run import demo_manifest
from shoal.node.exit_codes import ExitCode, ShoalError
from shoal.node.live import quiet_libraries
from shoal.node.swarm_processes import NodeProcess, SwarmProcesses
from shoal.protocol.events import EntryDecided, Stamped, SyncFinished

KILL_AT = 0.4  # of the rounds
REPLACE_AFTER_ROUNDS = 3  # a short demo replaces at once: the newcomer needs some rounds to be admitted in
MARGIN_NATS = 0.25
TOLERANCE = 0.1  # of the tripwire
ROUND_LIMIT_S = 120.0  # longest wait for the next committed round


@dataclass(frozen=True, slots=True)
class DemoSettings:
    rounds: int
    volunteers: int
    stages: int
    kill: bool
    directory: Path | None


@dataclass(slots=True)
class Story:
    """What happened, with unix times."""

    killed: str | None = None
    killed_at_s: float = 0.0
    recovered_at_s: float | None = None
    replaced: str | None = None


def run_demo(settings: DemoSettings, *, as_json: bool) -> ExitCode:
    """Run it, print the summary (`as_json`: as the last line), return OK or PROMISE_BROKEN."""
    quiet_libraries()
    started = time.monotonic()
    if settings.directory is not None and (settings.directory / "nodes").exists():
        raise ShoalError(
            ExitCode.USAGE, f"{settings.directory} holds an earlier demo", "remove it, or name another --dir"
        )
    folder = settings.directory or Path(tempfile.mkdtemp(prefix="shoal-demo-"))
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=as_json)
    manifest = folder / "run.toml"
    manifest.write_text(demo_manifest(rounds=settings.rounds, stages=settings.stages, volunteers=settings.volunteers))
    examination = examine(manifest)
    console.print(f"files of this demo: {folder}", highlight=False)
    story = Story()
    with SwarmProcesses(folder / "nodes", manifest) as swarm:
        with _view(console, swarm, settings) as board:
            _train(swarm, settings, story, board)
            export_dir = _export(folder, swarm, board)
        codes = swarm.stop()
        orphans = swarm.orphans()
    summary: dict[str, Any] = {
        "mode": "pipeline",
        "rounds": 0,
        "volunteers": settings.volunteers,
        "stages": settings.stages,
        **_from_log(folder / "nodes" / "coordinator"),
        "unigram_entropy": examination.unigram_entropy,
        "killed": story.killed,
        "replaced_by": story.replaced,
        "recovery_s": None if story.recovered_at_s is None else story.recovered_at_s - story.killed_at_s,
        "replacement_sync_s": _sync_seconds(swarm, story),
        "bytes_sent": measure.bytes_sent(node.events for node in swarm.nodes.values()),
        "export_dir": str(export_dir),
        "exit_codes": codes,
        "orphans": orphans,
    }
    summary |= _compare(console, manifest, export_dir, settings)
    summary["text"] = _generate(export_dir)
    summary["wall_s"] = time.monotonic() - started
    broken = broken_promises(summary, settings)
    summary["broken_promises"] = broken
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    _print_summary(console, summary)
    for promise in broken:
        console.print(f"[bold red]broken promise:[/] {promise}", highlight=False)
    if as_json:
        print(json.dumps(summary), flush=True)
    if not broken and settings.directory is None:
        shutil.rmtree(folder / "nodes", ignore_errors=True)
    return ExitCode.PROMISE_BROKEN if broken else ExitCode.OK


# --- the run ---------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _view(console: Console, swarm: SwarmProcesses, settings: DemoSettings) -> Iterator[SwarmBoard]:
    """The live board on a terminal, a line per round elsewhere."""
    board = SwarmBoard("demo", rounds=settings.rounds, stages=settings.stages)
    live = Live(console=console, refresh_per_second=4) if console.is_terminal else None

    def on_events(node: NodeProcess, events: list[Stamped]) -> None:
        for stamped in events:
            board.feed(node.name, stamped)
        if live is None:
            for line in board.plain_lines():
                console.print(line, highlight=False, markup=False)

    def redraw() -> None:
        for name, node in swarm.nodes.items():
            decided = node.of(EntryDecided)
            if decided and name == "coordinator":
                board.set_committee(decided[-1].event.committee)  # type: ignore[attr-defined]
        if live is not None:
            live.update(board.render(time.time()))

    poll = swarm.poll

    def poll_and_redraw() -> None:
        poll()
        redraw()

    swarm.on_events = on_events
    swarm.poll = poll_and_redraw  # type: ignore[method-assign]
    with live or contextlib.nullcontext():
        yield board
    if live is None:
        for line in board.plain_lines(final=True):
            console.print(line, highlight=False, markup=False)


def committed(swarm: SwarmProcesses) -> list[tuple[float, EntryDecided]]:
    """(unix time, entry) of every committed round, each when the first node learned of it."""
    return measure.committed(node.events for node in swarm.nodes.values())


def _train(swarm: SwarmProcesses, settings: DemoSettings, story: Story, board: SwarmBoard) -> None:
    board.note("starting the coordinator", time.time())
    invite = swarm.bootstrap()
    for i in range(settings.volunteers):
        swarm.join(f"volunteer-{i + 1}", invite)
        board.started(f"volunteer-{i + 1}", time.time())

    def steps() -> int:
        return max((e.step for _, e in committed(swarm)), default=0)

    def wait_for(step: int) -> None:
        while (now := steps()) < step:

            def grew(before: int = now) -> bool:
                return steps() > before

            swarm.wait(grew, ROUND_LIMIT_S, f"no round after step {now} was committed")

    if settings.kill:
        wait_for(max(1, int(settings.rounds * KILL_AT)))
        story.killed = "volunteer-2" if settings.volunteers > 1 else "volunteer-1"
        last = max(e.round for _, e in committed(swarm))
        story.killed_at_s = swarm.kill(story.killed)
        board.killed(story.killed, story.killed_at_s)
        copies = settings.volunteers // settings.stages
        if copies > 1:
            wait_for(min(settings.rounds - 1, steps() + (REPLACE_AFTER_ROUNDS if settings.rounds >= 20 else 0)))
        story.replaced = f"volunteer-{settings.volunteers + 1}"
        swarm.join(story.replaced, invite)
        board.joined(story.replaced, time.time())
        wait_for(settings.rounds)
        after = [at for at, e in committed(swarm) if e.round > last and at > story.killed_at_s]
        story.recovered_at_s = min(after, default=None)
    wait_for(settings.rounds)
    board.note("all rounds committed", time.time())


def _export(folder: Path, swarm: SwarmProcesses, board: SwarmBoard) -> Path:
    """Through `shoal export`, as a person would, while the swarm still answers."""
    import subprocess
    import sys

    target = folder / "export"
    board.note("exporting to a Hugging Face directory", time.time())
    command = ["export", str(target), "--dir", str(folder / "nodes" / "coordinator"), "--json"]
    done = subprocess.Popen(
        [sys.executable, "-m", "shoal.node", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    swarm.wait(lambda: done.poll() is not None, 180.0, "the export did not end")
    output = done.stdout.read().decode(errors="replace") if done.stdout is not None else ""
    if done.returncode != 0:
        raise ShoalError(
            ExitCode.PROMISE_BROKEN,
            f"shoal export failed with code {done.returncode}: {output[-1500:]}",
            f"look into {folder}",
        )
    return target


# --- measuring -------------------------------------------------------------------------------------------------------
def _from_log(directory: Path) -> dict[str, Any]:
    """Rounds, losses and sample counts from the coordinator's log on disk, entry by entry."""
    counts = measure.count(measure.read_log(directory))
    return {
        "rounds": counts.rounds,
        "loss_first": counts.losses[0] if counts.losses else None,
        "loss_last": counts.losses[-1] if counts.losses else None,
        "samples_committed": counts.committed,
        "samples_lost": counts.lost,
        "samples_double_counted": counts.double_counted,
    }


def _sync_seconds(swarm: SwarmProcesses, story: Story) -> float | None:
    """How long the replacement took from its first request for state to being at the log's step."""
    if story.replaced is None:
        return None
    found = swarm.nodes[story.replaced].of(SyncFinished)
    return found[0].event.seconds if found else None  # type: ignore[attr-defined]


def _compare(console: Console, manifest_path: Path, export_dir: Path, settings: DemoSettings) -> dict[str, Any]:
    """The one machine on the same samples, against the exported files."""
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("one machine, same samples", total=settings.rounds)
        found = measure.compare(
            manifest_path, export_dir, settings.rounds, lambda step: progress.update(task, completed=step)
        )
    return {
        "reference_max_abs_diff": found.max_abs_diff,
        "tripwire": found.tripwire,
        "reference_loss_last": found.loss_last,
    }


def _generate(export_dir: Path, prompt: str = "    def ", length: int = 72) -> str:
    """A line of text from the exported directory, through stock transformers; sampled from a fixed seed."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(export_dir)
    tokenizer = AutoTokenizer.from_pretrained(export_dir)
    torch.manual_seed(0)
    with torch.no_grad():
        ids = model.generate(
            **tokenizer(prompt, return_tensors="pt"),
            max_new_tokens=length,
            do_sample=True,
            temperature=0.6,
            pad_token_id=0,
        )
    return " ".join(str(tokenizer.decode(ids[0])).split())


def broken_promises(summary: dict[str, Any], settings: DemoSettings) -> list[str]:
    """Every promise that the summary does not keep, in words. Pure."""
    broken = []
    if summary["rounds"] != settings.rounds:
        broken.append(f"{summary['rounds']} rounds were committed, {settings.rounds} were wanted")
    for key in ("samples_lost", "samples_double_counted"):
        if summary[key] != 0:
            broken.append(f"{key} is {summary[key]}, not 0")
    bound = TOLERANCE * summary["tripwire"]
    if not summary["reference_max_abs_diff"] <= bound:
        broken.append(
            f"the parameters are {summary['reference_max_abs_diff']:.2e} away from one machine's, more than {bound:.2e}"
        )
    if settings.rounds >= 30 and not summary["loss_last"] <= summary["unigram_entropy"] - MARGIN_NATS:
        broken.append(f"the last loss {summary['loss_last']:.3f} is not {MARGIN_NATS} nats below the unigram entropy")
    if settings.kill and summary["recovery_s"] is None:
        broken.append("no round was committed after the kill")
    if settings.kill and settings.rounds >= 30 and summary["replacement_sync_s"] is None:
        broken.append("the replacement never caught up")
    if summary["orphans"]:
        broken.append(f"processes were left behind: {', '.join(summary['orphans'])}")
    wrong = {n: c for n, c in summary["exit_codes"].items() if c != 0 and n != summary["killed"]}
    if wrong:
        broken.append(f"nodes ended with errors: {wrong}")
    return broken


def _print_summary(console: Console, summary: dict[str, Any]) -> None:
    def number(key: str, form: str) -> str:
        value = summary.get(key)
        return "–" if value is None else form.format(value)

    table = Table(box=None, show_header=False)
    table.add_column(style="dim", justify="right")
    table.add_column()
    rows = [
        ("rounds", f"{summary['rounds']} over {summary['volunteers']} volunteers in {summary['stages']} stages"),
        (
            "loss",
            f"{number('loss_first', '{:.3f}')} → {number('loss_last', '{:.3f}')} nats per byte "
            f"(unigram entropy {summary['unigram_entropy']:.3f})",
        ),
        (
            "samples",
            f"{summary['samples_committed']} committed, {summary['samples_lost']} lost, "
            f"{summary['samples_double_counted']} counted twice",
        ),
        (
            "killed",
            "nobody"
            if summary["killed"] is None
            else f"{summary['killed']} by SIGKILL; next round committed after {number('recovery_s', '{:.1f} s')}; "
            f"{summary['replaced_by']} joined and caught up in {number('replacement_sync_s', '{:.1f} s')}",
        ),
        (
            "one machine",
            f"largest parameter difference {number('reference_max_abs_diff', '{:.2e}')}; leaving out one microbatch "
            f"would make {number('tripwire', '{:.2e}')}",
        ),
        ("traffic", f"{summary['bytes_sent'] / 1e6:.1f} MB sent"),
        ("export", summary["export_dir"]),
        ("text", repr(summary["text"])),
        ("time", f"{summary['wall_s']:.0f} s"),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
