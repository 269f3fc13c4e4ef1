"""Who does what in the next round: members, stages, feeders, committee. Pure functions of the entry and who answered.

A member that did not answer is dropped and may join again; it keeps its place only while its committee seat cannot be
filled, because a committee must not shrink just because somebody is away. It may shrink when somebody says goodbye.
Choices are sticky: what works stays. The coordinator serves no stage.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from shoal.protocol.runlog import COMMITTEE_SIZES, MAX_ENTRY_BYTES, MAX_MEMBERS, Entry, Member
from shoal.protocol.sampling import order


@dataclass(frozen=True, slots=True)
class Shape:
    """What the manifest asks for."""

    stages: int
    feeders: int
    committee: int
    coordinator: str
    max_peers: int


def next_members(
    head: Entry,
    shape: Shape,
    alive: Collection[str],
    joiners: Mapping[str, Member],
    leaving: Collection[str] = (),
) -> tuple[tuple[Member, ...], tuple[str, ...]]:
    """Members and committee that entry `head.round + 1` names.

    alive: members of `head` that answered in this round; joiners: candidates by PeerID, whose `stage` does not matter.
    At least one of the two must leave somebody, else the old committee's first member stays although it is leaving.
    Returns (members sorted by PeerID, committee in order).
    """
    round_ = head.round + 1
    before = {m.peer for m in head.members}
    if not (before - set(leaving) or joiners.keys() - before - set(leaving)):
        leaving = set(leaving) - set(head.committee[:1])
    kept = {m.peer: m for m in head.members if m.peer in alive and m.peer not in leaving}
    # a member of `head` that was dropped comes back by a later entry: in one entry nobody changes its key
    candidates = joiners.keys() - before - set(leaving)
    fresh = [joiners[peer] for peer in order(candidates, head.run, round_, head.beacon, "join")]
    members = dict(kept)
    seats = min(shape.max_peers, MAX_MEMBERS)
    room = MAX_ENTRY_BYTES - _FIXED_BYTES - _STAGE_BYTES * shape.stages - sum(map(_entry_bytes, head.members))
    for joiner in fresh:
        room -= _entry_bytes(joiner)
        if room < 0 or len(members) >= seats:
            break
        members[joiner.peer] = joiner.model_copy(update={"since": round_, "stage": None, "feeder": False})
    members = _assign_stages(members, shape)
    committee, away = _choose_committee(head, shape, members, leaving)
    for peer in away:
        old = head.member(peer)
        if old is not None:
            members[peer] = old.model_copy(update={"stage": None, "feeder": False})
    members = _assign_feeders(members, head, shape, away)
    return tuple(members[peer] for peer in sorted(members)), committee


_FIXED_BYTES = 8192  # of an entry without members and stages, twice over
_STAGE_BYTES = 512  # of a stage: its gradient, and its digests in the pin and in the candidate


def _entry_bytes(member: Member) -> int:
    """How many bytes an entry needs for a member at most: itself, and its name in the committee and as a holder."""
    changes = 64  # its stage, its role and the entry that admits it may need more digits than now
    return len(json.dumps(member.model_dump(mode="json"), separators=(",", ":"))) + 2 * len(member.peer) + changes


def _assign_stages(members: dict[str, Member], shape: Shape) -> dict[str, Member]:
    """Give everybody without a stage (newcomers, members that were away) the one with the fewest servers."""
    counts = [0] * shape.stages
    for member in members.values():
        if member.stage is not None:
            counts[member.stage] += 1
    out = dict(members)
    for member in members.values():
        if member.stage is not None or member.peer == shape.coordinator:
            continue
        stage = min(range(shape.stages), key=lambda s: (counts[s], s))
        counts[stage] += 1
        out[member.peer] = member.model_copy(update={"stage": stage})
    return out


def _assign_feeders(members: dict[str, Member], head: Entry, shape: Shape, away: Sequence[str]) -> dict[str, Member]:
    able = [m.peer for m in members.values() if m.can_feed and m.peer not in away]
    ranked = order(able, head.run, head.round + 1, head.beacon, "feeder")
    # sticky first, then volunteers by order, the coordinator last: it should only coordinate
    ranked = tuple(sorted(ranked, key=lambda p: (not members[p].feeder, p == shape.coordinator)))
    chosen = set(ranked[: shape.feeders])
    return {peer: m.model_copy(update={"feeder": peer in chosen}) for peer, m in members.items()}


def _choose_committee(
    head: Entry, shape: Shape, members: Mapping[str, Member], leaving: Collection[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(committee, its members that are away). Keeps who is alive, fills seats by order, never shrinks for absence."""
    stay = [p for p in head.committee if p in members]
    newcomers = [p for p in order(members, head.run, head.round + 1, head.beacon, "committee") if p not in stay]
    # a seat on the committee needs a settled member: one that was admitted by an earlier entry, unless there is none
    newcomers.sort(key=lambda p: members[p].since > head.round)
    away = [p for p in head.committee if p not in members and p not in leaving]
    seats = stay + newcomers + away
    size = max(s for s in COMMITTEE_SIZES if s <= max(1, min(shape.committee, len(seats))))
    chosen = tuple(seats[:size])
    return chosen, tuple(p for p in chosen if p not in members)


def microbatches_of(feeder: str, feeders: Sequence[str], microbatches: int) -> tuple[int, ...]:
    """The microbatches that a feeder drives in a round: dealt out in turn over the round's feeder order."""
    if feeder not in feeders:
        return ()
    return tuple(range(feeders.index(feeder), microbatches, len(feeders)))
