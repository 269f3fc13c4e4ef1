"""Named kill points (DESIGN 4.4), who dies there and what comes after; and chaos drawn from a seed."""

from __future__ import annotations

import asyncio
import enum
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shoal.protocol.events import (
    BackwardServed,
    EntryDecided,
    Event,
    ForwardServed,
    GradientPrepared,
    HoleRepaired,
    LeadershipTaken,
    LedgerReported,
    MicrobatchFinished,
    MicrobatchStarted,
    OperationTimed,
    Phase,
    PlanMade,
    ReducePartServed,
    ReduceStarted,
    RoundFrozen,
    SnapshotWritten,
    StepApplied,
    WorkArrived,
)
from shoal.swarm.simulation.network import Link, Moment
from shoal.swarm.simulation.world import COORDINATOR, World


@dataclass(frozen=True)
class Emitted:
    """A peer emits an event of this kind that passes the test."""

    kind: type[Event]
    test: Callable[[Any], bool] = lambda event: True


@dataclass(frozen=True)
class Called:
    """A peer's call is about to be sent, or was just delivered (and its reply is still out).

    others: calls of itself do not count."""

    method: str
    moment: Moment
    others: bool = True


Point = Emitted | Called

# What a stage server, a feeder and a leader go through in a round, in order.
KILL_POINTS: dict[str, Point] = {
    "before forward": Emitted(WorkArrived, lambda e: e.phase is Phase.FORWARD),
    "after forward": Emitted(ForwardServed),
    "before backward": Emitted(WorkArrived, lambda e: e.phase is Phase.BACKWARD),
    "after backward": Emitted(BackwardServed),
    "microbatch started": Emitted(MicrobatchStarted),
    "backward in flight": Called("backward", Moment.SENT, others=False),
    "microbatch finished": Emitted(MicrobatchFinished),
    "share reported to some": Called("feeder_done", Moment.DELIVERED),
    "leads": Emitted(LeadershipTaken),
    "some frozen": Called("freeze", Moment.DELIVERED),
    "ledger reported": Emitted(LedgerReported),
    "frozen": Emitted(RoundFrozen),
    "planned": Emitted(PlanMade),
    "some told to reduce": Called("reduce", Moment.DELIVERED),
    "reduction started": Emitted(ReduceStarted),
    "part sent": Called("allreduce.part", Moment.DELIVERED, others=False),
    "part served": Emitted(ReducePartServed),
    "prepared": Emitted(GradientPrepared),
    "before proposing": Called("paxos_accept", Moment.SENT, others=False),
    "some accepted": Called("paxos_accept", Moment.DELIVERED),
    "after proposing": Emitted(OperationTimed, lambda e: e.phase is Phase.COMMIT),
    "decided, not applied": Emitted(EntryDecided, lambda e: e.kind == "commit"),
    "some told": Called("learn", Moment.DELIVERED),
    "applied": Emitted(StepApplied),
    "snapshot": Emitted(SnapshotWritten),
}
# These need a hole to repair, so something must have failed before.
REPAIR_POINTS: dict[str, Point] = {
    "planned with holes": Emitted(PlanMade, lambda e: e.holes > 0),
    "some told to discard": Called("discard", Moment.DELIVERED),
    "some told to repair": Called("repair", Moment.DELIVERED),
    "hole repaired": Emitted(HoleRepaired),
}


class Victim(enum.Enum):
    """Who dies when somebody reaches the point."""

    SELF = "whoever reached it"
    SERVER = "a server"
    FEEDER = "a feeder"
    LEADER = "the leader"
    COORDINATOR = "the coordinator"


class Fate(enum.Enum):
    """What comes after the death."""

    DEAD = "stays dead"
    RESTART = "restarts from disk"
    REPLACED = "is replaced"


AFTER_S = 1.0  # until the restart or the replacement, virtual seconds


def reach(world: World, point: Point, then: Callable[[str], None], *, count: int = 1, since_step: int = 0) -> None:
    """Do `then(peer)` when a peer reaches the point for the `count`-th time after the log has `since_step` steps."""
    match point:
        case Emitted(kind, test):
            world.when(None, kind, then, test=test, count=count, since_step=since_step)
        case Called(method, moment, others):
            world.when_called(method, moment, then, others=others, count=count, since_step=since_step)


def choose(world: World, victim: Victim, reached: str) -> str:
    """The peer that plays this part at this moment; prefers another one than who reached the point."""
    head, live = world.head(), [name for name in world.alive() if name != reached]
    match victim:
        case Victim.SELF:
            found = [reached]
        case Victim.SERVER:
            me = head.member(reached)
            servers = [m for m in head.members if m.stage is not None and m.peer in live]
            found = [m.peer for m in sorted(servers, key=lambda m: me is None or m.stage != me.stage)]
        case Victim.FEEDER:
            found = [peer for peer in head.feeders() if peer in live]
        case Victim.LEADER:
            found = [p for p in world.alive() if world.peers[p].leader.leading is not None]
            found += [peer for peer in head.committee if peer in live]
        case Victim.COORDINATOR:
            found = [COORDINATOR]
    return (found or [reached])[0]


