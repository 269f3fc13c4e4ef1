"""For tests of blobs: a network in virtual time. Every donor has a latency, a rate and a behaviour; nothing sleeps."""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from shoal.protocol.blob_fetch import FetchResult, fetch
from shoal.protocol.blobs import (
    MIB,
    BlobStore,
    index_of,
    serve_blobs,
)
from shoal.protocol.events import ChunkFetched, Event, Reason
from shoal.protocol.store import MemoryStore
from shoal.protocol.transport import CallError, Handler, Message, Method, Refused, Reply, Request, Unanswered

T = TypeVar("T")
Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)


# --- a network in virtual time ---------------------------------------------------------------------------------------
class VirtualLoop(asyncio.SelectorEventLoop):
    """Time stands still while code runs and jumps to the next timer when there is nothing to do."""

    def __init__(self) -> None:
        self.now_s = 0.0
        loop = self

        class Selector(selectors.SelectSelector):
            def select(self, timeout: float | None = None) -> Any:
                assert timeout is not None, "everything waits and no timer is set"
                loop.now_s += max(0.0, timeout)
                return super().select(0)

        super().__init__(Selector())

    def time(self) -> float:
        return self.now_s


def run(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


def now() -> float:
    return asyncio.get_running_loop().time()


class Network:
    """Peers by name. `behave[peer]` is awaited before a call reaches that peer; it may raise or change the body."""

    def __init__(self) -> None:
        self.handlers: dict[tuple[str, str], tuple[Method[Any, Any], Handler]] = {}
        self.latency_s: dict[str, float] = {}
        self.bytes_per_s: dict[str, float] = {}
        self.behave: dict[str, Callable[[str, Any, bytes], Awaitable[bytes]]] = {}
        self.calls: list[tuple[float, str, str, Any]] = []
        self.line_free_s: dict[str, float] = {}

    def calls_for_chunks(self) -> list[int]:
        return [header.chunk for _, _, name, header in self.calls if name == "blob.chunk"]


class Peer:
    """A Transport."""

    def __init__(self, network: Network, peer: str) -> None:
        self.network = network
        self._peer = peer

    @property
    def peer(self) -> str:
        return self._peer

    def serve(self, method: Method[Q, A], handler: Handler) -> None:
        self.network.handlers[self._peer, method.name] = (method, handler)

    def learn_address(self, peer: str, maddrs: tuple[str, ...]) -> None: ...

    async def call(
        self, peer: str, method: Method[Q, A], header: Q, body: bytes = b"", *, timeout_s: float
    ) -> Reply[A]:
        network = self.network
        network.calls.append((now(), peer, method.name, header))
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.sleep(network.latency_s.get(peer, 0.01))
                if (peer, method.name) not in network.handlers:
                    raise Unanswered(Reason.UNREACHABLE, peer)
                served, handler = network.handlers[peer, method.name]
                request = served.request.model_validate_json(header.model_dump_json())
                reply = await handler(Request(self._peer, request, body))
                answer = reply.body
                if peer in network.behave:
                    answer = await network.behave[peer](method.name, header, answer)
                if len(answer) > method.max_reply_bytes:
                    raise Refused(Reason.TOO_LARGE, "")
                rate = network.bytes_per_s.get(peer, 100e6)
                free_s = max(network.line_free_s.get(peer, 0.0), now()) + len(answer) / rate
                network.line_free_s[peer] = free_s
                await asyncio.sleep(free_s - now())
                return Reply(reply.header, answer)
        except TimeoutError:
            raise Unanswered(Reason.DEADLINE, "") from None
        except CallError:
            raise
        except Exception as error:
            raise Refused(Reason.INTERNAL, "") from error


CHUNK = 1000


class World:
    """A fetcher and some donors that hold one blob of `size` bytes in chunks of CHUNK."""

    def __init__(self, donors: int, size: int = 20 * CHUNK - 7) -> None:
        self.network = Network()
        self.data = random.Random(size).randbytes(size)
        self.index = index_of(self.data, chunk_bytes=CHUNK)
        self.digest = self.index.digest
        self.donors = [f"donor{n}" for n in range(donors)]
        self.stores = {donor: MemoryStore() for donor in self.donors}
        self.store = MemoryStore()
        self.blobs = BlobStore(self.store)
        self.transport = Peer(self.network, "me")
        self.events: list[Event] = []

    async def start(self) -> World:
        for donor, store in self.stores.items():
            blobs = BlobStore(store)
            assert await blobs.put(self.data, chunk_bytes=CHUNK) == self.digest
            serve_blobs(Peer(self.network, donor), blobs, max_chunk_bytes=CHUNK, allow=lambda sender: sender == "me")
        return self

    async def fetch(self, **kwargs: Any) -> FetchResult:
        given: dict[str, Any] = {"donors": self.donors, "emit": self.events.append, "max_bytes": 10 * MIB} | kwargs
        return await fetch(self.transport, self.blobs, self.digest, given.pop("donors"), **given)

    def fetched_from(self) -> dict[str, int]:
        """Chunks per donor, from the events."""
        counts: dict[str, int] = {}
        for event in self.events:
            if isinstance(event, ChunkFetched):
                counts[event.peer] = counts.get(event.peer, 0) + 1
        return counts

    async def check(self) -> None:
        assert await self.blobs.get(self.digest) == self.data
        assert self.blobs.digests() == [self.digest] and self.blobs.incomplete() == []
        assert self.store.size(f"blob/{self.digest}/partial") is None


async def hang(method: str, header: Any, body: bytes) -> bytes:
    await asyncio.sleep(1e6)
    return body


async def lie(method: str, header: Any, body: bytes) -> bytes:
    return bytes(len(body))


def refuse(reason: Reason, kind: type[CallError] = Refused) -> Callable[[str, Any, bytes], Awaitable[bytes]]:
    async def behaviour(method: str, header: Any, body: bytes) -> bytes:
        raise kind(reason, "as told")

    return behaviour


def only_chunks(behaviour: Callable[[str, Any, bytes], Awaitable[bytes]]) -> Any:
    async def chosen(method: str, header: Any, body: bytes) -> bytes:
        return await behaviour(method, header, body) if method == "blob.chunk" else body

    return chosen
