"""Where a node is in its life (DESIGN 4.9): a pure function of facts, so it can never get out of step with them."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Stage(enum.StrEnum):
    """starting → checking → joining → syncing → working → draining → left."""

    STARTING = "starting"
    CHECKING = "checking"
    JOINING = "joining"
    SYNCING = "syncing"
    WORKING = "working"
    DRAINING = "draining"
    LEFT = "left"


@dataclass(frozen=True, slots=True)
class Facts:
    """What the state follows from. serves: the log gives this node a stage; ready: its state is at the log's step."""

    connected: bool = False
    member: bool = False
    serves: bool = False
    ready: bool = False
    draining: bool = False
    stopped: bool = False
    checked: bool = False


def state_of(facts: Facts) -> Stage:
    if facts.stopped:
        return Stage.LEFT
    if facts.draining:
        return Stage.DRAINING
    if not facts.checked:
        return Stage.STARTING if not facts.connected else Stage.CHECKING
    if not facts.member:
        return Stage.JOINING
    if facts.serves and not facts.ready:
        return Stage.SYNCING
    return Stage.WORKING


def told(old: Stage, facts: Facts) -> Stage:
    """What to tell people after `old`. Applying a step takes a moment in every round; a node that works goes on
    working through that, unless it lost its place or its stage."""
    new = state_of(facts)
    if old is Stage.WORKING and new is Stage.SYNCING:
        return Stage.WORKING
    return new
