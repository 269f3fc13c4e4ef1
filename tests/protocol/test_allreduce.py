"""The all-reduce over an in-memory transport, under a virtual clock: no threads, no real waiting, one order."""

from __future__ import annotations

import asyncio
import math
import random
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from shoal.protocol import allreduce, events
from shoal.protocol.allreduce import AllReduce, PartRequest, ReduceFailed, ReducePlan, split_by_shares
from shoal.protocol.codecs import decode, encode
from shoal.protocol.events import Reason
from shoal.protocol.transport import Refused, Reply, Request, Unanswered
from tests.protocol.allreduce_world import (
    Network,
    Node,
    Swarm,
    bits,
    contributions,
    failures,
    in_plan_order,
    inline,
    run,
)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 256 values, so that small vectors travel in many."""
    monkeypatch.setattr(allreduce, "CHUNK_VALUES", 256)


# --- complete --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("numel", [0, 1, 5, 3_001])
def test_everyone_gets_the_sum_in_plan_order_bit_for_bit(small_chunks, n, numel):
    swarm, x = Swarm(n), contributions(n, numel)
    outcomes = run(swarm.reduce(swarm.plan(numel), x))
    assert {bits(outcome) for outcome in outcomes} == {bits(in_plan_order(x))}


@pytest.mark.parametrize("codec", ["none", "fp16", "blockwise8"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_all_members_end_bit_equal_under_every_codec(small_chunks, codec, dtype):
    swarm, x = Swarm(3), contributions(3, 2_000, allreduce.DTYPES[dtype])
    outcomes = run(swarm.reduce(swarm.plan(2_000, codec=codec, dtype=dtype, shares=[1, 2, 0.5]), x))
    assert len({bits(outcome) for outcome in outcomes}) == 1
    exact, got = in_plan_order([c.double() for c in x]), outcomes[0].double()
    assert (got - exact).norm() <= {"none": 1e-6, "fp16": 1e-3, "blockwise8": 5e-2}[codec] * exact.norm()
    assert outcomes[0].dtype == allreduce.DTYPES[dtype]


def test_weights_scale_and_a_member_of_weight_zero_only_receives(small_chunks):
    swarm, x = Swarm(3), contributions(3, 1_000)
    plan = swarm.plan(1_000, weights=(0.5, 0.0, -2.0))
    outcomes = run(swarm.reduce(plan, [x[0], None, x[2]]))
    assert {bits(outcome) for outcome in outcomes} == {bits(x[0] * 0.5 + x[2] * -2.0)}
    assert not any(size for sender, _, _, size in swarm.network.calls if sender == "peer1")


def test_a_share_of_zero_reduces_nothing(small_chunks):
    swarm, x = Swarm(3), contributions(3, 1_000)
    outcomes = run(swarm.reduce(swarm.plan(1_000, shares=[1, 0, 3]), x))
    assert {bits(outcome) for outcome in outcomes} == {bits(in_plan_order(x))}
    assert {receiver for _, receiver, _, _ in swarm.network.calls} == {"peer0", "peer2"}


def test_members_that_learn_of_the_plan_at_different_times_still_meet(small_chunks):
    swarm, x = Swarm(3), contributions(3, 2_000)
    outcomes = run(swarm.reduce(swarm.plan(2_000), x, delays_s=[0, 3.0, 1.0]))
    assert {bits(outcome) for outcome in outcomes} == {bits(in_plan_order(x))}


def test_a_part_never_has_more_calls_under_way_than_the_plan_allows(small_chunks):
    swarm, x = Swarm(2), contributions(2, 20_000)
    under_way: dict[tuple[str, str], int] = {}
    most: list[int] = []

    async def before(sender: str, receiver: str, header: PartRequest) -> None:
        under_way[sender, receiver] = under_way.get((sender, receiver), 0) + 1
        most.append(under_way[sender, receiver])

    async def after(sender: str, receiver: str, header: PartRequest) -> None:
        under_way[sender, receiver] -= 1

    swarm.network.before, swarm.network.after = before, after
    plan = swarm.plan(20_000)
    outcomes = run(swarm.reduce(plan, x))
    assert bits(outcomes[0]) == bits(in_plan_order(x))
    assert max(most) == plan.calls_per_part() == 4
    assert len(swarm.network.calls) == 4 * plan.chunks(0) == 160


def test_events_tell_the_story_once(small_chunks):
    swarm, x = Swarm(2), contributions(2, 3_000)
    run(swarm.reduce(swarm.plan(3_000, round=4, plan=1, stage=2), x))
    started, served, timed = swarm.events["peer1"]
    assert started == events.ReduceStarted(4, 1, 2, members=2)
    assert served == events.ReducePartServed(4, 1, 2)
    assert isinstance(timed, events.OperationTimed) and timed.phase is events.Phase.REDUCE and timed.seconds > 0


def test_the_same_run_twice_makes_the_same_calls_in_the_same_order(small_chunks):
    def record() -> list[tuple[str, str, int, int]]:
        swarm = Swarm(4)
        run(swarm.reduce(swarm.plan(6_000), contributions(4, 6_000), delays_s=[0, 0.3, 0.1, 0]))
        return swarm.network.calls

    assert record() == record()


def test_it_works_on_a_real_loop_with_real_threads():
    async def main() -> list[Tensor]:
        network, x = Network(latency_s=0), contributions(2, 2**20, torch.float32)
        engines = []
        for peer in ("a", "b"):
            network.nodes[peer] = Node(network, peer)
            engines.append(AllReduce(network.nodes[peer], max_elements=2**20))
        plan = ReducePlan(key="k", members=("a", "b"), weights=(1.0, 1.0), bounds=split_by_shares(2**20, [1, 1]))
        pairs = zip(engines, x, strict=True)
        results = await asyncio.gather(*[engine.reduce(plan, part, timeout_s=20) for engine, part in pairs])
        return [*results, x[0] + x[1]]

    first, second, exact = asyncio.run(main())
    assert bits(first) == bits(second) == bits(exact)


# --- or failed -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_when_a_member_is_dead_from_the_start_every_survivor_raises_and_names_it(small_chunks, victim):
    swarm, x = Swarm(3), contributions(3, 1_000)
    swarm.network.dead.add(swarm.peers[victim])

    async def main() -> tuple[list[Tensor | ReduceFailed], float]:
        outcomes = await swarm.reduce(swarm.plan(1_000), x, timeout_s=100)
        return outcomes, asyncio.get_running_loop().time()

    outcomes, ended = run(main())
    assert ended < 5  # a refused connection is believed after a few dials, not at the deadline
    survivors = failures([outcome for index, outcome in enumerate(outcomes) if index != victim])
    assert [failure.reason for failure in survivors] == [Reason.REDUCE_INCOMPLETE] * 2
    assert [failure.missing for failure in survivors] == [(swarm.peers[victim],)] * 2
    assert swarm.events[swarm.peers[(victim + 1) % 3]][-1] == events.ReduceFailed(0, 0, 0, Reason.REDUCE_INCOMPLETE)


@pytest.mark.parametrize("shares", [[1, 1, 1], [1, 1, 0], [1, 0, 0]], ids=str)
def test_a_contributor_that_never_enters_is_named_before_the_deadline(small_chunks, shares):
    swarm, x = Swarm(3), contributions(3, 1_000)

    async def main() -> list[Any]:
        plan = swarm.plan(1_000, shares=shares)
        pairs = list(zip(swarm.peers, x, strict=True))[:2]
        calls = [swarm.engines[peer].reduce(plan, part, timeout_s=10) for peer, part in pairs]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        return [*outcomes, asyncio.get_running_loop().time()]

    *outcomes, ended = run(main())
    assert {failure.reason for failure in failures(outcomes)} == {Reason.REDUCE_INCOMPLETE}
    assert {failure.missing for failure in outcomes} == {("peer2",)}
    assert ended < 10


@pytest.mark.parametrize("after_calls", range(0, 60, 3))
def test_a_death_in_the_middle_never_leaves_a_partial_result(small_chunks, after_calls):
    """Whenever peer2 dies, a survivor has the whole exact sum or an error; with a reducer dead early, errors only."""
    swarm, x = Swarm(3), contributions(3, 4_000)

    async def before(sender: str, receiver: str, header: PartRequest) -> None:
        if len(swarm.network.calls) >= after_calls:
            swarm.network.dead.add("peer2")

    swarm.network.before = before
    outcomes = run(swarm.reduce(swarm.plan(4_000), x))
    for outcome in outcomes[:2]:
        if isinstance(outcome, Tensor):
            assert bits(outcome) == bits(in_plan_order(x))
        else:
            assert outcome.reason is Reason.REDUCE_INCOMPLETE and "peer2" in outcome.missing
    if after_calls <= 30:
        failures(outcomes[:2])


@pytest.mark.parametrize("seed", range(25))
def test_under_random_loss_delay_lateness_and_death_everyone_has_the_exact_sum_or_an_error_in_time(small_chunks, seed):
    rng = random.Random(seed)
    swarm, x = Swarm(4), contributions(4, 5_000)
    victim, dies_at = rng.choice([None, "peer3"]), rng.randrange(200)

    async def fault(sender: str, receiver: str, header: PartRequest) -> None:
        await asyncio.sleep(rng.uniform(0, 0.3))
        if victim and len(swarm.network.calls) > dies_at:
            swarm.network.dead.add(victim)
        if sender != receiver and rng.random() < 0.05:
            raise Unanswered(Reason.TORN_STREAM)

    swarm.network.before = swarm.network.after = fault

    async def main() -> tuple[list[Tensor | ReduceFailed], float]:
        plan = swarm.plan(5_000, shares=[rng.random() for _ in range(4)])
        outcomes = await swarm.reduce(plan, x, delays_s=[rng.uniform(0, 2) for _ in range(4)], timeout_s=30)
        return outcomes, asyncio.get_running_loop().time()

    outcomes, ended = run(main())
    exact = bits(in_plan_order(x))
    assert all(isinstance(outcome, ReduceFailed) or bits(outcome) == exact for outcome in outcomes), f"seed {seed}"
    assert ended <= 33
    if victim is None:
        assert all(isinstance(outcome, Tensor) for outcome in outcomes), f"seed {seed}: {outcomes}"


def test_a_member_that_is_cancelled_tells_those_who_wait(small_chunks):
    swarm, x = Swarm(3), contributions(3, 1_000)

    async def main() -> list[Any]:
        plan = swarm.plan(1_000)
        tasks = [
            asyncio.create_task(swarm.engines[peer].reduce(plan, part, timeout_s=100))
            for peer, part in zip(swarm.peers[:2], x, strict=False)
        ]
        await asyncio.sleep(1)
        tasks[0].cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        return [*outcomes, asyncio.get_running_loop().time()]

    cancelled, failed, ended = run(main())
    assert isinstance(cancelled, asyncio.CancelledError)
    assert isinstance(failed, ReduceFailed) and failed.missing == ("peer0",) and ended < 5


def test_after_cancel_the_local_call_raises_callers_are_refused_and_the_key_is_dead(small_chunks):
    swarm, x = Swarm(2), contributions(2, 1_000)

    async def main() -> list[Any]:
        plan = swarm.plan(1_000)
        first = asyncio.create_task(swarm.engines["peer0"].reduce(plan, x[0], timeout_s=100))
        await asyncio.sleep(1)
        swarm.engines["peer0"].cancel("k")
        outcomes = [*await asyncio.gather(first, return_exceptions=True)]
        for peer, part in zip(swarm.peers, x, strict=True):
            late = swarm.engines[peer].reduce(plan, part, timeout_s=100)
            outcomes += await asyncio.gather(late, return_exceptions=True)
        return [*outcomes, asyncio.get_running_loop().time()]

    *outcomes, ended = run(main())
    assert [failure.reason for failure in failures(outcomes)] == [Reason.REDUCE_INCOMPLETE] * 3
    assert ended < 5


@pytest.mark.parametrize("codec", ["none", "fp16", "blockwise8"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_contribution_that_is_not_finite_fails_everyone_at_once_and_names_its_sender(small_chunks, codec, bad):
    swarm, x = Swarm(3), contributions(3, 1_000, torch.float32)
    x[1][777] = bad

    async def main() -> tuple[list[ReduceFailed], float]:
        plan = swarm.plan(1_000, codec=codec, dtype="float32")
        outcomes = failures(await swarm.reduce(plan, x, timeout_s=100))
        return outcomes, asyncio.get_running_loop().time()

    outcomes, ended = run(main())
    assert {failure.reason for failure in outcomes} == {Reason.NOT_FINITE}
    assert {failure.missing for failure in outcomes} == {("peer1",)}
    assert ended < 5


def test_a_sum_that_overflows_is_refused_and_blames_nobody():
    swarm = Swarm(2)
    outcomes = failures(run(swarm.reduce(swarm.plan(4, dtype="float32"), [torch.full((4,), 3e38)] * 2)))
    assert {(failure.reason, failure.missing) for failure in outcomes} == {(Reason.NOT_FINITE, ())}


@pytest.mark.parametrize(
    "body",
    [
        encode(torch.zeros(499, dtype=torch.float64), "none"),
        encode(torch.zeros(501, dtype=torch.float64), "none"),
        encode(torch.zeros(500, dtype=torch.float32), "none"),
        encode(torch.zeros(500, dtype=torch.float64), "fp16"),
        encode(torch.zeros(20, 25, dtype=torch.float64), "none"),
        b"garbage",
    ],
    ids=["short", "long", "dtype", "codec", "shape", "garbage"],
)
def test_a_contribution_of_the_wrong_kind_fails_the_attempt_and_names_its_sender(body):
    swarm, x = Swarm(2), contributions(2, 1_000)

    async def main() -> list[Any]:
        plan = swarm.plan(1_000)
        reducer = asyncio.create_task(swarm.engines["peer0"].reduce(plan, x[0], timeout_s=10))
        await asyncio.sleep(0.1)
        header = PartRequest(key="k", plan=plan.digest(), chunk=0)
        liar = swarm.network.nodes["peer1"].call("peer0", allreduce.PART, header, body, timeout_s=10)
        return await asyncio.gather(reducer, liar, return_exceptions=True)

    failed, refused = run(main())
    assert isinstance(failed, ReduceFailed) and failed.missing == ("peer1",)
    assert isinstance(refused, Refused) and refused.detail == "peer1"
    assert failed.reason is refused.reason
    assert failed.reason in (Reason.MALFORMED, Reason.TOO_LARGE)


def test_strangers_other_plans_unknown_keys_and_odd_bodies_are_refused_without_effect():
    swarm, x = Swarm(2), contributions(2, 1_000)
    swarm.network.nodes["stranger"] = Node(swarm.network, "stranger")
    plan = swarm.plan(1_000)
    good = encode(x[1][:500], "none")

    async def attempt(sender: str, body: bytes = good, **fields: Any) -> Reason:
        header = PartRequest(**({"key": "k", "plan": plan.digest(), "chunk": 0} | fields))
        with pytest.raises(Refused) as refused:
            await swarm.network.nodes[sender].call("peer0", allreduce.PART, header, body, timeout_s=1)
        return refused.value.reason

    async def main() -> list[Any]:
        assert await attempt("peer1") is Reason.NOT_READY
        first = asyncio.create_task(swarm.engines["peer0"].reduce(plan, x[0], timeout_s=10))
        await asyncio.sleep(0.1)
        assert await attempt("stranger") is Reason.NOT_MEMBER
        assert await attempt("peer1", key="other") is Reason.NOT_READY
        assert await attempt("peer1", plan="0" * 64) is Reason.MALFORMED
        assert await attempt("peer1", chunk=1) is Reason.MALFORMED
        assert await attempt("peer1", body=b"") is Reason.MALFORMED
        return [await swarm.engines["peer1"].reduce(plan, x[1], timeout_s=10), await first]

    assert {bits(outcome) for outcome in run(main())} == {bits(in_plan_order(x))}


def test_a_reducer_that_answers_garbage_is_named():
    swarm, x = Swarm(2), contributions(2, 1_000)

    async def garbage(request: Request[PartRequest]) -> Reply[Any]:
        return Reply(allreduce.Empty(), encode(torch.full((500,), math.nan, dtype=torch.float64), "none", check=False))

    swarm.network.nodes["peer1"].handlers["allreduce.part"] = garbage
    honest = run(swarm.reduce(swarm.plan(1_000), x))[0]
    assert isinstance(honest, ReduceFailed) and (honest.reason, honest.missing) == (Reason.NOT_FINITE, ("peer1",))


# --- lost and repeated messages --------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["torn", "silent"])
@pytest.mark.parametrize("where", ["before", "after"])
def test_lost_requests_and_replies_are_asked_again_and_nothing_is_added_twice(small_chunks, how, where):
    swarm, x = Swarm(3), contributions(3, 2_000)
    seen: dict[tuple[str, str, int], int] = {}

    async def lose(sender: str, receiver: str, header: PartRequest) -> None:
        """Every call between two peers loses its first message."""
        call = (sender, receiver, header.chunk)
        seen[call] = seen.get(call, 0) + 1
        if sender != receiver and seen[call] == 1:
            if how == "silent":
                await asyncio.sleep(1e6)
            raise Unanswered(Reason.TORN_STREAM)

    setattr(swarm.network, where, lose)
    outcomes = run(swarm.reduce(swarm.plan(2_000), x, timeout_s=100))
    assert {bits(outcome) for outcome in outcomes} == {bits(in_plan_order(x))}
    assert max(seen.values()) == 2


def test_a_result_stays_answerable_until_cancel_and_another_contribution_is_refused():
    swarm, x = Swarm(2), contributions(2, 1_000)
    plan = swarm.plan(1_000)

    async def main() -> None:
        outcome = (await swarm.reduce(plan, x))[0]
        node, header = swarm.network.nodes["peer1"], PartRequest(key="k", plan=plan.digest(), chunk=0)
        for _ in range(2):
            body = encode(x[1][:500], "none")
            again = await node.call("peer0", allreduce.PART, header, body, timeout_s=1)
            assert torch.equal(decode(again.body, max_elements=500), outcome[:500])
        with pytest.raises(Refused) as refused:
            await node.call("peer0", allreduce.PART, header, encode(x[0][:500], "none"), timeout_s=1)
        assert refused.value.reason is Reason.MALFORMED
        swarm.engines["peer0"].cancel("k")
        with pytest.raises(Refused) as refused:
            await node.call("peer0", allreduce.PART, header, body, timeout_s=1)
        assert refused.value.reason is Reason.REDUCE_INCOMPLETE

    run(main())


def test_a_repeat_that_differs_is_refused_while_the_first_is_waiting_and_calls_are_bounded():
    swarm, x = Swarm(2), contributions(2, 1_000)
    plan = swarm.plan(1_000)
    header = PartRequest(key="k", plan=plan.digest(), chunk=0)

    async def main() -> list[Any]:
        node = swarm.network.nodes["peer1"]

        async def call(body: bytes) -> Any:
            return await node.call("peer0", allreduce.PART, header, body, timeout_s=1)

        first = asyncio.create_task(swarm.engines["peer0"].reduce(plan, x[0], timeout_s=5))
        await asyncio.sleep(0.1)
        mine = encode(x[1][:500], "none")
        return await asyncio.gather(call(mine), call(encode(x[0][:500], "none")), first, return_exceptions=True)

    async def held(sender: str, receiver: str, body_header: PartRequest) -> None:
        if sender == receiver == "peer0":
            await asyncio.sleep(2)  # peer0's own contribution is late: peer1's chunk waits

    swarm.network.before = held
    waiting, refused, _ = run(main())
    assert isinstance(waiting, Unanswered)
    assert isinstance(refused, Refused) and refused.reason is Reason.MALFORMED


def test_a_member_that_floods_the_reducer_is_told_to_wait():
    swarm, x = Swarm(2), contributions(2, 1_000)
    plan = swarm.plan(1_000)
    header, body = PartRequest(key="k", plan=plan.digest(), chunk=0), encode(x[1][:500], "none")

    async def late(sender: str, receiver: str, _: PartRequest) -> None:
        if sender == receiver == "peer0":
            await asyncio.sleep(3)

    async def main() -> list[Any]:
        first = asyncio.create_task(swarm.engines["peer0"].reduce(plan, x[0], timeout_s=5))
        await asyncio.sleep(0.1)
        node = swarm.network.nodes["peer1"]
        flood = [node.call("peer0", allreduce.PART, header, body, timeout_s=1) for _ in range(100)]
        outcomes = await asyncio.gather(*flood, return_exceptions=True)
        await asyncio.gather(first, return_exceptions=True)
        return outcomes

    swarm.network.before = late
    busy = [outcome for outcome in run(main()) if isinstance(outcome, Refused) and outcome.reason is Reason.BUSY]
    assert len(busy) == 100 - allreduce.MAX_REPEATS * plan.calls_per_part()


# --- wrong use -------------------------------------------------------------------------------------------------------
def test_wrong_arguments_are_value_errors_and_too_long_a_vector_is_refused():
    swarm, x = Swarm(2), contributions(2, 1_000)
    engine, plan = swarm.engines["peer0"], swarm.plan(1_000)

    async def main() -> None:
        for bad in (None, x[0][:999], x[0].float(), x[0].view(2, 500)):
            with pytest.raises(ValueError, match="contribution"):
                await engine.reduce(plan, bad, timeout_s=1)
        with pytest.raises(ValueError, match="contribution"):
            await engine.reduce(swarm.plan(1_000, weights=(0.0, 1.0)), x[0], timeout_s=1)
        other = ReducePlan(key="k", members=("other",), weights=(1.0,), bounds=(0, 1), dtype="float64")
        with pytest.raises(ValueError, match="not a member"):
            await engine.reduce(other, x[0][:1], timeout_s=1)
        await swarm.reduce(plan, x)
        with pytest.raises(ValueError, match="used before"):
            await engine.reduce(plan, x[0], timeout_s=1)
        small = AllReduce(swarm.network.nodes["peer0"], max_elements=999, run_in_thread=inline)
        with pytest.raises(ReduceFailed) as failed:
            await small.reduce(plan, x[0], timeout_s=1)
        assert failed.value.reason is Reason.TOO_LARGE

    run(main())


def test_attempts_that_nobody_cancels_are_forgotten_oldest_first():
    swarm, x = Swarm(2), contributions(2, 10)

    async def main() -> None:
        for attempt in range(3 * allreduce.MAX_HELD_ATTEMPTS):
            await swarm.reduce(swarm.plan(10, key=str(attempt)), x)
        assert len(swarm.engines["peer0"]._attempts) == allreduce.MAX_HELD_ATTEMPTS

    run(main())


@pytest.mark.parametrize(
    "wrong",
    [
        {"members": ("a", "a")},
        {"weights": (1.0,)},
        {"weights": (0.0, 0.0)},
        {"weights": (math.nan, 1.0)},
        {"bounds": (0, 5)},
        {"bounds": (1, 5, 9)},
        {"bounds": (0, 9, 5)},
        {"dtype": "int64"},
        {"codec": "zip"},
        {"surprise": 1},
    ],
    ids=str,
)
def test_a_plan_that_makes_no_sense_cannot_be_built(wrong):
    good: dict[str, Any] = {"key": "k", "members": ("a", "b"), "weights": (1.0, 1.0), "bounds": (0, 5, 9)}
    assert ReducePlan.model_validate_json(ReducePlan(**good).model_dump_json()) == ReducePlan(**good)
    with pytest.raises(ValidationError):
        ReducePlan(**(good | wrong))


# --- shares ----------------------------------------------------------------------------------------------------------
@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**12), st.lists(st.floats(0, 1e12), min_size=1, max_size=20).filter(any))
def test_shares_cut_the_vector_without_gap_and_each_part_is_within_one_value_of_its_share(numel, shares):
    bounds = split_by_shares(numel, shares)
    assert bounds[0] == 0 and bounds[-1] == numel and len(bounds) == len(shares) + 1
    for low, high, share in zip(bounds, bounds[1:], shares, strict=False):
        assert low <= high and abs((high - low) - numel * share / math.fsum(shares)) <= 1 + 1e-3
        assert share > 0 or low == high


@pytest.mark.parametrize("shares", [[], [0.0, 0.0], [-1.0, 2.0], [math.nan], [math.inf, 1.0]], ids=str)
def test_shares_without_meaning_are_value_errors(shares):
    with pytest.raises(ValueError, match="shares"):
        split_by_shares(10, shares)


def test_a_reduce_of_16_million_values_stays_within_a_generous_time():
    """Not a benchmark: a guard against accidental quadratic work."""

    async def main() -> float:
        network = Network(latency_s=0)
        network.nodes["a"] = Node(network, "a")
        engine = AllReduce(network.nodes["a"], max_elements=2**24)
        plan = ReducePlan(key="k", members=("a",), weights=(1.0,), bounds=(0, 2**24))
        x = torch.ones(2**24)
        started = time.perf_counter()
        assert torch.equal(await engine.reduce(plan, x, timeout_s=60), x)
        return time.perf_counter() - started

    assert asyncio.run(main()) < 20
