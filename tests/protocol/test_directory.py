"""The directory: good records are found by everybody, bad ones are stored and believed by nobody."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from hivemind.dht.crypto import DHTRecord
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.utils import MSGPackSerializer

from shoal.protocol import directory as directory_module
from shoal.protocol.directory import Directory, RecordValidator, peers_key
from shoal.protocol.identity import Identity
from shoal.protocol.p2p import BootstrapUnreachable
from shoal.protocol.records import MAX_RECORD_BYTES, PeerRecord, PeerStatus, seal
from shoal.protocol.transport import Refused
from tests.protocol.p2p_nodes import Nodes

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.process]

RUN = "ab" * 32
OTHER_RUN = "cd" * 32


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def swarm() -> AsyncIterator[tuple[Nodes, list[Directory]]]:
    nodes = Nodes()
    first = await nodes.start("a")
    for name in ("b", "c"):
        await nodes.start(name, bootstrap=first)
    directories = [await Directory.create(node, RUN) for node in nodes.started]
    yield nodes, directories
    for directory in directories:
        await directory.close()
    await nodes.close()


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return Identity.create(tmp_path_factory.mktemp("stranger") / "key")


def record_of(identity: Identity, *, run: str = RUN, lifetime_s: float = 300.0, counter: int = 0) -> PeerRecord:
    now = time.time()
    return PeerRecord(
        run=run,
        peer=identity.peer,
        name="quick-carp",
        maddrs=("/ip4/127.0.0.1/tcp/4001",),
        public_key=identity.public_key.hex(),
        stage=0,
        step=0,
        status=PeerStatus.WORKING,
        can_feed=True,
        samples_per_s=1.0,
        memory_bytes=1,
        counter=counter,
        issued_at=now,
        expires_at=now + lifetime_s,
    )


def entry(
    identity: Identity, record: PeerRecord, *, run: str = RUN, peer: str | None = None, expires_at: float | None = None
) -> DHTRecord:
    return DHTRecord(
        DHTID.generate(source=peers_key(run)).to_bytes(),
        MSGPackSerializer.dumps(peer or identity.peer),
        MSGPackSerializer.dumps(seal(record, identity)),
        record.expires_at if expires_at is None else expires_at,
    )


async def test_every_node_finds_what_every_node_published(swarm: tuple[Nodes, list[Directory]]) -> None:
    nodes, directories = swarm
    published = {}
    for name, node, directory in zip("abc", nodes.started, directories, strict=True):
        identity = Identity.load(nodes.folder / f"{name}.key")
        assert identity.peer == node.peer  # p2pd and we agree on the name of a key
        record = record_of(identity)
        assert await directory.publish(seal(record, identity), record.expires_at)
        published[identity.peer] = record
    for directory in directories:
        assert await directory.peers() == published
    newer = record_of(Identity.load(nodes.folder / "c.key"), lifetime_s=301, counter=1)
    assert await directories[2].publish(seal(newer, Identity.load(nodes.folder / "c.key")), newer.expires_at)
    assert (await directories[0].peers())[newer.peer].counter == 1


async def test_only_ones_own_good_record_is_published(swarm: tuple[Nodes, list[Directory]], stranger: Identity) -> None:
    nodes, directories = swarm
    record = record_of(stranger)
    with pytest.raises(Refused):
        await directories[0].publish(seal(record, stranger), record.expires_at)
    own = Identity.load(nodes.folder / "a.key")
    with pytest.raises(ValueError, match="expires"):
        await directories[0].publish(seal(record_of(own), own), time.time() + 1e6)


async def test_a_stock_dht_node_cannot_plant_anything(swarm: tuple[Nodes, list[Directory]], stranger: Identity) -> None:
    """The attacker runs hivemind as it comes, in our swarm."""
    nodes, directories = swarm
    before = await directories[0].peers()
    attacker = await nodes.start("attacker", bootstrap=nodes.started[0])
    bootstrap = [f"{maddr}/p2p/{nodes.started[0].peer}" for maddr in nodes.started[0].visible_addresses()]
    stock = await DHTNode.create(p2p=attacker.daemon.p2p, initial_peers=bootstrap)
    good, now = record_of(stranger), time.time()
    sealed = seal(good, stranger)
    attempts: list[tuple[str, object, float, str | None]] = [
        (peers_key(RUN), bytes(1 << 20), now + 60, stranger.peer),
        (peers_key(RUN), sealed, now + 50 * 365 * 86400, stranger.peer),
        (peers_key(RUN), sealed, good.expires_at, nodes.started[1].peer),
        (peers_key(RUN), sealed, good.expires_at, None),
        (peers_key(RUN), "text", now + 60, stranger.peer),
        ("another key", b"x", now + 60, None),
    ]
    for key, value, expires_at, subkey in attempts:
        assert not await stock.store(key, value, expires_at, subkey=subkey, exclude_self=True), (key, subkey)
    assert await directories[0].peers() == before
    assert await stock.store(peers_key(RUN), sealed, good.expires_at, subkey=stranger.peer, exclude_self=True)
    assert (await directories[0].peers()).keys() - before.keys() == {stranger.peer}  # the tripwire: a good one arrives
    await stock.shutdown()
    await attacker.close()


async def test_an_unreachable_directory_is_typed(swarm: tuple[Nodes, list[Directory]], stranger: Identity) -> None:
    nodes, _ = swarm
    lonely = await nodes.start("lonely")
    with pytest.raises(BootstrapUnreachable) as caught:
        await Directory.create(lonely, RUN, initial_peers=[f"/ip4/127.0.0.1/tcp/1/p2p/{stranger.peer}"])
    assert caught.value.fix
    await lonely.close()


async def test_a_dead_daemon_costs_the_deadline_and_no_more(swarm: tuple[Nodes, list[Directory]]) -> None:
    nodes, _ = swarm
    node = await nodes.start("dying", bootstrap=nodes.started[0])
    directory = await Directory.create(node, RUN)
    directory._timeout_s = 0.5
    node.daemon.p2p._child.kill()
    await node.daemon_died.wait()
    start = time.monotonic()
    assert await directory.peers() == {}
    assert time.monotonic() - start < 5
    await directory.close()
    await node.close()


async def test_the_validator_accepts_exactly_good_records(stranger: Identity, tmp_path: Path) -> None:
    validator = RecordValidator(RUN, time.time)
    record = record_of(stranger)
    good = entry(stranger, record)
    assert validator.validate(good)
    other = Identity.create(tmp_path / "other")
    bad = {
        "another run's key": entry(stranger, record, run=OTHER_RUN),
        "another run's record": entry(stranger, record_of(stranger, run=OTHER_RUN)),
        "another peer's subkey": entry(stranger, record, peer=other.peer),
        "longer in the DHT than signed": entry(stranger, record, expires_at=record.expires_at + 1),
        "expired": entry(stranger, record, expires_at=time.time() - 1),
        "flipped bit": DHTRecord(
            good.key, good.subkey, good.value[:-9] + bytes([good.value[-9] ^ 1]) + good.value[-8:], good.expiration_time
        ),
        "huge": DHTRecord(good.key, good.subkey, bytes(MAX_RECORD_BYTES + 100), good.expiration_time),
        "not msgpack": DHTRecord(good.key, b"\xc1", b"\xc1", good.expiration_time),
        "no subkey": DHTRecord(good.key, b"", good.value, good.expiration_time),
        "number": DHTRecord(good.key, good.subkey, MSGPackSerializer.dumps(7), good.expiration_time),
        "infinity": entry(stranger, record, expires_at=float("inf")),
        "not a number": entry(stranger, record, expires_at=float("nan")),
    }
    for what, record_in_dht in bad.items():
        assert not validator.validate(record_in_dht), what


async def test_the_number_of_records_is_bounded_until_some_expire(
    stranger: Identity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory_module, "MAX_RECORDS", 1)
    now = time.time()
    validator = RecordValidator(RUN, lambda: now)
    first = record_of(stranger, lifetime_s=100)
    assert validator.validate(entry(stranger, first))
    assert validator.validate(entry(stranger, first))  # the same peer again
    other = Identity.create(tmp_path / "other")
    second = entry(other, record_of(other, lifetime_s=500))
    assert not validator.validate(second)
    now = first.expires_at + 1
    assert validator.validate(second)
