"""What a person may set on the command line, and the files of a node's directory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from shoal.node.exit_codes import ExitCode, ShoalError

LISTEN = "/ip4/0.0.0.0/tcp/0"


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """One node. `linger_s`: how long a volunteer goes on giving state to others after the last round."""

    directory: Path
    listen: tuple[str, ...] = (LISTEN,)
    announce: tuple[str, ...] = ()
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 0
    device: str = "auto"
    threads: int = 0
    data: Path | None = None  # the volunteer's own copy of the training data
    linger_s: float = 60.0
    drain_s: float = 30.0

    @property
    def identity(self) -> Path:
        return self.directory / "identity.key"

    @property
    def store(self) -> Path:
        return self.directory / "store"

    @property
    def events(self) -> Path:
        return self.directory / "events.jsonl"

    @property
    def invite(self) -> Path:
        return self.directory / "invite"

    @property
    def running(self) -> Path:
        """Tells `shoal status` where the running node answers: {"pid", "url", "peer"}."""
        return self.directory / "node.json"

    @property
    def peers(self) -> Path:
        """Addresses of peers that this node met: ways back into the run when the bootstrap peer is gone."""
        return self.directory / "peers.json"

    @property
    def store_id(self) -> Path:
        """Names the store that this identity has voted with; see `Node._store_id`."""
        return self.directory / "store.id"

    @property
    def sockets(self) -> Path:
        return self.directory / "run"

    def prepare(self) -> None:
        """Make the directory. Raises ShoalError."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.sockets.mkdir(exist_ok=True, mode=0o700)
        except OSError as error:
            raise ShoalError(
                ExitCode.DIRECTORY_UNWRITABLE,
                f"{self.directory}: cannot be made or used ({error.strerror})",
                "choose another directory with --dir",
            ) from None
        if not os.access(self.directory, os.W_OK | os.X_OK):
            raise ShoalError(
                ExitCode.DIRECTORY_UNWRITABLE,
                f"{self.directory}: not writable",
                "correct its permissions or choose another directory with --dir",
            )


def default_directory(name: str) -> Path:
    """Where nodes keep their files unless told otherwise: $XDG_DATA_HOME/shoal/NAME."""
    return _base() / name


def volunteer_directory(run: str) -> Path:
    """A volunteer's default directory: one for each run that it joins."""
    return _base() / "runs" / run[:12]


def running_directories() -> list[Path]:
    """Default directories in which a node says that it runs."""
    return sorted(path.parent for path in (*_base().glob("*/node.json"), *_base().glob("runs/*/node.json")))


def _base() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "shoal"
