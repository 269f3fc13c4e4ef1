"""Membership: MoDeST's view, signed. Who is in the run and was active lately, without anybody's permission.

After "Decentralized Learning Made Practical with Client Sampling" (de Vos, Dhasade, Kermarrec, Lavoie, Pouwelse),
Section 4: a registry (join/leave events with per-node counters, the newer wins) and an activity table (last round a
node was seen active), both merged by maximum and piggy-backed on traffic; candidates of round k are joined nodes with
activity > k - window. What we changed: both halves are one entry signed by its subject, so nobody can join, retire or
revive somebody else; because signed halves cannot be mixed, the merge takes the larger whole entry, ordered by
(last_active_round, counter, LEAVE over JOIN, bytes). An honest subject's numbers only rise, so that is its newest.

The merge is a semilattice: any order of any gossip gives the same view. Bounds on how fast a subject's numbers may rise
depend on what the receiver knows, so they guard the door (`View.absorb`) and are no part of the merge.
"""

from __future__ import annotations

import bisect
import enum
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field, ValidationError

from shoal.protocol.events import Reason
from shoal.protocol.identity import Identity, Sealed, malformed
from shoal.protocol.records import PeerIdText, RunIdText
from shoal.protocol.transport import Message, Refused

DOMAIN = "shoal/membership/v1"
MAX_ENTRY_BYTES = 4 * 1024
MAX_ENTRIES = 4096
MAX_COUNTER = 2**53
MAX_COUNTER_STEP = 1024  # joins and leaves of one peer that we may have missed
MAX_ROUNDS_AHEAD = 8  # how far a peer's last active round may lie ahead of ours: we may be the one who lags
MAX_SUSPECTS = MAX_ENTRIES


class Membership(enum.StrEnum):
    JOIN = "join"
    LEAVE = "leave"


class _Statement(Message):
    run: RunIdText
    peer: PeerIdText
    last_active_round: Annotated[int, Field(ge=0, le=2**53)]
    counter: Annotated[int, Field(ge=0, le=MAX_COUNTER)]
    event: Membership


@dataclass(frozen=True, slots=True)
class Entry:
    """What `peer` last said about itself. `signed`: the sealed bytes it came in, for passing on unchanged."""

    run: str
    peer: str
    last_active_round: int
    counter: int
    event: Membership
    signed: bytes = field(repr=False)

    @property
    def rank(self) -> tuple[int, int, bool, bytes]:
        """Total order of one peer's entries; also which entries a full view keeps."""
        return (self.last_active_round, self.counter, self.event is Membership.LEAVE, self.signed)


