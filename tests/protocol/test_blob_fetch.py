"""Claims about fetching: what comes is what the digest names, whatever donors do; and it goes on where it stopped."""

from __future__ import annotations

import asyncio
import hashlib
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.blob_fetch import BlobUnavailable, fetch
from shoal.protocol.blobs import (
    INDEX,
    MIB,
    BlobError,
    BlobStore,
    index_of,
)
from shoal.protocol.deadlines import Deadline
from shoal.protocol.events import CallFailed, Reason
from shoal.protocol.store import DiskStore, MemoryStore, StoreError, StoreFault
from shoal.protocol.transport import Reply, Request, Unanswered
from tests.protocol.blob_world import (
    CHUNK,
    Peer,
    World,
    hang,
    lie,
    now,
    only_chunks,
    refuse,
    run,
)


@pytest.mark.parametrize("donors", [1, 2, 5])
@pytest.mark.parametrize("size", [0, 1, CHUNK, 20 * CHUNK - 7])
def test_a_fetch_brings_the_blob_that_the_digest_names(donors: int, size: int) -> None:
    async def main() -> None:
        world = await World(donors, size).start()
        result = await world.fetch()
        await world.check()
        assert result.size_bytes == result.fetched_bytes == size
        assert sorted(world.network.calls_for_chunks()) == list(range(len(world.index.chunks)))
        assert sum(world.fetched_from().values()) == len(world.index.chunks)
        assert set(result.donors_used) == set(world.fetched_from())
        again = await world.fetch()
        assert again.fetched_bytes == 0 and again.donors_used == ()

    run(main())


def test_several_donors_share_the_work_and_are_faster_than_one() -> None:
    async def timed(donors: int) -> float:
        world = await World(donors, 60 * CHUNK).start()
        world.network.bytes_per_s = dict.fromkeys(world.donors, 10 * CHUNK)
        result = await world.fetch()
        await world.check()
        assert len(result.donors_used) == donors
        return result.seconds

    one, three = run(timed(1)), run(timed(3))
    assert one == pytest.approx(6.0, rel=0.1)
    assert three < 0.45 * one


def test_a_slow_donor_gives_what_it_can_and_the_fast_one_takes_over_the_rest() -> None:
    async def main() -> None:
        world = await World(2, 100 * CHUNK).start()
        world.network.bytes_per_s = {"donor0": 20 * CHUNK, "donor1": 0.5 * CHUNK}
        result = await world.fetch()
        await world.check()
        assert result.seconds < 1.3 * 5.0  # the fast one alone would take 5 s
        assert world.fetched_from()["donor0"] > 90

    run(main())


@pytest.mark.parametrize("whole", [True, False])
def test_a_donor_that_hangs_costs_moments_while_another_lives(whole: bool) -> None:
    async def main() -> None:
        world = await World(2).start()
        world.network.behave["donor0"] = hang if whole else only_chunks(hang)
        result = await world.fetch()
        await world.check()
        assert result.donors_used == ("donor1",)
        assert result.seconds < 5.0  # its calls would run for 15 s

    run(main())


def test_two_of_three_donors_hang_and_the_fetch_still_ends_soon() -> None:
    async def main() -> None:
        world = await World(3).start()
        world.network.behave = {"donor0": hang, "donor1": hang}
        assert (await world.fetch()).seconds < 15.0
        await world.check()

    run(main())


def test_a_donor_that_dies_in_the_middle_is_replaced_by_the_others() -> None:
    async def main() -> None:
        world = await World(2, 100 * CHUNK).start()
        served = 0

        async def die(method: str, header: Any, body: bytes) -> bytes:
            nonlocal served
            served += 1
            if served > 10:
                raise Unanswered(Reason.TORN_STREAM, "")
            return body

        world.network.behave["donor0"] = die
        world.network.bytes_per_s = dict.fromkeys(world.donors, 20 * CHUNK)
        result = await world.fetch()
        await world.check()
        assert result.donors_used == ("donor0", "donor1")
        assert 90 <= world.fetched_from()["donor1"] <= 91

    run(main())


@pytest.mark.parametrize("fault", [0, 5])
def test_a_donor_that_sends_a_bad_chunk_is_excluded_and_counted_once_per_lie(fault: int) -> None:
    async def main() -> None:
        world = await World(2, 100 * CHUNK).start()
        served = 0

        async def lie_later(method: str, header: Any, body: bytes) -> bytes:
            nonlocal served
            served += 1
            return body if served <= fault else bytes(len(body))

        world.network.behave["donor0"] = only_chunks(lie_later)
        world.network.bytes_per_s = dict.fromkeys(world.donors, 20 * CHUNK)
        await world.fetch()
        await world.check()
        assert world.events.count(CallFailed("donor0", "blob.chunk", Reason.BAD_DIGEST)) == 1
        last_ask_s = max(at for at, peer, _, _ in world.network.calls if peer == "donor0")
        assert last_ask_s < 1.0 and world.fetched_from().get("donor0", 0) == fault

    run(main())


