"""Random faults from a seed. `pytest tests/simulation/test_chaos.py --seed N` replays one; every failure prints it."""

from __future__ import annotations

import random

import pytest

from shoal.swarm.simulation.faults import Chaos
from shoal.swarm.simulation.loop import run_virtual
from shoal.swarm.simulation.world import World

ROUNDS = 20
STORMS = 16  # seeds of one run: N, N + 1, …


def storm(number: int) -> None:
    """One run of 20 rounds in bad weather; everything about it is drawn from `number`."""
    rng = random.Random(f"storm {number}")

    async def main() -> None:
        world = World(
            stages=rng.choice((1, 2, 3)),
            servers=rng.choice((2, 2, 3)),
            feeders=rng.choice((1, 2)),
            optimizer=rng.choice(("sgd", "adamw")),
            max_buckets=rng.choice((1, 4)),
            snapshot_every=rng.choice((3, 5, 10)),
            seed=number,
        )
        async with world:
            await Chaos(world, number).run(until_step=ROUNDS - 2, limit_s=120)
            await world.run_rounds(ROUNDS, limit_s=1000)
            world.verify(ROUNDS)

    run_virtual(main())


@pytest.mark.parametrize("offset", range(STORMS))
def test_a_swarm_in_a_storm_equals_the_reference(offset: int, seed: int) -> None:
    print(f"replay: pytest {__file__} -k '[0]' --seed {seed + offset}")
    storm(seed + offset)
