"""hivemind's libp2p daemon as a child that cannot outlive its node, and the part of its control protocol that we use.

`P2P.create` of hivemind 1.1.12 starts and identifies the daemon; what it lacks is added here (each was measured):
- p2pd gets SIGKILL from the kernel when our main thread dies (PR_SET_PDEATHSIG, set by a ten-line launcher that then
  execs p2pd), and its own session, so that ^C in a terminal reaches only us and we can drain first;
- p2pd listens with SO_REUSEPORT: two daemons on one port start without an error and steal each other's connections.
  We probe the port first;
- a failed or cancelled start leaves no process and no socket; sockets live in a private folder, removed on close;
- hivemind's `stream_open` and `connect` leak their control connection when they fail or are cancelled: ours do not;
- `died` is set when the daemon ends, whatever ended it (`P2P.is_alive` stays true for ever).
TCP only: over QUIC p2pd loses the tail of a stream whose writer closes right after its last write.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HIVEMIND_LOGLEVEL", "WARNING")
os.environ.setdefault("HIVEMIND_MEMORY_SHARING_STRATEGY", "file_descriptor")

from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import read_pbmsg_safe
from hivemind.proto import p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr

from shoal.protocol.events import Reason

log = logging.getLogger(__name__)

READ_LIMIT_BYTES = 1 << 20  # asyncio's default of 64 KiB pauses the socket after every chunk: 260 instead of 380 MB/s
STOP_TIMEOUT_S = 3.0
MAX_SOCKET_PATH_BYTES = 107 - len("/p2pclient-0123456789abcdef.sock")
FOLDER_PREFIX = "shoal-p2p-"

_LAUNCHER = """
import ctypes, os, sys
os.setsid()
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL
if os.getppid() != int(sys.argv[1]):
    sys.exit("the node died while it started p2pd")
os.execv(sys.argv[2], sys.argv[2:])
"""


class TransportError(Exception):
    """The node cannot get on the network. The message is one line; `fix` says what to do."""

    reason = Reason.INTERNAL

    def __init__(self, detail: str, fix: str) -> None:
        super().__init__(detail)
        self.detail = detail
        self.fix = fix


class PortInUse(TransportError):
    """Another process listens on the port."""

    reason = Reason.BUSY


class ListenFailed(TransportError):
    """The listen or announce address is not one that this machine can use."""

    reason = Reason.MALFORMED


class BootstrapUnreachable(TransportError):
    """None of the initial peers answered."""

    reason = Reason.UNREACHABLE


class IdentityTaken(TransportError):
    """A live peer of the swarm has the same PeerID."""

    reason = Reason.BUSY


class IdentityUnreadable(TransportError):
    """The identity file is not an RSA key that p2pd understands."""

    reason = Reason.MALFORMED


class DaemonFailed(TransportError):
    """p2pd did not start for another reason, or not in time."""

    reason = Reason.DAEMON_DIED


class ControlError(Exception):
    """p2pd refused a control request; the message is the daemon's."""


