"""For tests of the all-reduce: nodes that reduce together over an in-memory network, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shoal.protocol import events
from shoal.protocol.allreduce import AllReduce, PartRequest, ReduceFailed, ReducePlan, split_by_shares
from shoal.protocol.events import Reason
from shoal.protocol.transport import Handler, Method, Reply, Request, Unanswered


class VirtualLoop(asyncio.SelectorEventLoop):
    """Jumps to the next timer when nothing is ready; a wait that nothing can end is an error instead of a hang."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready:
            live = [handle.when() for handle in self._scheduled if not handle.cancelled()]
            if not live:
                raise RuntimeError("deadlock: a wait without a deadline")
            self.now = max(self.now, min(live))
        super()._run_once()


def run(main: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


async def inline(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


Fault = Callable[[str, str, PartRequest], Awaitable[None]]


@dataclass
class Network:
    """Calls take `latency_s` each way. `dead` peers are unreachable, and calls that they were handling break off."""

    latency_s: float = 0.01
    nodes: dict[str, Node] = field(default_factory=dict)
    dead: set[str] = field(default_factory=set)
    calls: list[tuple[str, str, int, int]] = field(default_factory=list)  # sender, receiver, chunk, body bytes
    before: Fault | None = None  # awaited before a request arrives; may raise
    after: Fault | None = None  # awaited before a reply arrives; may raise


@dataclass
class Node:
    """One peer's transport."""

    network: Network
    peer: str
    handlers: dict[str, Handler] = field(default_factory=dict)

    def serve(self, method: Method[Any, Any], handler: Handler) -> None:
        self.handlers[method.name] = handler

    def learn_address(self, peer: str, maddrs: tuple[str, ...]) -> None:
        raise NotImplementedError

    async def call(self, peer: str, method: Any, header: Any, body: bytes = b"", *, timeout_s: float) -> Reply[Any]:
        assert type(body) is bytes and len(body) <= method.max_request_bytes
        header = type(header).model_validate_json(header.model_dump_json())
        try:
            async with asyncio.timeout(timeout_s):
                return await self._carry(peer, method, header, body)
        except TimeoutError:
            raise Unanswered(Reason.DEADLINE) from None

    async def _carry(self, peer: str, method: Any, header: Any, body: bytes) -> Reply[Any]:
        net = self.network
        net.calls.append((self.peer, peer, header.chunk, len(body)))
        await asyncio.sleep(net.latency_s if peer != self.peer else 0)
        if net.before:
            await net.before(self.peer, peer, header)
        if {peer, self.peer} & net.dead:
            raise Unanswered(Reason.UNREACHABLE)
        handling = asyncio.create_task(net.nodes[peer].handlers[method.name](Request(self.peer, header, body)))  # type: ignore[arg-type]
        try:
            while not handling.done() and not {peer, self.peer} & net.dead:
                await asyncio.wait([handling], timeout=0.05)
        finally:
            handling.cancel()
            await asyncio.gather(handling, return_exceptions=True)
        if {peer, self.peer} & net.dead:
            raise Unanswered(Reason.TORN_STREAM)
        reply = handling.result()
        await asyncio.sleep(net.latency_s if peer != self.peer else 0)
        if net.after:
            await net.after(self.peer, peer, header)
        if {peer, self.peer} & net.dead:
            raise Unanswered(Reason.TORN_STREAM)
        assert len(reply.body) <= method.max_reply_bytes
        return reply


@dataclass
class Swarm:
    """`n` nodes that reduce together. `events`: what each emitted."""

    n: int
    network: Network = field(default_factory=Network)

    def __post_init__(self) -> None:
        self.peers = tuple(f"peer{i}" for i in range(self.n))
        self.events: dict[str, list[events.Event]] = {peer: [] for peer in self.peers}
        self.engines: dict[str, AllReduce] = {}
        for peer in self.peers:
            node = self.network.nodes[peer] = Node(self.network, peer)
            self.engines[peer] = AllReduce(
                node, max_elements=10**7, run_in_thread=inline, emit=self.events[peer].append
            )

    def plan(self, numel: int, *, shares: Sequence[float] = (), **fields: Any) -> ReducePlan:
        fields = {"key": "k", "weights": (1.0,) * self.n, "dtype": "float64"} | fields
        bounds = split_by_shares(numel, shares or [1] * self.n)
        return ReducePlan(members=self.peers, bounds=bounds, **fields)

    async def reduce(
        self,
        plan: ReducePlan,
        contributions: Sequence[Tensor | None],
        *,
        delays_s: Sequence[float] = (),
        timeout_s: float = 10.0,
    ) -> list[Tensor | ReduceFailed]:
        """Everyone's outcome, in order. A dead peer's own outcome counts for nothing; its task is cancelled."""

        async def member(index: int) -> Tensor | ReduceFailed:
            await asyncio.sleep(delays_s[index] if delays_s else 0)
            try:
                return await self.engines[self.peers[index]].reduce(plan, contributions[index], timeout_s=timeout_s)
            except ReduceFailed as failure:
                return failure

        return await asyncio.gather(*[member(index) for index in range(self.n)])


def contributions(n: int, numel: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(7)
    return [torch.randn(numel, generator=g, dtype=dtype) * 10.0 ** (i % 3) for i in range(n)]


def in_plan_order(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def bits(outcome: Tensor | ReduceFailed) -> bytes:
    assert isinstance(outcome, Tensor), outcome
    return outcome.numpy().tobytes()


def failures(outcomes: Sequence[Tensor | ReduceFailed]) -> list[ReduceFailed]:
    assert all(isinstance(outcome, ReduceFailed) for outcome in outcomes), "somebody has a result"
    return list(outcomes)  # type: ignore[arg-type]
