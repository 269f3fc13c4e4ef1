"""A state that is none: on the own disk, pinned by the log, or gone to infinity. No node dies of it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.protocol.blobs import BlobStore, encode_state
from shoal.protocol.events import EntryDecided, Problem, Reason, SnapshotWritten, StepApplied
from shoal.protocol.transport import Refused
from shoal.swarm.pipeline import state
from shoal.swarm.pipeline.collect import collect_states
from shoal.swarm.simulation.loop import run_virtual
from shoal.swarm.simulation.world import COORDINATOR, World

ROUNDS = 20


def not_safetensors(_: Any) -> bytes:
    return b"garbage"


def not_finite(tensors: Any) -> bytes:
    return encode_state({k: t * torch.nan if t.is_floating_point() else t for k, t in tensors.items()})


def of_another_model(_: Any) -> bytes:
    return encode_state({"step": torch.tensor(5), "parameter.other": torch.zeros(3)})


BAD = [not_safetensors, not_finite, of_another_model]


@pytest.mark.parametrize("bad", BAD, ids=lambda f: f.__name__)
def test_a_node_survives_a_pinned_state_that_is_none_and_loads_the_next_one(
    bad: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forged(tensors: dict[str, Tensor]) -> bytes:
        return bad(tensors) if int(tensors["step"]) == 5 else encode_state(tensors)

    monkeypatch.setattr(state, "encode_state", forged)

    async def main() -> None:
        async with World(stages=2, servers=2, seed=seed) as world:
            world.when(None, EntryDecided, lambda _: world.start("late"), kind="commit", step=7)
            await world.run_rounds(ROUNDS, limit_s=400)
            reasons = {event.reason for event in world.recorders["late"].of(Problem)}
            assert reasons & {Reason.MALFORMED, Reason.NOT_FINITE}, f"it never met the state\n{world.describe()}"
            world.verify(ROUNDS)

    run_virtual(main())


@pytest.mark.parametrize("bad", BAD, ids=lambda f: f.__name__)
def test_a_snapshot_on_the_own_disk_that_is_no_state_is_deleted_and_the_state_made_from_an_older_one(
    bad: Any, seed: int
) -> None:
    async def main() -> None:
        async with World(stages=2, servers=2, seed=seed) as world:

            def all_die(_: str) -> None:
                for name in world.alive():
                    world.kill_now(name)

            world.when("v0", SnapshotWritten, all_die, step=10)
            while world.alive():  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            written = world.recorders["v0"].of(SnapshotWritten)[-1]
            disk = world.disks["v0"]
            digest = await BlobStore(disk).put(bad(world.build(written.stage).state()))
            (key,) = [k for k in disk.keys("snapshot/") if f"{10:012d}" in k]
            record = json.loads(await disk.get(key) or b"")
            await disk.put(key, json.dumps({**record, "digest": digest}).encode())
            for name in list(world.network.peers):
                world.start(name)
            await world.run_rounds(ROUNDS, limit_s=400)
            reasons = {event.reason for event in world.recorders["v0"].of(Problem)}
            assert reasons & {Reason.MALFORMED, Reason.NOT_FINITE}, f"it was not used\n{world.describe()}"
            assert not BlobStore(disk).has(digest), "it is still there"
            world.verify(ROUNDS)

    run_virtual(main())


@pytest.mark.parametrize("bad", BAD, ids=lambda f: f.__name__)
def test_whoever_collects_the_whole_state_is_told_that_a_pinned_one_is_none(
    bad: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "encode_state", bad)

    async def main() -> None:
        async with World(stages=2, servers=2, rounds=8, seed=seed) as world:
            await world.run_rounds(8, limit_s=100)
            peer = world.peers[COORDINATOR]
            assert peer.history.head.pin is not None, world.describe()
            with pytest.raises(Refused) as refused:
                await collect_states(peer._context, peer.history.chain, world.build)
            assert refused.value.reason in (Reason.MALFORMED, Reason.NOT_FINITE)

    run_virtual(main())


def test_a_state_that_is_not_finite_is_told_and_never_kept(seed: int) -> None:
    async def main() -> None:
        async with World(stages=2, servers=2, seed=seed) as world:

            def overflow(name: str) -> None:
                program = world.peers[name].server.program
                assert program is not None
                with torch.no_grad():
                    next(iter(program.module.parameters())).fill_(torch.inf)

            world.when("v0", StepApplied, overflow, step=5)
            await world.run_rounds(8, limit_s=400)
            told = world.recorders["v0"]
            assert [e.reason for e in told.of(Problem)].count(Reason.NOT_FINITE) >= 1, world.describe()
            assert 5 not in [e.step for e in told.of(SnapshotWritten)], "it was kept"

    run_virtual(main())
