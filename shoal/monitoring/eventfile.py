"""A node's events on disk: one JSON object per line, appended, bounded, readable while it grows.

Every line is handed to the kernel in one write before the sink returns, so a SIGKILL of the node loses nothing. When
the file would pass its bound it becomes `<name>.1` (the older `.1` is dropped) and a new file begins. Lines are strict
JSON: NaN is null and an infinity a string, because `nan` is not JSON and other tools read these files too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from shoal.protocol.events import EVENT_TYPES, Stamped, from_json, to_json

MAX_BYTES = 64 * 1024 * 1024
MAX_LINE_BYTES = 64 * 1024  # no event comes near it; bounds what a reader holds
READ_BYTES = 1024 * 1024


class EventFileError(Exception):
    """A line in the middle of an event file is not an event. Message: file, line number, what to do."""


def encode_line(stamped: Stamped) -> bytes:
    """One event as one line of strict JSON, newline included."""
    return json.dumps(_strict(to_json(stamped)), separators=(",", ":"), allow_nan=False).encode() + b"\n"


def decode_line(line: bytes) -> Stamped:
    """Inverse of `encode_line`. Raises ValueError for anything that is not one whole event."""
    try:
        data = json.loads(line)
        for f in dataclasses.fields(EVENT_TYPES[data["event"]]):
            if f.type == "float":
                data[f.name] = math.nan if data[f.name] is None else float(data[f.name])
        return from_json(data)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"not an event: {line[:80]!r}") from error


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


class EventFile:
    """A sink that appends to `path` (its folder is made). Raises OSError when the file cannot be opened.

    A write that fails later (a full disk) does not stop the node: the event is dropped and counted in `dropped`, the
    newest error is in `error`, and a half-written line is taken back."""

    def __init__(self, path: Path | str, *, max_bytes: int = MAX_BYTES) -> None:
        self.path = Path(path)
        self.dropped = 0
        self.error: OSError | None = None
        self._max_bytes = max_bytes
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._open()

    def _open(self) -> None:
        self._file: BinaryIO = open(self.path, "ab+", buffering=0)  # noqa: SIM115 (held until close)
        self._size = self._file.seek(0, os.SEEK_END)
        self._mend()

    def _mend(self) -> None:
        """Take back a line that a crash tore, so that the file goes on with whole lines."""
        if self._size == 0:
            return
        start = max(0, self._size - MAX_LINE_BYTES)
        self._file.seek(start)
        tail = self._file.read(self._size - start)
        torn = tail[tail.rfind(b"\n") + 1 :]
        if torn:
            self._size -= len(torn)
            self._file.truncate(self._size)

    def __call__(self, stamped: Stamped) -> None:
        line = encode_line(stamped)
        try:
            if self._size and self._size + len(line) > self._max_bytes:
                self._file.close()
                os.replace(self.path, rotated(self.path))
                self._open()
            written = self._file.write(line)
            if written != len(line):
                self._file.truncate(self._size)
                raise OSError(f"{self.path}: only {written} of {len(line)} bytes could be written")
            self._size += len(line)
        except (OSError, ValueError) as error:  # ValueError: a rotation failed half-way and the file is closed
            self.dropped += 1
            self.error = error if isinstance(error, OSError) else OSError(str(error))
            if self._file.closed:
                self._reopen()

    def _reopen(self) -> None:
        try:
            self._open()
        except OSError as error:
            self.error = error

    def close(self) -> None:
        self._file.close()


def rotated(path: Path | str) -> Path:
    """Where the older half of an event file lives."""
    path = Path(path)
    return path.with_name(path.name + ".1")


def read_events(path: Path | str) -> Iterator[Stamped]:
    """All events of a node, the rotated file first. A torn last line is left out.

    Raises FileNotFoundError when there is no such file, EventFileError for a damaged line before the last one."""
    path = Path(path)
    older = rotated(path)
    with contextlib.ExitStack() as files:
        # Both are opened before the first line is handed out: a rotation meanwhile changes nothing for this reader.
        names = [older, path] if older.exists() else [path]
        for name, file in [(name, files.enter_context(open(name, "rb"))) for name in names]:
            number = 0
            while line := file.readline(MAX_LINE_BYTES):
                number += 1
                if not line.endswith(b"\n") and not file.read(1):
                    break  # torn: nothing follows
                try:
                    yield decode_line(line)
                except ValueError as error:
                    raise EventFileError(
                        f"{name}, line {number} is damaged ({error}); delete that line to read the rest"
                    ) from error


class Follower:
    """Reads an event file while a node appends to it, across rotation and restart. Never blocks and never raises for
    what the file holds: a file that is not there yet has no events, damaged lines are counted in `damaged`."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.damaged = 0
        self._file: BinaryIO | None = None
        self._offset = 0  # of the first byte not yet handed out

    def poll(self) -> list[Stamped]:
        """The events that were completed since the last call. Two rotations between calls lose the first of them."""
        events: list[Stamped] = []
        while True:
            if self._file is None:
                try:
                    self._file = open(self.path, "rb")  # noqa: SIM115 (held until close)
                except FileNotFoundError:
                    return events
                self._offset = 0
            replaced = self._was_replaced()  # before the read: what is appended in between belongs to the new file
            self._read_on(events)
            if not replaced:
                return events
            self.close()

    def _was_replaced(self) -> bool:
        assert self._file is not None
        try:
            now = os.stat(self.path)
        except FileNotFoundError:
            return False  # between the rename and the new file; the old one still has its end to read
        mine = os.fstat(self._file.fileno())
        return (now.st_dev, now.st_ino) != (mine.st_dev, mine.st_ino)

    def _read_on(self, events: list[Stamped]) -> None:
        assert self._file is not None
        self._file.seek(self._offset)
        while block := self._file.read(READ_BYTES):
            end = block.rfind(b"\n") + 1
            if end == 0:
                if len(block) < READ_BYTES:
                    return  # a line that is still being written
                self.damaged += 1  # a megabyte without a newline is no event file
                end = len(block)
            for line in block[:end].splitlines():
                try:
                    events.append(decode_line(line))
                except ValueError:
                    self.damaged += 1
            self._offset += end
            self._file.seek(self._offset)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def follow(path: Path | str) -> Follower:
    """An incremental reader of `path`, from its beginning."""
    return Follower(path)
