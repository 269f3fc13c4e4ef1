"""`shoal export`: the newest committed model, from a node's own disk or from the swarm, checked against the log."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from shoal.node.entrance import fetch_manifest, invited_peers
from shoal.node.exit_codes import ExitCode, ShoalError
from shoal.node.live import quiet_libraries
from shoal.node.settings import NodeSettings
from shoal.protocol.events import Bus
from shoal.protocol.identity import Identity
from shoal.protocol.invite import Invite
from shoal.protocol.p2p import P2PTransport
from shoal.protocol.store import DiskStore
from shoal.protocol.transport import Refused

if TYPE_CHECKING:
    from shoal.swarm.pipeline.history import History

CHASE_S = 60.0  # how long the newest state of a run that goes on is chased


async def export_run(target: Path, source: NodeSettings, invite: str | None, *, show: bool) -> dict[str, Any]:
    """Export to `target`. `invite`: observe the swarm; else the invite that the node in `source` keeps is used.

    The exporter is an observer with an identity of its own: it reads the log, fetches pinned snapshots and committed
    gradients from their holders, and verifies each against the log. Raises ShoalError and the typed errors below it.
    """
    quiet_libraries()
    text = invite or _kept_invite(source)
    known = Invite.decode(text)
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shoal-export-")))
        return await _observe(stack, known, folder, target, show)


def _kept_invite(source: NodeSettings) -> str:
    try:
        return source.invite.read_text().strip()
    except OSError:
        raise ShoalError(
            ExitCode.NODE_NOT_RUNNING,
            f"{source.directory}: no node has run here",
            "name a node's directory with --dir, or give --invite",
        ) from None


async def _observe(
    stack: contextlib.AsyncExitStack, invite: Invite, folder: Path, target: Path, show: bool
) -> dict[str, Any]:
    from shoal.node.assembly import first_entry, make_context
    from shoal.swarm.export import export_hf
    from shoal.swarm.pipeline.collect import collect_states
    from shoal.swarm.pipeline.history import History
    from shoal.swarm.stage import build_stage

    identity = Identity.load_or_create(folder / "identity.key")
    store = DiskStore(folder / "store")
    stack.push_async_callback(store.aclose)
    bus = Bus(time.time)
    transport = await P2PTransport.create(
        identity_path=folder / "identity.key",
        listen=("/ip4/127.0.0.1/tcp/0",),
        initial_peers=invite.maddrs,
        emit=bus.emit,
        run_dir=folder,
    )
    stack.push_async_callback(transport.close)
    entrance = invited_peers(invite)
    signed, _ = await fetch_manifest(transport, invite, entrance)
    manifest = signed.manifest
    pool = stack.enter_context(ThreadPoolExecutor(1))
    context = make_context(signed, transport=transport, store=store, identity=identity, emit=bus.emit, pool=pool)
    history = History(context, first_entry(signed))
    spec = context.spec
    for stage in range(spec.shape.stages):
        await context.run_in_thread(build_stage, manifest, stage)
    console = Console(stderr=True)
    with Progress(console=console, disable=not (show and console.is_terminal), transient=True) as bar:
        tasks = [bar.add_task(f"stage {s}", total=None) for s in range(spec.shape.stages)]

        async def collect() -> list[dict[str, Any]]:
            return await collect_states(
                context,
                history.chain,
                lambda stage: build_stage(manifest, stage),
                lambda stage, step, last: bar.update(tasks[stage], completed=step, total=last),
            )

        states = await _newest(history, entrance, collect)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    written = await asyncio.to_thread(export_hf, manifest, states, target)
    return {"export_dir": str(written), "step": history.head.step, "round": history.head.round, "run": spec.run}


async def _newest(
    history: History, entrance: Sequence[str], collect: Callable[[], Awaitable[list[dict[str, Any]]]]
) -> list[dict[str, Any]]:
    """The newest state. A run that goes on meanwhile lets go of old states: then for its new head, until there is none.

    Raises ShoalError(EXPORT_REFUSED)."""
    end = time.monotonic() + CHASE_S
    while True:
        for peer in dict.fromkeys((*entrance, *(m.peer for m in history.head.members))):
            if await history.pull(peer):
                break
        round_ = history.head.round
        if round_ == 0:
            raise ShoalError(ExitCode.EXPORT_REFUSED, "the run has no history yet", "wait until it has begun")
        try:
            return await collect()
        except Refused as refusal:
            for peer in entrance:
                await history.pull(peer)
            if history.head.round == round_ or time.monotonic() > end:
                raise ShoalError(
                    ExitCode.EXPORT_REFUSED,
                    f"the state after step {history.head.step} is not to be had: {refusal.detail}",
                    "wait until a peer that holds it is back, then export again",
                ) from None
