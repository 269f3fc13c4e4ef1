"""The real transport: calls between peers over libp2p streams, through hivemind's p2pd (`protocol.p2pd`).

One stream per call: the caller opens `/shoal/1/<method>`, writes one frame (`protocol.wire`), reads one frame, closes.
p2pd authenticates both ends, so the sender's PeerID is the connection's. Opening a stream costs 0.3–0.5 ms of the
0.9 ms that a bare round trip over a new stream takes on loopback, too little to pay for a pool of streams.

Who waits for whom, and how long:
- a caller waits for `timeout_s` in all (dial, write, handler, read) and then closes the stream;
- a server waits `idle_s` for the next bytes and, for a whole message, no longer than a link of `min_rate_bytes_s` would
  need; a handler has `handler_s`. A handler is not cancelled when its caller goes away: it may have had effect;
- streams and announced bytes in flight are bounded, per peer and in all; above that a caller gets BUSY.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from shoal.protocol import wire
from shoal.protocol.events import BytesMoved, CallFailed, Event, Problem, Reason, RequestRefused
from shoal.protocol.p2pd import (
    BootstrapUnreachable,
    ControlError,
    Daemon,
    DaemonFailed,
    IdentityTaken,
    IdentityUnreadable,
    ListenFailed,
    PortInUse,
    TransportError,
    parse_peer,
    parse_tcp_address,
)
from shoal.protocol.transport import A, CallError, Handler, Message, Method, Q, Refused, Reply, Request, Unanswered
from shoal.protocol.wire import Decoder, Frame, Kind, WireError

__all__ = [
    "BootstrapUnreachable",
    "DaemonFailed",
    "IdentityTaken",
    "IdentityUnreadable",
    "Limits",
    "ListenFailed",
    "P2PTransport",
    "PortInUse",
    "TransportError",
]

log = logging.getLogger(__name__)

PREFIX = "/shoal/1/"
READ_CHUNK_BYTES = 1 << 20
WRITE_CHUNK_BYTES = 1 << 18
INLINE_BYTES = 1 << 16  # a message up to this size is written in one piece
HASH_IN_THREAD_BYTES = 1 << 20  # a body of this size is hashed in a thread while it is written
FEED_IN_THREAD_BYTES = 1 << 19  # a read of this size is hashed in a thread; for less, changing threads costs more
MAX_KNOWN_PEERS = 4096
MAX_ADDRESSES_PER_PEER = 16
DEATH_GRACE_S = 0.05  # a dying daemon closes its sockets a moment before it can be seen to be dead

Emit = Callable[[Event], None]
_REQUEST = frozenset({Kind.REQUEST})
_ANSWER = frozenset({Kind.REPLY, Kind.REFUSAL})
_METHOD_NAME = re.compile(r"[a-z0-9][a-z0-9_./-]{0,63}")


@dataclass(frozen=True, slots=True)
class Limits:
    """What strangers may hold of this node."""

    streams: int = 256
    streams_per_peer: int = 64
    inbound_bytes: int = 512 << 20  # sum of the announced sizes of requests being received or handled
    idle_s: float = 15.0  # longest silence within a message
    min_rate_bytes_s: int = 32 << 10  # slowest link that may still deliver a message of the largest size
    handler_s: float = 600.0
    linger_s: float = 5.0  # how long the end of an answered stream waits for the caller to close it


@dataclass(frozen=True, slots=True)
class _Served:
    method: Method[Any, Any]
    handler: Handler


class P2PTransport:
    """`protocol.transport.Transport` over p2pd. Make one with `create` in the main thread; end it with `close`.

    `daemon_died` is set when p2pd has ended although nobody closed it; from then on every call is
    Unanswered(DAEMON_DIED) at once.
    """

    def __init__(self, emit: Emit, initial_peers: tuple[str, ...], limits: Limits) -> None:
        self.initial_peers = initial_peers
        self._emit = emit
        self._limits = limits
        self._served: dict[str, _Served] = {}
        self._registrations: set[asyncio.Task[None]] = set()
        self._registration_error: TransportError | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._streams: Counter[str] = Counter()
        self._answering = 0  # all inbound streams, refused ones included
        self._inbound_bytes = 0
        self._addresses: dict[str, tuple[str, ...]] = {}
        self._connected: set[str] = set()  # peers that we gave p2pd addresses of and that answered
        self._visible: tuple[str, ...] = ()
        self._hashers = concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix="shoal-hash")
        self._daemon: Daemon

    @classmethod
    async def create(
        cls,
        *,
        identity_path: Path | str,
        listen: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",),
        announce: Sequence[str] = (),
        initial_peers: Sequence[str] = (),
        emit: Emit,
        run_dir: Path | str,
        startup_timeout_s: float = 20.0,
        limits: Limits | None = None,
    ) -> P2PTransport:
        """Start p2pd and join the network.

        identity_path: RSA key file as p2pd understands it; written if missing. listen, announce: TCP multiaddrs.
        initial_peers: multiaddrs with /p2p/<PeerID>; at least one must answer. run_dir: a folder for the sockets.
        Raises a TransportError (PortInUse, ListenFailed, BootstrapUnreachable, IdentityTaken, IdentityUnreadable,
        DaemonFailed), having left nothing behind.
        """
        self = cls(emit, tuple(initial_peers), limits or Limits())
        self._daemon = await Daemon.start(
            identity_path=Path(identity_path),
            listen=listen,
            announce=announce,
            initial_peers=initial_peers,
            run_dir=Path(run_dir),
            startup_timeout_s=startup_timeout_s,
            inbound=self._inbound,
        )
        try:
            await self.refresh_addresses(timeout_s=startup_timeout_s)
        except BaseException:
            await self.close()
            raise
        self._spawn(self._report_death())
        return self

    @property
    def peer(self) -> str:
        return self._daemon.peer

    @property
    def daemon(self) -> Daemon:
        """The child process, for `protocol.directory` and for tests."""
        return self._daemon

    @property
    def daemon_died(self) -> asyncio.Event:
        return self._daemon.died

    def serve(self, method: Method[Q, A], handler: Handler) -> None:
        """Answer `method` from now on. p2pd learns it a moment later: await `ready` before telling others."""
        if not _METHOD_NAME.fullmatch(method.name):
            raise ValueError(f"method name {method.name!r} does not fit {_METHOD_NAME.pattern}")
        protocol = PREFIX + method.name
        known = protocol in self._served
        self._served[protocol] = _Served(method, handler)
        if not known:
            task = self._spawn(self._register(protocol))
            self._registrations.add(task)
            task.add_done_callback(self._registrations.discard)

    async def ready(self, *, timeout_s: float = 10.0) -> None:
        """Return when everything passed to `serve` so far can be called by others. Raises TransportError."""
        if self._registrations:
            await asyncio.wait(set(self._registrations), timeout=timeout_s)
        if self._registrations:
            raise DaemonFailed("p2pd did not take our protocols in time", "the machine may be overloaded: try again")
        if self._registration_error is not None:
            raise self._registration_error

    async def call(
        self, peer: str, method: Method[Q, A], header: Q, body: bytes = b"", *, timeout_s: float
    ) -> Reply[A]:
        """See `Transport.call`. An oversized or wrong request is Refused here, before anything is sent."""
        try:
            async with asyncio.timeout(timeout_s):
                if not isinstance(header, method.request):
                    raise Refused(Reason.MALFORMED, f"{method.name} takes a {method.request.__name__}")
                if len(body) > method.max_request_bytes:
                    raise Refused(
                        Reason.TOO_LARGE, f"a body of {len(body)} bytes; {method.name} takes {method.max_request_bytes}"
                    )
                if peer == self.peer:
                    return await self._call_self(method, header, body)
                return await self._call_remote(peer, method, header, body)
        except CallError as error:
            self._emit(CallFailed(peer, method.name, error.reason))
            raise
        except TimeoutError as error:
            self._emit(CallFailed(peer, method.name, Reason.DEADLINE))
            raise Unanswered(Reason.DEADLINE, f"{method.name}: no answer within {timeout_s:g} s") from error
        except Exception as error:  # a defect of ours must not escape the contract
            log.exception("call of %s failed unexpectedly", method.name)
            self._emit(CallFailed(peer, method.name, Reason.INTERNAL))
            raise Unanswered(Reason.INTERNAL, f"{method.name} failed on this node; its log says why") from error

    def learn_address(self, peer: str, maddrs: tuple[str, ...]) -> None:
        """Remember where a peer listens. What is not a TCP multiaddr of a sane length is dropped."""
        good = []
        for maddr in maddrs[:MAX_ADDRESSES_PER_PEER]:
            with contextlib.suppress(ValueError):
                if len(maddr) <= 256:
                    parse_tcp_address(maddr)
                    good.append(maddr)
        if not good or self._addresses.get(peer) == tuple(good):
            return
        self._addresses.pop(peer, None)
        while len(self._addresses) >= MAX_KNOWN_PEERS:
            self._addresses.pop(next(iter(self._addresses)))
        self._addresses[peer] = tuple(good)
        self._connected.discard(peer)

    def visible_addresses(self) -> tuple[str, ...]:
        """Our own TCP multiaddrs without /p2p suffix, as of the start or the last `refresh_addresses`."""
        return self._visible

    async def refresh_addresses(self, *, timeout_s: float = 10.0) -> tuple[str, ...]:
        """Ask p2pd again (addresses behind NAT become known late). Raises DaemonFailed."""
        try:
            async with asyncio.timeout(timeout_s):
                self._visible = await self._daemon.addresses()
        except (ControlError, OSError, EOFError, TimeoutError) as error:
            raise DaemonFailed("p2pd does not say where it listens", "restart the node") from error
        return self._visible

    async def close(self) -> None:
        """End all streams, stop p2pd, remove its sockets. Drain before: handlers in flight are cancelled."""
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._daemon.close()
        self._hashers.shutdown(wait=False)

    # --- calls that we make ------------------------------------------------------------------------------------------
    async def _call_self(self, method: Method[Q, A], header: Q, body: bytes) -> Reply[A]:
        served = self._served.get(PREFIX + method.name)
        try:
            if served is None:
                raise Refused(Reason.UNKNOWN_METHOD, f"this node does not offer {method.name}")
            handling = self._spawn(self._handle(served, Request(self.peer, header, body)))
            return await asyncio.shield(handling)
        except Refused as refusal:
            self._emit(RequestRefused(self.peer, method.name, refusal.reason))
            raise

    async def _call_remote(self, peer: str, method: Method[Q, A], header: Q, body: bytes) -> Reply[A]:
        request = header.model_dump_json().encode()
        if len(request) > wire.MAX_HEADER_BYTES:
            raise Refused(Reason.TOO_LARGE, f"a header of {len(request)} bytes; at most {wire.MAX_HEADER_BYTES}")
        stream = await self._open(peer, method.name)
        decoder = Decoder(_ANSWER, max_body_bytes=method.max_reply_bytes)
        writing: asyncio.Task[None] | None = None
        try:
            if len(body) <= INLINE_BYTES:
                await stream.send(Kind.REQUEST, request, body)
            else:  # a refusal can arrive while we still write, so read at the same time
                writing = asyncio.create_task(stream.send(Kind.REQUEST, request, body))
            frame = await stream.receive(decoder)
        except WireError as error:
            if error.reason is Reason.TORN_STREAM:
                raise await self._lost(error.detail) from error
            raise Unanswered(error.reason, error.detail) from error
        except OSError as error:
            raise await self._lost("the connection broke") from error
        finally:
            if writing is not None:
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)
            stream.abort()
            self._count(method.name, stream)
        if frame.kind is Kind.REFUSAL:
            raise _read_refusal(frame)
        try:
            return Reply(method.reply.model_validate_json(frame.header), frame.body)
        except ValidationError as error:
            raise Unanswered(Reason.MALFORMED, f"the reply does not match {method.reply.__name__}") from error

    async def _open(self, peer: str, method: str) -> _Stream:
        """Dial if needed, and open a stream. Raises Refused(UNKNOWN_METHOD) or Unanswered."""
        if self._daemon.is_gone:
            raise Unanswered(Reason.DAEMON_DIED, "this node's p2pd has stopped")
        try:
            peer_id = parse_peer(peer)
        except ValueError as error:
            raise Unanswered(Reason.UNREACHABLE, str(error)) from error
        try:
            for _ in range(2):
                maddrs = self._addresses.get(peer, ())
                dialled = bool(maddrs) and peer not in self._connected
                if dialled:
                    with contextlib.suppress(ControlError):  # p2pd may know better addresses: let the stream decide
                        await self._daemon.connect(peer_id, [parse_tcp_address(maddr) for maddr in maddrs])
                        self._connected.add(peer)
                try:
                    return _Stream(*await self._daemon.open_stream(peer_id, PREFIX + method), self._hashers)
                except ControlError as error:
                    if "protocols not supported" in str(error):
                        raise Refused(Reason.UNKNOWN_METHOD, f"the peer does not offer {method}") from error
                    self._connected.discard(peer)
                    if dialled or not maddrs:
                        raise Unanswered(Reason.UNREACHABLE, _one_line(str(error))) from error
        except (OSError, EOFError) as error:
            raise await self._lost("the stream broke while it was opened") from error
        raise Unanswered(Reason.UNREACHABLE, "no connection could be made")

    async def _lost(self, detail: str) -> Unanswered:
        """Was it the peer or our own daemon?"""
        if not self._daemon.is_gone:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DEATH_GRACE_S):
                    await self._daemon.died.wait()
        if self._daemon.is_gone:
            return Unanswered(Reason.DAEMON_DIED, "this node's p2pd has stopped")
        return Unanswered(Reason.TORN_STREAM, detail)

    # --- calls that others make --------------------------------------------------------------------------------------
    async def _register(self, protocol: str) -> None:
        try:
            async with asyncio.timeout(self._limits.idle_s):
                await self._daemon.register(protocol)
        except (ControlError, OSError, EOFError, TimeoutError) as error:
            if not self._daemon.is_gone:
                log.error("p2pd refused to serve %s: %s", protocol, error)
            self._registration_error = DaemonFailed(f"p2pd does not serve {protocol}", "restart the node")

    async def _inbound(
        self, peer: str, protocol: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """One stream that another peer opened, from its first byte to its end."""
        stream = _Stream(reader, writer, self._hashers)
        served = self._served.get(protocol)
        task = asyncio.current_task()
        if served is None or task is None or self._answering >= 2 * self._limits.streams:
            stream.abort()
            return
        self._tasks.add(task)
        self._answering += 1
        try:
            await self._answer(peer, served, stream)
            async with asyncio.timeout(self._limits.linger_s):
                await stream.discard()
        except WireError as error:  # torn: there is nobody to tell
            self._emit(RequestRefused(peer, served.method.name, error.reason))
        except (OSError, EOFError, TimeoutError):
            log.debug("a stream of %s from %s ended early", served.method.name, peer, exc_info=True)
        finally:
            stream.abort()
            self._count(served.method.name, stream)
            self._answering -= 1
            self._tasks.discard(task)

    async def _answer(self, peer: str, served: _Served, stream: _Stream) -> None:
        """Receive, handle and answer one request. Raises WireError(TORN_STREAM), OSError, TimeoutError."""
        method = served.method
        async with self._admitted(peer) as lease:
            try:
                if lease is None:
                    raise Refused(Reason.BUSY, "too many calls at once; try again or elsewhere")
                frame = await self._receive(stream, method, lease)
                reply = await self._handle(served, Request(peer, _read_header(method, frame), frame.body))
                kind, header, body = Kind.REPLY, _write_header(method, reply), reply.body
                del frame, reply  # the request's body must not wait for a slow reader of the reply
            except Refused as refusal:
                self._emit(RequestRefused(peer, method.name, refusal.reason))
                told = wire.Refusal(reason=refusal.reason, detail=refusal.detail[: wire.MAX_DETAIL_CHARS])
                kind, header, body = Kind.REFUSAL, told.model_dump_json().encode(), b""
            async with asyncio.timeout(self._patience_s(len(header) + len(body))):
                await stream.send(kind, header, body, stall_s=self._limits.idle_s)

    async def _receive(self, stream: _Stream, method: Method[Any, Any], lease: _Lease) -> Frame:
        decoder = Decoder(_REQUEST, max_body_bytes=method.max_request_bytes)

        def announced(count: int) -> float:
            if self._inbound_bytes and self._inbound_bytes + count > self._limits.inbound_bytes:
                raise Refused(Reason.BUSY, "too many bytes in flight; try again or elsewhere")
            lease.count = count
            self._inbound_bytes += count
            return self._patience_s(count)

        try:
            return await stream.receive(decoder, stall_s=self._limits.idle_s, announced=announced)
        except WireError as error:
            if error.reason is Reason.TORN_STREAM:
                raise
            raise Refused(error.reason, error.detail) from error
        except TimeoutError as error:
            raise Refused(Reason.DEADLINE, "the request did not arrive in time") from error

    async def _handle(self, served: _Served, request: Request[Any]) -> Reply[Any]:
        """Run the handler. Raises Refused only: whatever else it raises becomes INTERNAL, and goes to our log."""
        method = served.method
        try:
            async with asyncio.timeout(self._limits.handler_s):
                reply = await served.handler(request)
            if not isinstance(reply, Reply) or not isinstance(reply.header, method.reply):
                raise TypeError(f"the handler did not return a Reply with a {method.reply.__name__}")
            if len(reply.body) > method.max_reply_bytes:
                raise ValueError(f"the handler's reply has {len(reply.body)} bytes; at most {method.max_reply_bytes}")
        except Refused:
            raise
        except Exception as error:
            log.exception("the handler of %s failed", method.name)
            raise Refused(Reason.INTERNAL) from error
        return reply

    @contextlib.asynccontextmanager
    async def _admitted(self, peer: str) -> AsyncIterator[_Lease | None]:
        """A place among the streams being handled, or None when there is none left."""
        if self._streams.total() >= self._limits.streams or self._streams[peer] >= self._limits.streams_per_peer:
            yield None
            return
        lease = _Lease()
        self._streams[peer] += 1
        try:
            yield lease
        finally:
            self._inbound_bytes -= lease.count
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]

    def _patience_s(self, count: int) -> float:
        return self._limits.idle_s + count / self._limits.min_rate_bytes_s

    # --- the rest ----------------------------------------------------------------------------------------------------
    def _count(self, method: str, stream: _Stream) -> None:
        if stream.sent:
            self._emit(BytesMoved("sent", method, "", stream.sent))
        if stream.received:
            self._emit(BytesMoved("received", method, "", stream.received))

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # a self-call whose caller has gone: nobody else will look

    async def _report_death(self) -> None:
        await self._daemon.died.wait()
        self._emit(Problem(Reason.DAEMON_DIED, "this node's p2pd has stopped", "restart the node; see its log"))


@dataclass(slots=True)
class _Lease:
    count: int = 0  # bytes announced by the request


class _Stream:
    """One libp2p stream and what moved over it (bytes)."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        hashers: concurrent.futures.Executor,
    ) -> None:
        self.sent = 0
        self.received = 0
        self._reader = reader
        self._writer = writer
        self._hashers = hashers

    async def send(self, kind: Kind, header: bytes, body: bytes, *, stall_s: float | None = None) -> None:
        """Write one message. Raises OSError, TimeoutError (after `stall_s` without progress), WireError(TOO_LARGE)."""
        front = wire.head(kind, header, len(body))
        if len(front) + len(body) <= INLINE_BYTES:
            await self._write(b"".join((front, body, wire.digest(front, body))), stall_s)
            return
        loop = asyncio.get_running_loop()
        hashing: Awaitable[bytes] | None = None
        if len(body) > HASH_IN_THREAD_BYTES:
            hashing = loop.run_in_executor(self._hashers, wire.digest, front, body)
        await self._write(front, stall_s)
        view = memoryview(body)
        for start in range(0, len(body), WRITE_CHUNK_BYTES):
            await self._write(view[start : start + WRITE_CHUNK_BYTES], stall_s)
        await self._write(wire.digest(front, body) if hashing is None else await hashing, stall_s)

    async def receive(
        self,
        decoder: Decoder,
        *,
        stall_s: float | None = None,
        announced: Callable[[int], float] | None = None,
    ) -> Frame:
        """Read one message. `announced` gets its announced size (bytes) and returns how many seconds it may take.

        Raises WireError, OSError, TimeoutError."""
        async with asyncio.timeout(None) as whole:
            while wanted := decoder.wanted:
                async with asyncio.timeout(stall_s):
                    chunk = await self._reader.read(min(wanted, READ_CHUNK_BYTES))
                if not chunk:
                    raise decoder.torn()
                self.received += len(chunk)
                known = decoder.announced_bytes
                if len(chunk) >= FEED_IN_THREAD_BYTES:
                    await asyncio.get_running_loop().run_in_executor(self._hashers, decoder.feed, chunk)
                else:
                    decoder.feed(chunk)
                if announced is not None and known is None and decoder.announced_bytes is not None:
                    whole.reschedule(asyncio.get_running_loop().time() + announced(decoder.announced_bytes))
        return decoder.frame()

    async def discard(self) -> None:
        """Throw away what still comes until the other end closes. p2pd resets a stream that we close with bytes unread,
        and what we wrote before is then lost."""
        while await self._reader.read(INLINE_BYTES):
            pass

    def abort(self) -> None:
        """Close now. Nothing is waited for and nothing buffered is kept."""
        self._writer.transport.abort()

    async def _write(self, data: bytes | memoryview, stall_s: float | None) -> None:
        self._writer.write(data)
        self.sent += len(data)
        async with asyncio.timeout(stall_s):
            await self._writer.drain()


def _read_header(method: Method[Any, Any], frame: Frame) -> Message:
    try:
        header: Message = method.request.model_validate_json(frame.header)
    except ValidationError as error:
        raise Refused(Reason.MALFORMED, f"the header does not match {method.request.__name__}") from error
    return header


def _write_header(method: Method[Any, Any], reply: Reply[Any]) -> bytes:
    try:
        header: bytes = reply.header.model_dump_json().encode()
        if len(header) > wire.MAX_HEADER_BYTES:
            raise ValueError(f"a reply header of {len(header)} bytes; at most {wire.MAX_HEADER_BYTES}")
    except ValueError as error:
        log.exception("the reply of %s cannot be sent", method.name)
        raise Refused(Reason.INTERNAL) from error
    return header


def _read_refusal(frame: Frame) -> CallError:
    try:
        refusal = wire.Refusal.model_validate_json(frame.header)
        return Refused(Reason(refusal.reason), _one_line(refusal.detail))
    except ValueError:
        return Unanswered(Reason.MALFORMED, "the refusal cannot be read")


def _one_line(text: str) -> str:
    return " ".join(text.split())[: wire.MAX_DETAIL_CHARS]
