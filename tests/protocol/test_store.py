"""Claims about the store: one conformance suite for both implementations, then what a disk does to the real one."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.protocol.store import DiskStore, MemoryStore, Store, StoreError, StoreFault

Scenario = Callable[[Store], Awaitable[None]]
CORRUPT: list[str] = []


def run(awaitable: Awaitable[Any]) -> Any:
    async def main() -> Any:
        async with asyncio.timeout(10):
            return await awaitable

    return asyncio.run(main())


@pytest.fixture(params=["disk", "memory"])
def run_in(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Scenario], None]:
    """Runs a scenario against one of the implementations; called again, it is what a restarted node would see."""
    memory = MemoryStore(on_corrupt=CORRUPT.append)
    CORRUPT.clear()

    def runner(scenario: Scenario) -> None:
        async def main() -> None:
            store: Store = memory
            if request.param == "disk":
                store = DiskStore(tmp_path / "store", on_corrupt=CORRUPT.append)
            try:
                await scenario(store)
            finally:
                await store.aclose()

        run(main())

    return runner


def damage(store: Store, key: str) -> None:
    if isinstance(store, MemoryStore):
        store.damage(key)
    else:
        assert isinstance(store, DiskStore)
        path = store.root / "data" / f"{key}.rec"
        path.write_bytes(path.read_bytes()[:-1])


# --- conformance -----------------------------------------------------------------------------------------------------
def test_what_was_put_is_there_also_after_a_restart(run_in: Callable[[Scenario], None]) -> None:
    values = {"log/000012": b"entry", "log": b"", "log/000003": bytes(range(256)) * 5000, "promise": b"\x00"}

    async def write(store: Store) -> None:
        for key, value in values.items():
            await store.put(key, value)
        await store.put("promise", b"newer")
        await read(store)

    async def read(store: Store) -> None:
        for key, value in (values | {"promise": b"newer"}).items():
            assert await store.get(key) == value
            assert store.size(key) == len(value)
        assert store.keys() == ["log", "log/000003", "log/000012", "promise"]
        assert store.keys("log/") == ["log/000003", "log/000012"]
        assert store.keys("lo") == ["log", "log/000003", "log/000012"]
        assert store.keys("x") == []

    run_in(write)
    run_in(read)


def test_absent_and_deleted_keys_are_none_and_deleting_twice_is_allowed(run_in: Callable[[Scenario], None]) -> None:
    async def delete(store: Store) -> None:
        assert await store.get("a/b") is None and store.size("a/b") is None
        await store.delete("a/b")
        await store.put("a/b", b"1")
        await store.put("a/c/d", b"2")
        await store.delete("a/b")
        await store.delete("a/b")
        await gone(store)

    async def gone(store: Store) -> None:
        assert await store.get("a/b") is None and store.size("a/b") is None
        assert store.keys() == ["a/c/d"]

    run_in(delete)
    run_in(gone)


def test_views_and_bytearrays_are_stored_as_their_bytes(run_in: Callable[[Scenario], None]) -> None:
    async def scenario(store: Store) -> None:
        buffer = bytearray(b"0123456789abcdef")
        await store.put("a", memoryview(buffer)[4:8])
        await store.put("b", memoryview(buffer).cast("Q"))
        buffer[:] = bytes(16)
        assert await store.get("a") == b"4567"
        assert await store.get("b") == b"0123456789abcdef" and store.size("b") == 16

    run_in(scenario)


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "a//b", ".", "..", "a/../b", "a.b", "a b", "a\x00", "a\n", "ä", "x" * 101, "a/" * 300 + "a"]
)
def test_keys_outside_the_alphabet_are_refused_before_any_effect(run_in: Callable[[Scenario], None], key: str) -> None:
    async def scenario(store: Store) -> None:
        with pytest.raises(ValueError, match="not a key"):
            await store.put(key, b"1")
        with pytest.raises(ValueError, match="not a key"):
            await store.get(key)
        with pytest.raises(ValueError, match="not a key"):
            await store.delete(key)
        with pytest.raises(ValueError, match="not a key"):
            store.size(key)
        assert store.keys() == []

    run_in(scenario)


def test_a_damaged_value_is_reported_once_then_absent_and_can_be_written_again(
    run_in: Callable[[Scenario], None],
) -> None:
    async def scenario(store: Store) -> None:
        await store.put("a/b", b"precious")
        damage(store, "a/b")
        assert await store.get("a/b") is None
        assert await store.get("a/b") is None
        assert CORRUPT == ["a/b"]
        assert store.keys() == [] and store.size("a/b") is None
        await store.put("a/b", b"again")
        assert await store.get("a/b") == b"again"

    run_in(scenario)
    assert CORRUPT == ["a/b"]


def test_operations_on_one_key_take_effect_in_the_order_of_their_calls(run_in: Callable[[Scenario], None]) -> None:
    async def scenario(store: Store) -> None:
        puts = [store.put("k", bytes([n]) * (20000 - 900 * n)) for n in range(20)]
        *_, seen = await asyncio.gather(*puts, store.get("k"))
        assert seen == bytes([19]) * 2900
        await asyncio.gather(store.delete("k"), store.put("k", b"last"))
        assert await store.get("k") == b"last"
        await asyncio.gather(store.put("k", b"1"), store.delete("k"))
        assert store.keys() == []

    run_in(scenario)


def test_many_keys_put_and_deleted_at_once_do_not_disturb_each_other(run_in: Callable[[Scenario], None]) -> None:
    async def scenario(store: Store) -> None:
        keys = [f"d{n % 3}/e{n % 5}/{n}" for n in range(60)]
        await asyncio.gather(*[store.put(key, key.encode()) for key in keys])
        more = [f"d{n % 3}/e{n % 5}/new{n}" for n in range(60)]  # into folders that the deletions would leave empty
        await asyncio.gather(
            *[operation for a, b in zip(keys, more, strict=True) for operation in (store.delete(a), store.put(b, b"x"))]
        )
        assert store.keys() == sorted(more)

    run_in(scenario)


def test_a_cancelled_put_leaves_the_old_or_the_new_value(run_in: Callable[[Scenario], None]) -> None:
    async def scenario(store: Store) -> None:
        for turns in range(6):
            await store.put("k", b"old")
            task = asyncio.ensure_future(store.put("k", b"new" * 1000))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert await store.get("k") in (b"old", b"new" * 1000)
            await store.put("k", b"later")
            await asyncio.sleep(0.005)
            assert await store.get("k") == b"later"  # the cancelled one does not come in late

    run_in(scenario)


# --- the disk --------------------------------------------------------------------------------------------------------
async def put_and_close(root: Path, key: str, data: bytes) -> None:
    store = DiskStore(root)
    await store.put(key, data)
    await store.aclose()


async def get_and_close(root: Path, key: str) -> tuple[bytes | None, list[str]]:
    corrupt: list[str] = []
    store = DiskStore(root, on_corrupt=corrupt.append)
    try:
        return await store.get(key), corrupt
    finally:
        await store.aclose()


def files_below(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_every_truncation_and_every_flipped_byte_is_noticed_and_never_read(tmp_path: Path) -> None:
    run(put_and_close(tmp_path, "a/k", b"a small value"))
    path = tmp_path / "data" / "a" / "k.rec"
    good = path.read_bytes()
    torn = [good[:length] for length in range(len(good))] + [good + b"\0", good + good, bytes(len(good))]
    for offset in range(len(good)):
        for flip in (0x01, 0x80, 0xFF):
            torn.append(good[:offset] + bytes([good[offset] ^ flip]) + good[offset + 1 :])

    async def check() -> None:
        corrupt: list[str] = []
        store = DiskStore(tmp_path, on_corrupt=corrupt.append)
        await store.put("a/k", b"a small value")
        for bad in torn:
            path.write_bytes(bad)
            store._refresh("a/k")  # what a restart would do, without the cost of one
            assert await store.get("a/k") is None
            assert path.with_suffix(".rec.corrupt").read_bytes() == bad
        assert corrupt == ["a/k"] * len(torn)
        path.write_bytes(good)
        store._refresh("a/k")
        assert await store.get("a/k") == b"a small value"
        await store.aclose()

    run(check())


def test_a_torn_file_found_at_restart_is_reported_and_set_aside(tmp_path: Path) -> None:
    for length in (0, 10, 48, 50):
        run(put_and_close(tmp_path, "k", b"value"))
        path = tmp_path / "data" / "k.rec"
        os.truncate(path, length)
        assert run(get_and_close(tmp_path, "k")) == (None, ["k"])
        assert run(get_and_close(tmp_path, "k")) == (None, [])
        assert files_below(tmp_path) == ["LOCK", "data/k.rec.corrupt"]


def test_a_value_moved_to_another_key_is_not_believed(tmp_path: Path) -> None:
    run(put_and_close(tmp_path, "promise-1", b"ballot 7"))
    os.rename(tmp_path / "data" / "promise-1.rec", tmp_path / "data" / "promise-2.rec")
    assert run(get_and_close(tmp_path, "promise-2")) == (None, ["promise-2"])


def test_leftovers_of_a_crash_and_foreign_files_are_not_values(tmp_path: Path) -> None:
    run(put_and_close(tmp_path, "k", b"value"))
    (tmp_path / "tmp" / "7").write_bytes(b"half")
    (tmp_path / "data" / "notes.txt").write_bytes(b"hello")
    (tmp_path / "data" / "a b.rec").write_bytes(b"hello")
    (tmp_path / "data" / "link.rec").symlink_to("/etc/hostname")

    async def check() -> None:
        store = DiskStore(tmp_path)
        assert store.keys() == ["k"]
        assert list((tmp_path / "tmp").iterdir()) == []
        await store.aclose()

    run(check())


def test_deleting_the_last_key_of_a_folder_removes_the_folder(tmp_path: Path) -> None:
    async def check() -> None:
        store = DiskStore(tmp_path)
        await asyncio.gather(*[store.put(f"blob/x/chunk/{n}", b"1") for n in range(8)])
        await asyncio.gather(*[store.delete(f"blob/x/chunk/{n}") for n in range(8)])
        assert list((tmp_path / "data").iterdir()) == []
        await store.aclose()

    run(check())


def test_a_directory_serves_one_store_at_a_time_and_the_error_names_the_process(tmp_path: Path) -> None:
    async def check() -> None:
        store = DiskStore(tmp_path)
        with pytest.raises(StoreError, match=f"in use by process {os.getpid()}: stop that process") as caught:
            DiskStore(tmp_path)
        assert caught.value.fault is StoreFault.LOCKED
        await store.aclose()
        with pytest.raises(StoreError, match="closed"):
            await store.put("k", b"1")
        await DiskStore(tmp_path).aclose()

    run(check())


def test_puts_to_different_keys_overlap_and_the_loop_goes_on_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    barrier = threading.Barrier(3)  # breaks, and fails the test, unless three writers are inside fsync at once
    fsync = os.fsync

    def meet(fd: int) -> None:
        if "/tmp/" in os.readlink(f"/proc/self/fd/{fd}").removeprefix(str(tmp_path)):
            barrier.wait(timeout=5)
        fsync(fd)

    async def check() -> None:
        store = DiskStore(tmp_path)
        monkeypatch.setattr(os, "fsync", meet)
        await asyncio.gather(*[store.put(f"k{n}", b"1") for n in range(3)])
        await store.aclose()

    run(check())


def test_a_cancelled_put_that_is_still_in_its_thread_cannot_overwrite_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, go_on = threading.Event(), threading.Event()
    fsync = os.fsync

    def block_the_first(fd: int) -> None:
        if not inside.is_set():
            inside.set()
            assert go_on.wait(timeout=5)
        fsync(fd)

    async def check() -> None:
        store = DiskStore(tmp_path)
        monkeypatch.setattr(os, "fsync", block_the_first)
        cancelled = asyncio.ensure_future(store.put("k", b"cancelled"))
        await asyncio.to_thread(inside.wait, 5)
        cancelled.cancel()
        later = asyncio.ensure_future(store.put("k", b"later"))
        await asyncio.wait([later], timeout=0.1)
        assert cancelled.cancelled() and not later.done()
        go_on.set()
        await later
        assert await store.get("k") == b"later"
        await store.aclose()

    run(check())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("call", ["open", "write", "fsync", "mkdir", "replace"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_disk_that_refuses_gives_a_typed_error_with_a_fix_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str, existing: bool
) -> None:
    fault, words = {
        errno.ENOSPC: (StoreFault.NO_SPACE, f"no space left for a checkpoint in {tmp_path}: free .* MB or choose"),
        errno.EROFS: (StoreFault.READ_ONLY, "read-only disk: mount it writable or choose another --dir"),
        errno.EACCES: (StoreFault.NO_PERMISSION, "no permission to write .*: give .* or choose another --dir"),
        errno.EIO: (StoreFault.IO, "the disk failed .*: check the disk or choose another --dir"),
    }[number]
    real = getattr(os, call)

    def refuse(target: Any, *rest: Any, **named: Any) -> Any:
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target)
        if str(path).startswith(str(tmp_path)):
            if call == "write" and len(rest[0]) > 100:
                return real(target, rest[0][:100])  # the disk fills up in the middle
            raise OSError(number, os.strerror(number))
        return real(target, *rest, **named)

    async def check() -> None:
        store = DiskStore(tmp_path)
        if existing:
            await store.put("a/b/k", b"old")
        before = files_below(tmp_path)
        monkeypatch.setattr(os, call, refuse)
        if call == "mkdir" and existing:
            monkeypatch.undo()
            await store.aclose()
            return  # there is no folder to make
        with pytest.raises(StoreError, match=words) as caught:
            await store.put("a/b/k", bytes(1000))
        assert caught.value.fault is fault
        monkeypatch.undo()
        assert files_below(tmp_path) == before
        assert await store.get("a/b/k") == (b"old" if existing else None)
        assert store.keys() == (["a/b/k"] if existing else [])
        assert [path.name for path in (tmp_path / "data").iterdir()] == (["a"] if existing else [])
        await store.put("a/b/k", b"now there is space")
        assert await store.get("a/b/k") == b"now there is space"
        await store.aclose()

    run(check())


def test_the_megabytes_to_free_are_those_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        store = DiskStore(tmp_path)

        class Disk:
            f_bavail, f_frsize = 1_000, 1_000

        monkeypatch.setattr(os, "statvfs", lambda path: Disk)
        full = OSError(errno.ENOSPC, "full")
        assert store._explain(full, 3_500_000).fix == "free 3 MB or choose another --dir"
        assert store._explain(full, 10).fix == "free 1 MB or choose another --dir"
        await store.aclose()

    run(check())


@pytest.mark.parametrize("blocked", ["file", "under_file"])
def test_a_place_that_cannot_be_a_directory_is_one_clear_error(tmp_path: Path, blocked: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="choose another --dir"):
        DiskStore(tmp_path / "file" if blocked == "file" else tmp_path / "file" / "store")


WRITER = """
import asyncio, sys
from shoal.protocol.store import DiskStore
async def main():
    store = DiskStore(sys.argv[1])
    number = int(sys.argv[2])
    while True:
        number += 1
        print("start", number, flush=True)
        await store.put("run/state", number.to_bytes(8, "little") * 20000)
        print("done", number, flush=True)
