"""Break the code on purpose, as little as possible: the equivalence check must fail each time, far above its tolerance.

Most mutations hit microbatch 0 of the last round, so the damage can be compared with the tripwire of the reference
(the same microbatch left out on one machine).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import Tensor

from shoal.protocol import allreduce, paxos
from shoal.protocol.events import BackwardServed
from shoal.swarm.pipeline import acceptor, decide
from shoal.swarm.pipeline.feeder import Feeder
from shoal.swarm.pipeline.ledger import Ledger
from shoal.swarm.pipeline.plan import StagePlan, plan_stage
from shoal.swarm.pipeline.server import StageServer
from shoal.swarm.reference import ReferenceResult, max_abs_difference, parameters_of
from shoal.swarm.simulation.faults import Called, Fate, Victim, kill_at
from shoal.swarm.simulation.loop import run_virtual
from shoal.swarm.simulation.network import Link, Moment
from shoal.swarm.simulation.world import TOLERANCE, World

ROUNDS = 20
LAST = ROUNDS - 1  # steps before the last round


class Outcome:
    """What a mutated swarm ended with."""

    def __init__(self, world: World) -> None:
        self.difference = world.difference()
        self.reference: Callable[..., ReferenceResult] = world.reference
        self.tripwire = world.reference(ROUNDS, tripwire=True).tripwire or 0.0
        self.parameters = world.parameters()
        self.story = world.describe()
        try:
            world.verify(ROUNDS)
            self.noticed = False
        except AssertionError as error:
            self.noticed = "differ from the reference" in str(error)

    def difference_to(self, **faults: Any) -> float:
        wanted = parameters_of(self.reference(ROUNDS, **faults).states)
        return max(max_abs_difference(mine, wanted) for mine in self.parameters)


def run(seed: int, link: Link | None = None, prepare: Callable[[World], None] = lambda world: None) -> Outcome:
    async def main() -> Outcome:
        async with World(stages=2, servers=2, seed=seed, link=link) as world:
            prepare(world)
            await world.run_rounds(ROUNDS, limit_s=400)
            return Outcome(world)

    return run_virtual(main())


def test_unchanged_code_passes_and_the_tripwire_is_far_above_the_tolerance(seed: int) -> None:
    outcome = run(seed)
    assert outcome.difference <= TOLERANCE and not outcome.noticed, outcome.story
    assert outcome.tripwire > 1e5 * TOLERANCE, f"tripwire {outcome.tripwire}"


def _skip_accumulation(monkeypatch: pytest.MonkeyPatch, stages: Sequence[int]) -> None:
    """The feeder asks for microbatch 0 of the last round without accumulating it, and reports it done."""
    original = Feeder._backward

    async def backward(self: Feeder, where: Any, known: Any, microbatch: int, stage: int, *, accumulate: bool) -> None:
        lose = self._history.head.step == LAST and microbatch == 0 and stage in stages
        await original(self, where, known, microbatch, stage, accumulate=accumulate and not lose)

    monkeypatch.setattr(Feeder, "_backward", backward)


def test_a_microbatch_that_a_feeder_forgot_is_a_hole_and_is_repaired(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    _skip_accumulation(monkeypatch, (0, 1))
    outcome = run(seed)
    assert outcome.difference <= TOLERANCE and not outcome.noticed, outcome.story


@pytest.mark.parametrize("stages", [(0,), (1,), (0, 1)])
def test_a_lost_microbatch_is_noticed(stages: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    _skip_accumulation(monkeypatch, stages)

    def plan_without_holes(*args: Any) -> StagePlan:
        plan = plan_stage(*args)
        return StagePlan(plan.stage, plan.chosen, (), plan.discard, plan.wasted, plan.loss_sum)

    monkeypatch.setattr(decide, "plan_stage", plan_without_holes)
    outcome = run(seed)
    assert outcome.noticed, outcome.story
    assert outcome.difference > 1e4 * TOLERANCE, f"{outcome.difference}\n{outcome.story}"
    if stages == (0, 1):  # exactly the fault of the tripwire
        assert outcome.difference == pytest.approx(outcome.tripwire, rel=1e-6), outcome.story
        assert outcome.difference_to(drop_microbatch=(LAST, 0)) <= TOLERANCE, outcome.story


def test_a_microbatch_added_twice_is_noticed(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Every request comes twice, and a server that has microbatch 0 in its ledger adds the repeat once more."""
    holds = Ledger.holds
    steps: list[int] = [0]

    def forgets(self: Ledger, microbatch: int) -> bool:
        return holds(self, microbatch) and not (steps[0] == LAST and microbatch == 0)

    def watch(world: World) -> None:
        world.when(None, BackwardServed, lambda _: steps.__setitem__(0, LAST), since_step=LAST)

    monkeypatch.setattr(Ledger, "holds", forgets)
    outcome = run(seed, Link(duplicate=1.0), watch)
    assert outcome.noticed, outcome.story
    assert outcome.difference > 1e4 * TOLERANCE, f"{outcome.difference}\n{outcome.story}"


