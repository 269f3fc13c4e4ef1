"""The real transport over p2pd: the shared suite, and what only real processes and sockets can do wrong."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from shoal.protocol import p2pd, wire
from shoal.protocol.events import BytesMoved, CallFailed, Problem, Reason, RequestRefused
from shoal.protocol.identity import Identity
from shoal.protocol.p2p import (
    BootstrapUnreachable,
    DaemonFailed,
    IdentityTaken,
    IdentityUnreadable,
    Limits,
    ListenFailed,
    P2PTransport,
    PortInUse,
    TransportError,
)
from shoal.protocol.transport import Refused, Reply, Request, Unanswered
from shoal.protocol.wire import Kind
from tests.protocol.p2p_nodes import Nodes
from tests.protocol.transport_conformance import LONG_S, Number, Pair, TransportConformance, echo, method

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.process]

QUICK = Limits(streams_per_peer=2, inbound_bytes=1 << 20, idle_s=0.3)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def shared() -> AsyncIterator[Nodes]:
    nodes = Nodes()
    first = await nodes.start("a")
    await nodes.start("b", bootstrap=first)
    yield nodes
    await nodes.close()


@pytest_asyncio.fixture(loop_scope="module")
async def nodes() -> AsyncIterator[Nodes]:
    nodes = Nodes()
    yield nodes
    await nodes.close()


@pytest.fixture
def a(shared: Nodes) -> P2PTransport:
    return shared.started[0]


@pytest.fixture
def b(shared: Nodes) -> P2PTransport:
    return shared.started[1]


class TestP2PConforms(TransportConformance):
    @pytest.fixture
    def pair(self, a: P2PTransport, b: P2PTransport, tmp_path: Path) -> Pair:
        async def settle() -> None:
            await a.ready()
            await b.ready()

        return Pair(a, b, Identity.create(tmp_path / "nobody").peer, settle)


# --- what is counted -------------------------------------------------------------------------------------------------
async def test_both_ends_count_the_same_bytes(shared: Nodes, a: P2PTransport, b: P2PTransport) -> None:
    b.serve(method("count"), echo)
    await b.ready()
    await a.call(b.peer, method("count"), Number(number=0), bytes(100_000), timeout_s=LONG_S)
    for node in (a, b):
        await shared.events(node).wait_for(lambda e: isinstance(e, BytesMoved) and e.method == "count")
    moved = [
        [e for e in shared.events(node).events if isinstance(e, BytesMoved) and e.method == "count"] for node in (a, b)
    ]
    expected = 100_000 + len(wire.encode(Kind.REQUEST, b'{"number":0}'))
    assert [(e.direction, e.count) for e in moved[0]] == [("sent", expected), ("received", expected)]
    assert {(e.direction, e.count) for e in moved[1]} == {("sent", expected), ("received", expected)}


async def test_a_refusal_is_an_event_on_both_ends(shared: Nodes, a: P2PTransport, b: P2PTransport) -> None:
    async def handler(request: Request[Number]) -> Reply[Number]:
        raise Refused(Reason.FROZEN)

    b.serve(method("frozen"), handler)
    await b.ready()
    with pytest.raises(Refused):
        await a.call(b.peer, method("frozen"), Number(number=0), timeout_s=LONG_S)
    assert CallFailed(b.peer, "frozen", Reason.FROZEN) in shared.events(a).events
    assert RequestRefused(a.peer, "frozen", Reason.FROZEN) in shared.events(b).events


# --- hostile callers -------------------------------------------------------------------------------------------------
async def send_raw(a: P2PTransport, b: P2PTransport, name: str, data: bytes, *, wait: bool = True) -> bytes:
    """Open a stream by hand, write, and return what comes back; without `wait`, cut it after writing."""
    reader, writer = await a.daemon.open_stream(p2pd.parse_peer(b.peer), f"/shoal/1/{name}")
    try:
        writer.write(data)
        await writer.drain()
        if not wait:
            return b""
        async with asyncio.timeout(LONG_S):
            front = await reader.readexactly(wire.PREFIX.size)
            _, _, _, _, header_bytes, body_bytes = wire.PREFIX.unpack(front)
            return front + await reader.readexactly(header_bytes + body_bytes + wire.DIGEST_BYTES)
    finally:
        writer.close()


GOOD = wire.encode(Kind.REQUEST, b'{"number":1}', b"body")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (GOOD[:-1] + bytes([GOOD[-1] ^ 1]), Reason.BAD_DIGEST),
        (b"GET / HTTP/1.1\r\nHost: shoal\r\n\r\n", Reason.MALFORMED),
        (wire.encode(Kind.REPLY, b'{"number":1}'), Reason.MALFORMED),
        (wire.encode(Kind.REQUEST, b'{"number":"1"}'), Reason.MALFORMED),
        (wire.encode(Kind.REQUEST, b'{"number":1,"more":1}'), Reason.MALFORMED),
        (wire.encode(Kind.REQUEST, b"\xff\xfe"), Reason.MALFORMED),
        (wire.encode(Kind.REQUEST, b"[" * 100_000), Reason.MALFORMED),
        (wire.PREFIX.pack(b"SHOA", 1, 0, 0, 2, 1 << 50), Reason.TOO_LARGE),
        (wire.PREFIX.pack(b"SHOA", 1, 0, 0, 0xFFFFFFFF, 0), Reason.TOO_LARGE),
    ],
    ids=["digest", "http", "kind", "type", "extra", "utf8", "nesting", "body", "header"],
)
async def test_bad_bytes_get_a_typed_refusal_and_never_reach_the_handler(
    a: P2PTransport, b: P2PTransport, data: bytes, reason: Reason
) -> None:
    handled = []

    async def handler(request: Request[Number]) -> Reply[Number]:
        handled.append(request)
        return Reply(Number(number=0))

    b.serve(method("hostile"), handler)
    await b.ready()
    answer = wire.decode(await send_raw(a, b, "hostile", data), frozenset({Kind.REFUSAL}), max_body_bytes=0)
    assert wire.Refusal.model_validate_json(answer.header).reason == reason
    assert handled == []


async def test_a_torn_request_never_reaches_the_handler(shared: Nodes, a: P2PTransport, b: P2PTransport) -> None:
    handled = []

    async def handler(request: Request[Number]) -> Reply[Number]:
        handled.append(request)
        return Reply(Number(number=0))

    b.serve(method("torn"), handler)
    await b.ready()
    await send_raw(a, b, "torn", GOOD[:-1], wait=False)
    await shared.events(b).wait_for(lambda e: e == RequestRefused(a.peer, "torn", Reason.TORN_STREAM))
    assert handled == []


# --- hostile servers -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.TORN_STREAM),
        (wire.encode(Kind.REPLY, b'{"number":1}', b"body")[:-1], Reason.TORN_STREAM),
        (wire.encode(Kind.REPLY, b'{"number":1}', b"body")[:-1] + b"?", Reason.BAD_DIGEST),
        (wire.encode(Kind.REQUEST, b'{"number":1}'), Reason.MALFORMED),
        (wire.encode(Kind.REPLY, b"{}"), Reason.MALFORMED),
        (wire.encode(Kind.REFUSAL, b'{"reason":"because"}'), Reason.MALFORMED),
        (wire.PREFIX.pack(b"SHOA", 1, 1, 0, 2, 1 << 40), Reason.TOO_LARGE),
    ],
    ids=["nothing", "torn", "digest", "kind", "header", "reason", "large"],
)
async def test_bad_replies_are_typed(
    a: P2PTransport, b: P2PTransport, monkeypatch: pytest.MonkeyPatch, data: bytes, reason: Reason
) -> None:
    async def answer(peer: str, served: Any, stream: Any) -> None:
        await stream.receive(wire.Decoder(frozenset({Kind.REQUEST}), max_body_bytes=0))
        stream._writer.write(data)
        await stream._writer.drain()
        stream._writer.close()
        await stream._writer.wait_closed()

    monkeypatch.setattr(b, "_answer", answer)
    b.serve(method("liar"), echo)
    await b.ready()
    with pytest.raises(Unanswered) as caught:
        await a.call(b.peer, method("liar"), Number(number=0), timeout_s=LONG_S)
    assert caught.value.reason is reason


# --- limits ----------------------------------------------------------------------------------------------------------
async def test_silence_and_crowds_hold_nothing_for_long(nodes: Nodes) -> None:
    server = await nodes.start("server", limits=QUICK)
    caller = await nodes.start("caller", bootstrap=server)
    events = nodes.events(server)
    entered, release = asyncio.Queue[None](), asyncio.Event()

    async def slow(request: Request[Number]) -> Reply[Number]:
        entered.put_nowait(None)
        await asyncio.wait_for(release.wait(), LONG_S)
        return await echo(request)

    server.serve(method("slow"), slow)
    server.serve(method("fast"), echo)
    await server.ready()

    # a peer that opens a stream, announces a megabyte and says no more
    silent = wire.PREFIX.pack(b"SHOA", 1, 0, 0, 2, 1 << 20) + b"{}"
    answer = wire.decode(await send_raw(caller, server, "fast", silent), frozenset(Kind), max_body_bytes=0)
    assert wire.Refusal.model_validate_json(answer.header).reason == Reason.DEADLINE
    assert (server._streams.total(), server._inbound_bytes) == (0, 0)

    # more calls at once than one peer may make: the third is told so, even while it writes a large body
    large = caller.call(server.peer, method("slow"), Number(number=0), bytes(600_000), timeout_s=LONG_S)
    first = [asyncio.create_task(large)]
    await asyncio.wait_for(entered.get(), LONG_S)
    with pytest.raises(Refused) as bytes_refused:  # 600 kB are held, 1 MiB is the bound
        await caller.call(server.peer, method("fast"), Number(number=0), bytes(600_000), timeout_s=LONG_S)
    assert bytes_refused.value.reason is Reason.BUSY
    first.append(asyncio.create_task(caller.call(server.peer, method("slow"), Number(number=9), timeout_s=LONG_S)))
    await asyncio.wait_for(entered.get(), LONG_S)
    with pytest.raises(Refused) as crowd_refused:
        await caller.call(server.peer, method("fast"), Number(number=0), bytes(1 << 20), timeout_s=LONG_S)
    assert crowd_refused.value.reason is Reason.BUSY
    assert RequestRefused(caller.peer, "fast", Reason.BUSY) in events.events

    release.set()
    assert [reply.header.number for reply in await asyncio.gather(*first)] == [1, 10]
    reply = await caller.call(server.peer, method("fast"), Number(number=0), bytes(1 << 20), timeout_s=LONG_S)
    assert len(reply.body) == 1 << 20


async def test_a_caller_that_gives_up_closes_its_stream(
    a: P2PTransport, b: P2PTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = asyncio.Event()

    async def handler(request: Request[Number]) -> Reply[Number]:
        await asyncio.wait_for(release.wait(), LONG_S)
        return Reply(Number(number=0), bytes(1 << 20))

    b.serve(method("abandoned"), handler)
    await b.ready()
    ended = asyncio.Queue[None]()
    monkeypatch.setattr(b, "_count", lambda name, stream: ended.put_nowait(None))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(Unanswered):
            await a.call(b.peer, method("abandoned"), Number(number=0), timeout_s=0.1)
    release.set()
    for _ in range(5):  # the server notices as soon as it answers
        await asyncio.wait_for(ended.get(), LONG_S)
    assert b._answering == 0
    assert len(os.listdir("/proc/self/fd")) <= before + 1


# --- frozen, dead, moved ---------------------------------------------------------------------------------------------
async def test_a_frozen_peer_costs_the_deadline_and_a_thawed_one_answers(a: P2PTransport, b: P2PTransport) -> None:
    b.serve(method("frozen_peer"), echo)
    await b.ready()
    os.kill(b.daemon.pid, signal.SIGSTOP)
    try:
        for size in (0, 1 << 20):
            with pytest.raises(Unanswered) as caught:
                await a.call(b.peer, method("frozen_peer"), Number(number=0), bytes(size), timeout_s=0.3)
            assert caught.value.reason is Reason.DEADLINE
    finally:
        os.kill(b.daemon.pid, signal.SIGCONT)
    reply = await a.call(b.peer, method("frozen_peer"), Number(number=0), timeout_s=LONG_S)
    assert reply.header.number == 1


async def test_the_death_of_our_own_daemon_is_noticed_at_once(nodes: Nodes) -> None:
    server = await nodes.start("server")
    caller = await nodes.start("caller", bootstrap=server)
    entered, release = asyncio.Event(), asyncio.Event()

    async def handler(request: Request[Number]) -> Reply[Number]:
        entered.set()
        await asyncio.wait_for(release.wait(), LONG_S)
        return await echo(request)

    server.serve(method("wait"), handler)
    await server.ready()
    calling = asyncio.create_task(caller.call(server.peer, method("wait"), Number(number=0), timeout_s=LONG_S))
    await asyncio.wait_for(entered.wait(), LONG_S)
    os.kill(caller.daemon.pid, signal.SIGKILL)
    async with asyncio.timeout(1.0):
        with pytest.raises(Unanswered) as pending:
            await calling
        await caller.daemon_died.wait()
        with pytest.raises(Unanswered) as later:
            await caller.call(server.peer, method("wait"), Number(number=0), timeout_s=LONG_S)
    assert pending.value.reason is later.value.reason is Reason.DAEMON_DIED
    problem = await nodes.events(caller).wait_for(lambda e: isinstance(e, Problem))
    assert isinstance(problem, Problem) and problem.reason is Reason.DAEMON_DIED and problem.fix
    release.set()


async def test_a_learned_address_is_enough_to_find_a_peer_again_and_again(nodes: Nodes) -> None:
    caller = await nodes.start("caller")
    for _ in range(2):  # the second time at another port, under the same name
        server = await nodes.start("server")
        server.serve(method("hello"), echo)
        await server.ready()
        with pytest.raises(Unanswered) as caught:
            await caller.call(server.peer, method("hello"), Number(number=0), timeout_s=5)
        assert caught.value.reason is Reason.UNREACHABLE
        caller.learn_address(server.peer, ("/ip4/127.0.0.1/udp/1/quic", "rubbish", *server.visible_addresses()))
        reply = await caller.call(server.peer, method("hello"), Number(number=0), timeout_s=LONG_S)
        assert reply.header.number == 1
        await server.close()


async def test_peers_find_each_other_after_the_bootstrap_peer_is_dead(nodes: Nodes) -> None:
    bootstrap = await nodes.start("bootstrap")
    one = await nodes.start("one", bootstrap=bootstrap)
    two = await nodes.start("two", bootstrap=bootstrap)
    await bootstrap.close()
    two.serve(method("after"), echo)
    await two.ready()
    one.learn_address(two.peer, two.visible_addresses())
    reply = await one.call(two.peer, method("after"), Number(number=0), timeout_s=LONG_S)
    assert reply.header.number == 1


# --- starting --------------------------------------------------------------------------------------------------------
async def test_what_a_person_can_get_wrong_is_typed_and_leaves_nothing(
    shared: Nodes, nodes: Nodes, a: P2PTransport
) -> None:
    port = int(a.visible_addresses()[0].rpartition("/")[2])
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nowhere = f"/ip4/127.0.0.1/tcp/{closed.getsockname()[1]}/p2p/{a.peer}"
    here = f"{a.visible_addresses()[0]}/p2p/{a.peer}"
    (nodes.folder / "rubbish.key").write_bytes(b"rubbish")
    shutil.copy(shared.folder / "b.key", nodes.folder / "taken.key")
    children = set(psutil.Process().children(recursive=True))
    mistakes: list[tuple[type[TransportError], str, dict[str, Any]]] = [
        (PortInUse, "port", {"listen": [f"/ip4/127.0.0.1/tcp/{port}"]}),
        (ListenFailed, "elsewhere", {"listen": ["/ip4/192.0.2.1/tcp/0"]}),
        (ListenFailed, "elsewhere_port", {"listen": ["/ip4/192.0.2.1/tcp/4001"]}),
        (ListenFailed, "quic", {"listen": ["/ip4/127.0.0.1/udp/0/quic"]}),
        (ListenFailed, "nonsense", {"initial_peers": ["127.0.0.1:4001"]}),
        (BootstrapUnreachable, "nobody", {"initial_peers": [nowhere]}),
        (IdentityTaken, "taken", {"initial_peers": [here]}),
        (IdentityUnreadable, "rubbish", {}),
        (DaemonFailed, "hurry", {"startup_timeout_s": 0.001}),
    ]
    for kind, name, options in mistakes:
        with pytest.raises(TransportError) as caught:
            await nodes.start(name, **options)
        assert type(caught.value) is kind, (name, caught.value)
        assert caught.value.fix and caught.value.detail
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
        assert nodes.sockets(name) == [] and not list(nodes.folder.glob(f"{name}/shoal-p2p-*"))
    assert set(psutil.Process().children(recursive=True)) == children


async def test_a_cancelled_start_leaves_nothing(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    children = set(psutil.Process().children(recursive=True))
    launched = asyncio.Event()
    launch = asyncio.subprocess.create_subprocess_exec

    async def launch_and_tell(*args: Any, **kwargs: Any) -> asyncio.subprocess.Process:
        process = await launch(*args, **kwargs)
        launched.set()
        return process

    monkeypatch.setattr(asyncio.subprocess, "create_subprocess_exec", launch_and_tell)
    starting = asyncio.create_task(nodes.start("late"))
    await asyncio.wait_for(launched.wait(), LONG_S)
    assert set(psutil.Process().children(recursive=True)) != children
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert set(psutil.Process().children(recursive=True)) == children
    assert not list(nodes.folder.glob("late/shoal-p2p-*"))


async def test_a_socket_path_that_is_too_long_moves_to_the_temporary_folder(nodes: Nodes) -> None:
    node = await nodes.start("n" * 100)
    assert nodes.sockets("n" * 100) == []
    folder = node.daemon._folder
    assert (folder / "inbound.sock").is_socket()
    await node.close()
    assert not folder.exists()


async def test_sockets_of_a_dead_node_are_swept_and_those_of_a_living_one_are_not(nodes: Nodes) -> None:
    dead = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
    await dead.wait()
    run_dir = nodes.folder / "swept"
    for pid in (dead.pid, os.getppid()):
        (run_dir / f"shoal-p2p-{pid}-x").mkdir(parents=True)
    await nodes.start("swept")
    assert [path.name for path in run_dir.glob("*-x")] == [f"shoal-p2p-{os.getppid()}-x"]


# --- ending ----------------------------------------------------------------------------------------------------------
NODE = """
import asyncio, sys
from shoal.protocol.p2p import P2PTransport

