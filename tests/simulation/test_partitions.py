"""Of the sides of a partition at most one goes on; after healing there is one history, and it equals the reference."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from shoal.protocol.events import WaitingForQuorum
from shoal.swarm.simulation.loop import run_virtual
from shoal.swarm.simulation.world import World

ROUNDS = 20
Cut = Callable[[World, random.Random], list[set[str]]]


def _shuffled(world: World, rng: random.Random) -> list[str]:
    names = sorted(world.network.peers)
    rng.shuffle(names)
    return names


def in_two(world: World, rng: random.Random) -> list[set[str]]:
    names = _shuffled(world, rng)
    return [set(names[: len(names) // 2]), set(names[len(names) // 2 :])]


def in_three(world: World, rng: random.Random) -> list[set[str]]:
    names = _shuffled(world, rng)
    return [set(names[i::3]) for i in range(3)]


def committee_split(world: World, rng: random.Random) -> list[set[str]]:
    """Every member of the committee alone with some others: no side has a majority."""
    committee = list(world.head().committee)
    others = [name for name in _shuffled(world, rng) if name not in committee]
    return [{member, *others[i :: len(committee)]} for i, member in enumerate(committee)]


def leader_alone(world: World, rng: random.Random) -> list[set[str]]:
    names = set(world.network.peers)
    leaders = [name for name in sorted(names) if world.peers[name].leader.leading is not None]
    alone = (leaders or [world.head().committee[0]])[0]
    return [{alone}, names - {alone}]


CUTS: dict[str, Cut] = {f.__name__: f for f in (in_two, in_three, committee_split, leader_alone)}
# (stages, servers per stage): the first is four peers, cut 2/2
SWARMS = ((1, 3), (2, 2), (3, 1))


def rounds_of(world: World, side: set[str]) -> int:
    return max(world.peers[name].history.head.round for name in side)


@pytest.mark.parametrize("draw", range(2))
@pytest.mark.parametrize(("stages", "servers"), SWARMS)
@pytest.mark.parametrize("cut", CUTS)
def test_at_most_one_side_goes_on_and_one_history_remains(
    cut: str, stages: int, servers: int, draw: int, seed: int
) -> None:
    async def main() -> None:
        rng = random.Random(f"{seed} {draw} {cut}")
        async with World(stages=stages, servers=servers, seed=seed + draw) as world:
            await world.run_rounds(1 + rng.randrange(8), limit_s=100)
            await asyncio.sleep(rng.uniform(0, 0.5))
            sides = CUTS[cut](world, rng)
            before = [rounds_of(world, side) for side in sides]
            world.partition(*sides)
            await asyncio.sleep(15)
            gained = [rounds_of(world, side) - was for side, was in zip(sides, before, strict=True)]
            # an entry that was chosen before the cut may be finished, or caught up with, behind it: one, not two
            going_on = [side for side, rounds in zip(sides, gained, strict=True) if rounds > 1]
            assert len(going_on) <= 1, f"{gained}\n{world.describe()}"
            if cut == "committee_split" and len(sides) > 1:
                assert not going_on, f"{gained}\n{world.describe()}"
            world.heal()
            await world.run_rounds(ROUNDS, limit_s=1000)
            world.verify(ROUNDS)

    run_virtual(main())


def test_without_a_majority_the_run_says_that_it_waits(seed: int) -> None:
    async def main() -> None:
        async with World(stages=2, servers=2, seed=seed) as world:
            await world.run_rounds(5, limit_s=100)
            world.partition(*committee_split(world, random.Random(seed)))
            await asyncio.sleep(30)
            waits = [e for r in world.recorders.values() for e in r.of(WaitingForQuorum)]
            assert waits, world.describe()
            world.heal()
            await world.run_rounds(ROUNDS, limit_s=1000)
            world.verify(ROUNDS)

    run_virtual(main())


@pytest.mark.parametrize("draw", range(6))
def test_partitions_that_come_and_go_change_nothing(draw: int, seed: int) -> None:
    async def main() -> None:
        rng = random.Random(f"{seed} {draw}")
        async with World(stages=1 + draw % 3, servers=1 + draw // 2 % 3, seed=seed + draw) as world:
            while world.step() < ROUNDS:
                await asyncio.sleep(rng.uniform(0, 1))
                world.partition(*CUTS[rng.choice(("in_two", "in_three", "leader_alone"))](world, rng))
                await asyncio.sleep(rng.uniform(0, 3))
                world.heal()
                await asyncio.sleep(rng.uniform(0.3, 2))
                assert asyncio.get_running_loop().time() < 1000, world.describe()
            await world.run_rounds(ROUNDS, limit_s=1000)
            world.verify(ROUNDS)

    run_virtual(main())
