"""Members, stages, feeders and committee over random histories of deaths, joins, returns and goodbyes."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Set

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.runlog import (
    MAX_ENTRY_BYTES,
    MAX_MEMBERS,
    Chain,
    Commit,
    Decided,
    Entry,
    Genesis,
    Member,
    Pin,
    Reconfigure,
    StageCommit,
    Vote,
)
from shoal.protocol.sampling import next_beacon
from shoal.swarm.pipeline.roles import Shape, microbatches_of, next_members

RUN = hashlib.sha256(b"run").hexdigest()
COORDINATOR = "c"


def member(peer: str, **fields: object) -> Member:
    return Member(peer=peer, public_key=hashlib.sha256(peer.encode()).hexdigest(), **fields)  # type: ignore[arg-type]


def genesis() -> Entry:
    return Entry(
        run=RUN,
        term=0,
        round=0,
        previous="",
        members=(member(COORDINATOR),),
        committee=(COORDINATOR,),
        next_sample=0,
        samples_total=0,
        step=0,
        beacon=next_beacon(None, RUN),
        decision=Genesis(),
    )


class History:
    """A log of reconfigurations: every entry that roles make must be one that the log takes."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.chain = shape, Chain(genesis())

    @property
    def head(self) -> Entry:
        return self.chain.head

    def enter(
        self, alive: set[str], joiners: dict[str, Member] | None = None, leaving: Set[str] = frozenset()
    ) -> Entry:
        members, committee = next_members(self.head, self.shape, alive, joiners or {}, leaving)
        entry = self.head.model_copy(
            update={
                "round": self.head.round + 1,
                "previous": self.chain.head_digest,
                "members": members,
                "committee": committee,
                "beacon": next_beacon(self.head, RUN),
                "decision": Reconfigure(),
            }
        )
        votes = tuple(Vote(peer=p, signature="00") for p in self.head.committee)
        return self.chain.extend(entry.to_bytes(), Decided(ballot=0, votes=votes), lambda *_: True)


def volunteers(*numbers: int, can_feed: bool = True) -> dict[str, Member]:
    return {f"v{i}": member(f"v{i}", can_feed=can_feed, stage=77) for i in numbers}


def running(servers: int = 6, stages: int = 2, feeders: int = 2, committee: int = 3) -> History:
    history = History(Shape(stages, feeders, committee, COORDINATOR, max_peers=64))
    history.enter({COORDINATOR}, volunteers(*range(servers)))
    history.enter({m.peer for m in history.head.members})
    return history


shapes = st.builds(
    Shape,
    stages=st.integers(1, 4),
    feeders=st.integers(1, 3),
    committee=st.sampled_from([1, 3, 5]),
    coordinator=st.just(COORDINATOR),
    max_peers=st.integers(6, 12),
)


@settings(max_examples=150)
@given(shape=shapes, seed=st.integers(0, 2**32), rounds=st.integers(1, 15))
def test_any_history_of_deaths_joins_returns_and_goodbyes_keeps_the_rules(shape: Shape, seed: int, rounds: int) -> None:
    rng, history = random.Random(seed), History(shape)
    for _ in range(rounds):
        old = history.head
        before = {m.peer: m for m in old.members}
        alive = {p for p in before if rng.random() < 0.75}
        pool = volunteers(*rng.sample(range(14), rng.randrange(5)), can_feed=rng.random() < 0.7)
        joiners = {p: m for p, m in pool.items() if rng.random() < 0.8 or p not in before}
        leaving = {p for p in [*before, *joiners] if rng.random() < 0.1}
        if COORDINATOR not in before and rng.random() < 0.5:
            joiners[COORDINATOR] = member(COORDINATOR, can_feed=True, stage=0)
        entry = history.enter(alive, joiners, leaving)  # raises if the log would refuse it
        now = {m.peer: m for m in entry.members}
        assert [m.peer for m in entry.members] == sorted(now)

        # who is in it
        stays = set(old.committee[:1])  # somebody has to, if all want to leave
        assert alive - leaving <= now.keys()
        assert now.keys() - before.keys() <= joiners.keys()
        assert not (now.keys() & leaving - stays)
        absent = now.keys() - alive - (joiners.keys() - before.keys())
        assert absent <= set(entry.committee), "an absent member stays for its seat only"
        assert all(now[p].stage is None and not now[p].feeder for p in absent)
        assert len(now) <= max(shape.max_peers, len(before))

        # the committee
        assert set(entry.committee) <= now.keys() and len(entry.committee) in (1, 3, 5)
        assert len(entry.committee) <= shape.committee
        assert entry.committee.count(COORDINATOR) <= 1, "at most one seat for the bootstrap"
        if not leaving & set(old.committee):
            assert len(entry.committee) >= len(old.committee), "no shrink because somebody is away"
        living = [p for p in old.committee if p in alive and p not in leaving]
        assert entry.committee[: len(living)] == tuple(living[: len(entry.committee)]), "who is there keeps the seat"
        if absent:
            assert alive - leaving <= set(entry.committee), "an absent member has a seat only if nobody can fill it"

        # stages
        assert all(m.stage is None or m.stage < shape.stages for m in entry.members)
        assert COORDINATOR not in now or now[COORDINATOR].stage is None
        present = now.keys() - absent - {COORDINATOR}
        assert all(now[p].stage is not None for p in present), "whoever is there serves a stage"
        settled = {p for p in present if p in before and before[p].stage is not None}
        assert all(now[p].stage == before[p].stage for p in settled), "servers stay where their state is"
        counts = Counter(now[p].stage for p in present)
        kept = Counter(now[p].stage for p in settled)
        sizes = [counts[s] for s in range(shape.stages)]
        filled = [counts[s] for s in range(shape.stages) if counts[s] > kept[s]]
        assert not filled or max(filled) <= min(sizes) + 1, "newcomers go where servers are missing"

        # feeders
        able = {p for p in now.keys() - absent if now[p].can_feed}
        feeders = set(entry.feeders())
        assert feeders <= able and len(feeders) == min(shape.feeders, len(able))
        sticky = {p for p in able if p in before and before[p].feeder}
        assert sticky <= feeders, "who feeds goes on"
        if COORDINATOR in feeders - sticky:
            assert feeders == able, "the coordinator only feeds if nobody else can"


