"""Swarms of every shape without faults, and with links and machines that are merely bad, equal the one machine."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from shoal.protocol.events import MicrobatchRetried, Phase, Reason, ReduceStarted, WorkArrived
from shoal.swarm.simulation.loop import run_virtual
from shoal.swarm.simulation.network import Link, Moment
from shoal.swarm.simulation.world import COORDINATOR, World

ROUNDS = 20
SHAPES = tuple(itertools.product((1, 2, 3), (1, 2, 3), (1, 2), ("sgd", "adamw")))

BAD_LINKS = {
    "requests get lost": Link(lose_request=0.1),
    "replies get lost after the work was done": Link(lose_reply=0.1),
    "requests arrive twice": Link(duplicate=0.3),
    "requests overtake one another": Link(latency_s=(0.001, 0.5)),
    "all of it": Link(latency_s=(0.001, 0.3), lose_request=0.05, lose_reply=0.05, duplicate=0.1),
}


@pytest.mark.parametrize(("stages", "servers", "feeders", "optimizer"), SHAPES)
def test_a_swarm_without_faults_equals_the_reference(
    stages: int, servers: int, feeders: int, optimizer: str, seed: int
) -> None:
    async def main() -> None:
        async with World(stages=stages, servers=servers, feeders=feeders, optimizer=optimizer, seed=seed) as world:
            await world.run_rounds(ROUNDS, limit_s=200)
            world.verify(ROUNDS)
            retries = [e for r in world.recorders.values() for e in r.of(MicrobatchRetried)]
            retries = [e for e in retries if e.reason is not Reason.NOT_READY]  # while servers initialise
            assert not retries, f"retries without a fault: {retries}\n{world.describe()}"

    run_virtual(main())


@pytest.mark.parametrize("max_buckets", [1, 4])
@pytest.mark.parametrize("link", BAD_LINKS)
@pytest.mark.parametrize("draw", range(2))
def test_bad_links_change_nothing_whatever_memory_servers_have(
    link: str, max_buckets: int, draw: int, seed: int
) -> None:
    async def main() -> None:
        async with World(
            stages=2 + draw, servers=2, seed=seed + draw, link=BAD_LINKS[link], max_buckets=max_buckets
        ) as world:
            await world.run_rounds(ROUNDS, limit_s=1000)
            world.verify(ROUNDS)

    run_virtual(main())


def test_a_slow_peer_slows_its_share_and_changes_nothing(seed: int) -> None:
    async def main() -> None:
        async with World(stages=2, servers=2, seed=seed) as world:
            world.network.slow["v1"] = 0.4
            await world.run_rounds(ROUNDS, limit_s=1000)
            world.verify(ROUNDS)

    run_virtual(main())


@pytest.mark.parametrize("seconds", [0.5, 5.0, 60.0])
@pytest.mark.parametrize("where", ["feeder", "server", "leader", "reducer", "coordinator"])
def test_a_peer_that_hangs_and_comes_back_changes_nothing(where: str, seconds: float, seed: int) -> None:
    async def main() -> None:
        async with World(stages=2, servers=2, seed=seed) as world:

            def hang(peer: str) -> None:
                world.hang_for(COORDINATOR if where == "coordinator" else peer, seconds)

            if where == "leader":
                world.when_called("reduce", Moment.DELIVERED, hang, since_step=5)
            elif where == "reducer":
                world.when(None, ReduceStarted, hang, since_step=5)
            elif where == "feeder":
                world.when_called("backward", Moment.SENT, hang, since_step=5)
            else:
                world.when(None, WorkArrived, hang, since_step=5, phase=Phase.BACKWARD)
            await world.run_rounds(ROUNDS, limit_s=1000)
            assert any("hang" in fault for _, fault in world.faults)
            await asyncio.sleep(seconds)  # virtual: whoever hung has woken up, and wakes up in a world that went on
            await world.run_rounds(ROUNDS, limit_s=1000)
            world.verify(ROUNDS)

    run_virtual(main())
