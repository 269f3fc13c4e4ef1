"""One long-lived swarm of three processes (coordinator, one server for each of two stages), and everything that a
person or another program does with running nodes. The last tests kill what the earlier ones need: order matters."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.node.exit_codes import ExitCode
from shoal.node.settings import NodeSettings
from shoal.protocol.events import EntryDecided, LifecycleChanged, MicrobatchFinished, Problem, Reason, StepApplied
from shoal.protocol.invite import Invite
from tests.node.small_runs import SmallSwarm, run_here, small_disk, write_run, write_words

Capture = pytest.CaptureFixture[str]
CLIENT = Path(__file__).parents[1] / "interop" / "pylibp2p_client.py"

pytestmark = [pytest.mark.process, pytest.mark.timeout(150)]


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallSwarm]:
    """It trains for ever: v1 and v2 serve a stage each and feed; with the coordinator they are the committee."""
    folder = tmp_path_factory.mktemp("swarm")
    with SmallSwarm(folder, write_run(folder, stages=2, copies=1, optimizer="sgd", rounds=0)) as swarm:
        swarm.start(2)
        swarm.wait_for_step(2)
        yield swarm


def directory(swarm: SmallSwarm, name: str) -> Path:
    return swarm.nodes[name].directory


def running(swarm: SmallSwarm, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(NodeSettings(directory(swarm, name)).running.read_text())
    return found


# --- watching --------------------------------------------------------------------------------------------------------
def test_status_of_a_running_node(swarm: SmallSwarm, capfd: Capture) -> None:
    answer = run_here(capfd, "status", "--dir", directory(swarm, "v1"), "--json")
    assert (answer.code, answer.err) == (0, "")
    status = json.loads(answer.out)
    assert status["peer"] == running(swarm, "v1")["peer"]
    assert status["state"] == "working" and status["mode"] == "pipeline" and status["step"] >= 2
    members = {m["peer"]: m for m in status["member_list"]}
    assert len(members) == 3 and sum(m["committee"] for m in members.values()) == 3
    assert sorted(m["stage"] for m in members.values() if m["stage"] is not None) == [0, 1]
    text = run_here(capfd, "status", "--dir", directory(swarm, "v1"))
    assert text.code == 0
    assert status["peer"] in text.out and "working" in text.out and "stage" in text.out


def test_metrics_of_a_running_node(swarm: SmallSwarm) -> None:
    with urllib.request.urlopen(f"{running(swarm, 'v1')['url']}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    assert "# TYPE shoal_" in text
    assert running(swarm, "v2")["peer"] not in text, "no peer ids in metrics"


@pytest.mark.skipif(
    importlib.util.find_spec("libp2p") is None, reason="py-libp2p is not installed: pip install 'shoal[interop]'"
)
def test_an_independent_libp2p_peer_identifies_pings_and_reads_the_status(swarm: SmallSwarm) -> None:
    address = Invite.decode(swarm.invite).maddrs[0]
    done = subprocess.run([sys.executable, str(CLIENT), address], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["agent"].startswith("p2pd/") and answer["ping_ms"] > 0
    assert answer["kind"] == "reply"
    assert answer["header"]["run"] == Invite.decode(swarm.invite).run
    assert answer["header"]["state"] == "working" and answer["header"]["step"] >= 2


# --- what does not go together with a running node -------------------------------------------------------------------
def test_a_directory_in_use_is_refused(swarm: SmallSwarm, capfd: Capture) -> None:
    before = running(swarm, "v1")
    answer = run_here(capfd, "join", swarm.invite, "--dir", directory(swarm, "v1"), "--quiet")
    answer.is_error(ExitCode.DIRECTORY_LOCKED, str(directory(swarm, "v1")), str(before["pid"]))
    answer = run_here(capfd, "bootstrap", swarm.manifest, "--dir", directory(swarm, "coordinator"), "--quiet")
    answer.is_error(ExitCode.DIRECTORY_LOCKED, str(directory(swarm, "coordinator")))
    assert running(swarm, "v1") == before
    assert json.loads(run_here(capfd, "status", "--dir", directory(swarm, "v1"), "--json").out)["state"] == "working"


def test_an_invite_to_another_run_of_the_same_coordinator_is_refused(
    swarm: SmallSwarm, capfd: Capture, tmp_path: Path
) -> None:
    invite = Invite.decode(swarm.invite)
    forged = Invite("ab" * 32, invite.coordinator, invite.maddrs).encode()
    answer = run_here(capfd, "join", forged, "--dir", tmp_path / "node", "--quiet")
    answer.is_error(ExitCode.MANIFEST_REFUSED, "manifest")
    run_here(capfd, "export", tmp_path / "out", "--invite", forged).is_error(ExitCode.MANIFEST_REFUSED, "manifest")
    assert not (tmp_path / "out").exists()


def test_a_directory_of_another_run_is_refused(swarm: SmallSwarm, capfd: Capture, tmp_path: Path) -> None:
    invite = Invite.decode(swarm.invite)
    from shoal.protocol.store import DiskStore

    async def of_another_run() -> None:
        store = DiskStore(tmp_path / "store")
        await store.put("manifest", b"of another run")
        await store.aclose()

    asyncio.run(of_another_run())
    answer = run_here(capfd, "join", invite.encode(), "--dir", tmp_path, "--quiet")
    answer.is_error(ExitCode.BAD_INVITE, str(tmp_path), "--dir")


# --- export ----------------------------------------------------------------------------------------------------------
def test_export_of_a_running_swarm_and_what_it_does_not_touch(
    swarm: SmallSwarm, capfd: Capture, tmp_path: Path
) -> None:
    source = ("--dir", directory(swarm, "coordinator"))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    run_here(capfd, "export", mine, *source).is_error(ExitCode.EXPORT_REFUSED, str(mine))
    assert [p.name for p in tmp_path.iterdir()] == ["mine"] and [p.name for p in mine.iterdir()] == ["thesis.txt"]
    answer = run_here(capfd, "export", tmp_path / "out", *source, "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["step"] >= 2
    assert (tmp_path / "out" / "model.safetensors").is_file()
    answer = run_here(capfd, "export", tmp_path / "out", "--invite", swarm.invite)
    assert answer.code == 0, "an earlier export is replaced"
    assert "exported to" in answer.out


def test_export_to_a_full_disk_says_so_and_leaves_nothing(swarm: SmallSwarm, capfd: Capture, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "100k"):
        answer = run_here(capfd, "export", tmp_path / "disk" / "out", "--dir", directory(swarm, "coordinator"))
        answer.is_error(ExitCode.NO_SPACE, "space")
        assert list((tmp_path / "disk").iterdir()) == []


def states(swarm: SmallSwarm, name: str) -> list[str]:
    return [s.event.new for s in swarm.nodes[name].of(LifecycleChanged)]  # type: ignore[attr-defined]


# --- joining late, leaving -------------------------------------------------------------------------------------------
def member(swarm: SmallSwarm, capfd: Capture, name: str) -> dict[str, Any] | None:
    """What the coordinator says about a node."""
    status = json.loads(run_here(capfd, "status", "--dir", directory(swarm, "coordinator"), "--json").out)
    peer = running(swarm, name)["peer"]
    return next((m for m in status["member_list"] if m["peer"] == peer), None)


def test_volunteers_without_the_runs_data_serve_and_do_not_feed_and_signals_end_them(
    swarm: SmallSwarm, capfd: Capture, tmp_path: Path
) -> None:
    swarm.join("other-data", swarm.invite, data=write_words(tmp_path / "other.txt", seed=1))
    swarm.join("no-data", swarm.invite)
    for name in ("other-data", "no-data"):
        swarm.wait_for_event(name, StepApplied)
        node = swarm.nodes[name]
        found = member(swarm, capfd, name)
        assert found is not None and found["stage"] is not None and not found["feeder"]
        reasons = [s.event.reason for s in node.of(Problem)]  # type: ignore[attr-defined]
        assert (Reason.DATA_MISMATCH in reasons) == (name == "other-data")
        assert node.of(MicrobatchFinished) == []

    assert swarm.terminate("other-data") == ExitCode.OK
    assert states(swarm, "other-data")[-2:] == ["draining", "left"]
    at = swarm.steps()
    swarm.wait_for_step(at + 2)
    assert not NodeSettings(directory(swarm, "other-data")).running.exists()

    node = swarm.nodes["no-data"]
    (daemon,) = [p for p in node.family if p.is_running()]
    node.killed_at_s = 1.0
    daemon.kill()
    swarm.wait(lambda: node.process.poll() is not None, 60.0, "the node did not notice that its p2pd died")
    assert node.process.returncode == ExitCode.DAEMON_DIED
    assert "shoal: the node's libp2p daemon" in node.log() and "Traceback" not in node.log()
    assert swarm.orphans() == []


# --- deaths ----------------------------------------------------------------------------------------------------------
def test_killing_the_bootstrap_peer_does_not_stop_training_and_it_catches_up_when_it_is_back(
    swarm: SmallSwarm,
) -> None:
    swarm.kill("coordinator")
    assert swarm.orphans() == []
    at = swarm.steps()
    swarm.wait_for_step(at + 3)
    assert not any(n.process.poll() is not None for name, n in swarm.nodes.items() if name in ("v1", "v2"))

    said = len(swarm.nodes["coordinator"].of(EntryDecided))
    swarm.bootstrap()
    coordinator = swarm.nodes["coordinator"]

    def caught_up() -> bool:
        entries = coordinator.of(EntryDecided)[said:]
        return any(s.event.step >= at + 3 and s.event.members == 3 for s in entries)  # type: ignore[attr-defined]

    swarm.wait(caught_up, 60.0, "the coordinator did not catch up")
    assert swarm.terminate("coordinator") == ExitCode.OK


def test_a_drain_waits_for_an_entry_and_a_second_signal_ends_it_at_once_and_nothing_is_left(
    swarm: SmallSwarm,
) -> None:
    """With v2 killed there is no majority, so no entry can leave v1 out."""
    swarm.poll()
    for name in ("v1", "v2"):
        assert any(p.name().startswith("p2pd") for p in swarm.nodes[name].family if p.is_running())
    swarm.kill("v2")
    assert swarm.orphans() == []
    node = swarm.nodes["v1"]
    node.killed_at_s = time.time()
    node.process.terminate()
    swarm.wait(lambda: "draining" in states(swarm, "v1"), 30.0, "v1 does not drain")
    time.sleep(1.0)
    assert node.process.poll() is None
    start = time.monotonic()
    assert swarm.terminate("v1") == ExitCode.DRAIN_TIMED_OUT
    assert time.monotonic() - start < 15
    assert states(swarm, "v1")[-1] == "left"
    assert swarm.orphans() == []
