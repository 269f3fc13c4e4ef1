"""Ways into a run: liars among the first peers, strangers in the phone book, crashes while files are written."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shoal.node import swarm_processes
from shoal.node.coordinator import prepare
from shoal.node.entrance import (
    MAX_KNOWN,
    KnownPeers,
    fetch_manifest,
    invited_addresses,
    invited_peers,
    merged,
    ways_back,
)
from shoal.node.exit_codes import ExitCode, ShoalError
from shoal.node.node import end_pool
from shoal.node.settings import NodeSettings
from shoal.node.swarm_processes import SwarmProcesses
from shoal.protocol.events import Reason
from shoal.protocol.invite import Invite
from shoal.protocol.runlog import Member
from shoal.protocol.transport import Empty, Reply, Unanswered
from tests.node.small_runs import write_run


# --- the manifest ----------------------------------------------------------------------------------------------------
class Answers:
    """A transport on which each peer gives what it is told to; None: it is away."""

    def __init__(self, given: dict[str, bytes | None]) -> None:
        self.given = given

    async def call(self, peer: str, *_: Any, **__: Any) -> Reply[Empty]:
        data = self.given[peer]
        if data is None:
            raise Unanswered(Reason.UNREACHABLE, peer)
        return Reply(Empty(), data)


@pytest.mark.parametrize("first", [{"liar": b"forged"}, {"away": None, "liar": b"", "other": b"\x80"}])
async def test_a_forged_manifest_does_not_keep_a_node_from_the_true_one(
    tmp_path: Path, first: dict[str, bytes | None]
) -> None:
    signed = prepare(write_run(tmp_path), NodeSettings(tmp_path / "coordinator"))
    invite = Invite(signed.manifest.run_id, signed.coordinator, (f"/ip4/1.2.3.4/tcp/1/p2p/{signed.coordinator}",))
    transport: Any = Answers({**first, "true": signed.to_bytes()})
    found, data = await fetch_manifest(transport, invite, transport.given)
    assert found == signed and data == signed.to_bytes()
    transport.given["true"] = None
    with pytest.raises(ShoalError) as refused:
        await fetch_manifest(transport, invite, transport.given)
    assert refused.value.exit_code is ExitCode.MANIFEST_REFUSED


# --- who is where ----------------------------------------------------------------------------------------------------
def member(peer: str, *maddrs: str) -> Member:
    return Member(peer=peer, public_key="ab" * 32, maddrs=maddrs)


def test_strangers_in_the_dht_cannot_push_members_out_of_the_known_peers(tmp_path: Path) -> None:
    known = KnownPeers(tmp_path / "peers.json", "me")
    strangers = {f"s{i}": ("/ip4/9.9.9.9/tcp/9",) for i in range(3 * MAX_KNOWN)}
    members = [member("c"), *(member(f"m{i}", f"/ip4/1.1.1.1/tcp/{i + 1}") for i in range(20)), member("me", "/x")]
    for _ in range(3):
        known.add(ways_back(members, {**strangers, "c": ("/ip4/2.2.2.2/tcp/2",), "m3": ("/lie",)}, "me"))
    read = known.read()
    assert len(read) == MAX_KNOWN and "me" not in read
    assert list(read)[:21] == ["c", *(f"m{i}" for i in range(20))]
    assert read["m3"] == ("/ip4/1.1.1.1/tcp/4",), "of a member, what the log says counts"
    assert read["c"] == ("/ip4/2.2.2.2/tcp/2",), "the log does not say where the coordinator is"


def test_the_addresses_of_the_invite_are_learned_beside_those_known_before(tmp_path: Path) -> None:
    signed = prepare(write_run(tmp_path), NodeSettings(tmp_path / "coordinator"))
    c = signed.coordinator
    invite = Invite(signed.manifest.run_id, c, (f"/ip4/1.2.3.4/tcp/1/p2p/{c}", f"/dns4/host/tcp/2/p2p/{c}"))
    assert invited_addresses(invite) == {c: ("/ip4/1.2.3.4/tcp/1", "/dns4/host/tcp/2")}
    assert set(invited_addresses(invite)) <= set(invited_peers(invite)) and invited_addresses(None) == {}
    known = {c: ("/ip4/1.2.3.4/tcp/3", "/ip4/1.2.3.4/tcp/1"), "m": ("/ip4/5.5.5.5/tcp/5",)}
    assert merged(known, invited_addresses(invite)) == {
        c: ("/ip4/1.2.3.4/tcp/3", "/ip4/1.2.3.4/tcp/1", "/dns4/host/tcp/2"),
        "m": ("/ip4/5.5.5.5/tcp/5",),
    }


# --- files -----------------------------------------------------------------------------------------------------------
def test_what_is_renamed_into_place_is_on_the_disk_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = write_run(tmp_path)
    NodeSettings(tmp_path / "coordinator").prepare()
    prepare(manifest, NodeSettings(tmp_path / "other"))  # so that what is made once only is made
    steps: list[str] = []
    fsync, rename = os.fsync, Path.replace

    def note_rename(self: Path, target: Path) -> Path:
        steps.append(f"rename {target.name}")
        return rename(self, target)

    def note_fsync(fd: int) -> None:
        steps.append("fsync")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_rename)
    prepare(manifest, NodeSettings(tmp_path / "coordinator"))
    KnownPeers(tmp_path / "peers.json", "me").add({"m": ("/ip4/5.5.5.5/tcp/5",)})
    for name in ("manifest.signed", "peers.json"):
        at = steps.index(f"rename {name}")
        assert steps[at - 1] == steps[at + 1] == "fsync", steps
    assert json.loads((tmp_path / "peers.json").read_text()) == {"m": ["/ip4/5.5.5.5/tcp/5"]}


def test_a_coordinator_that_starts_again_is_not_taken_at_its_old_invite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "coordinator"
    folder.mkdir()
    (folder / "invite").write_text("shoal1-old\n")

    class Process:
        pid, returncode = os.getpid(), None

        def __init__(self, *_: Any, **__: Any) -> None:
            threading.Timer(0.3, lambda: (folder / "invite").write_text("shoal1-new\n")).start()

        def poll(self) -> None:
            return None

    monkeypatch.setattr(swarm_processes.subprocess, "Popen", Process)
    assert SwarmProcesses(tmp_path, tmp_path / "run.toml").bootstrap(timeout_s=10) == "shoal1-new"


# --- the end ---------------------------------------------------------------------------------------------------------
async def test_a_computation_that_does_not_end_holds_neither_the_loop_nor_the_end_of_the_node() -> None:
    pool, go_on, ran = ThreadPoolExecutor(1), threading.Event(), []
    stuck = pool.submit(go_on.wait, 30)
    queued = pool.submit(ran.append, 1)
    turns = 0

    async def beat() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0.01)

    heart = asyncio.ensure_future(beat())
    started = time.monotonic()
    await end_pool(pool, 0.3)
    assert 0.25 < time.monotonic() - started < 5 and turns > 5, "the loop stood still"
    assert queued.cancelled() and not ran and not stuck.done()
    go_on.set()
    heart.cancel()


async def test_a_computation_that_ends_is_waited_for() -> None:
    pool = ThreadPoolExecutor(1)
    work = pool.submit(time.sleep, 0.1)
    started = time.monotonic()
    await end_pool(pool, 20)
    assert work.done() and time.monotonic() - started < 5
