"""Running a node in front of a person: the live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from shoal.monitoring.view import NodeBoard
from shoal.node.exit_codes import ExitCode
from shoal.node.node import Node
from shoal.node.settings import NodeSettings
from shoal.protocol.invite import Invite
from shoal.protocol.manifest import SignedManifest

REFRESH_S = 0.25


def quiet_libraries() -> None:
    """Our events say what there is to say; libraries only get to speak of errors."""
    for name in ("hivemind", "asyncio", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("HIVEMIND_LOGLEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HIVEMIND_MEMORY_SHARING_STRATEGY", "file_descriptor")


def run_node(
    settings: NodeSettings,
    *,
    manifest: SignedManifest | None = None,
    invite: Invite | None = None,
    folder: Path | None = None,
    quiet: bool = False,
    plain: bool = False,
) -> ExitCode:
    """Run a node to its end, showing what it does. Raises what `Node.run` raises."""
    quiet_libraries()
    return asyncio.run(_run(settings, manifest, invite, folder, quiet, plain))


async def _run(
    settings: NodeSettings,
    manifest: SignedManifest | None,
    invite: Invite | None,
    folder: Path | None,
    quiet: bool,
    plain: bool,
) -> ExitCode:
    asyncio.get_running_loop().set_exception_handler(_on_loop_error)
    rounds = manifest.manifest.schedule.rounds if manifest is not None else 0
    name = manifest.manifest.name if manifest is not None else ""
    board = NodeBoard(name, rounds=rounds)
    console = Console()
    fancy = console.is_terminal and not plain and not quiet

    def show_invite(made: Invite) -> None:
        if manifest is not None:
            console.print(f"[bold]invite[/] (also in {settings.invite})", highlight=False)
            print(made.encode(), flush=True)
            console.print("volunteers run: shoal join INVITE", highlight=False)

    node = Node(
        settings, manifest=manifest, invite=invite, data_folder=folder, sinks=(board.feed,), on_invite=show_invite
    )
    running = asyncio.ensure_future(node.run())
    if quiet:
        return await running
    if not fancy:
        return await _plain(running, board)
    with Live(console=console, refresh_per_second=4, transient=False) as live:
        while not running.done():
            live.update(board.render(time.time()))
            await asyncio.wait({running}, timeout=REFRESH_S)
        live.update(board.render(time.time()))
    return await running


def _on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """asyncio 3.11 reports a connection whose handler was cancelled, as ours are at the end: that is no error."""
    if not isinstance(context.get("exception"), asyncio.CancelledError):
        loop.default_exception_handler(context)


async def _plain(running: asyncio.Future[ExitCode], board: NodeBoard) -> ExitCode:
    while not running.done():
        await asyncio.wait({running}, timeout=REFRESH_S)
        for line in board.plain_lines():
            print(line, flush=True)
    for line in board.plain_lines(final=True):
        print(line, flush=True)
    return await running


def print_status(snapshot: dict[str, Any]) -> None:
    """A status snapshot for people."""
    console = Console(file=sys.stdout)
    loss = snapshot.get("loss")
    head = [
        ("node", f"{snapshot.get('name')}  {snapshot.get('peer')}"),
        ("run", f"{snapshot.get('run')}  ({snapshot.get('mode')})"),
        ("state", str(snapshot.get("state"))),
        ("round, step", f"{snapshot.get('round')}, {snapshot.get('step')}"),
        ("loss", "–" if loss is None else f"{loss:.3f} nats per token"),
        ("samples/s", f"{snapshot.get('samples_per_s') or 0:.1f}"),
    ]
    for label, text in head:
        console.print(f"[dim]{label:>12}[/]  {text}", highlight=False)
    members = Table("peer", "stage", "feeds", "committee", box=None, header_style="dim")
    for member in snapshot.get("member_list", []):
        stage = "–" if member["stage"] is None else str(member["stage"])
        marks = ("yes" if member[key] else "" for key in ("feeder", "committee"))
        members.add_row(member["name"], stage, *marks)
    console.print(members)
