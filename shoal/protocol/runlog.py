"""The run log: one history for everybody (DESIGN 4.3).

Entry r names its predecessor by hash, the members and committee of round r+1, the data cursor, and what the round
decided. It becomes history when a majority of the committee *named by entry r-1* has accepted it (single-decree Paxos,
`protocol.paxos`); the signed accepts travel with the entry, so anybody can check it offline, starting from genesis,
which is a pure function of the manifest.

`Chain` is a verified prefix of the log: `extend` refuses whatever does not follow. It is pure; storing it is the
caller's business.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from shoal.protocol.events import Reason
from shoal.protocol.sampling import next_beacon
from shoal.protocol.transport import Message, Refused

MAX_ENTRY_BYTES = 256 * 1024
MAX_MEMBERS = 512  # of one entry; how many of them fit is bounded by their bytes as well (`swarm.pipeline.roles`)
VOTE_DOMAIN = "shoal accept"
COMMITTEE_SIZES = (1, 3, 5)

PeerStr = Annotated[str, Field(min_length=1, max_length=80)]
Hex = Annotated[str, Field(max_length=64, pattern=r"^([0-9a-f]{2})*$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # a SHA-256 (or a hash of that size): names bytes
Count = Annotated[int, Field(ge=0, le=2**62)]
Small = Annotated[int, Field(ge=0, le=4096)]


class Member(Message):
    """A member of round r+1. `stage` is the pipeline stage it serves (None: none); `since`: entry that admitted it."""

    peer: PeerStr
    public_key: Hex  # Ed25519 run key
    name: Annotated[str, Field(max_length=64)] = ""
    maddrs: Annotated[tuple[Annotated[str, Field(max_length=256)], ...], Field(max_length=8)] = ()
    stage: Small | None = None
    feeder: bool = False
    can_feed: bool = False
    since: Count = 0


class StageCommit(Message):
    """The reduced gradient sum of one stage: its content digest and who held it when the round was decided."""

    stage: Small
    gradient: Digest
    holders: tuple[PeerStr, ...]


class Genesis(Message):
    kind: Literal["genesis"] = "genesis"


class Commit(Message):
    """A pipeline round: every microbatch exactly once, all stages at once."""

    kind: Literal["commit"] = "commit"
    plan: Count
    samples: Annotated[int, Field(ge=1, le=2**62)]
    loss_sum: Annotated[float, Field(allow_inf_nan=False)]  # sum over samples of the mean cross-entropy per token, nats
    stages: tuple[StageCommit, ...]


class Reconfigure(Message):
    """Membership changes; no step, no samples."""

    kind: Literal["reconfigure"] = "reconfigure"


class Rollback(Message):
    """Back to the pinned snapshot: a stage lost every copy of its newer state."""

    kind: Literal["rollback"] = "rollback"
    to_step: Count


Decision = Annotated[Genesis | Commit | Reconfigure | Rollback, Field(discriminator="kind")]


class Pin(Message):
    """State digests of all stages after `step`, and where the data cursor stood: what a joiner or a rollback loads."""

    step: Count
    next_sample: Count
    samples_total: Count
    digests: tuple[Digest, ...]  # by stage


class Entry(Message):
    """One entry of the run log. `step`: optimizer steps in the history up to here; `next_sample`: the data cursor."""

    run: Digest
    term: Count
    round: Count
    previous: Digest | Literal[""]  # "": genesis has none
    members: tuple[Member, ...]
    committee: Annotated[tuple[PeerStr, ...], Field(min_length=1, max_length=5)]
    next_sample: Count
    samples_total: Count
    step: Count
    beacon: Digest
    decision: Decision
    pin: Pin | None = None
    candidate: Pin | None = None  # the next pin, once more than one peer holds each of its snapshots

    def to_bytes(self) -> bytes:
        """Canonical bytes: what is hashed, voted on and stored."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Entry:
        """Takes canonical bytes only, so that an entry has one digest. Raises Refused(MALFORMED | TOO_LARGE)."""
        if len(data) > MAX_ENTRY_BYTES:
            raise Refused(Reason.TOO_LARGE, "log entry")
        try:
            entry = cls.model_validate_json(data)
        except ValidationError as error:
            raise Refused(Reason.MALFORMED, "log entry") from error
        if entry.to_bytes() != data:
            raise Refused(Reason.MALFORMED, "log entry: not in canonical form")
        return entry

    def member(self, peer: str) -> Member | None:
        return next((m for m in self.members if m.peer == peer), None)

    def servers(self, stage: int) -> tuple[str, ...]:
        return tuple(m.peer for m in self.members if m.stage == stage)

    def feeders(self) -> tuple[str, ...]:
        return tuple(m.peer for m in self.members if m.feeder)


