"""Cells of the kill matrix as real processes: whatever dies, the parameters are one machine's.

The full matrix runs over the simulated transport (tests/simulation); here the same decisions meet real daemons, disks
and SIGKILL. Every cell counts samples in the log and compares the exported parameters with the reference in float64.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from shoal.protocol.events import BackwardServed, EntryDecided, GradientPrepared, LeadershipTaken, MicrobatchStarted
from tests.node.small_runs import SmallSwarm, finish, write_run

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]


def died_at(swarm: SmallSwarm, name: str, kind: type) -> None:
    """The node was killed by SIGKILL while it told of an event of this kind, and its children went with it."""
    node = swarm.wait_for_death(name)
    assert node.process.returncode == -signal.SIGKILL
    assert isinstance(node.events[-1].event, kind)
    assert node.family, "its p2pd was seen"
    assert swarm.orphans() == []


def test_one_stage_one_server_sgd(tmp_path: Path) -> None:
    manifest = write_run(tmp_path, stages=1, copies=1, feeders=1, optimizer="sgd")
    with SmallSwarm(tmp_path, manifest) as swarm:
        swarm.start(1)
        outcome = finish(swarm, 6)
    outcome.check(6)
    assert outcome.codes == {"coordinator": 0, "v1": 0}


def test_two_stages_two_servers_each_adamw_one_killed_after_prepared(tmp_path: Path) -> None:
    manifest = write_run(tmp_path, stages=2, copies=2)
    with SmallSwarm(tmp_path, manifest) as swarm:
        swarm.start(4, v1="kill GradientPrepared 2")
        died_at(swarm, "v1", GradientPrepared)
        finish(swarm, 6).check(6)


def test_two_stages_two_servers_each_sgd_a_feeder_killed_with_a_microbatch_in_flight(tmp_path: Path) -> None:
    # all four feed: identities are new in every run, so which two would feed is anybody's guess
    manifest = write_run(tmp_path, stages=2, copies=2, feeders=4, optimizer="sgd")
    with SmallSwarm(tmp_path, manifest) as swarm:
        swarm.start(4, v1="kill MicrobatchStarted 3")
        died_at(swarm, "v1", MicrobatchStarted)
        finish(swarm, 6).check(6)


def test_one_stage_two_servers_adamw_one_killed_after_a_backward(tmp_path: Path) -> None:
    manifest = write_run(tmp_path, stages=1, copies=2)
    with SmallSwarm(tmp_path, manifest) as swarm:
        swarm.start(2, v1="kill BackwardServed 3")
        died_at(swarm, "v1", BackwardServed)
        finish(swarm, 6).check(6)


def test_one_stage_two_servers_adamw_one_killed_between_decision_and_apply(tmp_path: Path) -> None:
    manifest = write_run(tmp_path, stages=1, copies=2)
    with SmallSwarm(tmp_path, manifest) as swarm:
        swarm.start(2, v2="kill EntryDecided 1 kind=commit step=3")
        died_at(swarm, "v2", EntryDecided)
        finish(swarm, 6).check(6)


def test_three_stages_one_server_each_adamw_one_restarted_from_its_disk(tmp_path: Path) -> None:
    manifest = write_run(tmp_path, stages=3, copies=1, rounds=6)
    with SmallSwarm(tmp_path, manifest) as swarm:
        swarm.start(3, v2="kill BackwardServed 10")
        died_at(swarm, "v2", BackwardServed)
        swarm.enter("v2")
        outcome = finish(swarm, 6)
    outcome.check(6)
    assert outcome.codes["v2"] == 0


def test_one_stage_two_servers_adamw_a_committee_member_killed_when_it_takes_the_lead(tmp_path: Path) -> None:
    rounds = 20  # who leads is drawn anew in every round: in one of these it is v1's turn
    manifest = write_run(tmp_path, stages=1, copies=2, rounds=rounds)
    with SmallSwarm(tmp_path, manifest) as swarm:
        swarm.start(2, v1="kill LeadershipTaken")
        died_at(swarm, "v1", LeadershipTaken)
        finish(swarm, rounds).check(rounds)
