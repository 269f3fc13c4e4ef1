"""What every `Transport` promises: one suite that every implementation passes.

Subclass `TransportConformance` in a test module and give it a fixture `pair`; methods have names of their own, so one
pair may serve the whole module.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from shoal.protocol.events import Reason
from shoal.protocol.transport import Empty, Message, Method, Refused, Reply, Request, Transport, Unanswered

LONG_S = 20.0
SHORT_S = 0.4
BOUND = 2 << 20


@dataclass(frozen=True)
class Pair:
    """Two transports that can reach each other."""

    a: Transport
    b: Transport
    nobody: str  # a PeerID that no node has
    settle: Callable[[], Awaitable[None]]  # returns when what was served can be called


class Number(Message):
    number: int


class Text(Message):
    text: str


def method(name: str, **bounds: int) -> Method[Number, Number]:
    bounds = {"max_request_bytes": BOUND, "max_reply_bytes": BOUND} | bounds
    return Method(name, Number, Number, **bounds)


async def echo(request: Request[Number]) -> Reply[Number]:
    return Reply(Number(number=request.header.number + 1), request.body)


def pattern(size: int) -> bytes:
    """Bytes that differ everywhere, so that a lost or swapped piece shows."""
    seed = hashlib.sha256(size.to_bytes(8, "big")).digest()
    block = b"".join(hashlib.sha256(seed + i.to_bytes(4, "big")).digest() for i in range(min(4096, size // 32 + 1)))
    return (block * (size // len(block) + 1))[:size]


class TransportConformance:
    @pytest.mark.parametrize("size", [0, 1, 65_535, 65_537, (1 << 20) + 3])
    async def test_header_and_body_arrive_whole_both_ways(self, pair: Pair, size: int) -> None:
        seen = []

        async def handler(request: Request[Number]) -> Reply[Number]:
            seen.append((request.header.number, request.body))
            return Reply(Number(number=request.header.number + 1), request.body[::-1])

        pair.b.serve(method("whole"), handler)
        await pair.settle()
        body = pattern(size)
        reply = await pair.a.call(pair.b.peer, method("whole"), Number(number=size), body, timeout_s=LONG_S)
        assert reply == Reply(Number(number=size + 1), body[::-1])
        assert seen == [(size, body)]

    async def test_the_sender_is_the_peer_of_the_connection(self, pair: Pair) -> None:
        senders = []

        async def handler(request: Request[Number]) -> Reply[Number]:
            senders.append(request.sender)
            return Reply(Number(number=0))

        pair.a.serve(method("who"), handler)
        pair.b.serve(method("who"), handler)
        await pair.settle()
        await pair.a.call(pair.b.peer, method("who"), Number(number=0), timeout_s=LONG_S)
        await pair.b.call(pair.a.peer, method("who"), Number(number=0), timeout_s=LONG_S)
        assert senders == [pair.a.peer, pair.b.peer]
        assert pair.a.peer != pair.b.peer

    async def test_a_refusal_travels_with_its_reason_and_detail(self, pair: Pair) -> None:
        async def handler(request: Request[Number]) -> Reply[Number]:
            raise Refused(Reason.STALE, "round 3 is over")

        pair.b.serve(method("refuse"), handler)
        await pair.settle()
        for caller in (pair.a, pair.b):  # over the network, and to oneself
            with pytest.raises(Refused) as caught:
                await caller.call(pair.b.peer, method("refuse"), Number(number=0), b"x", timeout_s=LONG_S)
            assert (caught.value.reason, caught.value.detail) == (Reason.STALE, "round 3 is over")

    async def test_an_unknown_method_is_refused(self, pair: Pair) -> None:
        for caller in (pair.a, pair.b):
            with pytest.raises(Refused) as caught:
                await caller.call(pair.b.peer, method("nobody_serves_this"), Number(number=0), timeout_s=LONG_S)
            assert caught.value.reason is Reason.UNKNOWN_METHOD

    async def test_a_failing_handler_tells_the_caller_nothing_but_internal(self, pair: Pair) -> None:
        async def handler(request: Request[Number]) -> Reply[Number]:
            raise RuntimeError("the password is hunter2")

        pair.b.serve(method("fail"), handler)
        await pair.settle()
        for caller in (pair.a, pair.b):
            with pytest.raises(Refused) as caught:
                await caller.call(pair.b.peer, method("fail"), Number(number=0), timeout_s=LONG_S)
            assert caught.value.reason is Reason.INTERNAL
            assert "hunter2" not in str(caught.value)

    async def test_a_handler_that_breaks_its_own_contract_is_internal(self, pair: Pair) -> None:
        async def wrong_header(request: Request[Number]) -> Reply[Any]:
            return Reply(Text(text="not a number"))

        async def too_much(request: Request[Number]) -> Reply[Number]:
            return Reply(Number(number=0), bytes(11))

        small = method("too_much", max_reply_bytes=10)
        pair.b.serve(method("wrong_header"), wrong_header)
        pair.b.serve(small, too_much)
        await pair.settle()
        for called in (method("wrong_header"), small):
            with pytest.raises(Refused) as caught:
                await pair.a.call(pair.b.peer, called, Number(number=0), timeout_s=LONG_S)
            assert caught.value.reason is Reason.INTERNAL

    async def test_a_request_above_its_bound_never_leaves(self, pair: Pair) -> None:
        handled = []

        async def handler(request: Request[Number]) -> Reply[Number]:
            handled.append(request)
            return Reply(Number(number=0))

        small = method("small", max_request_bytes=10)
        pair.b.serve(small, handler)
        await pair.settle()
        for caller in (pair.a, pair.b):
            with pytest.raises(Refused) as caught:
                await caller.call(pair.b.peer, small, Number(number=0), bytes(11), timeout_s=LONG_S)
            assert caught.value.reason is Reason.TOO_LARGE
        assert handled == []
        await pair.a.call(pair.b.peer, small, Number(number=0), bytes(10), timeout_s=LONG_S)
        assert len(handled) == 1

    @pytest.mark.parametrize("size", [11, 1 << 20])
    async def test_each_end_holds_its_own_bounds(self, pair: Pair, size: int) -> None:
        """The other end may believe in larger ones."""
        pair.b.serve(method("server_bound", max_request_bytes=10), echo)
        pair.b.serve(method("caller_bound"), echo)
        await pair.settle()
        with pytest.raises(Refused) as refused:
            await pair.a.call(pair.b.peer, method("server_bound"), Number(number=0), bytes(size), timeout_s=LONG_S)
        assert refused.value.reason is Reason.TOO_LARGE
        with pytest.raises(Unanswered) as unanswered:
            await pair.a.call(
                pair.b.peer,
                method("caller_bound", max_reply_bytes=10),
                Number(number=0),
                bytes(size),
                timeout_s=LONG_S,
            )
        assert unanswered.value.reason is Reason.TOO_LARGE

    async def test_headers_of_another_schema_are_malformed(self, pair: Pair) -> None:
        pair.b.serve(method("schema"), echo)
        await pair.settle()
        asks_otherwise: Method[Any, Any] = Method("schema", Text, Number, BOUND, BOUND)
        reads_otherwise: Method[Any, Any] = Method("schema", Number, Text, BOUND, BOUND)
        with pytest.raises(Refused) as refused:
            await pair.a.call(pair.b.peer, asks_otherwise, Text(text="?"), timeout_s=LONG_S)
        assert refused.value.reason is Reason.MALFORMED
        with pytest.raises(Unanswered) as unanswered:
            await pair.a.call(pair.b.peer, reads_otherwise, Number(number=0), timeout_s=LONG_S)
        assert unanswered.value.reason is Reason.MALFORMED

    async def test_a_header_that_is_not_the_methods_is_refused_at_home(self, pair: Pair) -> None:
        wrong: Any = Empty()
        with pytest.raises(Refused) as caught:
            await pair.a.call(pair.b.peer, method("at_home"), wrong, timeout_s=LONG_S)
        assert caught.value.reason is Reason.MALFORMED

    async def test_a_hung_handler_costs_its_caller_no_more_than_the_deadline(self, pair: Pair) -> None:
        release = asyncio.Event()

        async def handler(request: Request[Number]) -> Reply[Number]:
            await asyncio.wait_for(release.wait(), LONG_S)
            return Reply(Number(number=0))

        pair.b.serve(method("hang"), handler)
        await pair.settle()
        loop = asyncio.get_running_loop()
        for caller in (pair.a, pair.b):
            start = loop.time()
            with pytest.raises(Unanswered) as caught:
                await caller.call(pair.b.peer, method("hang"), Number(number=0), timeout_s=SHORT_S)
            assert caught.value.reason is Reason.DEADLINE
            assert SHORT_S * 0.9 <= loop.time() - start < SHORT_S + 5
        release.set()

    async def test_a_peer_that_nobody_knows_is_unanswered_in_time(self, pair: Pair) -> None:
        for peer in (pair.nobody, "not a PeerID"):
            with pytest.raises(Unanswered) as caught:
                await pair.a.call(peer, method("whatever"), Number(number=0), timeout_s=5)
            assert caught.value.reason in (Reason.UNREACHABLE, Reason.DEADLINE)

    async def test_concurrent_calls_get_their_own_replies(self, pair: Pair) -> None:
        waiting = 0
        all_here = asyncio.Event()

        async def handler(request: Request[Number]) -> Reply[Number]:
            nonlocal waiting
            waiting += 1
            if waiting == 32:
                all_here.set()
            await asyncio.wait_for(all_here.wait(), LONG_S)  # so all 32 are in flight at once
            return await echo(request)

        pair.b.serve(method("many"), handler)
        await pair.settle()
        bodies = [pattern(1000 * i) for i in range(32)]
        replies = await asyncio.gather(
            *(
                pair.a.call(pair.b.peer, method("many"), Number(number=i), body, timeout_s=LONG_S)
                for i, body in enumerate(bodies)
            )
        )
        assert [(reply.header.number, reply.body) for reply in replies] == [(i + 1, b) for i, b in enumerate(bodies)]

    async def test_a_handler_may_call_back_its_caller(self, pair: Pair) -> None:
        async def outer(request: Request[Number]) -> Reply[Number]:
            return await pair.b.call(request.sender, method("inner"), request.header, timeout_s=LONG_S)

        pair.a.serve(method("inner"), echo)
        pair.b.serve(method("outer"), outer)
        await pair.settle()
        reply = await pair.a.call(pair.b.peer, method("outer"), Number(number=1), timeout_s=LONG_S)
        assert reply.header.number == 2

    async def test_a_call_to_oneself_is_like_any_other(self, pair: Pair) -> None:
        senders = []

        async def handler(request: Request[Number]) -> Reply[Number]:
            senders.append(request.sender)
            return await echo(request)

        pair.a.serve(method("myself"), handler)
        await pair.settle()
        reply = await pair.a.call(pair.a.peer, method("myself"), Number(number=1), b"body", timeout_s=LONG_S)
        assert reply == Reply(Number(number=2), b"body")
        assert senders == [pair.a.peer]

    async def test_serving_again_replaces_the_handler(self, pair: Pair) -> None:
        async def other(request: Request[Number]) -> Reply[Number]:
            return Reply(Number(number=-1))

        for handler, expected in ((echo, 1), (other, -1)):
            pair.b.serve(method("again"), handler)
            await pair.settle()
            reply = await pair.a.call(pair.b.peer, method("again"), Number(number=0), timeout_s=LONG_S)
            assert reply.header.number == expected

    async def test_a_cancelled_call_is_cancelled_and_harms_no_other(self, pair: Pair) -> None:
        entered, release = asyncio.Event(), asyncio.Event()

        async def handler(request: Request[Number]) -> Reply[Number]:
            if request.header.number == 0:
                entered.set()
                await asyncio.wait_for(release.wait(), LONG_S)
            return await echo(request)

        pair.b.serve(method("cancel"), handler)
        await pair.settle()
        calling = asyncio.create_task(pair.a.call(pair.b.peer, method("cancel"), Number(number=0), timeout_s=LONG_S))
        await asyncio.wait_for(entered.wait(), LONG_S)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        reply = await pair.a.call(pair.b.peer, method("cancel"), Number(number=5), timeout_s=LONG_S)
        assert reply.header.number == 6
        release.set()
