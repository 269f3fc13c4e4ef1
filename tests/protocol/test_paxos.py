"""Single-decree Paxos under random interleavings: never two values, and progress when one proposer is left alone.

The proposer below is the leader's (`swarm.pipeline.leader`): it asks its own acceptor first, skips phase 1 at ballot 0,
and forgets everything when it crashes. Messages are lost, duplicated, reordered and delayed without bound.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field

from hypothesis import example, given, settings
from hypothesis import strategies as st

from shoal.protocol.paxos import RANKS, Accepted, AcceptorState, accept, choose, next_ballot, prepare


@dataclass
class Proposer:
    """One attempt under way at one node. Volatile: a crash ends it."""

    ballot: int
    own: bytes
    value: bytes | None = None  # set: phase 2
    promises: dict[int, Accepted | None] = field(default_factory=dict)


class Model:
    def __init__(self, size: int, rng: random.Random) -> None:
        self.size, self.rng, self.need = size, rng, size // 2 + 1
        self.disks = [AcceptorState() for _ in range(size)]
        self.active: dict[int, Proposer] = {}
        self.wire: list[tuple] = []  # (kind, from, to, ballot, payload)
        self.accepts: dict[tuple[int, bytes], set[int]] = defaultdict(set)
        self.asked: dict[int, set[bytes]] = defaultdict(set)  # ballot -> values that phase 2 asked for
        self.attempts = 0

    def propose(self, node: int) -> None:
        self.attempts += 1
        ballot = next_ballot(self.disks[node].promised, node)
        assert ballot > self.disks[node].promised
        proposer = self.active[node] = Proposer(ballot, f"{node}/{self.attempts}".encode())
        if ballot == 0:
            self._phase_2(node, proposer, proposer.own)
            return
        if self._prepare(node, node, ballot):
            proposer.promises[node] = self.disks[node].accepted
            self.wire += [("prepare", node, to, ballot, None) for to in range(self.size) if to != node]
            self._count(node, proposer)

    def _prepare(self, node: int, proposer: int, ballot: int) -> bool:
        self.disks[node], promised = prepare(self.disks[node], ballot)
        if promised and node != proposer:
            self.wire.append(("promise", node, proposer, ballot, self.disks[node].accepted))
        return promised

    def _count(self, node: int, proposer: Proposer) -> None:
        if proposer.value is None and len(proposer.promises) >= self.need:
            self._phase_2(node, proposer, choose(proposer.promises.values(), proposer.own))

    def _phase_2(self, node: int, proposer: Proposer, value: bytes) -> None:
        proposer.value = value
        if self._accept(node, proposer.ballot, value):
            self.asked[proposer.ballot].add(value)
            self.wire += [("accept", node, to, proposer.ballot, value) for to in range(self.size) if to != node]

    def _accept(self, node: int, ballot: int, value: bytes) -> bool:
        self.disks[node], accepted = accept(self.disks[node], ballot, value)
        if accepted:
            self.accepts[ballot, value].add(node)
        return accepted

    def deliver(self, message: tuple) -> None:
        kind, source, to, ballot, payload = message
        if kind == "prepare":
            self._prepare(to, source, ballot)
        elif kind == "accept":
            self._accept(to, ballot, payload)
        else:
            proposer = self.active.get(to)
            if proposer is not None and proposer.ballot == ballot and proposer.value is None:
                proposer.promises[source] = payload
                self._count(to, proposer)

    def chosen(self) -> set[bytes]:
        return {value for (_, value), nodes in self.accepts.items() if len(nodes) >= self.need}

    def step(self) -> None:
        kind = self.rng.choices(("propose", "crash", "deliver", "repeat", "lose"), (1, 1, 12, 2, 2))[0]
        if kind == "propose":
            self.propose(self.rng.randrange(self.size))
        elif kind == "crash":  # volatile state is gone, the disk stays
            self.active.pop(self.rng.randrange(self.size), None)
        elif self.wire:
            at = self.rng.randrange(len(self.wire))
            message = self.wire[at]
            if kind != "repeat":
                self.wire[at] = self.wire[-1]
                self.wire.pop()
            if kind != "lose":
                self.deliver(message)

    def alone(self, node: int, majority: set[int]) -> None:
        """From here on only `node` proposes, and whatever is said within `majority` arrives at once."""
        self.active.clear()
        self.wire.clear()
        self.propose(node)
        while self.wire:
            message = self.wire.pop(0)
            if message[1] in majority and message[2] in majority:
                self.deliver(message)


@settings(max_examples=150)
@given(size=st.sampled_from([1, 3, 5]), seed=st.integers(0, 2**32), steps=st.integers(0, 250))
@example(size=3, seed=1, steps=3000)
@example(size=5, seed=2, steps=3000)
def test_at_most_one_value_is_ever_chosen_and_a_lone_proposer_gets_there(size: int, seed: int, steps: int) -> None:
    rng = random.Random(seed)
    model = Model(size, rng)
    seen: set[bytes] = set()
    for _ in range(steps):
        model.step()
        seen |= model.chosen()
        assert len(seen) <= 1
    node = rng.randrange(size)
    majority = {node, *rng.sample([n for n in range(size) if n != node], size // 2)}
    # its first ballots may lie below what others promised: every attempt goes higher
    for _ in range(model.attempts + 1):
        model.alone(node, majority)
        if model.chosen():
            break
    assert len(model.chosen() | seen) == 1
    assert all(len(values) == 1 for values in model.asked.values()), "a ballot was used for two values"


def test_the_model_finds_a_broken_acceptor(monkeypatch) -> None:
    """The tripwire: an acceptor that forgets its promise lets two values be chosen."""

    def forgetful(_: AcceptorState, ballot: int, value: bytes) -> tuple[AcceptorState, bool]:
        return AcceptorState(ballot, Accepted(ballot, value)), True

    monkeypatch.setitem(globals(), "accept", forgetful)
    assert any(_chosen_ever(seed) > 1 for seed in range(300))


def _chosen_ever(seed: int) -> int:
    model = Model(3, random.Random(seed))
    seen: set[bytes] = set()
    for _ in range(200):
        model.step()
        seen |= model.chosen()
    return len(seen)


def test_a_proposer_that_restarts_never_uses_a_ballot_again() -> None:
    disk, used = AcceptorState(), []
    for life in range(20):
        ballot = next_ballot(disk.promised, 0)
        disk, ok = (disk, True) if ballot == 0 else prepare(disk, ballot)
        assert ok
        if life % 3 != 1:  # every third life ends between the two phases
            disk, ok = accept(disk, ballot, f"value of life {life}".encode())
            assert ok
        used.append(ballot)
    assert used == sorted(set(used)) and used[0] == 0


@given(seen=st.integers(-1, 10**6), rank=st.integers(0, RANKS - 1))
def test_a_ballot_is_above_what_was_seen_and_names_its_proposer(seen: int, rank: int) -> None:
    ballot = next_ballot(seen, rank)
    assert ballot > seen and ballot % RANKS == rank
    assert (ballot == 0) == (rank == 0 and seen == -1), "only who saw nothing may skip phase 1"


states = st.builds(
    AcceptorState,
    st.integers(0, 40),
    st.none() | st.builds(Accepted, st.integers(0, 40), st.sampled_from([b"a", b"b"])),
).filter(lambda s: s.accepted is None or s.accepted.ballot <= s.promised)


@given(state=states, ballot=st.integers(0, 40), value=st.sampled_from([b"a", b"b"]))
def test_an_acceptor_never_goes_back(state: AcceptorState, ballot: int, value: bytes) -> None:
    promised, yes = prepare(state, ballot)
    assert yes == (ballot >= state.promised)
    assert promised.promised == max(state.promised, ballot) and promised.accepted == state.accepted
    accepted, yes = accept(state, ballot, value)
    assert accepted.promised >= state.promised
    if yes:
        assert ballot >= state.promised and accepted == AcceptorState(ballot, Accepted(ballot, value))
        assert accept(accepted, ballot, value) == (accepted, True), "a repeated request gets the same answer"
        assert accept(accepted, ballot, value + b"!") == (accepted, False)
    else:
        assert accepted == state


@given(st.lists(st.none() | st.builds(Accepted, st.integers(0, 99), st.binary(max_size=2)), max_size=5))
def test_the_value_of_the_highest_accepted_ballot_binds(promises: list[Accepted | None]) -> None:
    accepted = [a for a in promises if a is not None]
    value = choose(promises, b"own value")
    if not accepted:
        assert value == b"own value"
    else:
        assert value in {a.value for a in accepted if a.ballot == max(b.ballot for b in accepted)}
