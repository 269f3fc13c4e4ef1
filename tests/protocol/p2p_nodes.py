"""Real transports for tests: started in a short folder of their own, with their events, and closed in the end."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.protocol.events import Event
from shoal.protocol.p2p import P2PTransport
from tests.protocol.transport_conformance import LONG_S


class Recorder:
    """Every event of one node, and a way to wait for one."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._news = asyncio.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self._news.set()

    async def wait_for(self, wanted: Callable[[Event], bool], within_s: float = LONG_S) -> Event:
        async with asyncio.timeout(within_s):
            while True:
                for event in self.events:
                    if wanted(event):
                        return event
                self._news.clear()
                await self._news.wait()


class Nodes:
    """Starts transports in a short folder and closes them in the end."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="shoal-test-"))
        self.started: list[P2PTransport] = []
        self.recorders: dict[str, Recorder] = {}

    async def start(self, name: str, *, bootstrap: P2PTransport | None = None, **options: Any) -> P2PTransport:
        recorder = Recorder()
        peers = [f"{maddr}/p2p/{bootstrap.peer}" for maddr in bootstrap.visible_addresses()] if bootstrap else []
        node = await P2PTransport.create(
            identity_path=self.folder / f"{name}.key",
            run_dir=self.folder / name,
            emit=recorder,
            **({"initial_peers": peers, "startup_timeout_s": LONG_S} | options),
        )
        self.started.append(node)
        self.recorders[node.peer] = recorder
        return node

    def events(self, node: P2PTransport) -> Recorder:
        return self.recorders[node.peer]

    def sockets(self, name: str) -> list[Path]:
        return [path for path in (self.folder / name).rglob("*") if path.is_socket()]

    async def close(self) -> None:
        for node in reversed(self.started):
            await node.close()
        left = [path for path in self.folder.rglob("*") if path.is_socket()]
        shutil.rmtree(self.folder)
        assert left == []
