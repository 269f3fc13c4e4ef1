"""A node's only disk state: a small durable key -> bytes store (log, promises, gradients, snapshots, blob chunks).

A value is written aside, fsynced, renamed over the old one, and its folder fsynced, before `put` returns: after a crash
at any point a key has its old or its new value, never a mixture. A header carries the length and a SHA-256 over key,
length and data; a file that does not match (torn by the disk, flipped bits, moved) is never returned: it is set aside
as `*.corrupt` and reported, and the key is absent from then on.

Two implementations, one conformance suite (tests/protocol/test_store.py): `DiskStore` and, for the simulator,
`MemoryStore`.

    DIR/LOCK             flock held by the one process that uses DIR; its text is that process's pid
    DIR/tmp/             values being written; emptied at open
    DIR/data/log/12.rec  the value of key "log/12" (the suffix lets "log" be a key beside "log/12")
"""

from __future__ import annotations

import asyncio
import enum
import errno
import fcntl
import hashlib
import hmac
import itertools
import os
import re
import shutil
import struct
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

Data = bytes | bytearray | memoryview
OnCorrupt = Callable[[str], None]
T = TypeVar("T")

_MAGIC = b"shoalrec"
_HEADER = struct.Struct("<8sQ32s")  # magic, data length in bytes, checksum (see `_checksum`)
_SUFFIX = ".rec"
_SEGMENT = re.compile(r"[A-Za-z0-9_-]{1,100}")
_MAX_KEY = 400
_READ_BYTES = 1 << 30  # per system call


class Store(Protocol):
    """Durable key -> bytes. Keys: up to 400 characters of `[A-Za-z0-9_-]`, in parts of 1 to 100 separated by "/".

    Operations on one key happen one after the other in the order of their calls; on different keys they may overlap.
    Every method raises ValueError for a key that is not well formed; the async ones raise StoreError when the disk
    refuses. A cancelled `put` or `delete` may or may not have happened, and has not happened by halves.
    """

    on_corrupt: OnCorrupt  # called with the key whose value was found damaged; may be replaced at any time

    async def put(self, key: str, data: Data) -> None:
        """Set the value; durable when it returns. `data` must not change until then."""
        ...

    async def get(self, key: str) -> bytes | None:
        """The value; None if absent, or found damaged (then `on_corrupt(key)` was called and the key is absent)."""
        ...

    async def delete(self, key: str) -> None:
        """Remove the key; durable when it returns. Removing an absent key is allowed."""
        ...

    def keys(self, prefix: str = "") -> list[str]:
        """All keys that start with `prefix` (any string), sorted."""
        ...

    def size(self, key: str) -> int | None:
        """Bytes of the value, None if absent. Does not read the value, so it does not notice damage inside it."""
        ...

    async def aclose(self) -> None:
        """Wait for running operations and let go of the directory. Every later operation raises StoreError CLOSED."""
        ...


class StoreFault(enum.StrEnum):
    """What kind of thing is wrong with the store's directory."""

    NO_SPACE = "no_space"
    READ_ONLY = "read_only"
    NO_PERMISSION = "no_permission"
    LOCKED = "locked"
    IO = "io"
    CLOSED = "closed"


class StoreError(Exception):
    """The disk refused. `fault` is typed; the text is one line that says what happened and, in `fix`, what to do."""

    def __init__(self, fault: StoreFault, what: str, fix: str) -> None:
        super().__init__(f"{what}: {fix}")
        self.fault = fault
        self.what = what
        self.fix = fix


def check_key(key: str) -> str:
    """Returns `key`. Raises ValueError unless it is well formed (see `Store`); ".." and absolute paths are not."""
    if len(key) > _MAX_KEY or not all(_SEGMENT.fullmatch(part) for part in key.split("/")):
        raise ValueError(f"not a key of the store: {key[:_MAX_KEY]!r}")
    return key


