"""Catching up: whatever a node has loaded and stored, it ends at the head with the state of the current history."""

from __future__ import annotations

import asyncio
import hashlib
import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.runlog import (
    Chain,
    Commit,
    Decided,
    Entry,
    Genesis,
    Member,
    Pin,
    Reconfigure,
    Rollback,
    StageCommit,
    Vote,
)
from shoal.protocol.sampling import next_beacon
from shoal.protocol.transport import Refused
from shoal.swarm.pipeline.state import (
    COPIES_ELSEWHERE,
    Apply,
    Drop,
    Have,
    Initialise,
    Load,
    Ready,
    StateKeeper,
    keepers,
    next_action,
)

RUN = hashlib.sha256(b"run").hexdigest()
STAGES, SAMPLES = 2, 8
PEERS = ("c", "p0", "p1", "p2", "p3")
State = tuple[str, ...]  # the gradients that were applied, in order


def hexed(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def state_digest(stage: int, state: State) -> str:
    return hexed("state", stage, state)


class Log:
    """A chain that commits, pins, reconfigures and rolls back, and what the right state is after every step."""

    def __init__(self) -> None:
        genesis = Entry(
            run=RUN,
            term=0,
            round=0,
            previous="",
            members=tuple(Member(peer=p, public_key=hexed(p)) for p in PEERS),
            committee=("c",),
            next_sample=0,
            samples_total=0,
            step=0,
            beacon=next_beacon(None, RUN),
            decision=Genesis(),
        )
        self.chain = Chain(genesis)
        self.gradients: list[tuple[str, ...]] = []  # of the current history: step - 1 -> by stage

    @property
    def pinned(self) -> int:
        return self.chain.head.pin.step if self.chain.head.pin else 0

    def right(self, stage: int, step: int) -> State:
        return tuple(g[stage] for g in self.gradients[:step])

    def _extend(self, **changes: Any) -> None:
        head = self.chain.head
        always = {"round": head.round + 1, "previous": self.chain.head_digest, "beacon": next_beacon(head, RUN)}
        entry = head.model_copy(update={**always, **changes})
        votes = (Vote(peer="c", signature="00"),)
        self.chain.extend(entry.to_bytes(), Decided(ballot=0, votes=votes), lambda *_: True)

    def commit(self, pin_step: int | None = None) -> None:
        head, pin = self.chain.head, self.chain.head.pin
        if pin_step is not None and self.pinned < pin_step <= head.step:
            samples = pin_step * SAMPLES
            digests = tuple(state_digest(s, self.right(s, pin_step)) for s in range(STAGES))
            pin = Pin(step=pin_step, next_sample=samples, samples_total=samples, digests=digests)
        made = tuple(hexed("gradient", head.round, s) for s in range(STAGES))
        self.gradients.append(made)
        stages = tuple(StageCommit(stage=s, gradient=g, holders=("p0",)) for s, g in enumerate(made))
        self._extend(
            decision=Commit(plan=8, samples=SAMPLES, loss_sum=1.0, stages=stages),
            step=head.step + 1,
            next_sample=head.next_sample + SAMPLES,
            samples_total=head.samples_total + SAMPLES,
            pin=pin,
        )

    def rollback(self) -> None:
        step = self.pinned
        del self.gradients[step:]
        self._extend(
            decision=Rollback(to_step=step), step=step, next_sample=step * SAMPLES, samples_total=step * SAMPLES
        )

    def reconfigure(self) -> None:
        self._extend(decision=Reconfigure())

    def move(self, rng: random.Random) -> None:
        kind = rng.choices(("commit", "pin", "rollback", "reconfigure"), (6, 2, 1, 1))[0]
        if kind == "commit":
            self.commit()
        elif kind == "pin":
            self.commit(rng.randint(0, self.chain.head.step))
        elif kind == "rollback":
            self.rollback()
        else:
            self.reconfigure()


class Node:
    """What `next_action` is told, and the effects of its actions. States stand for the gradients in them."""

    def __init__(self, log: Log, rng: random.Random) -> None:
        self.log, self.rng = log, rng
        self.have: Have | None = None
        self.state: State = ()
        self.disk: dict[tuple[int, int], tuple[State, str]] = {}  # (step, stage) -> (state, commit that made it)

    def snapshots(self, stage: int) -> dict[int, str]:
        chain = self.log.chain
        return {
            step: state_digest(stage, state)
            for (step, s), (state, origin) in self.disk.items()
            if s == stage and origin == chain.commit_digest(step)
        }

    def local(self) -> set[str]:
        return {g for made in self.log.gradients for g in made if self.rng.random() < 0.5}

    def next(self, stage: int | None) -> Any:
        mine = self.snapshots(stage) if stage is not None else {}
        return next_action(self.log.chain, stage, self.have, mine, self.local())

    def do(self, action: Any) -> None:
        chain = self.log.chain
        match action:
            case Initialise(stage):
                self.state, self.have = (), Have(stage, 0, chain.commit_digest(0))
            case Load(stage, step, digest):
                assert step <= chain.head.step
                known = {state_digest(stage, self.log.right(stage, step)): self.log.right(stage, step)}
                self.state = known[digest]  # no other state may be asked for
                self.have = Have(stage, step, chain.commit_digest(step))
            case Apply(stage, step, gradient, holders, samples):
                assert self.have is not None and self.have.stage == stage and step == self.have.step + 1
                assert self.state == self.log.right(stage, self.have.step), "a gradient on top of another history"
                assert (gradient, holders, samples) == (self.log.gradients[step - 1][stage], ("p0",), SAMPLES)
                self.state = (*self.state, gradient)
                self.have = Have(stage, step, chain.commit_digest(step))
            case Drop():
                self.state, self.have = (), None
        if self.have is not None and self.rng.random() < 0.3:
            self.disk[self.have.step, self.have.stage] = (self.state, self.have.history)


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32), moves=st.integers(0, 30))
def test_every_node_catches_up_in_finitely_many_moves_however_history_went(seed: int, moves: int) -> None:
    rng = random.Random(seed)
    log, stage = Log(), rng.choice([None, 0, 1])
    node = Node(log, rng)
    for _ in range(moves):
        log.move(rng)
        if rng.random() < 0.1:
            stage = rng.choice([None, 0, 1])
        if rng.random() < 0.1:
            node.have = None  # a restart
        for _ in range(rng.choice([0, 0, 1, 2])):  # it does not always keep up
            node.do(node.next(stage))
    for _ in range(log.chain.head.step + 2):
        action = node.next(stage)
        if isinstance(action, Ready | Drop):
            break
        node.do(action)
    assert isinstance(action, Drop if stage is None else Ready), f"not there: {action}"
    if stage is not None:
        assert node.have == Have(stage, log.chain.head.step, log.chain.commit_digest(log.chain.head.step))
        assert node.state == log.right(stage, log.chain.head.step)


