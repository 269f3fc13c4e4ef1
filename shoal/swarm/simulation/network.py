"""Simulated network: the Transport seam over a virtual clock, with faults drawn from a seed.

Labelled simulated: latencies are drawn, bandwidth is not modelled. Every peer is an incarnation that can be killed at
any event, hung and resumed, or cut from others; a dead incarnation can neither send, store nor emit.
"""

from __future__ import annotations

import asyncio
import enum
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from shoal.protocol.events import Event, Reason
from shoal.protocol.store import Data, MemoryStore, StoreError, StoreFault
from shoal.protocol.transport import CallError, Handler, Method, Refused, Reply, Request, Unanswered


class PeerKilled(BaseException):
    """Raised inside a simulated peer at the point where it dies."""


@dataclass(slots=True)
class Link:
    """How messages travel. latency: uniform bounds, seconds; the rest are probabilities per message."""

    latency_s: tuple[float, float] = (0.001, 0.02)
    lose_request: float = 0.0
    lose_reply: float = 0.0
    duplicate: float = 0.0


class Moment(enum.Enum):
    """Where a request stands, for those who watch the wire."""

    SENT = "sent"  # the caller is about to send it
    DELIVERED = "delivered"  # the callee has it, and has not looked at it yet


# (moment, caller, callee, method name)
Tap = Callable[[Moment, str, str, str], None]


class SimNetwork:
    """All simulated peers and what lies between them."""

    def __init__(self, seed: int, link: Link | None = None) -> None:
        self.rng = random.Random(seed)
        self.link = link or Link()
        self.peers: dict[str, SimTransport] = {}
        self.taps: list[Tap] = []
        self.slow: dict[str, float] = {}  # peer -> seconds that it takes longer for every request
        self._sides: dict[str, int] = {}
        self.broken: set[frozenset[str]] = set()  # pairs that cannot reach each other, whatever others can

    def partition(self, *sides: set[str]) -> None:
        """Peers of different sides cannot reach each other; peers on no side reach everybody."""
        self._sides = {peer: i for i, side in enumerate(sides) for peer in side}

    def heal(self) -> None:
        self._sides = {}

    def cut(self, a: str, b: str) -> bool:
        if frozenset((a, b)) in self.broken:
            return True
        return a in self._sides and b in self._sides and self._sides[a] != self._sides[b]

    def tap(self, moment: Moment, caller: str, callee: str, method: str) -> None:
        for watch in list(self.taps):
            watch(moment, caller, callee, method)

    def latency_s(self) -> float:
        return self.rng.uniform(*self.link.latency_s)


@dataclass(eq=False, slots=True)
class _InFlight:
    reply: asyncio.Future[Reply[Any]]