def test_repeats_alone_are_not_added(seed: int) -> None:
    outcome = run(seed, Link(duplicate=1.0))
    assert outcome.difference <= TOLERANCE and not outcome.noticed, outcome.story


def test_a_partial_reduction_is_noticed(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Reducers leave out the last contributor once, and tell everybody the same incomplete sum."""
    original = allreduce._sum_encoded
    partial: list[str] = []

    def drop_last(plan: Any, numel: int, bodies: Sequence[bytes]) -> tuple[bytes, list[bytes]]:
        result, digests = original(plan, numel, bodies)
        givers = [i for i, weight in enumerate(plan.weights) if weight]
        if plan.round > ROUNDS // 2 and len(givers) > 1 and (not partial or partial[0] == plan.key):
            partial.append(plan.key)
            some = plan.model_copy(
                update={"weights": tuple(0.0 if i == givers[-1] else w for i, w in enumerate(plan.weights))}
            )
            result, _ = original(some, numel, bodies)
        return result, digests

    monkeypatch.setattr(allreduce, "_sum_encoded", drop_last)
    outcome = run(seed)
    assert partial, outcome.story
    assert outcome.noticed, outcome.story
    assert outcome.difference > 1e4 * TOLERANCE, f"{outcome.difference}\n{outcome.story}"


def test_a_gradient_applied_twice_is_noticed(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    original = StageServer.apply

    async def twice(self: StageServer, gradient: Tensor, samples: int, origin: str) -> None:
        assert self.program is not None
        if self.step == LAST:
            self.program.apply(gradient, samples)
        await original(self, gradient, samples, origin)

    monkeypatch.setattr(StageServer, "apply", twice)
    outcome = run(seed)
    assert outcome.noticed, outcome.story
    assert outcome.difference > 1e4 * TOLERANCE, outcome.story


@pytest.mark.parametrize("durable", [True, False])
def test_an_acceptor_that_forgets_its_votes_makes_two_histories_and_is_noticed(
    durable: bool, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """A leader dies when it alone knows what was decided: votes that are kept make its successor decide the same."""

    async def forgets(self: acceptor.Acceptor, where: Any) -> paxos.AcceptorState:
        return paxos.AcceptorState()

    if not durable:
        monkeypatch.setattr(acceptor.Acceptor, "state", forgets)

    async def main() -> int:
        async with World(stages=1, servers=3, seed=seed) as world:
            died = kill_at(world, Called("learn", Moment.SENT), Victim.SELF, Fate.REPLACED, since_step=5)
            await world.run_rounds(ROUNDS, limit_s=400)
            assert died, world.describe()
            return max(len(digests) for digests in world.entries().values())

    assert run_virtual(main()) == (1 if durable else 2)
