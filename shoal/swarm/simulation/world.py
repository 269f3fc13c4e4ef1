"""A whole simulated swarm in one process: toy float64 stages, virtual time, faults by name or from a seed.

The peers are the real `PipelinePeer`s; only transport, disk, clock and threads are simulated.

    async with World(stages=2, servers=2, seed=7) as world:
        world.kill("v1", at=GradientPrepared, count=2)      # v1 dies the second time it prepares a gradient
        await world.run_rounds(20)
        world.verify(20)
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections import Counter
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self

import torch

from shoal.protocol.blobs import BlobStore
from shoal.protocol.events import EntryDecided, Event
from shoal.protocol.runlog import Commit, Entry, Member
from shoal.protocol.store import MemoryStore, StoreError
from shoal.swarm.data import Corpus
from shoal.swarm.optimizers import OptimizerSpec
from shoal.swarm.pipeline.context import CodecName, Context, Patience, Spec, genesis
from shoal.swarm.pipeline.messages import Methods
from shoal.swarm.pipeline.peer import PipelinePeer
from shoal.swarm.pipeline.roles import Shape
from shoal.swarm.reference import ReferenceResult, max_abs_difference, parameters_of, run_rounds
from shoal.swarm.simulation.network import Link, Moment, PeerKilled, Recorder, SimNetwork, SimStore, SimTransport
from shoal.swarm.stage import StageProgram
from shoal.swarm.toy import toy_stage

COORDINATOR = "c"
SEQUENCE = 4
TOLERANCE = 1e-9  # float64: what another order of summation may cost after some tens of rounds
_REFERENCES: dict[tuple[object, ...], ReferenceResult] = {}  # runs of the one machine, by everything they depend on


class SimSigner:
    """Keyed hashes instead of Ed25519: fast, and as unforgeable as a simulation needs."""

    def __init__(self, peer: str) -> None:
        self.public_key = peer.encode().hex()

    def sign(self, domain: str, payload: bytes) -> bytes:
        return _mac(self.public_key, domain, payload)


def _mac(key: str, domain: str, payload: bytes) -> bytes:
    return hmac.new(key.encode(), domain.encode() + b"\0" + payload, hashlib.sha256).digest()


def verify(public_key: str, domain: str, payload: bytes, signature: bytes) -> bool:
    return hmac.compare_digest(_mac(public_key, domain, payload), signature)


def _thread(seconds: float) -> Callable[..., Awaitable[Any]]:
    """A thread whose every job takes so long on the virtual clock; at 0 other tasks may still come first."""

    async def run(function: Callable[..., Any], *args: Any) -> Any:
        await asyncio.sleep(seconds)
        return function(*args)

    return run


class World:
    """Coordinator "c" and volunteers "v0", "v1", …; every name is also its PeerID."""

    def __init__(
        self,
        *,
        stages: int = 2,
        servers: int = 2,
        feeders: int = 2,
        committee: int = 3,
        rounds: int = 20,
        microbatches: int = 4,
        microbatch_samples: int = 2,
        snapshot_every: int = 5,
        optimizer: str = "sgd",
        max_buckets: int = 4,
        compute_s: float = 0.0,
        has_data: Callable[[str], bool] = lambda name: name != COORDINATOR,
        activation_codec: CodecName = "none",
        gradient_codec: CodecName = "none",
        seed: int = 0,
        link: Link | None = None,
        patience: Patience | None = None,
    ) -> None:
        self.seed = seed
        self.network = SimNetwork(seed, link)
        self.spec = Spec(
            run=hashlib.sha256(b"simulated").hexdigest(),
            seed=seed,
            shape=Shape(stages, feeders, committee, COORDINATOR, max_peers=64),
            microbatches=microbatches,
            microbatch_samples=microbatch_samples,
            rounds=rounds,
            snapshot_every=snapshot_every,
            servers_per_stage=servers,
            max_buckets=max_buckets,
            activation_codec=activation_codec,
            gradient_codec=gradient_codec,
        )
        self.patience = patience or Patience(
            floor_s=0.2, work_s=2.0, freeze_s=1.0, reduce_s=3.0, paxos_s=0.5, ping_s=0.3, pong_s=0.3, round_s=20.0
        )
        self.optimizer = OptimizerSpec(name=optimizer, learning_rate=0.1 if optimizer == "sgd" else 0.01)
        data = hashlib.shake_256(f"toy {seed}".encode()).digest(4096)
        self.sequences = Corpus(bytes(b % 16 for b in data)).sequences(SEQUENCE, seed=seed)
        self.disks: dict[str, MemoryStore] = {}
        self.stores: dict[str, SimStore] = {}  # as the newest incarnation of each peer sees its disk
        self.compute_s = compute_s
        self.has_data = has_data
        self.recorders: dict[str, Recorder] = {}
        self.peers: dict[str, PipelinePeer] = {}
        self.faults: list[tuple[float, str]] = []  # what was done to this world, with virtual times
        self._rules: list[Callable[[str, Event], None]] = []
        self._genesis = genesis(self.spec.run, self._member(COORDINATOR))
        self._volunteers = stages * servers

    async def __aenter__(self) -> Self:
        self.start(COORDINATOR)
        for i in range(self._volunteers):
            self.start(f"v{i}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for transport in self.network.peers.values():
            transport.kill()
        await asyncio.sleep(1)

    # --- peers ------------------------------------------------------------------------------------------------------
    def start(self, name: str, *, forgetful: bool = False) -> None:
        """Start a peer, or start it again from its disk; nothing if it is alive. `forgetful`: as the daemon says
        when it finds another disk than the one that its identity voted with."""
        if name in self.network.peers and self.network.peers[name].alive:
            return
        self.note(f"start {name}")
        transport = SimTransport(self.network, name)
        recorder = self.recorders.setdefault(name, Recorder())
        store = self.stores[name] = SimStore(self.disks.setdefault(name, MemoryStore()), transport)

        def emit(event: Event) -> None:
            if not transport.alive:
                raise PeerKilled
            recorder.events.append((asyncio.get_running_loop().time(), event))
            for rule in list(self._rules):
                rule(name, event)
            if not transport.alive:
                raise PeerKilled

        context = Context(
            spec=self.spec,
            transport=transport,
            store=store,
            blobs=BlobStore(store),
            emit=emit,
            run_in_thread=_thread(self.compute_s),
            signer=SimSigner(name),
            verify=verify,
            calls=Methods(self.spec.max_body_bytes),
            patience=self.patience,
        )
        peer = PipelinePeer(
            context,
            self._genesis,
            data=self.sequences if self.has_data(name) else None,
            build=self.build,
            record=lambda: name.encode(),
            open_record=lambda data, sender: self._member(sender),
            contacts=lambda: tuple(self.network.peers),  # what the directory would know
        )
        self.peers[name] = peer

        async def live() -> None:
            await peer.open(forgetful=forgetful)
            try:
                await peer.run()
            except* StoreError:
                self.note(f"{name} ends: its disk failed")
                transport.kill()
            await asyncio.Event().wait()  # goes on answering

        transport.spawn(live())

    def build(self, stage: int) -> StageProgram:
        return toy_stage(self.seed, stage, self.spec.shape.stages, optimizer=self.optimizer)

    def _member(self, name: str) -> Member:
        return Member(
            peer=name, public_key=SimSigner(name).public_key, name=name, can_feed=self.has_data(name), since=0
        )

    def alive(self) -> list[str]:
        return [name for name, transport in self.network.peers.items() if transport.alive]

    # --- faults -----------------------------------------------------------------------------------------------------
    def note(self, fault: str) -> None:
        """Remember what was done, for `describe`."""
        self.faults.append((asyncio.get_running_loop().time(), fault))

    def kill_now(self, name: str) -> None:
        self.note(f"kill {name}")
        self.network.peers[name].kill()

    def kill_for(self, name: str, seconds: float, successor: str | None = None) -> None:
        """SIGKILL now; after `seconds` the same peer comes back from its disk, or its successor joins instead."""
        self.kill_now(name)
        asyncio.get_running_loop().call_later(seconds, self.start, successor or name)

    def hang_for(self, name: str, seconds: float) -> None:
        """SIGSTOP now, SIGCONT after `seconds`."""
        self.note(f"hang {name} for {seconds:.2f} s")
        self.network.peers[name].hang()
        asyncio.get_running_loop().call_later(seconds, self.network.peers[name].resume)

    def partition(self, *sides: set[str]) -> None:
        self.note("partition " + " | ".join(",".join(sorted(side)) for side in sides))
        self.network.partition(*sides)

    def heal(self) -> None:
        self.note("heal")
        self.network.heal()

    def when(
        self,
        name: str | None,
        at: type[Event],
        then: Callable[[str], None],
        *,
        count: int = 1,
        since_step: int = 0,
        test: Callable[[Any], bool] = lambda event: True,
        **fields: Any,
    ) -> None:
        """Do `then(peer)` when peer `name` (any, if None) emits its `count`-th event of kind `at` with these fields.

        test: events that fail it do not count; since_step: events before the log has so many steps do not count."""
        seen: Counter[str] = Counter()
        done = False

        def rule(peer: str, event: Event) -> None:
            nonlocal done
            if done or (name is not None and peer != name) or not isinstance(event, at):
                return
            if any(getattr(event, key) != value for key, value in fields.items()):
                return
            if not test(event) or self.step() < since_step:
                return
            seen[peer] += 1
            if seen[peer] == count:
                done = True
                then(peer)

        self._rules.append(rule)

    def when_called(
        self,
        method: str,
        moment: Moment,
        then: Callable[[str], None],
        *,
        others: bool = True,
        count: int = 1,
        since_step: int = 0,
    ) -> None:
        """Do `then(caller)` when a peer's `count`-th call of `method` (others: to another peer) is at this moment."""
        seen: Counter[str] = Counter()
        done = False

        def watch(at: Moment, caller: str, callee: str, name: str) -> None:
            nonlocal done
            if done or at is not moment or name != method or (others and caller == callee):
                return
            if self.step() < since_step:
                return
            seen[caller] += 1
            if seen[caller] == count:
                done = True
                then(caller)

        self.network.taps.append(watch)

    def kill(
        self,
        name: str | None,
        *,
        at: type[Event],
        count: int = 1,
        restart_after_s: float | None = None,
        replace_after_s: float | None = None,
        **fields: Any,
    ) -> None:
        """SIGKILL at an event. Optionally the same peer comes back from its disk, or a new one joins instead."""

        def then(peer: str) -> None:
            self.kill_now(peer)
            loop = asyncio.get_running_loop()
            if restart_after_s is not None:
                loop.call_later(restart_after_s, self.start, peer)
            if replace_after_s is not None:
                loop.call_later(replace_after_s, self.start, f"{peer}-new")

        self.when(name, at, then, count=count, **fields)

    # --- running and checking ---------------------------------------------------------------------------------------
    def head(self) -> Entry:
        """The newest entry that any live peer knows."""
        return max((self.peers[n].history.head for n in self.alive()), key=lambda e: e.round)

    def step(self) -> int:
        """Steps in the newest log that any live peer knows; 0 if none is alive."""
        return max((self.peers[n].history.head.step for n in self.alive()), default=0)

    async def run_rounds(self, rounds: int | None = None, *, limit_s: float = 3600.0, everybody: bool = True) -> None:
        """Until every live member (not `everybody`: any) has the log and state after `rounds` steps.

        Raises TimeoutError with where it stands.
        """
        wanted = rounds or self.spec.rounds
        loop = asyncio.get_running_loop()
        end = loop.time() + limit_s
        while not (self._settled(wanted) if everybody else self.step() >= wanted):
            self.check()
            if loop.time() > end:
                raise TimeoutError(self.describe())
            await asyncio.sleep(0.05)
        self.check()

    def _settled(self, step: int) -> bool:
        head = self.head()
        if head.step < step:
            return False
        live = set(self.alive())
        members = [m for m in head.members if m.peer in live]
        return all(
            self.peers[m.peer].history.head.round == head.round and (m.stage is None or self.peers[m.peer].server.ready)
            for m in members
        )

    def check(self) -> None:
        """Raise the first error that ended a task of a live peer: a bug, whatever the faults."""
        for name, transport in self.network.peers.items():
            for error in transport.failures():
                raise AssertionError(f"peer {name} failed (seed {self.seed})") from error

    def describe(self) -> str:
        told = "; ".join(f"{at:.2f} {fault}" for at, fault in self.faults)
        lines = [f"seed {self.seed}, alive {self.alive()}", f"faults: {told}"]
        for name in self.alive():
            peer = self.peers[name]
            head = peer.history.head
            lines.append(
                f"{name}: round {head.round} step {head.step} stage {peer.server.stage} ready {peer.server.ready} "
                f"state {peer.server.step} stuck {peer.server.stuck} committee {head.committee} "
                f"last {[type(e).__name__ for _, e in self.recorders[name].events[-6:]]}"
            )
        return "\n".join(lines)

    def reference(self, rounds: int | None = None, **faults: Any) -> ReferenceResult:
        """The one machine, on the same samples."""
        steps = rounds or self.head().step
        key = (self.seed, self.spec.shape.stages, self.spec.microbatches, self.spec.samples, self.optimizer, steps)
        if faults or key not in _REFERENCES:
            result = run_rounds(
                [self.build(s) for s in range(self.spec.shape.stages)],
                self.sequences,
                steps,
                samples=self.spec.samples,
                microbatch=self.spec.microbatch_samples,
                seed=self.seed,
                **faults,
            )
            if faults:
                return result
            _REFERENCES[key] = result
        return _REFERENCES[key]

    def parameters(self) -> list[dict[str, torch.Tensor]]:
        """Parameters of every complete choice of one live server per stage: all of them must equal the reference."""
        head, live = self.head(), set(self.alive())
        by_stage = [[p for p in head.servers(s) if p in live] for s in range(self.spec.shape.stages)]
        width = max(len(servers) for servers in by_stage)
        choices = []
        for i in range(width):
            states = []
            for servers in by_stage:
                program = self.peers[servers[i % len(servers)]].server.program
                assert program is not None
                states.append(program.state())
            choices.append(parameters_of(states))
        return choices

    def difference(self, reference: ReferenceResult | None = None) -> float:
        """Largest absolute parameter difference of any live server to the reference."""
        wanted = parameters_of((reference or self.reference()).states)
        return max(max_abs_difference(mine, wanted) for mine in self.parameters())

    def samples_committed(self) -> Counter[int]:
        """How often each sample id is in the current history: all ones, if the promise holds."""
        chain = max((self.peers[n].history.chain for n in self.alive()), key=len)
        counts: Counter[int] = Counter()
        for step in range(1, chain.head.step + 1):
            entry = chain.commit_of(step)
            assert entry is not None and isinstance(entry.decision, Commit)
            counts.update(range(entry.next_sample - entry.decision.samples, entry.next_sample))
        return counts

    def entries(self) -> dict[int, dict[str, set[str]]]:
        """Every entry that any peer, dead or alive, ever learned: round -> digest -> who learned it."""
        found: dict[int, dict[str, set[str]]] = {}
        for name, recorder in self.recorders.items():
            for event in recorder.of(EntryDecided):
                found.setdefault(event.round, {}).setdefault(event.digest, set()).add(name)
        return found

    def verify(self, rounds: int) -> None:
        """The promise: one history, every sample exactly once, parameters equal to the reference's. AssertionError."""
        story = self.describe()
        for round_, digests in self.entries().items():
            assert len(digests) == 1, f"two histories at round {round_}: {digests}\n{story}"
        counts = self.samples_committed()
        assert counts == Counter(range(rounds * self.spec.samples)), f"samples {counts}\n{story}"
        difference = self.difference()
        assert difference <= TOLERANCE, f"parameters differ from the reference by {difference}\n{story}"
