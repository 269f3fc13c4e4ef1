"""A swarm of real node processes on this machine: start, follow by their event files, kill, stop, leave nothing behind.

Used by the demo, the process tests and the benchmarks. Every process started here is ended here, by pid.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from shoal.monitoring.eventfile import Follower, follow
from shoal.node.exit_codes import ExitCode, ShoalError
from shoal.protocol.events import Event, Stamped

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
POLL_S = 0.1


@dataclass(slots=True)
class NodeProcess:
    """One node: its process, its directory, and everything it has said so far."""

    name: str
    directory: Path
    process: subprocess.Popen[bytes]
    follower: Follower
    started_at_s: float
    events: list[Stamped] = field(default_factory=list)
    family: list[psutil.Process] = field(default_factory=list)  # children ever seen, p2pd among them
    killed_at_s: float | None = None

    def of(self, *kinds: type[Event]) -> list[Stamped]:
        return [stamped for stamped in self.events if isinstance(stamped.event, kinds)]

    def log(self) -> str:
        """The end of what the process printed, for error messages."""
        try:
            return (self.directory / "output.log").read_text(errors="replace")[-2000:]
        except OSError:
            return ""


class SwarmProcesses:
    """A coordinator and volunteers under one folder. A context manager: leaving it ends every process."""

    def __init__(self, folder: Path, manifest: Path) -> None:
        self.folder = folder
        self.manifest = manifest
        self.nodes: dict[str, NodeProcess] = {}
        self.on_events: Callable[[NodeProcess, list[Stamped]], None] = lambda node, events: None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(timeout_s=0.0 if error is not None else 15.0)

    # --- starting ---------------------------------------------------------------------------------------------------
    def bootstrap(self, name: str = "coordinator", timeout_s: float = 90.0, **environment: str) -> str:
        """Start the coordinator; returns the invite. Raises ShoalError if it ends or says nothing in time."""
        directory = self.folder / name
        invite = directory / "invite"
        invite.unlink(missing_ok=True)  # of an earlier start: its addresses may be gone
        node = self._start(
            name, ["bootstrap", str(self.manifest), "--dir", str(directory), "--listen", LOOPBACK], environment
        )
        self.wait(lambda: invite.is_file() and invite.stat().st_size > 0, timeout_s, f"{name} gave no invite", [node])
        return invite.read_text().strip()

    def join(
        self,
        name: str,
        invite: str,
        *,
        threads: int = 1,
        linger_s: float = 600.0,
        data: Path | None = None,
        **environment: str,
    ) -> None:
        """Start a volunteer, or start one again in the directory that it had. `data`: its copy of the training data."""
        directory = self.folder / name
        options = ["--dir", str(directory), "--listen", LOOPBACK, "--threads", str(threads)]
        options += ["--data", str(data)] if data is not None else []
        self._start(name, ["join", invite, *options, "--linger", str(linger_s), "--device", "cpu"], environment)

    def _start(self, name: str, arguments: list[str], environment: dict[str, str]) -> NodeProcess:
        directory = self.folder / name
        directory.mkdir(parents=True, exist_ok=True)
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with (directory / "output.log").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "shoal.node", *arguments, "--quiet"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **threads, **environment},
            )
        node = NodeProcess(name, directory, process, follow(directory / "events.jsonl"), time.time())
        old = self.nodes.get(name)
        if old is not None:
            node.events = old.events
            node.follower = old.follower
            node.family = old.family
        self.nodes[name] = node
        return node

    # --- following --------------------------------------------------------------------------------------------------
    def poll(self) -> None:
        """Read what the nodes have said since the last time."""
        for node in self.nodes.values():
            news = node.follower.poll()
            node.events += news
            if node.process.poll() is None:
                known = {p.pid for p in node.family}
                with contextlib.suppress(psutil.NoSuchProcess):
                    node.family += [c for c in psutil.Process(node.process.pid).children(True) if c.pid not in known]
            if news:
                self.on_events(node, news)

    def wait(
        self, done: Callable[[], bool], timeout_s: float, what: str, watch: Iterable[NodeProcess] | None = None
    ) -> None:
        """Poll until `done`. Raises ShoalError when time is up, or when a node ended that nobody killed."""
        end = time.monotonic() + timeout_s
        while True:
            self.poll()
            if done():
                return
            for node in list(self.nodes.values() if watch is None else watch):
                code = node.process.poll()
                if code is not None and node.killed_at_s is None:
                    raise ShoalError(
                        ExitCode.INTERNAL, f"{node.name} ended with code {code}: {node.log()}", "see above"
                    )
            if time.monotonic() > end:
                tails = "; ".join(f"{n.name}: {n.log()[-300:]}" for n in self.nodes.values())
                raise ShoalError(ExitCode.INTERNAL, f"{what} within {timeout_s:.0f} s; {tails}", "see above")
            time.sleep(POLL_S)

    # --- ending -----------------------------------------------------------------------------------------------------
    def kill(self, name: str) -> float:
        """SIGKILL one node; returns when (unix seconds)."""
        self.poll()
        node = self.nodes[name]
        node.killed_at_s = time.time()
        node.process.send_signal(signal.SIGKILL)
        node.process.wait(10)
        return node.killed_at_s

    def terminate(self, name: str, timeout_s: float = 60.0) -> int:
        """SIGTERM one node and wait for its end; returns its exit code. Raises ShoalError if it stays."""
        node = self.nodes[name]
        node.killed_at_s = time.time()
        node.process.terminate()
        self.wait(lambda: node.process.poll() is not None, timeout_s, f"{name} did not end")
        return node.process.returncode

    def expect_death(self, name: str) -> None:
        """The node will end itself (fault injection): do not take that for an error."""
        self.nodes[name].killed_at_s = time.time()

    def orphans(self, timeout_s: float = 5.0) -> list[str]:
        """Children of ended nodes that still live after `timeout_s`: there should be none."""
        end = time.monotonic() + timeout_s
        while True:
            left = [
                f"{node.name}: {child.name()} ({child.pid})"
                for node in self.nodes.values()
                if node.process.poll() is not None
                for child in node.family
                if _lives(child)
            ]
            if not left or time.monotonic() > end:
                return left
            time.sleep(0.05)

    def stop(self, timeout_s: float = 15.0) -> dict[str, int]:
        """SIGTERM everybody, SIGKILL whoever is still there after `timeout_s`. Returns exit codes."""
        self.poll()
        for node in self.nodes.values():
            if node.process.poll() is None:
                node.process.terminate()
        end = time.monotonic() + timeout_s
        for node in self.nodes.values():
            try:
                node.process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                node.process.kill()
                node.process.wait(10)
        self.poll()
        return {node.name: node.process.returncode for node in self.nodes.values()}


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