Inbound = Callable[[str, str, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def parse_peer(peer: str) -> PeerID:
    """Raises ValueError for what is not a base58 PeerID."""
    try:
        return PeerID.from_base58(peer)
    except Exception as error:
        raise ValueError(f"not a PeerID: {peer[:80]!r}") from error


def parse_tcp_address(maddr: str) -> Multiaddr:
    """A multiaddr over TCP. Raises ValueError for anything else: QUIC truncates streams."""
    try:
        parsed = Multiaddr(maddr)
        protocols = [protocol.name for protocol in parsed.protocols()]
    except Exception as error:
        raise ValueError(f"not a multiaddr: {maddr[:120]!r}") from error
    if "tcp" not in protocols or "udp" in protocols:
        raise ValueError(f"not a TCP multiaddr: {maddr[:120]!r}")
    return parsed


class Daemon:
    """A running p2pd. `peer` is its PeerID; `died` is set when the process has ended without `close`."""

    def __init__(self, p2p: P2P, folder: Path, inbound: Inbound) -> None:
        self.p2p = p2p
        self.peer: str = p2p.peer_id.to_base58()
        self.pid: int = p2p._child.pid
        self.died = asyncio.Event()
        self._folder = folder
        self._inbound = inbound
        self._control_path: str = p2p.daemon_listen_maddr["unix"]
        self._inbound_path = str(folder / "inbound.sock")
        self._server: asyncio.Server | None = None
        self._watch = asyncio.create_task(self._watch_process())
        self._closed = False
        control = p2p._client.control
        for task in (control._read_task, control._write_task):  # hivemind's; they fail when p2pd dies and nobody looks
            task.add_done_callback(lambda done: done.cancelled() or done.exception())

    @classmethod
    async def start(
        cls,
        *,
        identity_path: Path,
        listen: Sequence[str],
        announce: Sequence[str],
        initial_peers: Sequence[str],
        run_dir: Path,
        startup_timeout_s: float,
        inbound: Inbound,
    ) -> Daemon:
        """Start p2pd and connect it to the initial peers (it fails when there are some and none answers).

        Must run in the main thread: the kernel ties the child's life to the thread that started it.
        Raises TransportError.
        """
        if threading.current_thread() is not threading.main_thread():
            raise DaemonFailed(
                "p2pd was started outside the main thread", "run the node's event loop in the main thread"
            )
        try:
            listen_maddrs = [parse_tcp_address(maddr) for maddr in listen]
            for maddr in (*announce, *initial_peers):
                parse_tcp_address(maddr)
        except ValueError as error:
            raise ListenFailed(str(error), "give addresses like /ip4/0.0.0.0/tcp/4001") from error
        for maddr in listen_maddrs:
            await _require_free_port(maddr)
        folder = _make_folder(run_dir)
        started: list[P2P] = []
        lines: deque[str] = deque(maxlen=20)

        class NodeP2P(P2P):
            """The seam that hivemind offers: class attribute, static methods, and a hook to find a half-started one."""

            _UNIX_SOCKET_PREFIX = f"/unix{folder}/"

            def __init__(self) -> None:
                super().__init__()
                started.append(self)

            @staticmethod
            def _make_process_args(*args: Any, **kwargs: Any) -> list[str]:
                launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())]
                return launcher + P2P._make_process_args(*args, **kwargs)

            @staticmethod
            def _log_p2pd_message(line: str) -> None:
                lines.append(line)
                P2P._log_p2pd_message(line)

        local = all(str(maddr).startswith(("/ip4/127.", "/ip6/::1/")) for maddr in listen_maddrs)
        try:
            async with asyncio.timeout(startup_timeout_s):
                p2p = await NodeP2P.create(
                    initial_peers=list(initial_peers) or None,
                    announce_maddrs=list(announce) or None,
                    host_maddrs=list(listen),
                    identity_path=str(identity_path),
                    nat_port_map=not local,
                    startup_timeout=startup_timeout_s,
                )
                daemon = cls(p2p, folder, inbound)
                daemon._server = await asyncio.start_unix_server(
                    daemon._accept, path=daemon._inbound_path, limit=READ_LIMIT_BYTES
                )
            return daemon
        except BaseException as error:
            for p2p in started:
                await _stop(p2p)
            shutil.rmtree(folder, ignore_errors=True)
            if not isinstance(error, Exception):
                raise
            raise _explain(error, lines, identity_path, initial_peers, startup_timeout_s) from error

    @property
    def is_gone(self) -> bool:
        return self._closed or self.died.is_set()

    async def addresses(self) -> tuple[str, ...]:
        """Where p2pd believes that others can reach it: TCP multiaddrs without the /p2p suffix."""
        response = await self._ask(p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY))
        maddrs = (str(Multiaddr(raw)) for raw in response.identify.addrs)
        return tuple(maddr for maddr in maddrs if "/tcp/" in maddr)

    async def connect(self, peer: PeerID, maddrs: Sequence[Multiaddr]) -> None:
        """Have a connection to `peer`, dialling these addresses if needed. Raises ControlError, OSError, EOFError."""
        connect = p2pd_pb2.ConnectRequest(peer=peer.to_bytes(), addrs=[maddr.to_bytes() for maddr in maddrs])
        await self._ask(p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=connect))

    async def register(self, protocol: str) -> None:
        """Accept streams of this protocol id from now on. Raises ControlError, OSError, EOFError."""
        request = p2pd_pb2.StreamHandlerRequest(
            addr=Multiaddr(f"/unix{self._inbound_path}").to_bytes(), proto=[protocol], balanced=False
        )
        await self._ask(p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_HANDLER, streamHandler=request))

    async def open_stream(self, peer: PeerID, protocol: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A raw binary stream. Raises ControlError, OSError, EOFError."""
        request = p2pd_pb2.Request(
            type=p2pd_pb2.Request.STREAM_OPEN,
            streamOpen=p2pd_pb2.StreamOpenRequest(peer=peer.to_bytes(), proto=[protocol]),
        )
        reader, writer = await asyncio.open_unix_connection(self._control_path, limit=READ_LIMIT_BYTES)
        try:
            await _exchange(reader, writer, request)
        except BaseException:
            writer.transport.abort()
            raise
        return reader, writer

    async def close(self) -> None:
        """Stop p2pd (SIGKILL if it does not listen) and remove its sockets. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._watch.cancel()
        if self._server is not None:
            self._server.close()
        await _stop(self.p2p)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _ask(self, request: Any) -> Any:
        reader, writer = await asyncio.open_unix_connection(self._control_path)
        try:
            return await _exchange(reader, writer, request)
        finally:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            info = p2pd_pb2.StreamInfo()
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await read_pbmsg_safe(reader, info)
            peer, protocol = PeerID(info.peer).to_base58(), str(info.proto)
        except Exception:
            log.debug("p2pd handed over a stream without saying whose it is", exc_info=True)
            writer.transport.abort()
            return
        await self._inbound(peer, protocol, reader, writer)

    async def _watch_process(self) -> None:
        await self.p2p._child.wait()
        self.died.set()


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: Any) -> Any:
    payload = request.SerializeToString()
    writer.write(_varint(len(payload)) + payload)
    response = p2pd_pb2.Response()
    await read_pbmsg_safe(reader, response)
    if response.type == p2pd_pb2.Response.ERROR:
        raise ControlError(str(response.error.msg))
    return response


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


