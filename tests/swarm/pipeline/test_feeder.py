"""A feeder among servers that answer nonsense, lag, freeze or start again: each microbatch counts once, always."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch

from shoal.protocol.codecs import encode, pack
from shoal.protocol.events import EntryDecided, HoleRepaired, MicrobatchRetried, MicrobatchStarted, Problem, Reason
from shoal.protocol.transport import Refused, Reply, Request
from shoal.swarm.pipeline.feeder import Feeder
from shoal.swarm.pipeline.messages import Hole, Repair
from shoal.swarm.simulation.loop import run_virtual
from shoal.swarm.simulation.world import World

ROUNDS = 8
Handle = Callable[[Request[Any]], Awaitable[Reply[Any]]]


def wrap(world: World, name: str, method: str, around: Callable[[Handle, Request[Any]], Awaitable[Reply[Any]]]) -> None:
    """Have `around` answer a peer's calls from now on; it is given the true handler."""
    handlers = world.network.peers[name]._handlers
    schema, true = handlers[method]

    async def handler(request: Request[Any]) -> Reply[Any]:
        return await around(true, request)

    handlers[method] = (schema, handler)


def after_step(world: World, step: int, then: Callable[[], None]) -> None:
    world.when(None, EntryDecided, lambda _: then(), kind="commit", step=step)


NONSENSE = {
    "no bytes": b"",
    "no tensor": pack([]),
    "an empty tensor": pack([b""]),
    "garbage": b"\x80\x04}" * 50,
    "a packed garbage": pack([b"garbage" * 20]),
    "two tensors": pack([encode(torch.zeros(1, dtype=torch.float64), "none")] * 2),
    "another shape": pack([encode(torch.zeros(1, 2, 3, dtype=torch.float64), "none")]),
    "another type": pack([encode(torch.zeros(2, 4, 8, dtype=torch.float32), "none")]),
    "not finite": pack([encode(torch.full((2, 4, 8), math.nan, dtype=torch.float64), "none", check=False)]),
}


@pytest.mark.parametrize("answer", NONSENSE)
@pytest.mark.parametrize(("method", "stage"), [("forward", 0), ("forward", 1), ("backward", 1), ("backward", 2)])
def test_one_server_that_answers_nonsense_stops_nobody(method: str, stage: int, answer: str, seed: int) -> None:
    async def lie(true: Handle, request: Request[Any]) -> Reply[Any]:
        return Reply((await true(request)).header, NONSENSE[answer])

    async def main() -> None:
        async with World(stages=3, servers=2, rounds=ROUNDS, seed=seed) as world:
            after_step(world, 2, lambda: wrap(world, world.head().servers(stage)[0], method, lie))
            await world.run_rounds(ROUNDS, limit_s=100)
            retried = [e for r in world.recorders.values() for e in r.of(MicrobatchRetried)]
            assert retried, f"nobody met it\n{world.describe()}"
            world.verify(ROUNDS)

    run_virtual(main())


@pytest.mark.parametrize("method", ["forward", "backward"])
def test_a_run_that_diverged_is_told_although_inputs_are_made_again(method: str, seed: int) -> None:
    async def refuse(true: Handle, request: Request[Any]) -> Reply[Any]:
        raise Refused(Reason.NOT_FINITE, "the output")

    async def main() -> None:
        async with World(stages=3, servers=2, seed=seed) as world:

            def diverge() -> None:
                for name in world.head().servers(1):
                    wrap(world, name, method, refuse)

            after_step(world, 2, diverge)
            async with asyncio.timeout(60):
                while not any("diverged" in e.detail for r in world.recorders.values() for e in r.of(Problem)):  # noqa: ASYNC110
                    await asyncio.sleep(0.1)

    run_virtual(main())


