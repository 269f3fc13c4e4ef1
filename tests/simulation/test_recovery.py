"""What a swarm comes back from: everything down, a stage lost for good, newcomers, replicas that drifted."""

from __future__ import annotations

import asyncio
import random

import pytest

from shoal.protocol.events import (
    BackwardServed,
    EntryDecided,
    ReplicaDrift,
    SnapshotWritten,
    StepApplied,
    SyncFinished,
)
from shoal.swarm.simulation.loop import run_virtual
from shoal.swarm.simulation.world import World

ROUNDS = 20


def kinds(world: World) -> list[str]:
    chain = world.peers[world.alive()[0]].history.chain
    return [chain.entry(r).decision.kind for r in range(len(chain))]


@pytest.mark.parametrize("draw", range(8))
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_swarm_that_is_shut_off_whole_goes_on_from_its_disks(optimizer: str, draw: int, seed: int) -> None:
    async def main() -> None:
        rng = random.Random(f"{seed} {draw}")
        stages, servers = 1 + draw % 3, 1 + draw % 2
        async with World(stages=stages, servers=servers, optimizer=optimizer, seed=seed + draw) as world:
            await world.run_rounds(1 + rng.randrange(15), limit_s=200)
            await asyncio.sleep(rng.uniform(0, 0.5))
            before = world.head()
            for name in world.alive():
                world.kill_now(name)
            await asyncio.sleep(10)
            for name in list(world.network.peers):
                world.start(name)
            await world.run_rounds(ROUNDS, limit_s=400)
            after = world.peers[world.alive()[0]].history.chain.entry(before.round)
            assert after == before, f"the log lost an entry\n{world.describe()}"
            assert "rollback" not in kinds(world), world.describe()
            world.verify(ROUNDS)

    run_virtual(main())


@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize(("step", "goes_back_to"), [(3, 0), (8, 5), (13, 10)])
def test_a_stage_whose_copies_all_die_after_the_decision_is_computed_again_from_the_pinned_snapshot(
    step: int, goes_back_to: int, servers: int, seed: int
) -> None:
    async def main() -> None:
        async with World(stages=2, servers=servers, seed=seed) as world:

            def all_die(_: str) -> None:
                for name in world.head().servers(1):
                    if world.network.peers[name].alive:
                        world.kill_for(name, 1.0, successor=f"{name}-new")

            world.when(None, EntryDecided, all_die, kind="commit", step=step)
            await world.run_rounds(ROUNDS, limit_s=400)
            chain = world.peers[world.alive()[0]].history.chain
            entries = [chain.entry(r) for r in range(len(chain))]
            back = [e for e in entries if e.decision.kind == "rollback"]
            assert [e.step for e in back] == [goes_back_to], f"{kinds(world)}\n{world.describe()}"
            world.verify(ROUNDS)

    run_virtual(main())


def test_the_only_server_may_die_at_the_entry_that_pins_its_snapshot(seed: int) -> None:
    """The log never goes back to a snapshot that only the dead held: the older pin stays until there are two copies."""

    async def main() -> None:
        async with World(stages=3, servers=1, seed=seed) as world:

            def server_dies(_: str) -> None:
                world.kill_for(world.head().servers(0)[0], 1.0, successor="new")

            world.when(None, EntryDecided, server_dies, kind="commit", step=6)
            await world.run_rounds(ROUNDS, limit_s=400)
            assert "rollback" in kinds(world), world.describe()
            world.verify(ROUNDS)

    run_virtual(main())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_late_joiner_catches_up_from_a_snapshot_and_gradients_and_then_works(optimizer: str, seed: int) -> None:
    async def main() -> None:
        async with World(stages=2, servers=2, optimizer=optimizer, seed=seed) as world:
            world.when(None, EntryDecided, lambda _: world.start("late"), kind="commit", step=8)
            await world.run_rounds(ROUNDS, limit_s=400)
            late = world.recorders["late"]
            finished = late.of(SyncFinished)
            assert finished and finished[0].step >= 8 and finished[0].donors >= 1, world.describe()
            sources = {event.source for event in late.of(StepApplied)}
            assert "fetched" in sources, f"no gradient was replayed\n{world.describe()}"
            assert min(event.step for event in late.of(StepApplied)) > 5, "it did not start from the snapshot of step 5"
            assert any(event.accumulated for event in late.of(BackwardServed)), f"it never worked\n{world.describe()}"
            world.verify(ROUNDS)

    run_virtual(main())


@pytest.mark.parametrize("victim", ["v0", "v1", "v2", "v3"])
def test_a_replica_that_drifted_is_replaced_by_the_canonical_state(victim: str, seed: int) -> None:
    drift = 1e-12  # as another processor's rounding: far below the tolerance, but not bit-equal

    async def main() -> None:
        async with World(stages=2, servers=2, seed=seed) as world:

            def corrupt(_: str) -> None:
                program = world.peers[victim].server.program
                assert program is not None
                state = program.state()
                name = next(n for n in state if n.startswith("parameter."))
                state[name] = state[name] + drift
                program.load_state(state)

            world.when(victim, StepApplied, corrupt, step=8)
            await world.run_rounds(ROUNDS, limit_s=400)
            drifts = [event for recorder in world.recorders.values() for event in recorder.of(ReplicaDrift)]
            assert len(drifts) == 1, f"{drifts}\n{world.describe()}"
            assert drifts[0].step == 10 and 0 < drifts[0].max_abs < 1e-9, drifts
            for stage in (0, 1):
                programs = [world.peers[name].server.program for name in world.head().servers(stage)]
                digests = {program.digest() for program in programs if program is not None}
                assert len(programs) == 2 and len(digests) == 1, f"replicas differ\n{world.describe()}"
            world.verify(ROUNDS)

    run_virtual(main())


def test_snapshots_are_written_at_the_steps_that_the_manifest_names(seed: int) -> None:
    async def main() -> None:
        async with World(stages=2, servers=2, snapshot_every=5, seed=seed) as world:
            await world.run_rounds(ROUNDS, limit_s=200)
            await asyncio.sleep(5)
            for name in ("v0", "v1", "v2", "v3"):
                assert [e.step for e in world.recorders[name].of(SnapshotWritten)] == [5, 10, 15, 20], world.describe()

    run_virtual(main())
