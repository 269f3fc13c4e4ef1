"""Whole runs as a person sees them: the README's terminals, the demo, a full disk, signals."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from shoal.node.exit_codes import ExitCode
from shoal.protocol.identity import Identity
from shoal.protocol.invite import Invite
from tests.node.small_runs import SmallSwarm, run_here, shoal, small_disk, write_run

Capture = pytest.CaptureFixture[str]
README = Path(__file__).parents[2] / "README.md"
# The keys that the demo's JSON promises.
KEYS = (
    "mode rounds volunteers loss_first loss_last unigram_entropy samples_committed samples_lost samples_double_counted "
    "reference_max_abs_diff tripwire killed recovery_s wall_s bytes_sent export_dir"
)

pytestmark = [pytest.mark.process, pytest.mark.timeout(240)]


class Terminals:
    """Commands that run side by side; all are ended with the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        log = (self.folder / f"terminal-{len(self.started)}.txt").open("w")
        process = subprocess.Popen(
            [sys.executable, "-m", "shoal.node", *arguments],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(README.parent)},
        )
        log.close()
        self.started.append(process)
        return process

    def said(self, process: subprocess.Popen[str]) -> str:
        return (self.folder / f"terminal-{self.started.index(process)}.txt").read_text()

    def until(self, process: subprocess.Popen[str], pattern: str, timeout_s: float = 60.0) -> re.Match[str]:
        """Wait until the process has printed something."""
        end = time.monotonic() + timeout_s
        while (found := re.search(pattern, self.said(process), re.MULTILINE)) is None:
            assert process.poll() is None and time.monotonic() < end, self.said(process)
            time.sleep(0.1)
        return found


@pytest.fixture
def terminals(tmp_path: Path) -> Iterator[Terminals]:
    found = Terminals(tmp_path)
    yield found
    for process in found.started:
        if process.poll() is None:
            process.kill()
        process.wait(10)


def test_the_readmes_three_terminals(tmp_path: Path, capfd: Capture, terminals: Terminals) -> None:
    """On the run.toml that the README shows, with fewer rounds."""
    text = README.read_text()
    (manifest,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    commands = re.findall(r"^\.venv/bin/shoal (\w+) ([^#\n]*)", text, re.MULTILINE)
    wanted = {"check", "bootstrap", "join", "export", "status"}
    assert wanted <= {name for name, _ in commands}
    (tmp_path / "run.toml").write_text(manifest.replace("rounds = 20", "rounds = 2"))
    answer = run_here(capfd, "check", tmp_path / "run.toml")
    assert answer.code == 0, answer.err

    listen = "/ip4/127.0.0.1/tcp/0"
    runs = ("--dir", "runs/coordinator")
    coordinator = terminals.start("bootstrap", "run.toml", *runs, "--listen", listen, "--plain")
    invite = terminals.until(coordinator, r"^shoal1-\S+$")[0]
    assert (tmp_path / "runs/coordinator/invite").read_text().strip() == invite
    options = ("--listen", listen, "--device", "cpu", "--threads", "1", "--linger", "600")
    one = terminals.start("join", "runs/coordinator/invite", "--dir", "runs/volunteer-1", *options)
    two = terminals.start("join", invite, "--dir", "runs/volunteer-2", *options, "--plain")
    for process in (coordinator, one, two):
        terminals.until(process, r"step +2\b", 60.0)
    answer = run_here(capfd, "export", tmp_path / "model", "--dir", tmp_path / "runs/coordinator")
    assert answer.code == 0, answer.err
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.hidden_size == 128
    for process in (one, two, coordinator):
        process.send_signal(signal.SIGINT)  # Ctrl-C
    for process in (one, two, coordinator):
        assert process.wait(30) == 0, terminals.said(process)
        assert "Traceback" not in terminals.said(process)


@pytest.mark.slow
def test_the_demo_keeps_its_promises_and_leaves_nothing_running(tmp_path: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    size = ("--rounds", "4", "--stages", "1", "--volunteers", "2")  # `make demo` is the large one
    done = shoal("demo", *size, "--json", "--dir", tmp_path / "demo", timeout_s=220.0)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert [key for key in KEYS.split() if key not in summary] == []
    assert (summary["mode"], summary["rounds"], summary["volunteers"]) == ("pipeline", 4, 2)
    assert summary["samples_committed"] == 4 * 32
    assert (summary["samples_lost"], summary["samples_double_counted"]) == (0, 0)
    assert summary["reference_max_abs_diff"] <= 0.1 * summary["tripwire"]
    assert summary["killed"] is not None and summary["recovery_s"] > 0
    assert summary["bytes_sent"] > 1e6 and summary["broken_promises"] == []
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(summary["export_dir"]) is not None
    left = [p for p in set(psutil.Process().children(recursive=True)) - before if p.status() != psutil.STATUS_ZOMBIE]
    assert left == []


def test_a_disk_that_is_full_ends_a_node_with_one_clear_line(tmp_path: Path) -> None:
    manifest = write_run(tmp_path, stages=1, copies=1, feeders=1)
    store = tmp_path / "nodes" / "v1" / "store"
    with small_disk(store, "600k"), SmallSwarm(tmp_path, manifest) as swarm:
        swarm.start(1)
        swarm.expect_death("v1")
        node = swarm.wait_for_death("v1")
        assert node.process.returncode == ExitCode.NO_SPACE
        lines = node.log().splitlines()
        assert [line[:7] for line in lines[-2:]] == ["shoal: ", "  fix: "] and "Traceback" not in node.log()
        assert "no space left" in lines[-2] and "--dir" in lines[-1]
        assert list(store.rglob("*.tmp")) == [] and list((store / "tmp").iterdir()) == []
        assert swarm.orphans() == []


def test_a_node_that_waits_for_a_bootstrap_that_hangs_ends_at_sigterm(tmp_path: Path, terminals: Terminals) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        peer = Identity.create(tmp_path / "key").peer
        invite = Invite("ab" * 32, peer, (f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}/p2p/{peer}",))
        node = terminals.start("join", invite.encode(), "--dir", "node", "--listen", "/ip4/127.0.0.1/tcp/0", "--quiet")
        silent.settimeout(60)
        connection, _ = silent.accept()  # it knocked, and gets no answer
        with connection:
            start = time.monotonic()
            node.send_signal(signal.SIGTERM)
            assert node.wait(15) == 0
            assert time.monotonic() - start < 10
        assert "Traceback" not in terminals.said(node)
        assert list((tmp_path / "node" / "run").iterdir()) == []
