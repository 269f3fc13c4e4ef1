"""Peers that answer and still stand in the way: the run goes on without them, and the result is the same."""

from __future__ import annotations

import asyncio

import pytest

from shoal.protocol.events import LeadershipTaken, MemberDropped, MicrobatchStarted, PeerSuspected, PlanMade, Reason
from shoal.swarm.pipeline.context import Patience
from shoal.swarm.simulation.loop import run_virtual
from shoal.swarm.simulation.world import World

ROUNDS = 20


def test_two_servers_of_a_stage_that_cannot_reach_each_other_do_not_stop_the_run(seed: int) -> None:
    async def main() -> None:
        async with World(seed=seed) as world:
            await world.run_rounds(3)
            one, other = world.head().servers(1)
            world.network.broken.add(frozenset((one, other)))
            await world.run_rounds(ROUNDS, limit_s=2000, everybody=False)
            world.network.broken.clear()  # the one that was left out could not fetch the last state from the other
            await world.run_rounds(ROUNDS, limit_s=200)
            leaders = world.recorders.values()
            suspected = [e for r in leaders for e in r.of(PeerSuspected) if e.reason is Reason.OBSTRUCTS]
            dropped = [e for r in leaders for e in r.of(MemberDropped) if e.reason is Reason.OBSTRUCTS]
            assert {e.peer for e in suspected} & {one, other} and dropped, world.describe()
            world.verify(ROUNDS)

    run_virtual(main())


@pytest.mark.parametrize("victim", ["v0", "v1", "v2", "v3", "c"])
def test_a_peer_whose_disk_is_full_ends_and_the_others_go_on(victim: str, seed: int) -> None:
    async def main() -> None:
        async with World(seed=seed) as world:
            await world.run_rounds(3)
            world.stores[victim].full = True
            await world.run_rounds(ROUNDS, limit_s=2000)
            assert victim not in world.alive(), world.describe()
            world.verify(ROUNDS)

    run_virtual(main())


def test_when_the_only_feeder_dies_a_newcomer_with_data_is_let_in(seed: int) -> None:
    async def main() -> None:
        world = World(feeders=1, has_data=lambda name: name in ("v0", "late"), seed=seed)
        async with world:
            world.kill("v0", at=MicrobatchStarted, count=15)
            await world.run_rounds(3)
            await asyncio.sleep(60)
            assert "v0" not in world.alive() and world.step() < ROUNDS, world.describe()
            world.start("late")
            await world.run_rounds(ROUNDS, limit_s=2000)
            world.verify(ROUNDS)

    run_virtual(main())


def test_two_leaders_at_a_time_do_not_keep_each_other_from_deciding(seed: int) -> None:
    """Rounds that take longer than a leader is given: others take over while it works."""

    async def main() -> None:
        patience = Patience(
            floor_s=0.2, work_s=5.0, freeze_s=2.0, reduce_s=8.0, paxos_s=1.0, ping_s=0.3, pong_s=0.3, round_s=2.0
        )
        async with World(compute_s=0.4, patience=patience, rounds=8, seed=seed) as world:
            await world.run_rounds(8, limit_s=2000)
            took = [e for r in world.recorders.values() for e in r.of(LeadershipTaken) if e.rank > 0]
            plans = [e.plan for r in world.recorders.values() for e in r.of(PlanMade)]
            assert took, f"nobody took over\n{world.describe()}"
            assert max(plans) < 8 * 200, f"plan numbers ran away: {max(plans)}"
            world.verify(8)

    run_virtual(main())


def test_a_peer_that_lost_its_disk_and_kept_its_key_leaves_and_comes_back_before_it_votes(seed: int) -> None:
    async def main() -> None:
        async with World(seed=seed) as world:
            await world.run_rounds(3)
            victim = next(p for p in world.head().committee if p != "c")
            since = world.head().member(victim)
            assert since is not None
            world.kill_now(victim)
            del world.disks[victim]
            world.start(victim)
            await world.run_rounds(ROUNDS, limit_s=2000)
            again = world.head().member(victim)
            assert again is not None and again.since > since.since, world.describe()
            world.verify(ROUNDS)

    run_virtual(main())


def test_a_coordinator_that_lost_its_disk_does_not_begin_a_second_history(seed: int) -> None:
    async def main() -> None:
        async with World(seed=seed) as world:
            await world.run_rounds(3)
            world.kill_now("c")
            del world.disks["c"]
            world.start("c", forgetful=True)
            await world.run_rounds(ROUNDS, limit_s=2000)
            world.verify(ROUNDS)

    run_virtual(main())
