"""Deadlines learn from what was measured and a hang never makes them look better."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.deadlines import WINDOW, Deadline

seconds = st.floats(0, 1000, allow_nan=False)
steps = st.lists(st.tuples(st.booleans(), seconds), max_size=3 * WINDOW)


def grown(history: list[tuple[bool, float]]) -> Deadline:
    deadline = Deadline(initial_s=2.0, floor_s=0.05, ceiling_s=60.0, k=6.0)
    for finished, duration in history:
        (deadline.observe if finished else deadline.expire)(duration)
    return deadline


@given(steps)
def test_the_value_stays_between_floor_and_ceiling_and_the_window_is_bounded(history: list[tuple[bool, float]]) -> None:
    deadline = grown(history)
    assert 0.05 <= deadline.value() <= 60.0
    assert deadline.measurements <= WINDOW


@given(steps, seconds)
def test_giving_up_never_lowers_the_deadline_and_doubles_it_up_to_the_ceiling(
    history: list[tuple[bool, float]], elapsed: float
) -> None:
    deadline = grown(history)
    before, typical = deadline.value(), deadline.typical()
    deadline.expire(elapsed)
    assert deadline.value() >= min(60.0, 2 * before)
    assert deadline.typical() >= typical


@given(steps, seconds, seconds)
def test_a_running_operation_makes_the_estimate_worse_the_longer_it_runs_and_changes_nothing_else(
    history: list[tuple[bool, float]], one: float, other: float
) -> None:
    deadline = grown(history)
    shorter, longer = sorted((one, other))
    views: list[Callable[[Deadline], float]] = [Deadline.value, Deadline.typical]
    for view in views:
        before = view(deadline)
        assert before <= view(deadline.pending(shorter)) <= view(deadline.pending(longer))
        assert view(deadline) == before
    assert deadline.pending(longer).typical() >= longer


def test_a_deadline_that_is_too_short_for_a_slow_link_grows_until_operations_succeed_and_does_not_collapse() -> None:
    deadline = Deadline(initial_s=1.0, floor_s=0.1, ceiling_s=100.0)
    for _ in range(WINDOW):
        deadline.observe(0.1)
    assert deadline.value() < 0.5
    given_up = 0
    for _ in range(3 * WINDOW):  # from now on everything takes 5 s
        if deadline.value() < 5.0:
            deadline.expire(deadline.value())
            given_up += 1
        else:
            deadline.observe(5.0)
    assert given_up <= 6
    assert 5.0 < deadline.value() < 10.0


def test_the_deadline_comes_back_after_a_hang() -> None:
    deadline = Deadline(initial_s=1.0, floor_s=0.1, ceiling_s=100.0)
    for _ in range(10):
        deadline.observe(0.5)
    usual = deadline.value()
    for _ in range(3):
        deadline.expire(deadline.value())
    assert deadline.value() >= 8 * usual
    held = deadline.value()
    deadline.observe(0.5)
    assert deadline.value() == pytest.approx(held / 2)  # not all at once: one success proves little
    for _ in range(10):
        deadline.observe(0.5)
    assert deadline.value() == pytest.approx(usual, rel=0.2)


@given(st.lists(st.floats(0.9, 1.1), min_size=5, max_size=15), st.lists(st.floats(100, 1000), max_size=4))
def test_a_minority_of_outliers_moves_the_deadline_little(usual: list[float], outliers: list[float]) -> None:
    deadline = Deadline(initial_s=1.0, floor_s=0.01, ceiling_s=1e6, k=6.0)
    for duration in usual + outliers:
        deadline.observe(duration)
    assert 0.9 <= deadline.value() <= 1.1 + 6 * 0.2 + 1e-9


@given(st.lists(seconds, min_size=1, max_size=WINDOW))
def test_the_order_of_successes_within_the_window_does_not_matter(durations: list[float]) -> None:
    shuffled = sorted(durations)
    assert grown([(True, d) for d in durations]).value() == grown([(True, d) for d in shuffled]).value()


def test_identical_measurements_leave_slack_and_few_do_not_replace_the_initial_value() -> None:
    deadline = Deadline(initial_s=10.0, floor_s=0.1, ceiling_s=100.0, k=6.0)
    deadline.observe(1.0)
    assert deadline.value() == 10.0
    for _ in range(5):
        deadline.observe(1.0)
    assert deadline.value() == pytest.approx(1.6)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_nonsense_durations_are_refused(bad: float) -> None:
    for method in (Deadline.observe, Deadline.expire, Deadline.pending):
        with pytest.raises(ValueError, match="finite"):
            method(Deadline(1.0, 0.1, 2.0), bad)
    with pytest.raises(ValueError, match="floor_s"):
        Deadline(1.0, bad, 2.0)
