"""What a leader makes of the reports: what is prepared, whether history must go back, and which state is pinned."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shoal.protocol.runlog import Chain, Commit, Decided, Entry, Genesis, Member, Pin, Rollback, StageCommit, Vote
from shoal.protocol.sampling import next_beacon
from shoal.swarm.pipeline.decide import needs_rollback, next_pin, survey, uncovered
from shoal.swarm.pipeline.messages import BucketReport, PreparedReport, Report, SnapshotReport
from shoal.swarm.pipeline.plan import plan_stage

RUN = hashlib.sha256(b"run").hexdigest()
STAGES, MICROBATCHES, SAMPLES = 2, 4, 8
ORDER = ("p2", "p0", "p1", "p3", "p4")


def hexed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def report(stage: int | None, *, ready: bool = True, stuck: bool = False, **fields: Any) -> Report:
    return Report(stage=stage, ready=ready, stuck=stuck, step=fields.pop("step", 0), **fields)


def snapshots(*of: tuple[int, int, str]) -> tuple[SnapshotReport, ...]:
    return tuple(SnapshotReport(step=step, stage=stage, digest=hexed(text)) for step, stage, text in of)


def prepared(text: str, loss_sum: float = 1.0) -> PreparedReport:
    return PreparedReport(gradient=hexed(text), plan=8, loss_sum=loss_sum)


def chain_of(commits: int) -> Chain:
    members = tuple(Member(peer=p, public_key=hexed(p)) for p in ORDER)
    beacon = next_beacon(None, RUN)
    chain = Chain(
        Entry(
            run=RUN,
            term=0,
            round=0,
            previous="",
            members=members,
            committee=("p0",),
            next_sample=0,
            samples_total=0,
            step=0,
            beacon=beacon,
            decision=Genesis(),
        )
    )
    for _ in range(commits):
        commit(chain)
    return chain


def commit(chain: Chain, pin: Pin | None = None) -> None:
    head = chain.head
    stages = tuple(StageCommit(stage=s, gradient=hexed(f"{head.round}/{s}"), holders=("p0",)) for s in range(STAGES))
    extend(
        chain,
        decision=Commit(plan=8, samples=SAMPLES, loss_sum=1.0, stages=stages),
        step=head.step + 1,
        next_sample=head.next_sample + SAMPLES,
        samples_total=head.samples_total + SAMPLES,
        pin=pin or head.pin,
    )


def extend(chain: Chain, **changes: Any) -> None:
    head = chain.head
    always = {"round": head.round + 1, "previous": chain.head_digest, "beacon": next_beacon(head, RUN)}
    entry = head.model_copy(update={**always, **changes})
    chain.extend(entry.to_bytes(), Decided(ballot=0, votes=(Vote(peer="p0", signature="00"),)), lambda *_: True)


# --- survey --------------------------------------------------------------------------------------------------------
def test_a_stored_gradient_is_used_as_it_is_and_the_one_with_most_holders_wins() -> None:
    reports = {
        "p0": report(0, prepared=(prepared("x"), prepared("y"))),
        "p1": report(0, prepared=(prepared("y"),), buckets=(BucketReport(id=0, microbatches=(0,), loss_sum=1.0),)),
        "p2": report(0),
        "p3": report(1),
    }
    first, second = survey(STAGES, MICROBATCHES, reports, ORDER)
    assert first.servers == ("p2", "p0", "p1") and first.plan is None and first.enough == 2
    assert first.prepared == (prepared("y"), ("p0", "p1"))
    assert second.prepared is None and second.plan is not None and second.enough == 1
    assert uncovered((first, second)) == ()


def test_a_gradient_reported_twice_by_one_peer_has_one_holder() -> None:
    reports = {
        "p0": report(0, prepared=(prepared("x"), prepared("x"), prepared("x"))),
        "p1": report(0, prepared=(prepared("y"),)),
        "p2": report(0, prepared=(prepared("y"),)),
    }
    assert survey(1, MICROBATCHES, reports, ORDER)[0].prepared == (prepared("y"), ("p2", "p1"))


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_does_not_reach_the_leader(loss: float) -> None:
    with pytest.raises(ValidationError):
        prepared("x", loss)
    with pytest.raises(ValidationError):
        BucketReport(id=0, microbatches=(0,), loss_sum=loss)


FINITE = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def report_sets(draw: st.DrawFn) -> dict[str, Report]:
    buckets = st.builds(
        BucketReport,
        id=st.integers(0, 3),
        microbatches=st.lists(st.integers(-1, 5), max_size=4).map(tuple),
        loss_sum=FINITE,
    )
    stored = st.builds(
        PreparedReport, gradient=st.sampled_from([hexed("x"), hexed("y")]), plan=st.integers(0, 9), loss_sum=FINITE
    )
    held = st.builds(
        SnapshotReport,
        step=st.integers(0, 6),
        stage=st.integers(0, 3),
        digest=st.sampled_from([hexed("a"), hexed("b")]),
    )
    one = st.builds(
        Report,
        stage=st.none() | st.integers(0, 3),
        ready=st.booleans(),
        stuck=st.booleans(),
        step=st.integers(0, 6),
        buckets=st.lists(buckets, max_size=3).map(tuple),
        prepared=st.lists(stored, max_size=2).map(tuple),
        snapshots=st.lists(held, max_size=5).map(tuple),
    )
    return draw(st.dictionaries(st.sampled_from([*ORDER, "stranger"]), one))


@settings(max_examples=80)
@given(reports=report_sets(), turn=st.integers(0, 5))
def test_no_well_formed_report_breaks_the_leader(reports: dict[str, Report], turn: int) -> None:
    chain = chain_of(4)
    for state in survey(STAGES, MICROBATCHES, reports, ORDER, turn):
        live = [p for p in ORDER if p in reports and reports[p].ready and reports[p].stage == state.stage]
        assert state.servers == tuple(live) and state.enough == min(2, len(live))
        assert (state.prepared is None) or (state.plan is None)
        assert bool(live) == (state.prepared is not None or state.plan is not None)
        if state.prepared is not None:
            best, holders = state.prepared
            assert math.isfinite(best.loss_sum) and len(set(holders)) == len(holders) >= 1
            assert all(any(r.gradient == best.gradient for r in reports[p].prepared) for p in holders)
        if state.plan is not None:
            assert state.plan.loss_sum == state.plan.loss_sum
            ledgers = {p: reports[p].buckets for p in live}
            assert state.plan == plan_stage(state.stage, MICROBATCHES, ledgers, live, turn)  # type: ignore[arg-type]
    needs_rollback(chain.head, reports, (0, 1))
    pin = next_pin(chain, STAGES, reports, ORDER)
    if pin is not None:
        commit(chain, pin)  # the log takes every pin that a leader proposes
        assert next_pin(chain, STAGES, reports, ORDER) is None, "the newest one was pinned"


# --- rollback ------------------------------------------------------------------------------------------------------
def pinned() -> Chain:
    chain = chain_of(2)
    source = chain.commit_of(1)
    assert source is not None
    commit(chain, Pin(step=1, next_sample=SAMPLES, samples_total=SAMPLES, digests=(hexed("s0"), hexed("s1"))))
    return chain


BOTH = snapshots((1, 0, "s0"), (1, 1, "s1"))


def test_history_goes_back_when_a_stage_is_lost_and_the_pinned_state_of_all_stages_is_there() -> None:
    reports = {"p0": report(0, step=3), "p1": report(1, ready=False, stuck=True), "p2": report(None, snapshots=BOTH)}
    assert needs_rollback(pinned().head, reports, (1,))


@pytest.mark.parametrize(
    ("why", "reports"),
    [
        ("nobody serves the stage", {"p0": report(0, snapshots=BOTH)}),
        ("its server still looks", {"p1": report(1, ready=False, snapshots=BOTH)}),
        (
            "another server of it still looks",
            {"p1": report(1, ready=False, stuck=True, snapshots=BOTH), "p3": report(1, ready=False)},
        ),
        ("its pinned state is gone", {"p1": report(1, ready=False, stuck=True, snapshots=snapshots((1, 0, "s0")))}),
        (
            "the pinned state of another stage is gone",
            {"p0": report(0), "p1": report(1, ready=False, stuck=True, snapshots=snapshots((1, 1, "s1")))},
        ),
        (
            "what is there is another state",
            {"p1": report(1, ready=False, stuck=True, snapshots=snapshots((1, 0, "s0"), (1, 1, "drifted")))},
        ),
    ],
)
def test_history_does_not_go_back(why: str, reports: dict[str, Report]) -> None:
    assert not needs_rollback(pinned().head, reports, (1,)), why


def test_history_does_not_go_back_for_nothing() -> None:
    stuck = {"p0": report(0, ready=False, stuck=True, snapshots=BOTH), "p1": report(1, ready=False, stuck=True)}
    assert not needs_rollback(pinned().head, stuck, ())
    assert not needs_rollback(chain_of(0).head, stuck, (0, 1)), "there is nothing to go back from"
    chain = pinned()
    extend(chain, decision=Rollback(to_step=1), step=1, next_sample=SAMPLES, samples_total=SAMPLES)
    assert not needs_rollback(chain.head, stuck, (0,)), "it is back already"
    assert needs_rollback(chain_of(2).head, stuck, (0, 1)), "without a pin everybody can compute the start"


# --- pin -----------------------------------------------------------------------------------------------------------
def test_the_newest_step_that_every_stage_holds_is_pinned_and_the_first_in_order_is_canonical() -> None:
    chain = chain_of(4)
    reports = {
        "p0": report(0, snapshots=snapshots((2, 0, "mine"), (4, 0, "newer"), (2, 1, "hearsay"))),
        "p2": report(0, snapshots=snapshots((2, 0, "canonical"))),
        "p1": report(1, snapshots=snapshots((2, 1, "other stage"), (3, 1, "alone"))),
    }
    pin = next_pin(chain, STAGES, reports, ORDER)
    assert pin == Pin(
        step=2, next_sample=2 * SAMPLES, samples_total=2 * SAMPLES, digests=(hexed("canonical"), hexed("other stage"))
    )


def test_a_pin_never_goes_back_nor_ahead() -> None:
    chain = pinned()
    old = snapshots((1, 0, "again"), (0, 0, "start"), (9, 0, "ahead"))
    other = snapshots((1, 1, "again"), (0, 1, "start"), (9, 1, "ahead"))
    assert next_pin(chain, STAGES, {"p0": report(0, snapshots=old), "p1": report(1, snapshots=other)}, ORDER) is None


def test_a_snapshot_of_a_stage_that_does_not_exist_is_not_counted() -> None:
    reports = {
        "p0": report(0, snapshots=snapshots((2, 0, "state"))),
        "p1": report(2, snapshots=snapshots((2, 2, "nonsense"))),
    }
    assert next_pin(chain_of(3), STAGES, reports, ORDER) is None


def test_a_server_that_is_not_up_to_date_has_no_say_in_what_is_pinned() -> None:
    """Its disk may hold a snapshot of a history that was rolled back while it was away."""
    reports = {
        "p2": report(0, ready=False, snapshots=snapshots((2, 0, "rolled back"))),
        "p0": report(0, snapshots=snapshots((2, 0, "current"))),
        "p1": report(1, snapshots=snapshots((2, 1, "current"))),
    }
    pin = next_pin(chain_of(3), STAGES, reports, ORDER)
    assert pin is not None and pin.digests[0] == hexed("current")


@pytest.mark.parametrize("digest", ["", "ab", "A" * 64, "0" * 63])
def test_a_report_names_states_and_gradients_by_whole_digests_only(digest: str) -> None:
    with pytest.raises(ValidationError):
        SnapshotReport(step=1, stage=0, digest=digest)
    with pytest.raises(ValidationError):
        PreparedReport(gradient=digest, plan=8, loss_sum=1.0)