class MemoryStore:
    """The simulator's disk: hand the same object to the restarted peer. No threads, no clock.

    Every operation yields to the loop before it takes effect and again before it returns, so a simulated kill can fall
    on either side of the effect, as on a disk.
    """

    def __init__(self, *, on_corrupt: OnCorrupt = lambda key: None) -> None:
        self.on_corrupt = on_corrupt
        self._values: dict[str, bytes] = {}
        self._damaged: set[str] = set()

    async def put(self, key: str, data: Data) -> None:
        check_key(key)
        value = bytes(data)
        await asyncio.sleep(0)
        self._values[key] = value
        self._damaged.discard(key)
        await asyncio.sleep(0)

    async def get(self, key: str) -> bytes | None:
        check_key(key)
        await asyncio.sleep(0)
        value = self._values.get(key)
        if key in self._damaged:
            self._damaged.discard(key)
            del self._values[key]
            self.on_corrupt(key)
            value = None
        await asyncio.sleep(0)
        return value

    async def delete(self, key: str) -> None:
        check_key(key)
        await asyncio.sleep(0)
        self._values.pop(key, None)
        self._damaged.discard(key)
        await asyncio.sleep(0)

    def keys(self, prefix: str = "") -> list[str]:
        return sorted(key for key in self._values if key.startswith(prefix))

    def size(self, key: str) -> int | None:
        value = self._values.get(check_key(key))
        return None if value is None else len(value)

    async def aclose(self) -> None:
        """Nothing is held; the object stays usable, because a restarted peer gets the same one."""

    def damage(self, key: str) -> None:
        """Simulate a torn value: the next `get` of this key finds it. Raises KeyError if the key is absent."""
        if key not in self._values:
            raise KeyError(key)
        self._damaged.add(key)


