"""A node's state follows from facts; chaos kills at the event that it was told."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys

import pytest

from shoal.node.chaos import VARIABLE, injection
from shoal.node.lifecycle import Facts, Stage, state_of, told

STEPS = ("connected", "checked", "member", "ready")


def test_a_volunteer_passes_every_state_in_order() -> None:
    facts = {"serves": True}
    states = [state_of(Facts(**facts))]
    for step in STEPS:
        facts[step] = True
        states.append(state_of(Facts(**facts)))
    for end in ("draining", "stopped"):
        facts[end] = True
        states.append(state_of(Facts(**facts)))
    names = ["starting", "checking", "joining", "syncing", "working", "draining", "left"]
    assert [state.value for state in states] == names


def test_who_serves_no_stage_works_as_soon_as_it_is_a_member() -> None:
    assert state_of(Facts(connected=True, checked=True, member=True)) is Stage.WORKING


def test_stopped_wins_over_draining_and_draining_over_everything_else() -> None:
    names = list(Facts.__dataclass_fields__)
    for values in itertools.product((False, True), repeat=len(names)):
        facts = Facts(**dict(zip(names, values, strict=True)))
        if facts.stopped:
            assert state_of(facts) is Stage.LEFT
        elif facts.draining:
            assert state_of(facts) is Stage.DRAINING
        else:
            assert state_of(facts) not in (Stage.LEFT, Stage.DRAINING)


def test_a_node_that_applies_a_step_is_still_told_to_work_and_one_that_lost_its_place_is_not() -> None:
    applying = Facts(connected=True, checked=True, member=True, serves=True, ready=False)
    assert told(Stage.WORKING, applying) is Stage.WORKING
    assert told(Stage.JOINING, applying) is Stage.SYNCING
    assert told(Stage.WORKING, Facts(connected=True, checked=True)) is Stage.JOINING


@pytest.mark.parametrize("text", ["kill", "kill Nothing", "maim GradientPrepared", "kill gradientprepared"])
def test_chaos_that_cannot_be_understood_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="kill EVENT"):
        injection({VARIABLE: text})


def test_no_chaos_unless_it_is_asked_for() -> None:
    assert injection({}) is None and injection({VARIABLE: ""}) is None


@pytest.mark.parametrize(
    ("text", "dies_after"),
    [("kill StageUncovered", 0), ("kill StageUncovered 3", 2), ("kill StageUncovered 1 stage=1 round=7", 5)],
)
def test_chaos_kills_at_the_event_that_it_was_told(text: str, dies_after: int) -> None:
    code = """
import sys
from shoal.node.chaos import injection
from shoal.protocol.events import Bus, StageUncovered, WaitingForQuorum
bus = Bus(lambda: 0.0)
bus.subscribe(injection({"SHOAL_CHAOS": sys.argv[1]}))
for round in range(2, 12):
    bus.emit(WaitingForQuorum(round, 1, 3))
    bus.emit(StageUncovered(round, 1))
    print(round, flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code, text], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(done.stdout.split()) == dies_after