async def main():
    folder = sys.argv[1]
    node = await P2PTransport.create(identity_path=folder + "/key", run_dir=folder, emit=lambda event: None)
    print(node.daemon.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def start_process(folder: Path) -> tuple[asyncio.subprocess.Process, psutil.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", NODE, str(folder), stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    async with asyncio.timeout(LONG_S):
        line = await process.stdout.readline()
    return process, psutil.Process(int(line))


async def test_p2pd_dies_with_its_node_whatever_kills_the_node(nodes: Nodes) -> None:
    process, daemon = await start_process(nodes.folder)
    assert daemon.name() == "p2pd" and daemon.ppid() == process.pid
    family = psutil.Process(process.pid).children(recursive=True)
    assert family == [daemon]
    process.kill()
    _, alive = await asyncio.to_thread(psutil.wait_procs, family, 1.0)
    assert alive == []
    await process.wait()
    for path in nodes.folder.glob("shoal-p2p-*"):  # a killed node cannot tidy up; its next start does
        shutil.rmtree(path)


async def test_an_interrupt_from_the_terminal_does_not_reach_p2pd(nodes: Nodes) -> None:
    node = await nodes.start("terminal")
    assert os.getsid(node.daemon.pid) == os.getpgid(node.daemon.pid) == node.daemon.pid


async def test_closing_stops_even_a_frozen_daemon_and_removes_its_sockets(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(p2pd, "STOP_TIMEOUT_S", 0.3)
    node = await nodes.start("frozen")
    daemon = psutil.Process(node.daemon.pid)
    assert nodes.sockets("frozen")
    os.kill(daemon.pid, signal.SIGSTOP)
    await node.close()
    assert not daemon.is_running() and nodes.sockets("frozen") == []
    await node.close()
    with pytest.raises(Unanswered):
        await node.call(node.peer[:-1] + "x", method("closed"), Number(number=0), timeout_s=LONG_S)
