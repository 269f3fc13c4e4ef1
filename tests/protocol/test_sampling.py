"""The keyed order: the same for everybody, another one for every key, and no newcomer's id flows into its beacon."""

from __future__ import annotations

import hashlib
import random

from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.runlog import Chain, Entry, Genesis, Member
from shoal.protocol.sampling import beacon_for, next_beacon, order

RUN = hashlib.sha256(b"run").hexdigest()
peers = st.lists(st.text(min_size=1, max_size=12), unique=True, max_size=12)
beacons = st.binary(min_size=32, max_size=32).map(bytes.hex)
rounds = st.integers(0, 2**40)


def entry(members: dict[str, int], round_: int, beacon: str) -> Entry:
    return Entry(
        run=RUN,
        term=0,
        round=round_,
        previous="",
        members=tuple(Member(peer=p, public_key="", since=since) for p, since in members.items()),
        committee=("a",),
        next_sample=0,
        samples_total=0,
        step=0,
        beacon=beacon,
        decision=Genesis(),
    )


@given(members=peers, round_=rounds, beacon=beacons, seed=st.integers())
def test_an_order_is_a_permutation_that_does_not_depend_on_the_order_of_its_input(
    members: list[str], round_: int, beacon: str, seed: int
) -> None:
    shuffled = list(members)
    random.Random(seed).shuffle(shuffled)
    ordered = order(members, RUN, round_, beacon, "x")
    assert sorted(ordered) == sorted(members)
    assert order(iter(shuffled), RUN, round_, beacon, "x") == ordered


@given(members=peers, beacon=beacons, seed=st.integers(0, 100), left=st.integers(0, 11))
def test_who_leaves_changes_nothing_among_the_others(members: list[str], beacon: str, seed: int, left: int) -> None:
    gone = members[left % len(members)] if members else ""
    ordered = order(members, RUN, seed, beacon)
    assert order([p for p in members if p != gone], RUN, seed, beacon) == tuple(p for p in ordered if p != gone)


def test_run_round_beacon_and_purpose_each_give_another_order() -> None:
    members = [f"peer {i}" for i in range(30)]
    keys = [
        (RUN, 1, "ab" * 32, ""),
        (RUN, 2, "ab" * 32, ""),
        (RUN, 1, "ac" * 32, ""),
        (RUN, 1, "ab" * 32, "leader"),
        (hashlib.sha256(b"other").hexdigest(), 1, "ab" * 32, ""),
    ]
    assert len({order(members, *key) for key in keys}) == len(keys)


def test_every_peer_comes_first_about_equally_often() -> None:
    members = [f"peer {i}" for i in range(5)]
    firsts = [order(members, RUN, r, "00" * 32)[0] for r in range(2000)]
    assert all(300 < firsts.count(peer) < 500 for peer in members)


def test_parts_of_the_key_do_not_run_into_each_other() -> None:
    members = [f"peer {i}" for i in range(30)]
    assert order(members, RUN, 1, "00" * 32, "1x") != order(members, RUN, 11, "00" * 32, "x")


@given(
    settled=st.dictionaries(st.text(min_size=1, max_size=8), st.integers(0, 8), min_size=1, max_size=6),
    newcomers=st.sets(st.text(min_size=1, max_size=8), max_size=6),
    round_=st.integers(9, 20),
    beacon=beacons,
)
def test_newcomers_cannot_grind_a_beacon(
    settled: dict[str, int], newcomers: set[str], round_: int, beacon: str
) -> None:
    fresh = dict.fromkeys(newcomers - settled.keys(), round_)
    with_them = next_beacon(entry({**settled, **fresh}, round_, beacon), RUN)
    assert with_them == next_beacon(entry(dict(reversed(settled.items())), round_, beacon), RUN)


def test_settled_members_the_previous_beacon_and_the_run_flow_into_a_beacon() -> None:
    base = next_beacon(entry({"a": 0, "b": 1}, 5, "00" * 32), RUN)
    others = [
        next_beacon(entry({"a": 0}, 5, "00" * 32), RUN),
        next_beacon(entry({"a": 0, "b": 1}, 5, "01" * 32), RUN),
        next_beacon(entry({"a": 0, "b": 1}, 5, "00" * 32), "11" * 32),
        next_beacon(None, RUN),
    ]
    assert len({base, *others}) == 5


def test_the_first_rounds_are_ordered_by_genesis() -> None:
    chain = Chain(entry({"a": 0}, 0, "07" * 32))
    assert {beacon_for(chain, r) for r in (0, 1, 2)} == {"07" * 32}
