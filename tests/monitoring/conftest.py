"""A made-up swarm whose story the tests tell: six nodes, two stages, one kill, one newcomer. No time passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from shoal.monitoring.view import SwarmBoard
from shoal.protocol import events as e

RUN = "stdlib-tiny"
ROUNDS = 40
START_S = 1_700_000_000.0
ROUND_S = 1.7
SAMPLES = 64
NODES = {
    "bootstrap": None,
    "amber-otter": 0,
    "brave-heron": 0,
    "calm-badger": 1,
    "dapper-lynx": 1,
    "eager-finch": 1,
}
FEEDERS = ("amber-otter", "calm-badger")
VICTIM, KILL_ROUND = "dapper-lynx", 14
NEWCOMER, JOIN_ROUND = "eager-finch", 20


def peer_id(node: str) -> str:
    return "12D3KooW" + (node.replace("-", "") + "x" * 36)[:36]


def loss_at(round_: int) -> float:
    return 2.2 + 3.3 * math.exp(-round_ / 11) + 0.05 * math.sin(round_ * 1.7)


@dataclass(frozen=True)
class Story:
    """(node, event) in order of time, and a board that was told all of it."""

    events: list[tuple[str, e.Stamped]]
    board: SwarmBoard
    end_s: float


def tell(rounds: int) -> Story:
    board = SwarmBoard(RUN, rounds=ROUNDS, stages=2)
    told: list[tuple[str, e.Stamped]] = []

    def say(node: str, at_s: float, *events: e.Event) -> None:
        for event in events:
            stamped = e.Stamped(at_s, event)
            told.append((node, stamped))
            board.feed(node, stamped)

    def begin(node: str, at_s: float) -> None:
        say(node, at_s, e.NodeStarted(peer_id(node), node, RUN, "pipeline", "0.1.0"))
        say(node, at_s + 0.4, e.LifecycleChanged("", "joining"))

    def entry(round_: int, kind: str, servers: tuple[int, ...], members: int) -> e.EntryDecided:
        commit = kind == "commit"
        return e.EntryDecided(
            round=round_, term=0, kind=kind, step=round_, digest=f"{round_:064x}", members=members,
            servers_per_stage=servers, samples=SAMPLES if commit else 0, loss=loss_at(round_) if commit else math.nan,
            samples_total=SAMPLES * round_,
        )  # fmt: skip

    first = [node for node in NODES if node != NEWCOMER]
    for node in first:
        board.started(node, START_S)
        begin(node, START_S + 0.5)
    for node in first:
        say(node, START_S + 4, entry(0, "genesis", (2, 2), len(first)), e.LifecycleChanged("joining", "working"))
    alive = list(first)
    at_s = START_S + 4
    for r in range(1, rounds + 1):
        at_s += ROUND_S
        if r == JOIN_ROUND:
            board.joined(NEWCOMER, at_s)
            begin(NEWCOMER, at_s)
            say(NEWCOMER, at_s + 0.2, e.LifecycleChanged("joining", "syncing"), e.SyncStarted(1, 0, r))
            say(NEWCOMER, at_s + 0.3, e.ChunkFetched(peer_id("calm-badger"), 6_400_000))
            say(
                NEWCOMER, at_s + 0.4, e.SyncFinished(1, r, 2, 12_800_000, 2.1), e.LifecycleChanged("syncing", "working")
            )
            for node in alive:
                say(node, at_s + 0.4, e.MemberAdmitted(r, peer_id(NEWCOMER), 1))
            alive.append(NEWCOMER)
        for m in range(8):
            feeder = FEEDERS[m % 2]
            say(feeder, at_s, e.MicrobatchStarted(r, m))
            for node in alive:
                stage = NODES[node]
                if stage is None or m % 2 != alive.index(node) % 2:
                    continue
                say(
                    node, at_s, e.ForwardServed(r, m, stage, 8, 0.02), e.BackwardServed(r, m, stage, 8, True, 0.06),
                    e.BytesMoved("sent", "pipeline.forward", "none", 786_432),
                    e.BytesMoved("received", "pipeline.backward", "none", 655_360),
                )  # fmt: skip
            say(feeder, at_s, e.MicrobatchFinished(r, m, 8, loss_at(r), 0.4))
        if r == KILL_ROUND:
            board.killed(VICTIM, at_s)
            alive.remove(VICTIM)
            for m in (3, 5):
                say(FEEDERS[0], at_s, e.MicrobatchRetried(r, m, 1, peer_id(VICTIM), e.Reason.UNREACHABLE))
            say("brave-heron", at_s, e.LeadershipTaken(r, 1), e.PlanMade(r, 1, 3, 1))
            for m in (1, 3, 7):
                say("brave-heron", at_s, e.HoleRepaired(r, 1, 1, m))
            for node in alive:
                say(node, at_s, e.MemberDropped(r, peer_id(VICTIM), e.Reason.UNREACHABLE))
        elif "amber-otter" in alive:
            say("amber-otter", at_s, e.LeadershipTaken(r, 0))
        servers = (2, sum(NODES[node] == 1 for node in alive))
        for node in alive:
            say(node, at_s, entry(r, "commit", servers, len(alive)))
            stage = NODES[node]
            if stage is not None:
                say(node, at_s, e.StepApplied(r, r, stage, "prepared", 0.03))
        say("amber-otter", at_s + 0.1, e.LeadershipTaken(r + 1, 0), e.MicrobatchStarted(r + 1, 0))
    return Story(told, board, at_s + 0.5)


@pytest.fixture(scope="session")
def story() -> Story:
    """27 of 40 rounds; the kill and the newcomer are in it."""
    return tell(27)


@pytest.fixture
def tell_story() -> Callable[[int], Story]:
    return tell