def kill_at(
    world: World, point: Point, victim: Victim, fate: Fate, *, count: int = 1, since_step: int = 0
) -> list[str]:
    """Arrange one death. Returns a list that will hold the name of who died."""
    died: list[str] = []

    def then(reached: str) -> None:
        name = choose(world, victim, reached)
        died.append(name)
        match fate:
            case Fate.DEAD:
                world.kill_now(name)
            case Fate.RESTART:
                world.kill_for(name, AFTER_S)
            case Fate.REPLACED:
                world.kill_for(name, AFTER_S, successor=f"{name}-new")

    reach(world, point, then, count=count, since_step=since_step)
    return died


def survivable(world: World, victim: Victim, fate: Fate) -> bool:
    """Does the promise cover it? Progress needs a majority of the committee and a copy of every stage."""
    servers, stages = world.spec.servers_per_stage, world.spec.shape.stages
    if servers * stages == 1:  # two peers: the committee is the coordinator alone
        return fate is Fate.RESTART
    return fate is not Fate.DEAD or servers > 1 or victim is Victim.COORDINATOR


# --- chaos -----------------------------------------------------------------------------------------------------------
class Chaos:
    """Random faults, one after another, until told to stop; then everything is healed and the dead come back.

    Never more than the promise covers: a peer goes for good only where its stage has another live copy and the
    committee no other missing member.
    """

    def __init__(self, world: World, seed: int, *, pause_s: tuple[float, float] = (0.05, 1.5)) -> None:
        self._world = world
        self._rng = random.Random(f"chaos {seed}")
        self._pause_s = pause_s
        self._calm = world.network.link
        self._gone: set[str] = set()
        self._born = 0

    async def run(self, *, until_step: int, limit_s: float) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + limit_s
        faults = (self._crash, self._crash, self._leave, self._hang, self._partition, self._rain)
        while self._world.step() < until_step and loop.time() < end:
            await asyncio.sleep(self._rng.uniform(*self._pause_s))
            self._rng.choice(faults)()
        self._world.network.link = self._calm
        self._world.heal()
        for name, transport in list(self._world.network.peers.items()):
            transport.resume()
            if name not in self._gone:
                self._world.start(name)

    def _someone(self) -> str | None:
        live = self._world.alive()
        return self._rng.choice(live) if live else None

    def _crash(self) -> None:
        if (name := self._someone()) is not None:
            self._world.kill_for(name, self._rng.uniform(0.05, 3.0))

    def _leave(self) -> None:
        """Gone for good, and a newcomer instead."""
        name = self._someone()
        if name is None or name == COORDINATOR:
            return
        head = self._world.head()
        me = head.member(name)
        missing = [m.peer for m in head.members if m.peer not in self._world.alive()]
        copies = [
            m.peer
            for m in head.members
            if me is not None and m.stage == me.stage and m.peer not in (name, *missing) and self._ready(m.peer)
        ]
        if missing or not copies:
            return
        self._gone.add(name)
        self._born += 1
        self._world.kill_for(name, self._rng.uniform(0.0, 1.0), successor=f"n{self._born}")

    def _ready(self, name: str) -> bool:
        peer = self._world.peers[name]
        return peer.server.ready and peer.history.head.round == self._world.head().round

    def _hang(self) -> None:
        if (name := self._someone()) is not None:
            self._world.hang_for(name, self._rng.uniform(0.1, 4.0))

    def _partition(self) -> None:
        names = list(self._world.network.peers)
        self._rng.shuffle(names)
        sides = self._rng.choice((2, 2, 2, 3))
        self._world.partition(*(set(names[i::sides]) for i in range(sides)))
        asyncio.get_running_loop().call_later(self._rng.uniform(0.1, 4.0), self._world.heal)

    def _rain(self) -> None:
        """A spell of bad links."""
        lossy = Link(
            latency_s=(0.001, self._rng.choice((0.05, 0.5))),
            lose_request=self._rng.choice((0.0, 0.1, 0.3)),
            lose_reply=self._rng.choice((0.0, 0.1, 0.3)),
            duplicate=self._rng.choice((0.0, 0.2)),
        )
        network = self._world.network
        network.link = lossy
        self._world.note(f"rain {lossy}")

        def clear() -> None:
            if network.link is lossy:
                network.link = self._calm

        asyncio.get_running_loop().call_later(self._rng.uniform(0.2, 3.0), clear)