def digest_of(entry_bytes: bytes) -> str:
    return hashlib.sha256(entry_bytes).hexdigest()


class Vote(Message):
    """A committee member's signed accept."""

    peer: PeerStr
    signature: Annotated[str, Field(max_length=256, pattern=r"^[0-9a-f]*$")]


class Decided(Message):
    """The proof beside an entry: the ballot that a majority of its committee accepted, with their signatures."""

    ballot: Count
    votes: Annotated[tuple[Vote, ...], Field(max_length=5)]


def vote_payload(run: str, round_: int, ballot: int, entry_digest: str) -> bytes:
    """What an acceptor signs."""
    return f"{run}/{round_}/{ballot}/{entry_digest}".encode()


def majority(committee: Iterable[str]) -> int:
    return len(tuple(committee)) // 2 + 1


# (public key hex, domain, payload, signature) -> valid?
Verify = Callable[[str, str, bytes, bytes], bool]


class Chain:
    """A verified prefix of the log, from genesis. Pure: no I/O, no clock."""

    def __init__(self, genesis: Entry) -> None:
        self._entries: list[Entry] = []
        self._digests: list[str] = []
        self._proofs: list[tuple[bytes, Decided]] = []
        self._commits: dict[int, Entry] = {}  # step -> the commit entry of the current history
        self._stages: int | None = None  # of the run, once a commit showed them
        self.append(genesis, genesis.to_bytes(), Decided(ballot=0, votes=()))

    @property
    def head(self) -> Entry:
        return self._entries[-1]

    @property
    def head_digest(self) -> str:
        return self._digests[-1]

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, round_: int) -> Entry:
        return self._entries[round_]

    def digest(self, round_: int) -> str:
        return self._digests[round_]

    def proof(self, round_: int) -> tuple[bytes, Decided]:
        """The entry's own bytes and the votes beside it, for peers that missed it."""
        return self._proofs[round_]

    def commit_of(self, step: int) -> Entry | None:
        """The entry that made `step` (1-based) in the current history; rolled-back commits are gone."""
        return self._commits.get(step)

    def commit_digest(self, step: int) -> str:
        """Digest that identifies the history up to `step`: of the commit entry, or of genesis for step 0."""
        entry = self._commits.get(step)
        return self._digests[entry.round] if entry else self._digests[0]

    def extend(self, data: bytes, proof: Decided, verify: Verify) -> Entry:
        """Append the next entry. Raises what `verified` raises, and then changes nothing."""
        entry = self.verified(data, proof, verify)
        self.append(entry, data, proof)
        return entry

    def verified(self, data: bytes, proof: Decided, verify: Verify) -> Entry:
        """The next entry, checked but not appended. Raises Refused(STALE | AHEAD | MALFORMED | BAD_SIGNATURE)."""
        entry = Entry.from_bytes(data)
        self.check_follows(entry)
        digest = digest_of(data)
        payload = vote_payload(entry.run, entry.round, proof.ballot, digest)
        keys = {m.peer: m.public_key for m in self.head.members}
        valid = {
            vote.peer
            for vote in proof.votes
            if vote.peer in self.head.committee
            and vote.peer in keys
            and len(vote.signature) % 2 == 0
            and verify(keys[vote.peer], VOTE_DOMAIN, payload, bytes.fromhex(vote.signature))
        }
        if len(valid) < majority(self.head.committee):
            raise Refused(Reason.BAD_SIGNATURE, f"entry {entry.round}: {len(valid)} valid votes")
        return entry

    def check_follows(self, entry: Entry) -> None:
        """Does `entry` follow the head? Raises Refused otherwise. Acceptors call it before they vote."""
        head = self.head
        if entry.run != head.run:
            raise Refused(Reason.WRONG_RUN)
        if entry.round <= head.round:
            raise Refused(Reason.STALE, f"entry {entry.round} after {head.round}")
        if entry.round > head.round + 1:
            raise Refused(Reason.AHEAD, f"entry {entry.round} after {head.round}")
        expected = _expected(head, entry) and entry.beacon == next_beacon(head, head.run)
        if entry.previous != self.head_digest or entry.term != head.term or not expected:
            raise Refused(Reason.MALFORMED, f"entry {entry.round} does not follow")
        if not _members_agree(head, entry):
            raise Refused(Reason.MALFORMED, f"entry {entry.round}: members and committee disagree")
        if not self._stages_agree(entry) or not self._pins_agree(entry):
            raise Refused(Reason.MALFORMED, f"entry {entry.round}: stages or pinned state disagree with the log")

    def _stages_agree(self, entry: Entry) -> bool:
        """A commit holds every stage of the run once, in order; members serve only such stages."""
        stages = self._stages
        if isinstance(entry.decision, Commit):
            listed = tuple(s.stage for s in entry.decision.stages)
            stages = len(listed) if stages is None else stages
            if stages == 0 or listed != tuple(range(stages)):
                return False
        return stages is None or all(m.stage is None or m.stage < stages for m in entry.members)

    def _pins_agree(self, entry: Entry) -> bool:
        """The pinned state stays, or a commit moves it on to a later step of this history. So it is with the next one,
        which is newer than the pin and may be given up at any time."""
        old, new, then = self.head.pin, entry.pin, entry.candidate
        commits = entry.decision.kind == "commit"
        if new != old and not (commits and new is not None and self._pinnable(new, old)):
            return False
        if then is None:
            return True
        return (commits or then == self.head.candidate) and then.step <= entry.step and self._pinnable(then, new)

    def _pinnable(self, pin: Pin, older: Pin | None) -> bool:
        """Is it a step of this history, later than `older`, with the cursor of that step and one digest per stage?"""
        source = self.commit_of(pin.step)
        if source is None or pin.step <= (older.step if older else 0):
            return False
        there = (source.next_sample, source.samples_total, self._stages)
        return (pin.next_sample, pin.samples_total, len(pin.digests)) == there

    def append(self, entry: Entry, data: bytes, proof: Decided) -> None:
        """Append an entry that `verified` returned for this head."""
        self._entries.append(entry)
        self._digests.append(digest_of(data))
        self._proofs.append((data, proof))
        if isinstance(entry.decision, Commit):
            self._commits[entry.step] = entry
            self._stages = len(entry.decision.stages)
        elif entry.decision.kind == "rollback":
            self._commits = {step: e for step, e in self._commits.items() if step <= entry.step}


def _members_agree(head: Entry, entry: Entry) -> bool:
    """Distinct members, a committee of 1, 3 or 5 of them; who stays keeps its key, who comes is marked as new."""
    peers, committee = {m.peer for m in entry.members}, set(entry.committee)
    before = {m.peer: m for m in head.members}
    return (
        len(peers) == len(entry.members)
        and len(committee) == len(entry.committee)
        and len(committee) in COMMITTEE_SIZES
        and committee <= peers
        and all(
            (m.public_key, m.since) == (before[m.peer].public_key, before[m.peer].since)
            if m.peer in before
            else m.since == entry.round
            for m in entry.members
        )
    )


def _expected(head: Entry, entry: Entry) -> bool:
    """Do step, cursor and sample count move as the decision says?"""
    here = (entry.step, entry.next_sample, entry.samples_total)
    match entry.decision:
        case Commit(samples=n):
            return here == (head.step + 1, head.next_sample + n, head.samples_total + n)
        case Rollback(to_step=step):
            pin = head.pin
            start = (0, 0, 0) if pin is None else (pin.step, pin.next_sample, pin.samples_total)
            return here == start and step == start[0]
        case Reconfigure():
            return here == (head.step, head.next_sample, head.samples_total)
        case _:
            return False