def test_a_choice_does_not_depend_on_who_answered_first() -> None:
    head, shape = running().head, Shape(2, 2, 5, COORDINATOR, 64)
    alive, joiners = [m.peer for m in head.members][1:], volunteers(10, 11, 12)
    first = next_members(head, shape, alive, joiners)
    assert next_members(head, shape, alive[::-1], dict(reversed(joiners.items()))) == first


def test_a_quiet_round_changes_nothing() -> None:
    history = running()
    old = history.head
    entry = history.enter({m.peer for m in old.members})
    assert (entry.members, entry.committee) == (old.members, old.committee)


def test_a_committee_member_that_was_away_gets_a_stage_when_it_is_back() -> None:
    history = running(servers=2, committee=3)
    away = next(p for p in history.head.committee if p != COORDINATOR)
    everybody = {m.peer for m in history.head.members}
    absent = history.enter(everybody - {away}).member(away)
    assert absent is not None and absent.stage is None
    stages = sorted(m.stage for m in history.enter(everybody).members if m.stage is not None)
    assert stages == [0, 1]


def test_a_committee_does_not_shrink_while_its_members_are_away_but_does_when_they_say_goodbye() -> None:
    history = running(servers=2, committee=3)
    assert len(history.head.committee) == 3
    others = set(history.head.committee) - {COORDINATOR}
    for _ in range(3):
        assert len(history.enter({COORDINATOR}).committee) == 3
    one = min(others)
    entry = history.enter({COORDINATOR, *others}, leaving={one})
    assert entry.committee == (COORDINATOR,) and entry.member(one) is None


def test_the_last_member_stays_though_it_wants_to_leave() -> None:
    history = History(Shape(2, 2, 3, COORDINATOR, 64))
    assert history.enter({COORDINATOR}, leaving={COORDINATOR}).committee == (COORDINATOR,)
    assert history.enter({COORDINATOR}, volunteers(1), leaving={COORDINATOR}).committee == ("v1",)


def test_a_seat_goes_to_a_settled_member_before_a_newcomer() -> None:
    for i in range(5):
        history = running(servers=4, committee=3)
        gone = next(p for p in history.head.committee if p != COORDINATOR)
        settled = {m.peer for m in history.head.members} - {gone}
        entry = history.enter(settled, volunteers(*range(100 * i + 20, 100 * i + 50)))
        assert set(entry.committee) <= settled and len(entry.committee) == 3


def test_a_full_run_takes_nobody_in() -> None:
    history = History(Shape(2, 2, 3, COORDINATOR, max_peers=4))
    assert len(history.enter({COORDINATOR}, volunteers(*range(10))).members) == 4
    everybody = {m.peer for m in history.head.members}
    assert {m.peer for m in history.enter(everybody, volunteers(20)).members} == everybody
    assert len(history.enter({COORDINATOR}, volunteers(*range(30, 40))).members) <= 4


@pytest.mark.parametrize("stages", [1, 64])
@pytest.mark.parametrize("long", [False, True])
def test_whoever_asks_an_entry_stays_one_that_the_log_takes(long: bool, stages: int) -> None:
    """Even a commit that names every server as a holder, with records as long as they may be."""
    shape = Shape(stages, 2, 5, COORDINATOR, max_peers=4096)
    history = History(shape)
    words = {"name": "\U0001f41f" * 64, "maddrs": ("/" * 256,) * 8} if long else {}
    crowd = {f"v{i:078d}": member(f"v{i:078d}", can_feed=True, **words) for i in range(600)}
    for _ in range(3):
        history.enter({m.peer for m in history.head.members}, crowd)
    head = history.head
    assert 50 < len(head.members) <= MAX_MEMBERS
    digest = hashlib.sha256(b"").hexdigest()
    commits = tuple(StageCommit(stage=s, gradient=digest, holders=head.servers(s)) for s in range(stages))
    pin = Pin(step=2**62, next_sample=2**62, samples_total=2**62, digests=(digest,) * stages)
    decision = Commit(plan=2**62, samples=2**62, loss_sum=-1.7976931348623157e300, stages=commits)
    entry = head.model_copy(update={"round": 2**62, "decision": decision, "pin": pin, "candidate": pin})
    assert len(entry.to_bytes()) <= MAX_ENTRY_BYTES


@given(
    feeders=st.lists(st.text(min_size=1, max_size=4), unique=True, min_size=1, max_size=6),
    microbatches=st.integers(0, 50),
)
def test_feeders_share_every_microbatch_evenly(feeders: list[str], microbatches: int) -> None:
    shares = [microbatches_of(f, feeders, microbatches) for f in feeders]
    assert sorted(m for share in shares for m in share) == list(range(microbatches))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert microbatches_of("stranger", feeders, microbatches) == ()


@pytest.mark.parametrize("wanted", [1, 3, 5])
def test_a_committee_grows_to_what_is_wanted_and_no_further(wanted: int) -> None:
    assert len(running(servers=8, committee=wanted).head.committee) == wanted
