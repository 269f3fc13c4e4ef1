"""Small runs for the tests of real processes: a tiny float64 Llama on a text of a few kilobytes, and what came out."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from shoal.node import measure
from shoal.node.cli import main
from shoal.node.exit_codes import ExitCode
from shoal.node.exporting import export_run
from shoal.node.settings import NodeSettings
from shoal.node.swarm_processes import NodeProcess, SwarmProcesses
from shoal.protocol.events import EntryDecided

TOLERANCE = 1e-9
ROUND_LIMIT_S = 60.0

TEMPLATE = """\
name = "{name}"
mode = "pipeline"
seed = 7

[model]
architecture = "llama"
stages = {stages}
dtype = "float64"

[model.config]
hidden_size = 32
intermediate_size = 48
num_hidden_layers = {layers}
num_attention_heads = 2
num_key_value_heads = 2
vocab_size = 256
max_position_embeddings = 32
tie_word_embeddings = false

[data]
kind = "text"
path = "words.txt"
sequence_length = 32

[batch]
samples = 8
microbatch = 2

[optimizer]
name = "{optimizer}"
learning_rate = 1e-2

[schedule]
rounds = {rounds}
snapshot_every = 2

[participation]
servers_per_stage = {copies}
feeders = {feeders}
committee = 3
"""


def write_run(
    folder: Path,
    *,
    stages: int = 2,
    copies: int = 2,
    feeders: int = 2,
    optimizer: str = "adamw",
    rounds: int = 6,
    name: str = "tiny",
) -> Path:
    """run.toml and its words.txt in `folder`; returns the path of run.toml."""
    folder.mkdir(parents=True, exist_ok=True)
    write_words(folder / "words.txt")
    manifest = folder / "run.toml"
    manifest.write_text(
        TEMPLATE.format(
            name=name,
            stages=stages,
            layers=max(2, stages),
            copies=copies,
            feeders=feeders,
            optimizer=optimizer,
            rounds=rounds,
        )
    )
    return manifest


def write_words(path: Path, seed: int = 0) -> Path:
    rng = random.Random(seed)
    words = ("shoal", "round", "stage", "peer", "feeder", "server", "ledger", "plan", "freeze", "decide", "apply")
    path.write_text(" ".join(rng.choice(words) for _ in range(3000)))
    return path


class SmallSwarm(SwarmProcesses):
    """A swarm of one small run in a folder: coordinator, and volunteers v1, v2, … that have the data."""

    def __init__(self, folder: Path, manifest: Path) -> None:
        super().__init__(folder / "nodes", manifest)
        self.words = manifest.parent / "words.txt"
        self.invite = ""

    def start(self, volunteers: int, **chaos: str) -> None:
        """The coordinator and so many volunteers; `chaos`: SHOAL_CHAOS of some of them, by name."""
        self.invite = self.bootstrap()
        for i in range(1, volunteers + 1):
            self.enter(f"v{i}", chaos.get(f"v{i}", ""))

    def enter(self, name: str, chaos: str = "") -> None:
        """A volunteer with the data, new or from the directory that it left; it may be told to kill itself."""
        self.join(name, self.invite, data=self.words, SHOAL_CHAOS=chaos)
        if chaos:
            self.expect_death(name)

    def steps(self) -> int:
        """Optimizer steps after the newest entry that any node knows."""
        return max((s.event.step for n in self.nodes.values() for s in n.of(EntryDecided)), default=0)  # type: ignore[attr-defined]

    def wait_for_step(self, step: int) -> None:
        """Raises ShoalError when no step is committed for ROUND_LIMIT_S."""
        while (now := self.steps()) < step:
            self.wait(lambda now=now: self.steps() > now, ROUND_LIMIT_S, f"no step after {now} was committed")

    def wait_for_death(self, name: str, timeout_s: float = 90.0) -> NodeProcess:
        """Until the node that was told to kill itself has done so."""
        node = self.nodes[name]
        self.wait(lambda: node.process.poll() is not None, timeout_s, f"{name} did not come to the point of its death")
        self.poll()
        return node

    def wait_for_event(self, name: str, kind: type, timeout_s: float = 60.0, after: int = 0) -> None:
        """Until the node has said more than `after` events of this kind."""
        node = self.nodes[name]
        self.wait(lambda: len(node.of(kind)) > after, timeout_s, f"{name} said no {kind.__name__}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a swarm ended with: its log's counts, and its exported parameters beside one machine's."""

    counts: measure.LogCounts
    against: measure.Comparison
    codes: dict[str, int]
    orphans: list[str]

    def check(self, rounds: int, samples: int = 8) -> None:
        """The promise: every sample exactly once, and one machine's parameters; the comparison would see a fault."""
        assert self.counts.rounds == rounds
        assert self.counts.committed == rounds * samples
        assert (self.counts.lost, self.counts.double_counted) == (0, 0)
        assert self.against.max_abs_diff <= TOLERANCE
        assert self.against.tripwire > 1e4 * TOLERANCE, "the comparison would not notice a lost microbatch"
        assert self.orphans == []


def finish(swarm: SmallSwarm, rounds: int) -> Outcome:
    """Wait for the last round, export as `shoal export` does, end every process, and measure."""
    swarm.wait_for_step(rounds)
    target = swarm.folder.parent / "export"
    coordinator = NodeSettings(directory=swarm.folder / "coordinator")
    asyncio.run(export_run(target, coordinator, None, show=False))
    codes = swarm.stop()
    orphans = swarm.orphans()
    counts = measure.count(measure.read_log(coordinator.directory))
    return Outcome(counts, measure.compare(swarm.manifest, target, rounds), codes, orphans)


@contextlib.contextmanager
def small_disk(at: Path, size: str) -> Iterator[None]:
    """A disk of so many bytes mounted at a folder. Skips the test where this user may not mount."""
    at.mkdir(parents=True, exist_ok=True)
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(at)], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"no small tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command said and how it ended."""

    code: int
    out: str
    err: str

    def is_error(self, code: ExitCode, *words: str) -> None:
        """One line that says what happened (with these words), one with the fix, the documented code, no traceback."""
        lines = self.err.splitlines()
        assert self.code == code, self
        assert [line[:7] for line in lines] == ["shoal: ", "  fix: "], self
        for word in words:
            assert word in self.err, self


def run_here(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> Answer:
    """The command, in this process: the same code without the seconds that importing costs."""
    capfd.readouterr()
    before, sys.argv = sys.argv, ["shoal", *map(str, arguments)]
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "200"
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = before
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns
    out, err = capfd.readouterr()
    code = ended.value.code
    return Answer(int(code) if code is not None else 0, out, err)  # type: ignore[arg-type]


def shoal(*arguments: str | Path, timeout_s: float = 60.0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "shoal.node", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "COLUMNS": "200", **environment},
        check=False,
    )