def test_a_feeder_whose_servers_are_frozen_says_that_it_is_done_with_what_it_finished(seed: int) -> None:
    async def main() -> None:
        async with World(stages=2, servers=2, microbatches=16, seed=seed) as world:
            heard: list[Any] = []

            async def listen(true: Handle, request: Request[Any]) -> Reply[Any]:
                heard.append(request.header)
                return await true(request)

            frozen: list[int] = []

            def freeze(name: str) -> None:
                """As a leader does that dies before it says anything more."""
                where = world.peers[name].history.here()
                for member in world.head().members:
                    wrap(world, member.peer, "feeder_done", listen)
                    world.peers[member.peer].server._round(where).plan = 1
                frozen.append(where.round)

            world.when(None, MicrobatchStarted, freeze, since_step=3)
            await world.run_rounds(6, limit_s=100)
            done = [h for h in heard if h.at.round == frozen[0]]
            assert {len(h.microbatches) for h in done} and all(len(h.microbatches) < 8 for h in done), done
            world.verify(world.step())

    run_virtual(main())


def test_a_server_that_lags_is_passed_over_and_ends_no_round(seed: int) -> None:
    async def lag(true: Handle, request: Request[Any]) -> Reply[Any]:
        raise Refused(Reason.AHEAD, "round 4, here 3")

    async def main() -> None:
        async with World(stages=2, servers=2, seed=seed) as world:

            def start_to_lag() -> None:
                for method in ("forward", "backward"):
                    wrap(world, world.head().servers(0)[0], method, lag)

            after_step(world, 2, start_to_lag)
            await world.run_rounds(ROUNDS, limit_s=100)
            recorders = world.recorders.values()
            assert any(e.reason is Reason.AHEAD for r in recorders for e in r.of(MicrobatchRetried)), world.describe()
            assert not [e for r in recorders for e in r.of(HoleRepaired)], "its feeder gave up the round"
            world.verify(world.step())

    run_virtual(main())


def test_a_feeder_that_was_restarted_in_a_round_marks_what_it_sends_as_sent_before(seed: int) -> None:
    """What it sent before its death may count already: a repeat must not spoil the sums of first attempts."""

    async def main() -> None:
        async with World(stages=2, servers=2, microbatches=16, seed=seed) as world:
            seen: dict[int, set[int]] = {}  # round -> attempts from the feeder
            feeder: list[str] = []

            async def note(true: Handle, request: Request[Any]) -> Reply[Any]:
                work = request.header
                if request.sender in feeder[:1] and work.accumulate and work.plan == 0:
                    seen.setdefault(work.at.round, set()).add(work.attempt)
                return await true(request)

            def die(name: str) -> None:
                feeder.append(name)
                world.kill_for(name, 0.02)
                for other in set(world.alive()) - {name}:
                    wrap(world, other, "backward", note)

            world.when(None, MicrobatchStarted, die, since_step=3, count=26)
            await world.run_rounds(ROUNDS, limit_s=100)
            first, *later = sorted(seen)
            assert min(seen[first]) >= 1, f"{seen}\n{world.describe()}"
            assert later and min(min(seen[r]) for r in later) == 0, seen
            world.verify(world.step())

    run_virtual(main())


def test_a_repair_ends_when_one_for_a_newer_plan_comes_and_an_older_one_is_refused(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled: list[int] = []

    async def fill(self: Feeder, where: Any, head: Any, plan: int, hole: Hole) -> None:
        await asyncio.sleep(5)
        filled.append(plan)

    async def main() -> None:
        async with World(stages=2, servers=2, rounds=2, seed=seed) as world:
            await world.run_rounds(2, limit_s=100)
            monkeypatch.setattr(Feeder, "_fill", fill)
            leader = world.peers[world.head().committee[0]]
            (feeder, *_) = (p for p in world.head().feeders() if p != leader._context.me)
            where, calls = leader.history.here(), leader._context.calls

            async def ask(plan: int) -> Any:
                order = Repair(at=where, plan=plan, holes=(Hole(stage=0, microbatch=0, server="v0"),))
                return await leader._context.transport.call(feeder, calls.repair, order, timeout_s=20)

            loop = asyncio.get_running_loop()
            older = asyncio.ensure_future(ask(8))
            await asyncio.sleep(1)
            newer = asyncio.ensure_future(ask(16))
            with pytest.raises(Refused) as refused:
                await older
            assert refused.value.reason is Reason.FROZEN and loop.time() < 300
            with pytest.raises(Refused):
                await ask(8)
            assert (await newer).header.done == 1
            assert filled == [16], "the older one went on"

    run_virtual(main())