class DiskStore:
    """The store in a directory of its own (made if missing, mode 0700), used by one process at a time.

    The constructor reads the names and sizes below `root` (not the values), removes what a crash left half-written, and
    raises StoreError: LOCKED (names the pid), NO_PERMISSION, READ_ONLY, NO_SPACE, IO. System calls of the async methods
    run through `run_in_thread`. Works from one event loop at a time.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        on_corrupt: OnCorrupt = lambda key: None,
        run_in_thread: Callable[..., Awaitable[Any]] = asyncio.to_thread,
    ) -> None:
        self.root = Path(os.path.abspath(root))
        self.on_corrupt = on_corrupt
        self._run_in_thread = run_in_thread
        self._data = self.root / "data"
        self._tmp = self.root / "tmp"
        self._serial = itertools.count()
        self._tree = threading.Lock()  # making, filling and pruning folders exclude one another
        self._synced: set[Path] = set()  # folders whose own name is known to be on disk
        self._turns: dict[str, _Turn] = {}
        self._running: dict[int, asyncio.Task[Any]] = {}
        with self._explained(0):
            new = [folder for folder in (self.root, *self.root.parents) if not folder.exists()]
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in new:
                with suppress(PermissionError):  # a parent that we may write to and not read
                    _fsync_folder(folder.parent)
            self._lock_fd = self._lock()
            try:
                shutil.rmtree(self._tmp, ignore_errors=True)
                self._tmp.mkdir(exist_ok=True)
                for leftover in self._tmp.iterdir():  # what rmtree could not remove says why here
                    leftover.unlink()
                self._data.mkdir(exist_ok=True)
                _fsync_folder(self.root)
                self._sizes: dict[str, int] = dict(_scan(self._data, ""))
            except BaseException:
                os.close(self._lock_fd)
                raise

    async def put(self, key: str, data: Data) -> None:
        view = memoryview(data).cast("B")
        await self._operate(check_key(key), self._put(key, view))

    async def get(self, key: str) -> bytes | None:
        return await self._operate(check_key(key), self._get(key))

    async def delete(self, key: str) -> None:
        await self._operate(check_key(key), self._delete(key))

    def keys(self, prefix: str = "") -> list[str]:
        return sorted(key for key in self._sizes if key.startswith(prefix))

    def size(self, key: str) -> int | None:
        return self._sizes.get(check_key(key))

    async def aclose(self) -> None:
        while self._running:
            await asyncio.wait(list(self._running.values()))
        if self._lock_fd >= 0:
            os.close(self._lock_fd)  # lets go of the flock; the file stays, removing it would race with the next owner
            self._lock_fd = -1

    # --- on the loop ----------------------------------------------------------------------------------------------
    async def _operate(self, key: str, operation: Coroutine[Any, Any, T]) -> T:
        """Run `operation` as a task of its own, which goes on when the caller is cancelled: a thread cannot be stopped,
        and the next operation on this key must not start before it has ended."""
        if self._lock_fd < 0:
            operation.close()
            raise StoreError(StoreFault.CLOSED, f"the store in {self.root} was closed", "open it again")
        turn = self._turns.setdefault(key, _Turn())
        turn.users += 1
        task = asyncio.ensure_future(turn.run(operation))
        number = next(self._serial)
        self._running[number] = task

        def ended(task: asyncio.Task[Any]) -> None:
            operation.close()  # it never started if the loop was shut down before its turn
            turn.users -= 1
            if not turn.users:
                del self._turns[key]
            del self._running[number]
            if not task.cancelled():
                task.exception()  # seen, even if the caller has gone

        task.add_done_callback(ended)
        return await asyncio.shield(task)

    async def _put(self, key: str, view: memoryview) -> None:
        try:
            await self._run_in_thread(self._write, key, view)
        finally:
            self._refresh(key)

    async def _get(self, key: str) -> bytes | None:
        if key not in self._sizes:
            return None
        data: bytes | None = await self._run_in_thread(self._read, key)
        if data is None:
            self._refresh(key)
            self.on_corrupt(key)
        return data

    async def _delete(self, key: str) -> None:
        try:
            await self._run_in_thread(self._remove, key)
        finally:
            self._refresh(key)

    def _refresh(self, key: str) -> None:
        """Learn the size of a key from the disk, which knows best after a failed operation too."""
        with suppress(OSError):
            self._sizes[key] = max(0, os.stat(self._path(key)).st_size - _HEADER.size)
            return
        self._sizes.pop(key, None)

    # --- in a thread ----------------------------------------------------------------------------------------------
    def _path(self, key: str) -> Path:
        return self._data / (key + _SUFFIX)

    def _write(self, key: str, view: memoryview) -> None:
        path = self._path(key)
        aside = self._tmp / str(next(self._serial))
        with self._explained(_HEADER.size + view.nbytes):
            try:
                fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                try:
                    _write_all(fd, memoryview(_HEADER.pack(_MAGIC, view.nbytes, _checksum(key, view))))
                    _write_all(fd, view)
                    os.fsync(fd)
                finally:
                    os.close(fd)
                with self._tree:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(aside, path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(aside)
                with suppress(OSError):
                    self._prune(path.parent)
                raise
            self._sync_folders(path.parent)

    def _read(self, key: str) -> bytes | None:
        path = self._path(key)
        with self._explained(0):
            try:
                with open(path, "rb", buffering=0) as file:
                    header = file.read(_HEADER.size)
                    held = os.fstat(file.fileno()).st_size - _HEADER.size
                    if len(header) == _HEADER.size:
                        magic, length, checksum = _HEADER.unpack(header)
                        if magic == _MAGIC and length == held:
                            data = _read_all(file.fileno(), length)
                            if len(data) == length and hmac.compare_digest(checksum, _checksum(key, memoryview(data))):
                                return data
            except FileNotFoundError:
                return None  # removed behind our back: as absent as a damaged one
            os.replace(path, path.with_suffix(_SUFFIX + ".corrupt"))
            _fsync_folder(path.parent)
            return None

    def _remove(self, key: str) -> None:
        path = self._path(key)
        with self._explained(0):
            with suppress(FileNotFoundError):
                os.unlink(path)
            folder = self._prune(path.parent)
            while True:
                with suppress(FileNotFoundError):  # pruned by another removal meanwhile
                    _fsync_folder(folder)
                    return
                folder = folder.parent

    def _prune(self, folder: Path) -> Path:
        """Remove `folder` and its parents as far as they are empty; return the first that stays."""
        with self._tree:
            while folder != self._data:
                try:
                    os.rmdir(folder)
                except FileNotFoundError:
                    pass
                except OSError:
                    break  # not empty
                self._synced.discard(folder)
                folder = folder.parent
        return folder

    def _sync_folders(self, folder: Path) -> None:
        """Make a name in `folder` durable, and the names of the folders above it as far as they are new."""
        _fsync_folder(folder)
        synced = []
        while folder != self._data and folder not in self._synced:
            _fsync_folder(folder.parent)
            synced.append(folder)
            folder = folder.parent
        self._synced.update(synced)  # at the end: who finds a folder here may rely on all those above it

    def _lock(self) -> int:
        fd = os.open(self.root / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError:
            pid = os.pread(fd, 20, 0).decode(errors="replace").strip()
            os.close(fd)
            raise StoreError(
                StoreFault.LOCKED,
                f"{self.root} is in use by process {pid or '(unknown)'}",
                "stop that process or choose another --dir",
            ) from None
        except BaseException:
            os.close(fd)
            raise
        return fd

    @contextmanager
    def _explained(self, needed_bytes: int) -> Iterator[None]:
        """Turn an OSError into a StoreError that says what to do. `needed_bytes`: what was to be written."""
        try:
            yield
        except OSError as error:
            raise self._explain(error, needed_bytes) from error

    def _explain(self, error: OSError, needed_bytes: int) -> StoreError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free_bytes = 0
            with suppress(OSError):
                disk = os.statvfs(self.root)
                free_bytes = disk.f_bavail * disk.f_frsize
            short_bytes = needed_bytes - free_bytes if free_bytes < needed_bytes else needed_bytes
            megabytes = max(1, -(-short_bytes // 1_000_000))
            return StoreError(
                StoreFault.NO_SPACE,
                f"no space left for a checkpoint in {self.root}",
                f"free {megabytes} MB or choose another --dir",
            )
        if error.errno == errno.EROFS:
            return StoreError(
                StoreFault.READ_ONLY, f"{self.root} is on a read-only disk", "mount it writable or choose another --dir"
            )
        if error.errno in (errno.EACCES, errno.EPERM):
            return StoreError(
                StoreFault.NO_PERMISSION,
                f"no permission to write in {self.root}",
                "give this user write permission on it or choose another --dir",
            )
        return StoreError(
            StoreFault.IO,
            f"the disk failed in {self.root} ({error.strerror or error})",
            "check the disk or choose another --dir",
        )


class _Turn:
    """Who may work on one key: waiters come in order."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.users = 0

    async def run(self, operation: Coroutine[Any, Any, T]) -> T:
        async with self.lock:
            return await operation


