"""Views merge to the same result in any order; entries speak for their subjects only."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.events import Reason
from shoal.protocol.identity import Identity, peer_id_of
from shoal.protocol.membership import (
    DOMAIN,
    MAX_COUNTER_STEP,
    MAX_ENTRY_BYTES,
    MAX_ROUNDS_AHEAD,
    Entry,
    Membership,
    Suspicions,
    View,
    active,
    make_entry,
    next_entry,
    open_entry,
)
from shoal.protocol.transport import Refused

RUN = "ab" * 32
JOIN, LEAVE = Membership.JOIN, Membership.LEAVE


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Identity, ...]:
    folder = tmp_path_factory.mktemp("peers")
    return tuple(Identity.create(folder / str(n)) for n in range(3))


def entry(name: str, last: int, counter: int, event: Membership = JOIN, signed: bytes = b"") -> Entry:
    return Entry(RUN, peer_id_of(name.encode()), last, counter, event, signed)


entries = st.builds(
    entry,
    st.sampled_from("abcdef"),
    st.integers(0, 4),
    st.integers(0, 3),
    st.sampled_from(Membership),
    st.sampled_from([b"x", b"y"]),
)
groups = st.lists(entries, max_size=8)


def view(group: Iterable[Entry], limit: int) -> View:
    return View(limit=limit).merge(group)


@settings(max_examples=150, deadline=None, database=None)
@given(groups, groups, groups, st.integers(1, 6))
def test_merge_is_commutative_associative_and_idempotent_also_when_full(
    a: list[Entry], b: list[Entry], c: list[Entry], limit: int
) -> None:
    x, y, z = (view(group, limit) for group in (a, b, c))
    assert x.merge(y) == y.merge(x)
    assert x.merge(y).merge(z) == x.merge(y.merge(z)) == view([*a, *b, *c], limit)
    assert x.merge(x) == x == x.merge(())


@settings(max_examples=80, deadline=None, database=None)
@given(groups, groups, st.integers(1, 6))
def test_a_view_is_sorted_bounded_and_never_forgets_the_newer(a: list[Entry], b: list[Entry], limit: int) -> None:
    x = view(a, limit)
    merged = x.merge(b)
    assert [e.peer for e in merged] == sorted({e.peer for e in merged}) and len(merged) <= limit
    for old in x:
        new = merged.get(old.peer)
        assert (new is None and len(merged) == limit) or (new is not None and new.rank >= old.rank)


def test_a_full_view_keeps_the_most_recently_active() -> None:
    for rounds in itertools.permutations((1, 2, 3)):
        full = view([entry(name, last, 9 - last) for name, last in zip("abc", rounds, strict=True)], limit=2)
        assert {e.last_active_round for e in full} == {2, 3}


def test_a_leave_beats_the_join_before_it_and_yields_to_the_join_after_it() -> None:
    joined, left, back = entry("a", 5, 0), entry("a", 5, 1, LEAVE), entry("a", 5, 2)
    peer = joined.peer
    assert view([left, joined], 9).get(peer) == left
    assert view([back, joined, left], 9).get(peer) == back


def test_active_are_the_joined_within_the_window() -> None:
    v = view([entry("a", 10, 0), entry("b", 7, 0), entry("c", 10, 1, LEAVE), entry("d", 8, 4)], 9)
    assert active(v, round=10, window=3) == tuple(sorted(peer_id_of(name) for name in (b"a", b"d")))
    assert active(v, round=10, window=4) == tuple(sorted(peer_id_of(name) for name in (b"a", b"b", b"d")))
    assert active(View(), round=10, window=3) == ()


def test_entries_travel_signed_from_view_to_view(peers: tuple[Identity, ...]) -> None:
    source = View().merge(next_entry(View(), who, run=RUN, round=4, event=JOIN) for who in peers)
    copy, refused = View().absorb(source.signed(), run=RUN, round=4)
    assert copy == source and refused == ()
    assert active(copy, 4, 1) == tuple(sorted(who.peer for who in peers))
    assert all(len(e.signed) < 1400 for e in copy)


def test_next_entry_counts_joins_and_leaves_and_goes_on_after_a_lost_disk(peers: tuple[Identity, ...]) -> None:
    who, v = peers[0], View()
    seen = []
    for round, event in [(3, JOIN), (5, JOIN), (5, LEAVE), (2, JOIN)]:
        v = v.merge([next_entry(v, who, run=RUN, round=round, event=event)])
        mine = v.get(who.peer)
        assert mine is not None
        seen.append((mine.last_active_round, mine.counter, mine.event))
    assert seen == [(3, 0, JOIN), (5, 0, JOIN), (5, 1, LEAVE), (5, 2, JOIN)]


def signed(identity: Identity, **change: Any) -> bytes:
    fields = {"run": RUN, "peer": identity.peer, "last_active_round": 1, "counter": 0, "event": "join", **change}
    return identity.seal(DOMAIN, json.dumps(fields)).to_bytes()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"run": "cd" * 32}, Reason.WRONG_RUN),
        ({"peer": peer_id_of(b"victim")}, Reason.BAD_SIGNATURE),
        ({"last_active_round": 1 + MAX_ROUNDS_AHEAD + 1}, Reason.AHEAD),
        ({"last_active_round": -1}, Reason.MALFORMED),
        ({"last_active_round": 10**30}, Reason.MALFORMED),
        ({"counter": 1.5}, Reason.MALFORMED),
        ({"counter": 2**60}, Reason.MALFORMED),
        ({"event": "reign"}, Reason.MALFORMED),
        ({"peer": "x"}, Reason.MALFORMED),
        ({"more": 1}, Reason.MALFORMED),
    ],
)
def test_bad_entries_are_refused_typed_and_good_ones_beside_them_taken(
    peers: tuple[Identity, ...], change: dict[str, Any], reason: Reason
) -> None:
    good = make_entry(peers[1], run=RUN, last_active_round=1, counter=0, event=JOIN)
    v, refused = View().absorb([signed(peers[0], **change), good.signed], run=RUN, round=1)
    assert refused == (reason,) and v.entries == (good,)


def test_a_counter_may_rise_by_a_bounded_step_only(peers: tuple[Identity, ...]) -> None:
    v, _ = View().absorb([signed(peers[0], counter=5)], run=RUN, round=1)
    assert v.absorb([signed(peers[0], counter=5 + MAX_COUNTER_STEP + 1)], run=RUN, round=1) == (v, (Reason.AHEAD,))
    risen, refused = v.absorb([signed(peers[0], counter=5 + MAX_COUNTER_STEP)], run=RUN, round=1)
    assert refused == () and risen.entries[0].counter == 5 + MAX_COUNTER_STEP


def test_more_blobs_than_a_view_holds_are_not_read(peers: tuple[Identity, ...]) -> None:
    blobs = [signed(who) for who in peers]
    v, refused = View(limit=2).absorb(blobs, run=RUN, round=1)
    assert len(v) == 2 and refused == (Reason.TOO_LARGE,)


def test_a_huge_entry_is_refused_before_parsing() -> None:
    with pytest.raises(Refused) as caught:
        open_entry(b"{" * (MAX_ENTRY_BYTES + 1), expected_run=RUN)
    assert caught.value.reason is Reason.TOO_LARGE


@settings(max_examples=60, deadline=None, database=None)
@given(noise=st.binary(max_size=200), at=st.integers(0, 900), bit=st.integers(0, 7))
def test_noise_and_flipped_bits_raise_nothing_but_refused(
    peers: tuple[Identity, ...], noise: bytes, at: int, bit: int
) -> None:
    good = bytearray(signed(peers[0]))
    good[at] ^= 1 << bit
    for blob in (noise, bytes(good), peers[0].seal(DOMAIN, noise.decode("latin-1")).to_bytes()):
        with pytest.raises(Refused):
            open_entry(blob, expected_run=RUN)


def test_a_suspicion_is_local_prolongs_expires_and_can_be_forgiven() -> None:
    none = Suspicions()
    some = none.suspect("a", now=10, for_s=5).suspect("b", now=10, for_s=50)
    assert some.suspected(12) == {"a", "b"} and some.suspected(15) == {"b"} and none.suspected(12) == frozenset()
    assert some.suspect("b", now=11, for_s=1).suspected(59) == {"b"}
    assert some.forgive("b").suspected(12) == {"a"}
    assert "a" not in dict(some.suspect("c", now=20, for_s=1).until_s)