async def _stop(p2p: P2P) -> None:
    child = p2p._child
    p2p._terminate()
    if child is None:
        return
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await child.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()
    child._transport.close()  # its pipes; without this the loop complains when it is closed first


def _make_folder(run_dir: Path) -> Path:
    """A private folder for our sockets; those of dead nodes beside it are removed. Unix socket paths are short."""
    parent = run_dir.resolve()
    parent.mkdir(parents=True, exist_ok=True)
    example = f"{FOLDER_PREFIX}{os.getpid()}-01234567"
    if len(os.fsencode(parent / example)) > MAX_SOCKET_PATH_BYTES:
        parent = Path(tempfile.gettempdir()).resolve()
    for old in parent.glob(f"{FOLDER_PREFIX}*"):
        match = re.fullmatch(FOLDER_PREFIX + r"(\d+)-.*", old.name)
        if match and not _is_running(int(match[1])):
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-", dir=parent))


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


async def _require_free_port(maddr: Multiaddr) -> None:
    """Raises PortInUse or ListenFailed. Tried for a second: the daemon of a node just killed may be on its way out."""
    parts = dict(zip((protocol.name for protocol in maddr.protocols()), maddr.values(), strict=True))
    port = int(parts["tcp"])
    host = parts.get("ip4") or parts.get("ip6")
    if port == 0 or host is None:
        return
    family = socket.AF_INET6 if "ip6" in parts else socket.AF_INET
    for attempt in range(10):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # past connections in TIME_WAIT do not matter
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                probe.bind((host, port))
                return
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise ListenFailed(
                        f"cannot listen on {maddr}: {error.strerror}", "choose an address and port of this machine"
                    ) from error
                if attempt == 9:
                    raise PortInUse(
                        f"port {port} on {host} is in use by another process",
                        "stop the other process, or choose another port with --listen",
                    ) from error
        await asyncio.sleep(0.1)


def _explain(
    error: Exception, lines: Sequence[str], identity_path: Path, initial_peers: Sequence[str], timeout_s: float
) -> TransportError:
    said = " | ".join([str(error), *lines])
    if "already taken by another peer" in said:
        return IdentityTaken(
            f"another running peer uses the identity {identity_path}",
            "stop the other node, or give this one a folder (and so an identity) of its own",
        )
    if "failed to connect to bootstrap peers" in said:
        return BootstrapUnreachable(
            f"no bootstrap peer answered: {', '.join(initial_peers)}",
            "check that the bootstrap peer is running and reachable from here, and that the invite is the newest one",
        )
    if "failed to listen on any addresses" in said:
        return ListenFailed(
            f"cannot listen: {said.rpartition('failed to listen on any addresses')[2].strip(': ')[:200]}",
            "choose an address and port of this machine that are free",
        )
    if isinstance(error, FileNotFoundError | PermissionError):
        return IdentityUnreadable(f"cannot read or write {error.filename}", "check the path and its permissions")
    if any(word in said for word in ("crypto.pb", "proto:", "DecodeError", "Error parsing message", "PrivateKey")):
        return IdentityUnreadable(
            f"{identity_path} is not an identity file", "restore it from a backup, or remove it to get a new identity"
        )
    if isinstance(error, TimeoutError) or "failed to start in" in said:
        return DaemonFailed(
            f"the libp2p daemon was not ready after {timeout_s:g} s",
            "the machine may be overloaded: try again; a bootstrap peer that hangs also causes this",
        )
    return DaemonFailed(
        f"the libp2p daemon did not start: {str(error)[-300:]}",
        "reinstall the dependencies: `make env` (hivemind==1.1.12 carries p2pd)",
    )