asyncio.run(main())
"""


def test_a_writer_killed_at_any_moment_leaves_the_acknowledged_or_the_next_value(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    number = 0
    killed_in_the_middle = 0
    environment = os.environ | {"PYTHONPATH": str(Path(shoal.__file__).parents[1])}
    for _ in range(8):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(number)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        ) as writer:
            assert writer.stdout is not None
            try:
                assert writer.stdout.readline() == f"start {number + 1}\n"  # from here on the moment is random
                wait = threading.Event()
                wait.wait(rng.uniform(0, 0.02))
            finally:
                writer.send_signal(signal.SIGKILL)
            lines = [f"start {number + 1}", *writer.stdout.read().splitlines()]
        acknowledged = max([int(line.split()[1]) for line in lines if line.startswith("done")], default=number)
        started = max(int(line.split()[1]) for line in lines if line.startswith("start"))
        killed_in_the_middle += started > acknowledged
        value, corrupt = run(get_and_close(tmp_path, "run/state"))
        assert corrupt == []
        held = int.from_bytes(value[:8], "little") if value else 0
        assert value == (held.to_bytes(8, "little") * 20000 if held else None)
        assert acknowledged <= held <= started, f"seed {seed}"
        assert files_below(tmp_path) == ["LOCK"] + ["data/run/state.rec"] * bool(held), f"seed {seed}"
        number = held
    assert killed_in_the_middle > 0, f"seed {seed}"