def test_a_donor_that_sends_another_index_is_excluded() -> None:
    async def main() -> None:
        world = await World(2).start()

        async def other_index(method: str, header: Any, body: bytes) -> bytes:
            return index_of(b"evil").canonical()

        world.network.behave["donor0"] = other_index
        assert (await world.fetch()).donors_used == ("donor1",)
        await world.check()
        assert CallFailed("donor0", "blob.index", Reason.BAD_DIGEST) in world.events

    run(main())


def test_a_donor_that_sends_more_than_the_index_says_is_cut_off_by_the_bound_of_the_call() -> None:
    async def main() -> None:
        world = await World(2).start()

        async def flood(method: str, header: Any, body: bytes) -> bytes:
            return body + b"x"

        world.network.behave["donor0"] = only_chunks(flood)
        assert (await world.fetch()).donors_used == ("donor1",)
        await world.check()

    run(main())


def test_all_donors_gone_says_why_for_each_and_the_next_fetch_goes_on_without_refetching() -> None:
    async def main() -> None:
        world = await World(5).start()
        allowed = iter(range(8))

        async def stop(method: str, header: Any, body: bytes) -> bytes:
            if method == "blob.chunk" and next(allowed, None) is None:
                raise Unanswered(Reason.TORN_STREAM, "")
            return body

        world.network.behave = {
            "donor0": stop,
            "donor1": only_chunks(lie),
            "donor2": refuse(Reason.NOT_FOUND),
            "donor3": refuse(Reason.BUSY),
            "donor4": refuse(Reason.UNREACHABLE, Unanswered),
        }
        with pytest.raises(BlobUnavailable, match=r"donor1: bad_digest.*again with other donors") as caught:
            await world.fetch()
        assert caught.value.reasons == {
            "donor0": Reason.TORN_STREAM,
            "donor1": Reason.BAD_DIGEST,
            "donor2": Reason.NOT_FOUND,
            "donor3": Reason.BUSY,
            "donor4": Reason.UNREACHABLE,
        }
        assert not world.blobs.has(world.digest) and world.blobs.incomplete() == [world.digest]
        world.network.behave.clear()
        world.network.calls.clear()
        world.blobs = BlobStore(world.store)  # a restarted node
        result = await world.fetch()
        await world.check()
        assert len(world.network.calls) == 20 - 8  # neither the index nor a chunk twice
        assert result.fetched_bytes == 12 * CHUNK - 7 or result.fetched_bytes == 12 * CHUNK

    run(main())


def test_without_donors_or_with_only_itself_nothing_is_available() -> None:
    async def main() -> None:
        world = await World(0).start()
        for donors in ([], ["me"]):
            with pytest.raises(BlobUnavailable, match="there were none"):
                await world.fetch(donors=donors)

    run(main())


def test_a_donor_that_stumbles_for_a_moment_is_kept() -> None:
    async def main() -> None:
        world = await World(1).start()

        async def stumble(method: str, header: Any, body: bytes) -> bytes:
            if method == "blob.chunk" and now() < 0.8:
                raise Unanswered(Reason.TORN_STREAM, "")
            return body

        world.network.behave["donor0"] = stumble
        result = await world.fetch()
        await world.check()
        assert 0.8 < result.seconds < 3.0

    run(main())


def test_a_link_slower_than_the_first_deadline_is_learned_and_not_given_up() -> None:
    async def main() -> None:
        world = await World(1, 10 * CHUNK).start()
        world.network.latency_s["donor0"] = 2.5
        estimator = Deadline(initial_s=1.0, floor_s=0.5, ceiling_s=60.0)
        await world.fetch(deadline=lambda donor: estimator)
        await world.check()
        assert estimator.value() > 2.5

    run(main())


def test_a_blob_larger_than_allowed_is_refused_before_any_chunk_is_asked_for() -> None:
    async def main() -> None:
        world = await World(2).start()
        with pytest.raises(BlobError, match="allowed are 19000") as caught:
            await world.fetch(max_bytes=19 * CHUNK)
        assert caught.value.reason is Reason.TOO_LARGE
        assert world.network.calls_for_chunks() == [] and world.store.keys() == []

    run(main())