def _scan(folder: Path, prefix: str) -> Iterator[tuple[str, int]]:
    """(key, bytes of its value) for every value below `folder`; links and foreign files are passed over."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _scan(folder / entry.name, f"{prefix}{entry.name}/")
            elif entry.is_file(follow_symlinks=False) and entry.name.endswith(_SUFFIX):
                key = prefix + entry.name.removesuffix(_SUFFIX)
                with suppress(ValueError):
                    yield check_key(key), max(0, entry.stat(follow_symlinks=False).st_size - _HEADER.size)


def _checksum(key: str, view: memoryview) -> bytes:
    name = key.encode()
    state = hashlib.sha256(_MAGIC + struct.pack("<Q", len(name)) + name + struct.pack("<Q", view.nbytes))
    state.update(view)
    return state.digest()


def _write_all(fd: int, view: memoryview) -> None:
    while view.nbytes:
        view = view[os.write(fd, view) :]


def _read_all(fd: int, length: int) -> bytes:
    """Up to `length` bytes; fewer at the end of the file. One buffer when one system call is enough."""
    first = os.read(fd, min(length, _READ_BYTES))
    if len(first) == length or not first:
        return first
    parts = [first]
    missing = length - len(first)
    while missing and (part := os.read(fd, min(missing, _READ_BYTES))):
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system on which folders cannot be synced
            raise
    finally:
        os.close(fd)