class SimTransport:
    """One incarnation of a simulated peer on the network."""

    def __init__(self, network: SimNetwork, peer: str) -> None:
        self._network = network
        self._peer = peer
        self._handlers: dict[str, tuple[Method[Any, Any], Handler]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._failures: list[BaseException] = []
        self._inbound: list[_InFlight] = []
        self._awake = asyncio.Event()
        self._awake.set()
        self.alive = True
        network.peers[peer] = self

    @property
    def peer(self) -> str:
        return self._peer

    def serve(self, method: Method[Any, Any], handler: Handler) -> None:
        self._handlers[method.name] = (method, handler)

    def learn_address(self, peer: str, maddrs: tuple[str, ...]) -> None:
        """Everybody knows everybody here."""

    async def call(
        self, peer: str, method: Method[Any, Any], header: Any, body: bytes = b"", *, timeout_s: float
    ) -> Reply[Any]:
        self._check_alive()
        if not isinstance(header, method.request):
            raise TypeError(f"{method.name} wants {method.request.__name__}")
        if len(body) > method.max_request_bytes:
            raise Refused(Reason.TOO_LARGE, f"{len(body)} bytes to {method.name}")
        self._network.tap(Moment.SENT, self._peer, peer, method.name)
        self._check_alive()
        if peer == self._peer:
            return await self._local(method, Request(peer, header, body), timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                reply = await self._remote(peer, method, Request(self._peer, header, body))
                await self._awake.wait()
        except TimeoutError:
            self._check_alive()
            raise Unanswered(Reason.DEADLINE, method.name) from None
        except CallError:
            self._check_alive()
            raise
        self._check_alive()
        return reply

    async def _local(self, method: Method[Any, Any], request: Request[Any], timeout_s: float) -> Reply[Any]:
        try:
            async with asyncio.timeout(timeout_s):
                self._network.tap(Moment.DELIVERED, self._peer, self._peer, method.name)
                self._check_alive()
                return await self._handle(method.name, request)
        except TimeoutError:
            raise Unanswered(Reason.DEADLINE, method.name) from None

    async def _remote(self, peer: str, method: Method[Any, Any], request: Request[Any]) -> Reply[Any]:
        network = self._network
        await self._awake.wait()
        await asyncio.sleep(network.latency_s())
        target = network.peers.get(peer)
        if target is None or not target.alive:
            raise Unanswered(Reason.UNREACHABLE, peer)
        if network.cut(self._peer, peer) or network.rng.random() < network.link.lose_request:
            await asyncio.Event().wait()  # until the caller's deadline
        if network.rng.random() < network.link.duplicate:
            target._receive(method.name, request)
        call = target._receive(method.name, request)
        network.tap(Moment.DELIVERED, self._peer, peer, method.name)
        self._check_alive()
        try:
            reply = await call.reply
        except CallError:
            await asyncio.sleep(network.latency_s())
            raise
        if network.cut(self._peer, peer) or network.rng.random() < network.link.lose_reply:
            await asyncio.Event().wait()
        await asyncio.sleep(network.latency_s())
        if len(reply.body) > method.max_reply_bytes:
            raise Refused(Reason.TOO_LARGE, f"{len(reply.body)} bytes from {method.name}")
        return reply

    def _receive(self, name: str, request: Request[Any]) -> _InFlight:
        call = _InFlight(asyncio.get_running_loop().create_future())
        call.reply.add_done_callback(lambda f: f.cancelled() or f.exception())  # a caller that left is no problem
        self._inbound.append(call)

        async def work() -> None:
            try:
                await self._awake.wait()
                if self._peer in self._network.slow:
                    await asyncio.sleep(self._network.slow[self._peer])
                reply = await self._handle(name, request)
                if self.alive and not call.reply.done():
                    call.reply.set_result(reply)
            except CallError as error:
                if self.alive and not call.reply.done():
                    call.reply.set_exception(error)
            except StoreError:  # as the real transport does with what a handler did not foresee
                if self.alive and not call.reply.done():
                    call.reply.set_exception(Refused(Reason.INTERNAL))
            finally:
                if call in self._inbound:
                    self._inbound.remove(call)

        self.spawn(work())
        return call

    async def _handle(self, name: str, request: Request[Any]) -> Reply[Any]:
        if name not in self._handlers:
            raise Refused(Reason.UNKNOWN_METHOD, name)
        return await self._handlers[name][1](request)

    # --- life and death ---------------------------------------------------------------------------------------------
    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task that dies with this incarnation."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and self.alive and not isinstance(error, PeerKilled):
            self._failures.append(error)

    def kill(self) -> None:
        """SIGKILL: no more effects from here on; callers see the connection break."""
        if not self.alive:
            return
        self.alive = False
        loop = asyncio.get_running_loop()
        for call in self._inbound:
            if not call.reply.done():
                call.reply.set_exception(Unanswered(Reason.TORN_STREAM, self._peer))
        for task in self._tasks:
            loop.call_soon(task.cancel)

    def hang(self) -> None:
        """SIGSTOP: nothing leaves, nothing is handled, until `resume`."""
        self._awake.clear()

    def resume(self) -> None:
        self._awake.set()

    def _check_alive(self) -> None:
        if not self.alive:
            raise PeerKilled

    def failures(self) -> list[BaseException]:
        """Exceptions that ended tasks of this incarnation while it was alive."""
        return list(self._failures)


class SimStore:
    """A disk as one incarnation sees it: once that is dead, nothing is written any more."""

    def __init__(self, disk: MemoryStore, transport: SimTransport) -> None:
        self.on_corrupt = disk.on_corrupt
        self._disk = disk
        self._transport = transport
        self.full = False

    def _check(self) -> None:
        if not self._transport.alive:
            raise PeerKilled

    async def put(self, key: str, data: Data) -> None:
        self._check()
        if self.full:
            raise StoreError(StoreFault.NO_SPACE, "the simulated disk is full", "make it larger")
        await self._disk.put(key, data)
        self._check()

    async def get(self, key: str) -> bytes | None:
        self._check()
        return await self._disk.get(key)

    async def delete(self, key: str) -> None:
        self._check()
        await self._disk.delete(key)

    def keys(self, prefix: str = "") -> list[str]:
        return self._disk.keys(prefix)

    def size(self, key: str) -> int | None:
        return self._disk.size(key)

    async def aclose(self) -> None:
        """A disk outlives its computer."""


@dataclass(slots=True)
class Recorder:
    """Every event of one peer, over all its incarnations, with virtual times."""

    events: list[tuple[float, Event]] = field(default_factory=list)
    watchers: list[Callable[[Event], None]] = field(default_factory=list)

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for _, event in self.events if isinstance(event, kind)]