def test_a_pinned_digest_of_something_that_is_no_index_is_malformed() -> None:
    async def main() -> None:
        world = await World(1).start()
        junk = b"not an index"
        world.digest = hashlib.sha256(junk).hexdigest()
        method, _ = world.network.handlers["donor0", "blob.index"]

        async def give_junk(request: Request[Any]) -> Reply[Any]:
            return Reply(method.reply(), junk)

        Peer(world.network, "donor0").serve(INDEX, give_junk)
        with pytest.raises(BlobError) as caught:
            await world.fetch()
        assert caught.value.reason is Reason.MALFORMED

    run(main())


def test_a_full_disk_ends_the_fetch_with_its_own_error_and_no_call_goes_on() -> None:
    async def main() -> None:
        world = await World(2).start()

        class Full(MemoryStore):
            async def put(self, key: str, data: Any) -> None:
                if key.endswith("/3"):
                    raise StoreError(StoreFault.NO_SPACE, "no space left", "free some")
                await super().put(key, data)

        world.blobs = BlobStore(Full())
        with pytest.raises(StoreError, match="no space"):
            await world.fetch()
        assert len(asyncio.all_tasks()) == 1

    run(main())


def test_a_fetch_cancelled_at_any_point_leaves_no_task_and_the_next_one_finishes_it() -> None:
    async def main() -> None:
        resumed = 0
        for milliseconds in range(0, 120, 3):
            world = await World(2).start()
            world.network.bytes_per_s = dict.fromkeys(world.donors, 100 * CHUNK)
            task = asyncio.ensure_future(world.fetch())
            await asyncio.sleep(milliseconds / 1000)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert len(asyncio.all_tasks()) == 1
            held = len(world.store.keys(f"blob/{world.digest}/chunk/"))
            result = await world.fetch()
            assert abs(result.fetched_bytes - (20 - held) * CHUNK) <= 7
            resumed += 0 < held < 20
            await world.check()
        assert resumed > 10

    run(main())


def test_memory_under_way_is_bounded_whatever_the_number_of_donors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.protocol.blob_fetch.MAX_IN_FLIGHT_BYTES", 6 * CHUNK)

    async def main() -> None:
        world = await World(10, 100 * CHUNK).start()
        under_way = most = 0

        async def count(method: str, header: Any, body: bytes) -> bytes:
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            await asyncio.sleep(0.05)
            under_way -= 1
            return body

        world.network.behave = {donor: only_chunks(count) for donor in world.donors}
        await fetch(
            world.transport, world.blobs, world.digest, world.donors, emit=world.events.append, max_bytes=10 * MIB
        )
        await world.check()
        assert most == 6

    run(main())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), donors=st.integers(1, 5))
def test_under_random_faults_the_blob_is_right_or_the_error_is_typed_and_one_honest_donor_is_enough(
    seed: int, donors: int
) -> None:
    async def main() -> list[Any]:
        rng = random.Random(seed)
        world = await World(donors, 30 * CHUNK + 1).start()
        kinds = [hang, lie, refuse(Reason.BUSY), refuse(Reason.NOT_FOUND), refuse(Reason.TORN_STREAM, Unanswered)]

        def sometimes(kind: Any, share: float) -> Any:
            async def behaviour(method: str, header: Any, body: bytes) -> bytes:
                return await kind(method, header, body) if rng.random() < share else body

            return behaviour

        honest = rng.randrange(donors + 1)  # == donors: none
        for number, donor in enumerate(world.donors):
            world.network.latency_s[donor] = rng.uniform(0.001, 0.2)
            world.network.bytes_per_s[donor] = CHUNK * 10 ** rng.uniform(0, 2)
            if number != honest:
                world.network.behave[donor] = sometimes(rng.choice(kinds), rng.choice([0.1, 0.5, 1.0]))
        failed: BlobUnavailable | None = None
        try:
            await world.fetch()
            await world.check()
        except BlobUnavailable as error:
            failed = error
        if failed:
            assert honest == donors
            assert sorted(failed.reasons) == world.donors
        assert len(asyncio.all_tasks()) == 1
        return [world.events, world.network.calls, now()]

    assert run(main()) == run(main())  # and the same seed gives the same calls at the same times


def test_it_works_over_a_real_disk_and_threads(tmp_path: Path) -> None:
    async def main() -> None:
        world = await World(3, 40 * CHUNK).start()
        for _ in range(2):
            store = DiskStore(tmp_path)
            blobs = BlobStore(store)
            result = await fetch(
                world.transport, blobs, world.digest, world.donors, emit=world.events.append, max_bytes=MIB
            )
            assert result.size_bytes == len(world.data)
            assert await blobs.get(world.digest) == world.data
            await store.aclose()
        assert len(world.network.calls_for_chunks()) == 40

    asyncio.run(main())