def make_entry(identity: Identity, *, run: str, last_active_round: int, counter: int, event: Membership) -> Entry:
    """Sign a statement about oneself. Raises pydantic.ValidationError for numbers out of bounds."""
    statement = _Statement(
        run=run, peer=identity.peer, last_active_round=last_active_round, counter=counter, event=event
    )
    payload = json.dumps(statement.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return Entry(run, identity.peer, last_active_round, counter, event, identity.seal(DOMAIN, payload).to_bytes())


def open_entry(data: bytes, *, expected_run: str) -> Entry:
    """Read and check a signed entry. Raises Refused (TOO_LARGE, MALFORMED, BAD_SIGNATURE, WRONG_RUN), nothing else."""
    sealed = Sealed.from_bytes(data, max_bytes=MAX_ENTRY_BYTES)
    peer, _ = sealed.verify(DOMAIN)
    try:
        statement = _Statement.model_validate_json(sealed.payload)
    except ValidationError as error:
        raise malformed(error) from None
    if statement.peer != peer:
        raise Refused(Reason.BAD_SIGNATURE, "the entry is about another peer than its signer")
    if statement.run != expected_run:
        raise Refused(Reason.WRONG_RUN, "the entry belongs to another run")
    return Entry(statement.run, peer, statement.last_active_round, statement.counter, statement.event, data)


@dataclass(frozen=True, slots=True)
class View:
    """What one node knows about all peers of one run: at most `limit` entries, one per peer, sorted by PeerID.

    Build it from `View()` with `merge` (entries that were checked) or `absorb` (bytes from the network)."""

    entries: tuple[Entry, ...] = ()
    limit: int = MAX_ENTRIES

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def get(self, peer: str) -> Entry | None:
        at = bisect.bisect_left(self.entries, peer, key=lambda entry: entry.peer)
        found = self.entries[at] if at < len(self.entries) else None
        return found if found is not None and found.peer == peer else None

    def merge(self, others: Iterable[Entry]) -> View:
        """Per peer the entry of highest rank; of all peers the `limit` highest. Commutative, associative, idempotent
        (also when it overflows: an entry that falls out has `limit` peers above it, and those only rise)."""
        best = {entry.peer: entry for entry in self.entries}
        for entry in others:
            known = best.get(entry.peer)
            if known is None or entry.rank > known.rank:
                best[entry.peer] = entry
        kept = list(best.values())
        if len(kept) > self.limit:
            kept = sorted(kept, key=lambda entry: (entry.rank, entry.peer), reverse=True)[: self.limit]
        return View(tuple(sorted(kept, key=lambda entry: entry.peer)), self.limit)

    def absorb(self, blobs: Iterable[bytes], *, run: str, round: int) -> tuple[View, tuple[Reason, ...]]:
        """Merge signed entries from the network; returns the view and why the bad ones among them were refused.

        Refused beyond `open_entry`'s reasons: AHEAD, when an entry claims activity more than MAX_ROUNDS_AHEAD after
        `round` (ours) or a counter more than MAX_COUNTER_STEP above the one we know. At most `limit` blobs are read."""
        known = {entry.signed for entry in self.entries}
        good: list[Entry] = []
        refused: list[Reason] = []
        for count, blob in enumerate(blobs):
            if count >= self.limit:
                refused.append(Reason.TOO_LARGE)
                break
            if blob in known:
                continue
            try:
                entry = open_entry(blob, expected_run=run)
                self._check_rise(entry, round)
            except Refused as refusal:
                refused.append(refusal.reason)
            else:
                good.append(entry)
        return self.merge(good), tuple(refused)

    def _check_rise(self, entry: Entry, round: int) -> None:
        if entry.last_active_round > round + MAX_ROUNDS_AHEAD:
            raise Refused(Reason.AHEAD, f"claims activity in round {entry.last_active_round}, we are in {round}")
        known = self.get(entry.peer)
        if known is not None and entry.counter > known.counter + MAX_COUNTER_STEP:
            raise Refused(Reason.AHEAD, f"its counter rose by more than {MAX_COUNTER_STEP}")

    def signed(self) -> tuple[bytes, ...]:
        """The entries as they go on the wire."""
        return tuple(entry.signed for entry in self.entries)


def next_entry(view: View, identity: Identity, *, run: str, round: int, event: Membership) -> Entry:
    """This node's next statement: counter one higher if it joins or leaves, activity raised to `round`, never lowered.

    A node that lost its disk first absorbs a view of somebody else: its old entry there tells it where to go on."""
    known = view.get(identity.peer)
    active = round if known is None else max(round, known.last_active_round)
    counter = 0 if known is None else known.counter + (known.event is not event)
    return make_entry(identity, run=run, last_active_round=active, counter=counter, event=event)


def active(view: View, round: int, window: int) -> tuple[str, ...]:
    """PeerIDs, sorted, of the candidates of `round`: joined, and active later than `round - window` (Section 4.3)."""
    return tuple(e.peer for e in view if e.event is Membership.JOIN and e.last_active_round > round - window)


@dataclass(frozen=True, slots=True)
class Suspicions:
    """What this node alone believes about others; never sent, never merged. peer -> forgiven at (own clock, s)."""

    until_s: tuple[tuple[str, float], ...] = ()

    def suspect(self, peer: str, *, now: float, for_s: float) -> Suspicions:
        """Prolongs, never shortens. Those already forgiven are dropped; beyond MAX_SUSPECTS the soonest forgiven go."""
        alive = {name: until for name, until in self.until_s if until > now}
        alive[peer] = max(now + for_s, alive.get(peer, now))
        kept = sorted(alive.items(), key=lambda item: (-item[1], item[0]))[:MAX_SUSPECTS]
        return Suspicions(tuple(sorted(kept)))

    def forgive(self, peer: str) -> Suspicions:
        """It answered: the suspicion ends."""
        return Suspicions(tuple(item for item in self.until_s if item[0] != peer))

    def suspected(self, now: float) -> frozenset[str]:
        return frozenset(peer for peer, until in self.until_s if until > now)
