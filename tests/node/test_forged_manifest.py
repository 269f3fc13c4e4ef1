"""A peer at the invite's address that gives another manifest than the invite promises: refused, nothing kept."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from shoal.node.coordinator import prepare
from shoal.node.exit_codes import ExitCode, ShoalError
from shoal.node.node import Node
from shoal.node.services import MANIFEST
from shoal.node.settings import NodeSettings
from shoal.protocol.identity import Identity
from shoal.protocol.invite import Invite
from shoal.protocol.manifest import SignedManifest
from shoal.protocol.p2p import P2PTransport
from shoal.protocol.store import DiskStore
from shoal.protocol.transport import Empty, Reply, Request
from tests.node.small_runs import write_run

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)

pytestmark = pytest.mark.process


def other_run(true: SignedManifest, tmp_path: Path) -> bytes:
    """Signed by the right coordinator, but not the run of the invite: its hash is wrong."""
    manifest = true.manifest.model_copy(update={"seed": 8})
    return SignedManifest.sign(manifest, Identity.load(tmp_path / "coordinator" / "identity.key")).to_bytes()


def other_signer(true: SignedManifest, tmp_path: Path) -> bytes:
    """The right run, signed by somebody else."""
    return SignedManifest.sign(true.manifest, Identity.create(tmp_path / "stranger.key")).to_bytes()


def changed(true: SignedManifest, tmp_path: Path) -> bytes:
    """One character of the true bytes is another one."""
    data = true.to_bytes()
    at = data.index(b"0.01") if b"0.01" in data else len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def garbage(true: SignedManifest, tmp_path: Path) -> bytes:
    """Not a manifest at all."""
    return b"\x80\x04}" * 100


def empty(true: SignedManifest, tmp_path: Path) -> bytes:
    """No bytes at all."""
    return b""


@pytest.mark.parametrize("forge", [other_run, other_signer, changed, garbage, empty], ids=lambda f: f.__name__)
async def test_a_forged_manifest_is_refused_and_not_kept(tmp_path: Path, forge) -> None:  # type: ignore[no-untyped-def]
    signed = prepare(write_run(tmp_path), NodeSettings(tmp_path / "coordinator"))
    rogue = await P2PTransport.create(
        identity_path=tmp_path / "coordinator" / "identity.key",
        listen=LOOPBACK,
        emit=lambda event: None,
        run_dir=tmp_path / "rogue",
    )
    try:

        async def give(request: Request[Empty]) -> Reply[Empty]:
            return Reply(Empty(), forge(signed, tmp_path))

        rogue.serve(MANIFEST, give)
        await rogue.ready()
        addresses = tuple(f"{maddr}/p2p/{rogue.peer}" for maddr in rogue.visible_addresses())
        invite = Invite(signed.manifest.run_id, signed.coordinator, addresses)
        node = Node(NodeSettings(tmp_path / "node", listen=LOOPBACK), invite=invite)
        with pytest.raises(ShoalError) as refused:
            async with asyncio.timeout(60):
                await node.run()
    finally:
        await rogue.close()
    assert refused.value.exit_code is ExitCode.MANIFEST_REFUSED
    assert "manifest" in refused.value.message and "invite" in refused.value.fix
    store = DiskStore(tmp_path / "node" / "store")
    assert store.keys() == []
    await store.aclose()
    assert not (tmp_path / "node" / "invite").exists()
