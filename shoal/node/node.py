"""A running node: directory, identity, network, log, work, watching and a clean end, in one event loop.

`Node` is the same for the coordinator's bootstrap peer and for volunteers; they differ in where the manifest comes
from. Everything it does is told to the event bus; the live view, metrics, status and event file are its sinks.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal import __version__
from shoal.monitoring.eventfile import EventFile
from shoal.monitoring.exporter import Exporter
from shoal.monitoring.metrics import Metrics
from shoal.monitoring.projection import Projection
from shoal.node.chaos import injection
from shoal.node.entrance import (
    KnownPeers,
    fetch_manifest,
    initial_addresses,
    invited_addresses,
    invited_peers,
    merged,
    ways_back,
)
from shoal.node.errors import explain
from shoal.node.exit_codes import ExitCode, ShoalError
from shoal.node.files import replace_file
from shoal.node.hardware import Hardware, choose
from shoal.node.lifecycle import Facts, Stage, told
from shoal.node.services import MANIFEST, STATUS, Status
from shoal.node.settings import NodeSettings
from shoal.protocol.blobs import BlobError
from shoal.protocol.events import Bus, LifecycleChanged, NodeStarted, NodeStopped, Problem, Reason, Sink
from shoal.protocol.identity import Identity, readable_name
from shoal.protocol.invite import Invite
from shoal.protocol.manifest import SignedManifest
from shoal.protocol.p2p import BootstrapUnreachable, P2PTransport
from shoal.protocol.records import PeerRecord, PeerStatus, open_record, seal
from shoal.protocol.runlog import Member
from shoal.protocol.store import DiskStore
from shoal.protocol.transport import CallError, Empty, Refused, Reply, Request

if TYPE_CHECKING:
    from shoal.protocol.directory import Directory
    from shoal.swarm.data import Corpus
    from shoal.swarm.pipeline.peer import PipelinePeer
    from shoal.swarm.stage import StageProgram

RECORD_LIFETIME_S = 300.0
STORE_ID = "store-id"
ANNOUNCE_S = 60.0
LOOK_S = 0.2  # between two looks at what the lifecycle follows from
KEPT_GRAPHS = 4  # forwards whose backward need not recompute them


class Node:
    """One node of one run. Make it, `await run()`, and look at what it returns: the exit code."""

    def __init__(
        self,
        settings: NodeSettings,
        *,
        manifest: SignedManifest | None = None,
        invite: Invite | None = None,
        data_folder: Path | None = None,
        sinks: tuple[Sink, ...] = (),
        on_invite: Callable[[Invite], None] = lambda invite: None,
    ) -> None:
        """`manifest`: this node coordinates and hands it out; `invite`: it joins. Exactly one is given."""
        self.settings = settings
        self._manifest = manifest
        self._invite = invite
        self._data_folder = data_folder
        self._on_invite = on_invite
        self.bus = Bus(time.time)
        self.projection = Projection()
        self.metrics = Metrics()
        self._sinks = sinks
        self._state = Stage.STARTING
        self._facts = Facts()
        self._counter = int(time.time())
        self._stop = asyncio.Event()
        self._stops = 0
        self._finished = False
        self._directory: Directory | None = None
        self._peer: PipelinePeer | None = None
        self._hardware = Hardware("cpu", "processor", 0)
        self._corpus: Corpus | None = None

    # --- the whole life ---------------------------------------------------------------------------------------------
    async def run(self) -> ExitCode:
        """From start to end. Raises the typed errors that `node.errors.explain` knows."""
        code = ExitCode.INTERNAL
        async with contextlib.AsyncExitStack() as stack:
            try:
                self.settings.prepare()
                self._open_files(stack)
                self._handle_signals(stack)
                code = await self._live() if await self._starts(stack) else ExitCode.OK
            except BaseException as error:
                known = explain(error)
                code = known.exit_code if known is not None else ExitCode.INTERNAL
                raise
            finally:
                self._tell(stopped=True)
                self.bus.emit(NodeStopped(int(code)))
        return code

    def _open_files(self, stack: contextlib.AsyncExitStack) -> None:
        self.identity = Identity.load_or_create(self.settings.identity)
        self.disk = DiskStore(self.settings.store, on_corrupt=self._on_corrupt)
        stack.push_async_callback(self.disk.aclose)
        events = EventFile(self.settings.events)
        stack.callback(events.close)
        sinks: tuple[Sink, ...] = (self.projection, self.metrics, events, *self._sinks)
        for sink in sinks:
            self.bus.subscribe(sink)
        chaos = injection(os.environ)
        if chaos is not None:
            self.bus.emit(Problem(Reason.INTERNAL, "fault injection is on: this node will kill itself", "a test only"))
            self.bus.subscribe(chaos)

    async def _store_id(self) -> tuple[str, bool]:
        """The id of the store that is here, and whether this identity ran before with another one.

        Votes in the run log are in the store; an identity that lost it must not vote as if it had said nothing. A file
        beside the identity remembers which store it had.
        """
        stored = await self.disk.get(STORE_ID)
        try:
            remembered = self.settings.store_id.read_text().strip()
        except OSError:
            remembered = ""
        known = stored.decode("ascii", "replace") if stored is not None else secrets.token_hex(8)
        if stored is None:
            await self.disk.put(STORE_ID, known.encode())
        return known, remembered not in ("", known)

    def _on_corrupt(self, key: str) -> None:
        self.bus.emit(Problem(Reason.BAD_DIGEST, f"a damaged file was set aside: {key}", "it is fetched again"))

    def _handle_signals(self, stack: contextlib.AsyncExitStack) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.stop)
            stack.callback(loop.remove_signal_handler, number)

    def stop(self) -> None:
        """First call: leave in order. Second call: leave at once."""
        self._stops += 1
        self._stop.set()

    async def _starts(self, stack: contextlib.AsyncExitStack) -> bool:
        """Start, unless somebody stops us meanwhile: then False."""
        start = asyncio.ensure_future(self._start(stack))
        stop = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
            if start.done():
                start.result()
                return True
            return False
        finally:
            for task in (start, stop):
                task.cancel()
            await asyncio.wait({start, stop})

    async def _start(self, stack: contextlib.AsyncExitStack) -> None:
        self.known = KnownPeers(self.settings.peers, self.identity.peer)
        known = self.known.read()
        self.transport = await P2PTransport.create(
            identity_path=self.settings.identity,
            listen=self.settings.listen,
            announce=self.settings.announce,
            initial_peers=initial_addresses(self._invite, known),
            emit=self.bus.emit,
            run_dir=self.settings.sockets,
        )
        stack.push_async_callback(self.transport.close)
        for peer, maddrs in merged(known, invited_addresses(self._invite)).items():
            self.transport.learn_address(peer, maddrs)
        signed = self._manifest = self._manifest or await self._get_manifest()
        manifest = signed.manifest
        self.bus.emit(NodeStarted(self.identity.peer, self.identity.name, manifest.name, manifest.mode, __version__))
        self._tell(connected=True)
        self._hardware = choose(self.settings.device)
        self._corpus = await asyncio.to_thread(self._load_data)
        self._tell(checked=True)
        self._make_peer(stack, signed)
        self.transport.serve(MANIFEST, self._on_manifest)
        self.transport.serve(STATUS, self._on_status)
        store_id, forgetful = await self._store_id()
        await self._peer_of_run.open(forgetful=forgetful)
        replace_file(self.settings.store_id, store_id.encode())  # only now: the store itself remembers to abstain
        await self.transport.ready()
        await self._join_dht(stack)
        await self._start_exporter(stack)
        invite = Invite(manifest.run_id, signed.coordinator, self._bootstrap_addresses())
        replace_file(self.settings.invite, f"{invite.encode()}\n".encode())
        self._on_invite(invite)

    def _bootstrap_addresses(self) -> tuple[str, ...]:
        """Where others can enter: the invite's own addresses, or ours if we are the bootstrap peer."""
        if self._invite is not None:
            return self._invite.maddrs
        return tuple(f"{maddr}/p2p/{self.identity.peer}" for maddr in self.transport.visible_addresses())[:8]

    # --- joining ------------------------------------------------------------------------------------------------------
    async def _get_manifest(self) -> SignedManifest:
        """From this disk, or from a peer of the invite, or from anybody met: it must match the invite."""
        assert self._invite is not None
        invite = self._invite
        stored = await self.disk.get("manifest")
        if stored is not None:
            try:
                return SignedManifest.open(stored, expected_run=invite.run, expected_coordinator=invite.coordinator)
            except Refused:
                raise ShoalError(
                    ExitCode.BAD_INVITE,
                    f"{self.settings.directory} holds another run than the one of this invite",
                    "give each run a directory of its own with --dir",
                ) from None
        signed, data = await fetch_manifest(self.transport, invite, (*invited_peers(invite), *self.known.read()))
        await self.disk.put("manifest", data)
        return signed

    def _load_data(self) -> Corpus | None:
        """The training data, if this machine has the run's copy; without it the node serves and does not feed."""
        from shoal.swarm.data import load_corpus

        assert self._manifest is not None
        settings = self._manifest.manifest.data
        if self._invite is not None and settings.kind != "stdlib":
            if self.settings.data is None:
                return None  # the path in the manifest is the coordinator's: never opened here
            settings = settings.model_copy(update={"path": str(self.settings.data.absolute())})
        corpus = load_corpus(settings, self._data_folder or ".")
        if corpus.sha256 != self._manifest.manifest.data.sha256:
            self.bus.emit(
                Problem(
                    Reason.DATA_MISMATCH,
                    "this machine's copy of the training data is not the run's: serving without feeding",
                    "nothing to do; to feed, use the coordinator's copy (stdlib: the same Python version)",
                )
            )
            return None
        return corpus

    def _make_peer(self, stack: contextlib.AsyncExitStack, signed: SignedManifest) -> None:
        import torch

        from shoal.node.assembly import first_entry, make_context
        from shoal.swarm.pipeline.peer import PipelinePeer
        from shoal.swarm.stage import build_stage

        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)
        manifest = signed.manifest
        pool = ThreadPoolExecutor(2, thread_name_prefix="shoal-compute")
        stack.push_async_callback(end_pool, pool, self.settings.drain_s)

        def build(index: int) -> StageProgram:
            return build_stage(manifest, index, device=self._hardware.device, keep_graphs=KEPT_GRAPHS)

        self.build = build
        self.context = make_context(
            signed, transport=self.transport, store=self.disk, identity=self.identity, emit=self.bus.emit, pool=pool
        )
        self._peer = PipelinePeer(
            self.context,
            first_entry(signed),
            data=self._corpus.sequences(manifest.data.sequence_length, seed=manifest.seed) if self._corpus else None,
            build=build,
            record=lambda: seal(self._record(), self.identity),
            open_record=self._open_record,
            contacts=lambda: (signed.coordinator, *invited_peers(self._invite), *self.known.read()),
        )

    @property
    def _peer_of_run(self) -> PipelinePeer:
        assert self._peer is not None  # made by `_start`, before anything that needs it
        return self._peer

    def _record(self) -> PeerRecord:
        """What this node says about itself now."""
        assert self._manifest is not None and self._peer is not None
        self._counter += 1
        now = time.time()
        return PeerRecord(
            run=self._manifest.manifest.run_id,
            peer=self.identity.peer,
            name=self.identity.name,
            maddrs=self.transport.visible_addresses()[:8],
            public_key=self.identity.public_key.hex(),
            stage=self._peer.server.stage,
            step=max(0, self._peer.server.step),
            status=PeerStatus(self._state.value),
            can_feed=self._corpus is not None,
            samples_per_s=0.0,
            memory_bytes=self._hardware.memory_bytes,
            counter=self._counter,
            issued_at=now,
            expires_at=now + RECORD_LIFETIME_S,
        )

    def _open_record(self, data: bytes, sender: str) -> Member:
        assert self._manifest is not None
        record = open_record(data, now=time.time(), expected_run=self._manifest.manifest.run_id, expected_peer=sender)
        return Member(
            peer=record.peer,
            public_key=record.public_key,
            name=record.name,
            maddrs=record.maddrs,
            can_feed=record.can_feed,
        )

    async def _join_dht(self, stack: contextlib.AsyncExitStack) -> None:
        from shoal.protocol.directory import Directory

        assert self._manifest is not None
        try:
            self._directory = await Directory.create(self.transport, self._manifest.manifest.run_id)
        except BootstrapUnreachable as error:
            # the libp2p connection stands, so the run can be joined; the DHT is only how peers are found again
            self.bus.emit(Problem(Reason.UNREACHABLE, error.detail, error.fix))
            self._directory = await Directory.create(self.transport, self._manifest.manifest.run_id, initial_peers=())
        stack.push_async_callback(self._directory.close)

    async def _start_exporter(self, stack: contextlib.AsyncExitStack) -> None:
        exporter = await Exporter.start(
            self.settings.metrics_host, self.settings.metrics_port, self.metrics.registry, self.status
        )
        stack.push_async_callback(exporter.close)
        self.url = exporter.url
        self.settings.running.write_text(
            json.dumps({"pid": os.getpid(), "url": exporter.url, "peer": self.identity.peer}) + "\n"
        )
        stack.callback(self.settings.running.unlink, missing_ok=True)

    # --- living -----------------------------------------------------------------------------------------------------
    async def _live(self) -> ExitCode:
        """Work until the run ends, somebody stops us, or our libp2p daemon dies."""
        assert self._peer is not None
        async with _background(self._announce(), self._watch()):
            work = asyncio.ensure_future(self._work())
            stop = asyncio.ensure_future(self._stop.wait())
            died = asyncio.ensure_future(self.transport.daemon_died.wait())
            try:
                await asyncio.wait({work, stop, died}, return_when=asyncio.FIRST_COMPLETED)
                if died.done():
                    raise ShoalError(ExitCode.DAEMON_DIED, "the node's libp2p daemon (p2pd) stopped")
                if not work.done():
                    return await self._drain(work)
                work.result()
                return ExitCode.OK
            finally:
                for task in (work, stop, died):
                    task.cancel()
                await asyncio.wait({work, stop, died})

    async def _work(self) -> None:
        """The run, and after its last round the time in which others still fetch from us."""
        assert self._peer is not None
        await self._peer.run()
        self._finished = True
        if self._invite is None:
            await self._archive()
            await asyncio.Event().wait()  # the coordinator stays until it is told to stop
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), self.settings.linger_s)

    async def _archive(self) -> None:
        """Have everything that the final state is made of on the coordinator's disk, before the volunteers leave."""
        from shoal.swarm.pipeline.collect import collect_states

        assert self._peer is not None
        try:
            await collect_states(self.context, self._peer.history.chain, self.build)
        except (Refused, BlobError) as error:
            self.bus.emit(
                Problem(error.reason, f"the final state is not complete here: {error.detail}", "export while they stay")
            )

    async def _drain(self, work: asyncio.Future[None]) -> ExitCode:
        """Leave in order: be left out of the next entry, so that nobody waits for us. A second signal cuts it short."""
        assert self._peer is not None
        if self._finished or self._peer.history.head.member(self.identity.peer) is None or self._invite is None:
            return ExitCode.OK
        self._tell(draining=True)
        self._stop.clear()
        leave = asyncio.ensure_future(self._peer.leave(self.settings.drain_s))
        again = asyncio.ensure_future(self._stop.wait())
        try:
            waiting: set[asyncio.Future[Any]] = {leave, again, work}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            left = leave.done() and not leave.cancelled() and leave.result()
            return ExitCode.OK if left else ExitCode.DRAIN_TIMED_OUT
        finally:
            for task in (leave, again):
                task.cancel()
            await asyncio.wait(waiting - {work})

    async def _announce(self) -> None:
        """For ever: publish our record, and remember who else is there."""
        assert self._peer is not None and self._directory is not None
        while True:
            record = self._record()
            try:
                await self._directory.publish(seal(record, self.identity), record.expires_at)
                found = await self._directory.peers()
            except (CallError, TimeoutError, OSError) as error:
                self.bus.emit(Problem(Reason.UNREACHABLE, f"the DHT did not answer: {error}", "it is tried again"))
                found = {}
            listed = {peer: record.maddrs for peer, record in found.items()}
            met = ways_back(self._peer.history.head.members, listed, self.identity.peer)
            for peer, maddrs in met.items():
                self.transport.learn_address(peer, maddrs)
            if met:
                self.known.add(met)
            await asyncio.sleep(ANNOUNCE_S)

    async def _watch(self) -> None:
        """For ever: tell the lifecycle from the facts."""
        assert self._peer is not None
        while True:
            member = self._peer.history.head.member(self.identity.peer)
            self._tell(
                member=member is not None,
                serves=member is not None and member.stage is not None,
                ready=self._peer.server.ready,
            )
            await asyncio.sleep(LOOK_S)

    def _tell(self, **facts: bool) -> None:
        current = {name: getattr(self._facts, name) for name in Facts.__dataclass_fields__}
        self._facts = Facts(**{**current, **facts})
        new = told(self._state, self._facts)
        if new is not self._state:
            old, self._state = self._state, new
            self.bus.emit(LifecycleChanged(old.value, new.value))

    # --- answering --------------------------------------------------------------------------------------------------
    def status(self) -> dict[str, Any]:
        """What `shoal status --json` prints."""
        head = self._peer.history.head if self._peer is not None else None
        members = [
            {
                "peer": m.peer,
                "name": m.name or readable_name(m.peer),
                "stage": m.stage,
                "feeder": m.feeder,
                "committee": head is not None and m.peer in head.committee,
            }
            for m in (head.members if head is not None else ())
        ]
        return {**self.projection.snapshot().to_json(), "member_list": members, "finished": self._finished}

    async def _on_manifest(self, request: Request[Empty]) -> Reply[Empty]:
        assert self._manifest is not None
        return Reply(Empty(), self._manifest.to_bytes())

    async def _on_status(self, request: Request[Empty]) -> Reply[Status]:
        assert self._manifest is not None and self._peer is not None
        manifest, head = self._manifest.manifest, self._peer.history.head
        return Reply(
            Status(
                run=manifest.run_id,
                name=self.identity.name,
                version=__version__,
                state=self._state.value,
                mode=manifest.mode,
                round=head.round,
                step=head.step,
                stage=self._peer.server.stage,
            )
        )


async def end_pool(pool: Executor, timeout_s: float) -> None:
    """Start nothing more and wait for what runs, but not for ever: a computation cannot be interrupted."""
    pool.shutdown(wait=False, cancel_futures=True)
    waiter = threading.Thread(target=pool.shutdown, daemon=True, name="shoal-compute-end")
    waiter.start()
    end = time.monotonic() + timeout_s
    while waiter.is_alive() and time.monotonic() < end:  # noqa: ASYNC110
        await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def _background(*work: Any) -> AsyncIterator[None]:
    """Run these beside the body; an error in one of them ends the body, and leaving the body ends them."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one) for one in work]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