def ready_node(steps: int) -> tuple[Log, Node]:
    log = Log()
    node = Node(log, random.Random(0))
    for _ in range(steps):
        log.commit()
    for _ in range(steps + 1):
        node.do(next_action(log.chain, 0, node.have, {}, ()))
    assert isinstance(next_action(log.chain, 0, node.have, {}, ()), Ready)
    return log, node


def test_after_a_rollback_the_pinned_state_is_loaded_even_if_the_step_has_come_again() -> None:
    log, node = ready_node(3)
    log.commit(pin_step=2)
    log.rollback()
    pin = log.chain.head.pin
    assert pin is not None
    for _ in range(3):  # step 2, 3 again, 4
        assert next_action(log.chain, 0, node.have, {}, ()) == Load(0, 2, pin.digests[0])
        log.commit()


def test_a_rollback_to_the_start_computes_the_start_again() -> None:
    log, node = ready_node(2)
    log.rollback()
    assert next_action(log.chain, 0, node.have, {}, ()) == Initialise(0)
    log.commit()
    log.commit()
    assert next_action(log.chain, 0, node.have, {}, ()) == Initialise(0)


def test_a_pin_does_not_disturb_who_has_that_state_already() -> None:
    log, node = ready_node(3)
    log.commit(pin_step=3)
    gradient = log.gradients[3][0]
    assert next_action(log.chain, 0, node.have, {}, ()) == Apply(0, 4, gradient, ("p0",), SAMPLES)


def test_applying_what_is_here_comes_before_loading_and_loading_before_fetching_many_gradients() -> None:
    log, node = ready_node(1)
    log.commit()
    log.commit()
    log.commit(pin_step=3)
    pin = log.chain.head.pin
    assert pin is not None
    assert next_action(log.chain, 0, node.have, {}, ()) == Load(0, 3, pin.digests[0])
    assert isinstance(next_action(log.chain, 0, node.have, {}, {log.gradients[1][0]}), Apply)


def test_a_snapshot_of_its_own_that_differs_from_the_pinned_one_is_not_used() -> None:
    log, _ = ready_node(2)
    log.commit(pin_step=2)
    pin = log.chain.head.pin
    assert pin is not None
    assert next_action(log.chain, 1, None, {2: hexed("drifted")}, ()) == Load(1, 2, pin.digests[1])


