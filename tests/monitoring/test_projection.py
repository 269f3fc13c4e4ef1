"""The snapshot is a pure fold of events, in event time."""

from __future__ import annotations

import json
import math

import pytest

from shoal.monitoring.projection import LOSS_HISTORY, Projection, RateWindow, perplexity, project
from shoal.protocol import events as e
from shoal.protocol.events import Reason, Stamped


def commit(round_: int, *, samples: int = 64, loss: float = 3.0, servers: tuple[int, ...] = (2, 2)) -> e.EntryDecided:
    return e.EntryDecided(round_, 0, "commit", round_, "d", 5, servers, samples, loss, samples * round_)


def told(*events: e.Event) -> Projection:
    projection = Projection()
    for at_s, event in enumerate(events):
        projection.apply(Stamped(float(at_s), event))
    return projection


def test_rate_is_samples_after_the_first_entry_over_the_time_between():
    state = project(Stamped(10.0 + 2 * r, commit(r)) for r in range(1, 6))
    assert state.samples_per_s == pytest.approx(4 * 64 / 8)
    assert state.samples_total == 5 * 64


def test_rate_forgets_what_lies_outside_the_window_but_keeps_two_entries():
    rate = RateWindow(10.0)
    for at_s in (0, 1, 2, 3):
        rate.add(at_s, 100)
    rate.add(100, 50)
    rate.add(104, 60)
    assert rate.samples_per_s == pytest.approx(60 / 4)
    rate.add(900, 90)
    assert rate.samples_per_s == pytest.approx(90 / 796)


def test_entries_learned_while_catching_up_do_not_count_as_throughput():
    projection = Projection()
    projection.apply(Stamped(0.0, e.LifecycleChanged("joining", "syncing")))
    for r in range(1, 500):
        projection.apply(Stamped(0.001 * r, commit(r)))
    projection.apply(Stamped(1.0, e.LifecycleChanged("syncing", "working")))
    assert projection.snapshot().samples_per_s == 0
    assert projection.snapshot().step == 499
    projection.apply(Stamped(2.0, commit(500)))
    projection.apply(Stamped(4.0, commit(501)))
    assert projection.snapshot().samples_per_s == pytest.approx(32)


def test_perplexity_is_exp_of_the_newest_loss():
    assert told(commit(1, loss=5.0), commit(2, loss=2.0)).snapshot().perplexity == pytest.approx(math.exp(2.0))
    assert perplexity(1e6) == math.inf


def test_loss_history_is_bounded_and_remembers_the_first_loss():
    state = project(Stamped(float(r), commit(r, loss=1000.0 - r)) for r in range(1, 1000))
    assert len(state.loss_history) == LOSS_HISTORY
    assert state.loss_history[-1] == (999, 1.0)
    assert state.loss_first == 999.0


def test_quorum_wait_keeps_its_beginning_and_ends_with_the_next_entry():
    projection = told(commit(1), e.WaitingForQuorum(2, 1, 3), e.WaitingForQuorum(2, 1, 3))
    waiting = projection.snapshot().waiting_for_quorum
    assert waiting is not None and waiting.since_s == 1.0 and (waiting.reachable, waiting.committee) == (1, 3)
    projection.apply(Stamped(9.0, commit(2)))
    assert projection.snapshot().waiting_for_quorum is None


def test_stage_stays_uncovered_until_an_entry_names_a_server_for_it():
    projection = told(commit(1), e.StageUncovered(2, 1))
    assert projection.snapshot().stages_uncovered == {1: 1.0}
    projection.apply(Stamped(5.0, e.EntryDecided(2, 0, "reconfigure", 1, "d", 3, (2, 0), 0, math.nan, 64)))
    assert projection.snapshot().stages_uncovered == {1: 1.0}
    projection.apply(Stamped(6.0, e.EntryDecided(3, 0, "reconfigure", 1, "d", 4, (2, 1), 0, math.nan, 64)))
    assert projection.snapshot().stages_uncovered == {}


def test_leader_is_who_took_the_round_that_is_not_yet_decided():
    projection = told(commit(1), e.LeadershipTaken(2, 0))
    assert projection.snapshot().leader
    projection.apply(Stamped(3.0, commit(2)))
    assert not projection.snapshot().leader
    projection.apply(Stamped(4.0, e.LeadershipTaken(3, 1)))
    assert projection.snapshot().takeovers == 1


def test_own_stage_comes_from_ones_own_admission_only():
    projection = told(e.NodeStarted("me", "n", "run", "pipeline", "1"), e.MemberAdmitted(1, "other", 0))
    assert projection.snapshot().stage is None
    projection.apply(Stamped(2.0, e.MemberAdmitted(1, "me", 1)))
    assert projection.snapshot().stage == 1


def test_a_repeated_backward_serves_but_gives_no_samples():
    projection = told(e.BackwardServed(1, 0, 1, 8, True, 0.1), e.BackwardServed(1, 0, 1, 8, False, 0.1))
    state = projection.snapshot()
    assert (state.backwards, state.backwards_accumulated, state.samples_served) == (2, 1, 8)


def test_failures_are_counted_by_reason():
    state = told(
        e.CallFailed("p", "m", Reason.DEADLINE), e.CallFailed("q", "m", Reason.DEADLINE),
        e.RequestRefused("p", "m", Reason.STALE), e.MicrobatchRetried(1, 2, 0, "p", Reason.TORN_STREAM),
    ).snapshot()  # fmt: skip
    assert state.failures == {"deadline": 2} and state.refusals == {"stale": 1} and state.retries == {"torn_stream": 1}


def test_a_problem_without_a_fix_gets_the_help_of_its_reason():
    state = told(e.Problem(Reason.DAEMON_DIED, "p2pd is gone")).snapshot()
    assert state.problem is not None and state.problem.fix == e.REASON_HELP[Reason.DAEMON_DIED]


def test_json_is_strict_and_has_every_field():
    state = told(e.StageUncovered(1, 0), e.WaitingForQuorum(1, 1, 3), e.Problem(Reason.BUSY, "x")).snapshot()
    data = json.loads(json.dumps(state.to_json(), allow_nan=False))
    assert data["loss"] is None and data["problem"]["reason"] == "busy" and data["waiting_for_quorum"]["committee"] == 3
    assert set(data) == set(state.__dataclass_fields__)


def test_replaying_the_same_events_gives_the_same_snapshot(story):
    own = [stamped for node, stamped in story.events if node == "amber-otter"]
    assert project(own).to_json() == project(own).to_json()
    assert project(own).step == 27 and project(own).stage == 0 and project(own).feeds


def test_a_snapshot_does_not_change_when_more_events_come():
    projection = told(e.CallFailed("p", "m", Reason.DEADLINE))
    before = projection.snapshot()
    projection.apply(Stamped(9.0, e.CallFailed("p", "m", Reason.DEADLINE)))
    assert before.failures == {"deadline": 1}
