"""Who asks to be let in is heard as long as it asks; strangers cannot fill the books of a peer."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from shoal.protocol.events import EntryDecided
from shoal.swarm.pipeline.messages import Join
from shoal.swarm.simulation.loop import run_virtual
from shoal.swarm.simulation.network import SimTransport
from shoal.swarm.simulation.world import COORDINATOR, World


async def ask(world: World, name: str, *, leave: bool = False) -> None:
    """As a volunteer does that says this once and is not heard of again."""
    calls = world.peers[COORDINATOR]._context.calls
    transport = SimTransport(world.network, name)
    await transport.call(COORDINATOR, calls.join, Join(run=world.spec.run, leave=leave), b"record", timeout_s=1)
    transport.kill()


def alone(seed: int) -> World:
    """Volunteers do not come by themselves: the first round waits for them."""
    world = World(stages=2, servers=2, seed=seed)
    world._volunteers = 0
    return world


def test_a_joiner_that_stops_asking_is_forgotten_and_one_that_goes_on_is_not(seed: int) -> None:
    async def main() -> None:
        async with alone(seed) as world:
            silence_s = 8 * world.patience.ping_s
            await asyncio.sleep(1)
            peer = world.peers[COORDINATOR]
            await ask(world, "gone")
            for _ in range(12):
                await ask(world, "stays")
                await asyncio.sleep(silence_s / 6)
            assert set(peer.joiners()) == {"stays"}
            await asyncio.sleep(silence_s)
            assert not peer.joiners()

    run_virtual(main())


def test_a_joiner_that_died_while_the_run_waited_is_not_admitted(seed: int) -> None:
    async def main() -> None:
        async with alone(seed) as world:
            await asyncio.sleep(1)
            await ask(world, "gone")
            await asyncio.sleep(9 * world.patience.ping_s)
            for i in range(4):
                world.start(f"v{i}")
            await world.run_rounds(3, limit_s=60)
            chain = world.peers[COORDINATOR].history.chain
            assert all(chain.entry(r).member("gone") is None for r in range(len(chain))), world.describe()

    run_virtual(main())


def test_strangers_fill_neither_the_list_of_joiners_nor_that_of_leavers(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[str] = []

    def learn(self: Any, peer: str, maddrs: tuple[str, ...]) -> None:
        learned.append(peer)

    async def main() -> None:
        async with alone(seed) as world:
            world.spec = dataclasses.replace(world.spec, shape=dataclasses.replace(world.spec.shape, max_peers=3))
            world.kill_now(COORDINATOR)
            world.start(COORDINATOR)
            await asyncio.sleep(1)
            monkeypatch.setattr(SimTransport, "learn_address", learn)
            peer = world.peers[COORDINATOR]
            for i in range(9):
                await ask(world, f"s{i}", leave=True)
            assert not peer._leaving and not learned
            for i in range(9):
                await ask(world, f"s{i}")
            assert set(peer.joiners()) == set(learned) == {"s0", "s1", "s2"}
            await asyncio.sleep(6 * world.patience.ping_s)
            await ask(world, "s1")  # there is always room for who is on the list
            await asyncio.sleep(6 * world.patience.ping_s)
            assert set(peer.joiners()) == {"s1"}

    run_virtual(main())


def test_a_member_that_says_goodbye_is_left_out(seed: int) -> None:
    async def main() -> None:
        async with World(stages=2, servers=2, seed=seed) as world:
            asked: list[asyncio.Task[bool]] = []

            def goodbye(_: str) -> None:
                asked.append(asyncio.ensure_future(world.peers["v3"].leave(30)))

            world.when(None, EntryDecided, goodbye, kind="commit", step=3)
            await world.run_rounds(6, limit_s=60)
            assert await asked[0] and world.head().member("v3") is None, world.describe()

    run_virtual(main())
