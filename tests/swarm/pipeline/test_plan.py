"""Plans cover every microbatch exactly once; freeze, discard, repair converges while a server of the stage lives."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shoal.swarm.pipeline.ledger import Bucket, Ledger
from shoal.swarm.pipeline.plan import StagePlan, plan_stage

SERVERS = ("s0", "s1", "s2", "s3")
finite = st.floats(-100, 100)
losses = st.one_of(finite, st.sampled_from([math.nan, math.inf, -math.inf, 1e308, -1e308]))


def ledgers_of(microbatches: st.SearchStrategy[int], loss: st.SearchStrategy[float]) -> st.SearchStrategy:
    bucket = st.builds(Bucket, st.integers(0, 5), st.lists(microbatches, max_size=8).map(tuple), loss)
    return st.dictionaries(st.sampled_from(SERVERS), st.lists(bucket, max_size=5), min_size=1)


def hold(ledgers: dict[str, list[Bucket]], plan: StagePlan) -> Counter[int]:
    """How often the chosen buckets and the holes hold each microbatch."""
    count: Counter[int] = Counter()
    for peer, ids in plan.chosen:
        by_id = {b.id: b for b in ledgers[peer]}
        for id_ in ids:
            count.update(by_id[id_].microbatches)
    count.update(m for m, _ in plan.holes)
    return count


@settings(max_examples=150)
@given(ledgers=ledgers_of(st.integers(-3, 14), losses), size=st.integers(1, 12), turn=st.integers(0, 9))
def test_whatever_servers_claim_every_microbatch_is_in_the_plan_exactly_once(
    ledgers: dict[str, list[Bucket]], size: int, turn: int
) -> None:
    plan = plan_stage(0, size, ledgers, SERVERS, turn)
    assert hold(ledgers, plan) == Counter(range(size))
    assert {server for _, server in plan.holes} <= ledgers.keys()
    chosen = {(peer, id_) for peer, ids in plan.chosen for id_ in ids}
    dropped = {(peer, id_) for peer, ids in plan.discard for id_ in ids}
    assert not chosen & dropped
    assert len(chosen) == sum(len(ids) for _, ids in plan.chosen), "a bucket is added once"
    assert math.isfinite(plan.loss_sum)
    assert {p for p, _ in plan.chosen} <= ledgers.keys() and all(ids for _, ids in (*plan.chosen, *plan.discard))


@st.composite
def honest_ledgers(draw: st.DrawFn) -> tuple[int, dict[str, list[Bucket]]]:
    """Within a server every microbatch at most once; different servers may hold the same ones."""
    size = draw(st.integers(1, 12))
    ledgers = {}
    for peer in draw(st.sets(st.sampled_from(SERVERS), min_size=1)):
        where = draw(st.dictionaries(st.integers(0, size - 1), st.integers(0, 3)))
        buckets = {id_: tuple(sorted(m for m in where if where[m] == id_)) for id_ in set(where.values())}
        ledgers[peer] = [Bucket(id_, held, draw(finite)) for id_, held in sorted(buckets.items())]
    return size, ledgers


@settings(max_examples=200)
@given(case=honest_ledgers(), seed=st.integers())
def test_a_plan_depends_on_what_is_held_and_not_on_who_answered_first(
    case: tuple[int, dict[str, list[Bucket]]], seed: int
) -> None:
    size, ledgers = case
    shuffled = [(peer, random.Random(seed).sample(b, len(b))) for peer, b in ledgers.items()]
    random.Random(seed).shuffle(shuffled)
    assert plan_stage(0, size, dict(shuffled), SERVERS) == plan_stage(0, size, ledgers, SERVERS)


@settings(max_examples=200)
@given(case=honest_ledgers())
def test_every_bucket_is_used_or_dropped_and_what_is_dropped_is_counted(
    case: tuple[int, dict[str, list[Bucket]]],
) -> None:
    size, ledgers = case
    plan = plan_stage(0, size, ledgers, SERVERS)
    chosen = {(peer, id_) for peer, ids in plan.chosen for id_ in ids}
    dropped = {(peer, id_) for peer, ids in plan.discard for id_ in ids}
    all_buckets = {(peer, b.id): b for peer, buckets in ledgers.items() for b in buckets}
    assert chosen | dropped == all_buckets.keys()
    assert plan.wasted == sum(len(all_buckets[key].microbatches) for key in dropped)
    assert plan.loss_sum == pytest.approx(sum(all_buckets[key].loss_sum for key in chosen))
    covered = {m for key in chosen for m in all_buckets[key].microbatches}
    assert all(covered & set(all_buckets[key].microbatches) for key in dropped), "only a conflict drops a bucket"


def test_a_microbatch_held_twice_costs_its_own_bucket_and_not_the_round() -> None:
    ledgers = {
        "s0": [Bucket(0, (0, 1, 2), 3.0)],
        "s1": [Bucket(0, (3, 4), 2.0), Bucket(1, (2,), 1.0)],  # 2 was retried at s1
    }
    plan = plan_stage(1, 6, ledgers, SERVERS)
    assert plan.chosen == (("s0", (0,)), ("s1", (0,)))
    assert (plan.discard, plan.wasted, plan.loss_sum) == ((("s1", (1,)),), 1, 5.0)
    assert plan.holes == ((5, "s0"),)


def test_a_bucket_that_holds_a_microbatch_twice_is_left_out() -> None:
    plan = plan_stage(0, 2, {"s0": [Bucket(0, (0, 0), 1.0)], "s1": [Bucket(0, (1,), 1.0)]}, SERVERS)
    assert plan.chosen == (("s1", (0,)),) and plan.discard == (("s0", (0,)),)


def test_holes_are_spread_over_the_servers() -> None:
    plan = plan_stage(0, 10, {peer: [] for peer in SERVERS}, SERVERS)
    assert sorted(Counter(server for _, server in plan.holes).values()) == [2, 2, 3, 3]


def test_a_stage_that_nobody_serves_cannot_be_planned() -> None:
    with pytest.raises(ValueError):
        plan_stage(0, 4, {}, SERVERS)
    with pytest.raises(ValueError):
        plan_stage(0, 4, {"stranger": []}, SERVERS)


class Swarm:
    """The servers of one stage, driven as the leader drives them, with everything lost that can be lost."""

    def __init__(self, seed: int, size: int, max_buckets: int, broken: set[str]) -> None:
        self.rng = random.Random(seed)
        self.size, self.max_buckets, self.broken = size, max_buckets, broken
        self.ledgers = {peer: Ledger(max_buckets) for peer in SERVERS}
        self.dead: set[str] = set()

    def feed(self, trouble: float) -> None:
        """First attempts and blind retries, before any plan."""
        for m in range(self.size):
            attempt, done = 0, False
            while not done and attempt < 4:
                peer = self.rng.choice(SERVERS)
                done = self.rng.random() >= trouble
                if done or self.rng.random() < 0.6:  # no answer, and yet it was added
                    self._add(peer, m, first=attempt == 0)
                attempt += 1

    def _add(self, peer: str, m: int, *, first: bool) -> None:
        ledger = self.ledgers[peer]
        if not ledger.holds(m):
            ledger.add(ledger.place(first=first), m, float(m))

    def kill(self) -> None:
        alive = sorted(set(SERVERS) - self.dead - {SERVERS[-1]})
        if alive:
            self.dead.add(self.rng.choice(alive))

    def restart(self) -> None:
        if self.dead:  # back, with nothing in its sums
            peer = self.rng.choice(sorted(self.dead))
            self.dead.discard(peer)
            self.ledgers[peer] = Ledger(self.max_buckets)

    def attempt(self, turn: int, trouble: float) -> StagePlan:
        answered = {p: list(self.ledgers[p].buckets()) for p in SERVERS if p not in self.dead}
        plan = plan_stage(0, self.size, answered, SERVERS, turn)
        assert hold(answered, plan) == Counter(range(self.size))
        if plan.holes:
            for peer, buckets in plan.discard:
                if self.rng.random() >= trouble:
                    for bucket in buckets:
                        self.ledgers[peer].discard(bucket)
            for m, peer in plan.holes:
                if peer not in self.broken and self.rng.random() >= trouble:
                    self._add(peer, m, first=False)
        return plan


@settings(max_examples=120)
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 16),
    max_buckets=st.integers(1, 4),
    trouble=st.floats(0, 0.8),
    broken=st.sets(st.sampled_from(SERVERS[:-1])),
    faults=st.integers(0, 6),
)
@example(seed=0, size=16, max_buckets=1, trouble=0.8, broken={"s0", "s1", "s2"}, faults=6)
@example(seed=0, size=8, max_buckets=4, trouble=0.0, broken={"s0"}, faults=0)
def test_plans_converge_while_one_server_lives_and_works(
    seed: int, size: int, max_buckets: int, trouble: float, broken: set[str], faults: int
) -> None:
    """Servers die and come back empty, messages are lost, `broken` ones answer every freeze but never fill a hole."""
    swarm = Swarm(seed, size, max_buckets, broken)
    swarm.feed(trouble)
    for turn in range(1, 2000):
        plan = swarm.attempt(turn, trouble)
        if not plan.holes:
            break
        if faults and swarm.rng.random() < 0.4:
            faults -= 1
            swarm.rng.choice((swarm.kill, swarm.restart))()
    assert not plan.holes, f"still {len(plan.holes)} holes after {turn} attempts"


@given(seed=st.integers(0, 2**32), size=st.integers(1, 30), max_buckets=st.integers(1, 4))
def test_without_faults_one_repair_is_enough(seed: int, size: int, max_buckets: int) -> None:
    swarm = Swarm(seed, size, max_buckets, set())
    swarm.feed(0.5)
    swarm.attempt(1, 0.0)
    assert not swarm.attempt(2, 0.0).holes