def test_a_snapshot_ahead_of_the_log_is_not_used() -> None:
    log, _ = ready_node(2)
    assert next_action(log.chain, 0, None, {5: hexed("ahead")}, ()) == Initialise(0)


@settings(max_examples=50)
@given(stages=st.lists(st.none() | st.integers(0, 1), min_size=len(PEERS), max_size=len(PEERS)))
def test_the_pinned_state_is_kept_outside_its_stage_and_by_the_coordinator_first(stages: list[int | None]) -> None:
    members = tuple(
        Member(peer=p, public_key=hexed(p), stage=None if p == "c" else s) for p, s in zip(PEERS, stages, strict=True)
    )
    chain = Log().chain
    entry = chain.head.model_copy(update={"members": members})
    for stage in range(STAGES):
        kept = keepers(chain, entry, stage, "c")
        others = {m.peer for m in members if m.stage != stage}
        assert set(kept) <= others and len(set(kept)) == len(kept) == min(COPIES_ELSEWHERE, len(others))
        assert kept[0] == "c"
        shuffled = entry.model_copy(update={"members": members[::-1]})
        assert keepers(chain, shuffled, stage, "c") == kept


# --- the log moves while a state is being fetched -------------------------------------------------------------------
class _Server:
    """A server whose state is the list of what was applied; `meanwhile` runs while it fetches."""

    def __init__(self, log: Log) -> None:
        self.log, self.stage, self.stuck = log, 0, False
        self.program: Any = None
        self.step = -1
        self.snapshots: dict[tuple[int, int], str] = {}
        self.meanwhile: list[Any] = []

    async def set_program(self, program: Any, step: int, origin: str) -> None:
        self.program, self.step = program, step

    async def fetch_blob(self, digest: str, donors: list[str]) -> None:
        while self.meanwhile:
            self.meanwhile.pop()()

    async def gradient(self, digest: str) -> str:
        return digest

    async def apply(self, gradient: str, samples: int, origin: str) -> None:
        self.program.append(gradient)
        self.step += 1


def keeper_of(log: Log) -> tuple[StateKeeper, _Server]:
    async def in_thread(function: Any, *args: Any) -> Any:
        return function(*args)

    async def nothing(_: str) -> None:
        return None

    server = _Server(log)
    blobs = SimpleNamespace(has=lambda _: False, digests=lambda: (), get=nothing)
    context = SimpleNamespace(
        blobs=blobs,
        me="p1",
        emit=lambda _: None,
        now=lambda: 0.0,
        run_in_thread=in_thread,
        spec=SimpleNamespace(snapshot_every=0),
    )

    class History:
        chain = log.chain

        @property
        def head(self) -> Entry:
            return log.chain.head

        async def beyond(self, round_: int) -> Entry:
            if self.head.round <= round_:
                await asyncio.Event().wait()  # in these tests the log only grows while something is fetched
            return self.head

    return StateKeeper(context, History(), server, lambda _: []), server  # type: ignore[arg-type]


async def test_a_gradient_that_was_rolled_back_while_it_was_fetched_does_not_stay() -> None:
    log = Log()
    log.commit()
    keeper, server = keeper_of(log)
    # the same step comes again with another gradient before the first one has arrived
    server.meanwhile = [log.commit, log.rollback]
    await keeper.catch_up()
    assert tuple(server.program) == log.right(0, 1) and server.step == 1


async def test_a_state_of_another_history_is_let_go_before_the_right_one_is_fetched() -> None:
    log = Log()
    log.commit()
    log.commit()
    keeper, server = keeper_of(log)
    await keeper.catch_up()
    log.rollback()
    log.commit()
    log.commit()
    seen: list[Any] = []
    server.meanwhile = [lambda: seen.append(server.step)]
    await keeper.catch_up()
    assert seen == [0], "it looked ready at step 2 while it was not"
    assert tuple(server.program) == log.right(0, 2)


async def test_a_rolled_back_state_is_let_go_even_if_the_pinned_one_is_not_to_be_had() -> None:
    log = Log()
    log.commit()
    log.commit()
    keeper, server = keeper_of(log)
    await keeper.catch_up()
    log.commit(pin_step=1)
    log.rollback()
    action = next_action(log.chain, 0, Have(0, server.step, log.chain.digest(2)), {}, ())
    assert isinstance(action, Load) and action.step == 1
    with pytest.raises(Refused):
        await keeper._do(action)
    assert server.program is None and server.step == -1
