"""A ledger holds every microbatch at most once and keeps what may be held twice apart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.swarm.pipeline.ledger import Ledger

moves = st.lists(
    st.tuples(st.sampled_from(["first", "retry", "discard"]), st.integers(0, 20)),
    max_size=40,
)


@given(max_buckets=st.integers(1, 6), moves=moves)
def test_a_ledger_says_exactly_what_it_holds(max_buckets: int, moves: list[tuple[str, int]]) -> None:
    ledger = Ledger(max_buckets)
    model: dict[int, dict[int, float]] = {}  # bucket -> microbatch -> loss
    for kind, number in moves:
        held = {m for bucket in model.values() for m in bucket}
        if kind == "discard":
            ledger.discard(number % max_buckets)
            model.pop(number % max_buckets, None)
        elif number in held:
            assert ledger.holds(number)
            with pytest.raises(ValueError):
                ledger.add(0, number, 1.0)
        else:
            bucket = ledger.place(first=kind == "first")
            assert 0 <= bucket < max_buckets
            if kind == "retry" and max_buckets > 1:
                assert bucket > 0, "what somebody else may hold too stays apart from first attempts"
                own = set(range(1, max_buckets)) - model.keys()
                assert bucket in own if own else bucket == max_buckets - 1
            elif kind == "first":
                assert bucket == 0
            ledger.add(bucket, number, number / 4)
            model.setdefault(bucket, {})[number] = number / 4
        assert len(ledger) == sum(map(len, model.values()))
        assert {b.id: b.microbatches for b in ledger.buckets()} == {i: tuple(sorted(m)) for i, m in model.items()}
        assert {b.id: b.loss_sum for b in ledger.buckets()} == {i: sum(m.values()) for i, m in model.items()}
        assert [b.id for b in ledger.buckets()] == sorted(model)
        assert all(ledger.holds(m) == any(m in b for b in model.values()) for m in range(21))


def test_what_was_discarded_may_be_added_again() -> None:
    ledger = Ledger(4)
    ledger.add(2, 7, 1.0)
    ledger.discard(2)
    ledger.discard(2)  # a repeated request
    assert not ledger.holds(7) and ledger.buckets() == ()
    ledger.add(0, 7, 1.0)
    assert ledger.holds(7)


def test_a_server_without_memory_for_one_bucket_is_an_error() -> None:
    with pytest.raises(ValueError):
        Ledger(0)
