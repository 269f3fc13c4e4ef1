"""Claims about blobs at rest: what is kept, served and decoded is what the digest names, or a typed refusal."""

from __future__ import annotations

import asyncio
import hashlib
import random
import struct
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from shoal.protocol.blob_fetch import BlobUnavailable
from shoal.protocol.blobs import (
    INDEX,
    MAX_CHUNK_BYTES,
    MAX_CHUNKS,
    MAX_INDEX_BYTES,
    MIB,
    BlobError,
    BlobIndex,
    BlobStore,
    ChunkRequest,
    IndexRequest,
    chunk_bytes_for,
    chunk_method,
    decode_flat,
    decode_state,
    encode_flat,
    encode_state,
    index_of,
)
from shoal.protocol.events import Reason
from shoal.protocol.store import MemoryStore, StoreError, StoreFault
from shoal.protocol.transport import Refused
from tests.protocol.blob_world import (
    CHUNK,
    Peer,
    World,
    run,
)


# --- index -----------------------------------------------------------------------------------------------------------
@given(st.binary(max_size=300), st.integers(1, 64))
def test_an_index_survives_its_encoding_and_names_the_bytes(data: bytes, chunk_bytes: int) -> None:
    index = index_of(data, chunk_bytes=chunk_bytes)
    assert BlobIndex.parse(index.canonical()) == index
    assert index.digest == hashlib.sha256(index.canonical()).hexdigest()
    sizes = [index.chunk_size(number) for number in range(len(index.chunks))]
    assert sum(sizes) == len(data) and all(0 < size <= chunk_bytes for size in sizes)
    for position in range(len(data)):
        other = data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
        assert index_of(other, chunk_bytes=chunk_bytes).digest != index.digest


def test_the_index_of_a_known_blob_is_pinned() -> None:
    """If this changes, nodes of different versions disagree about digests: that needs a new magic."""
    assert (
        index_of(b"shoal").digest
        == hashlib.sha256(b"shoalidx" + struct.pack("<QI", 5, MIB) + hashlib.sha256(b"shoal").digest()).hexdigest()
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.MALFORMED),
        (b"shoalidx", Reason.MALFORMED),
        (b"otheridx" + struct.pack("<QI", 0, 1), Reason.MALFORMED),
        (b"shoalidx" + struct.pack("<QI", 0, 0), Reason.MALFORMED),
        (b"shoalidx" + struct.pack("<QI", 2**63, 1), Reason.MALFORMED),
        (b"shoalidx" + struct.pack("<QI", 1, 1) + bytes(64), Reason.MALFORMED),
        (b"shoalidx" + struct.pack("<QI", 1, 1) + bytes(33), Reason.MALFORMED),
        (b"shoalidx" + struct.pack("<QI", 1, MAX_CHUNK_BYTES + 1) + bytes(32), Reason.TOO_LARGE),
        (bytes(MAX_INDEX_BYTES + 1), Reason.TOO_LARGE),
    ],
)
def test_a_malformed_index_is_refused_with_its_reason(data: bytes, reason: Reason) -> None:
    with pytest.raises(BlobError) as caught:
        BlobIndex.parse(data)
    assert caught.value.reason is reason


@given(st.integers(0, MAX_CHUNK_BYTES * MAX_CHUNKS))
def test_every_allowed_size_has_a_chunk_size_whose_index_fits(size: int) -> None:
    chunk_bytes = chunk_bytes_for(size)
    assert MIB <= chunk_bytes <= MAX_CHUNK_BYTES
    assert -(-size // chunk_bytes) <= MAX_CHUNKS
    assert MAX_INDEX_BYTES < MIB
    assert chunk_bytes == MIB or size > MAX_CHUNKS * chunk_bytes // 2


def test_a_blob_beyond_the_largest_is_refused() -> None:
    with pytest.raises(BlobError, match="too_large"):
        chunk_bytes_for(MAX_CHUNK_BYTES * MAX_CHUNKS + 1)


# --- store -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1, 12 * CHUNK])
def test_a_blob_that_was_put_is_there_until_it_is_deleted(size: int) -> None:
    async def main() -> None:
        store = MemoryStore()
        blobs = BlobStore(store)
        data = random.Random(size).randbytes(size)
        digest = await blobs.put(data, chunk_bytes=CHUNK)
        assert digest == index_of(data, chunk_bytes=CHUNK).digest
        assert await blobs.put(memoryview(data), chunk_bytes=CHUNK) == digest
        other = await blobs.put(b"other")
        assert BlobStore(store).digests() == sorted([digest, other])
        assert await BlobStore(store).get(digest) == data
        assert not blobs.has("0" * 64) and await blobs.get("0" * 64) is None
        assert not blobs.has("../etc") and await blobs.get("../etc") is None
        await blobs.delete(digest)
        assert not blobs.has(digest) and await blobs.get(digest) is None
        assert blobs.digests() == [other] and store.keys(f"blob/{digest}") == []
        with pytest.raises(ValueError, match="not a digest"):
            await blobs.delete("../etc")

    run(main())


def test_a_put_that_was_cut_at_any_point_is_incomplete_or_complete_and_never_wrong() -> None:
    async def main() -> None:
        data = random.Random(1).randbytes(6 * CHUNK)
        states = set()
        for turns in range(60):
            store = MemoryStore()
            task = asyncio.ensure_future(BlobStore(store).put(data, chunk_bytes=CHUNK))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            blobs = BlobStore(store)
            for digest in blobs.digests():
                assert await blobs.get(digest) == data
            states.add((len(blobs.digests()), len(blobs.incomplete())))
            for digest in blobs.incomplete():
                await blobs.delete(digest)
            assert store.keys() == [] or blobs.digests()
        assert states == {(0, 0), (0, 1), (1, 0)}

    run(main())


def test_a_put_for_which_there_is_no_space_leaves_nothing_behind() -> None:
    class Full(MemoryStore):
        async def put(self, key: str, data: Any) -> None:
            if len(self.keys()) >= 5:
                raise StoreError(StoreFault.NO_SPACE, "no space left", "free some")
            await super().put(key, data)

    async def main() -> None:
        store = Full()
        with pytest.raises(StoreError, match="no space"):
            await BlobStore(store).put(bytes(8 * CHUNK), chunk_bytes=CHUNK)
        assert store.keys() == []

    run(main())


def test_a_damaged_chunk_makes_the_blob_absent_and_a_fetch_mends_only_that_chunk() -> None:
    async def main() -> None:
        world = await World(1).start()
        await world.blobs.put(world.data, chunk_bytes=CHUNK)
        world.store.damage(f"blob/{world.digest}/chunk/7")
        assert await world.blobs.get(world.digest) is None
        assert not world.blobs.has(world.digest)
        result = await world.fetch()
        assert world.network.calls_for_chunks() == [7]
        assert result.fetched_bytes == CHUNK and result.size_bytes == len(world.data)
        await world.check()

    run(main())


# --- serving ---------------------------------------------------------------------------------------------------------
def test_donors_refuse_strangers_unknown_blobs_and_chunks_beyond_their_bound_with_a_typed_reason() -> None:
    async def main() -> None:
        world = await World(1).start()
        stranger = Peer(world.network, "stranger")

        async def reason(peer: Peer, method: Any, header: Any) -> Reason:
            with pytest.raises(Refused) as caught:
                await peer.call("donor0", method, header, timeout_s=1)
            return caught.value.reason

        asks = (
            (INDEX, IndexRequest(digest=world.digest)),
            (chunk_method(CHUNK), ChunkRequest(digest=world.digest, chunk=0)),
        )
        for method, header in asks:
            assert await reason(stranger, method, header) is Reason.NOT_MEMBER
        me = world.transport
        assert await reason(me, INDEX, IndexRequest(digest="0" * 64)) is Reason.NOT_FOUND
        assert await reason(me, chunk_method(CHUNK), ChunkRequest(digest="0" * 64, chunk=0)) is Reason.NOT_FOUND
        assert await reason(me, chunk_method(CHUNK), ChunkRequest(digest=world.digest, chunk=20)) is Reason.NOT_FOUND
        large = await BlobStore(world.stores["donor0"]).put(bytes(CHUNK + 1), chunk_bytes=CHUNK + 1)
        assert await reason(me, chunk_method(MIB), ChunkRequest(digest=large, chunk=0)) is Reason.TOO_LARGE
        reply = await me.call("donor0", chunk_method(CHUNK), ChunkRequest(digest=world.digest, chunk=19), timeout_s=1)
        assert reply.body == world.data[19 * CHUNK :]

    run(main())


@pytest.mark.parametrize("bad", ["", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 65, "0" * 64 + "\n"])
def test_requests_whose_digest_is_no_digest_do_not_pass_the_schema(bad: str) -> None:
    with pytest.raises(ValidationError):
        IndexRequest(digest=bad)
    with pytest.raises(ValidationError):
        ChunkRequest(digest=bad, chunk=0)
    with pytest.raises(ValidationError):
        ChunkRequest(digest="0" * 64, chunk=MAX_CHUNKS)


def test_an_incomplete_blob_is_not_offered() -> None:
    async def main() -> None:
        world = await World(1).start()
        await BlobStore(world.stores["donor0"]).begin(world.digest, world.index)
        await world.stores["donor0"].delete(f"blob/{world.digest}/index")
        with pytest.raises(BlobUnavailable) as caught:
            await world.fetch()
        assert caught.value.reasons == {"donor0": Reason.NOT_FOUND}

    run(main())


# --- tensors ---------------------------------------------------------------------------------------------------------
def example_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(100, generator=generator, dtype=torch.float64)
    return {
        "weight": flat[:60].view(6, 10),  # two views into one memory, and a transposed one
        "transposed": flat[:60].view(6, 10).t(),
        "bias": flat[60:],
        "half": torch.randn(3, generator=generator).to(torch.bfloat16),
        "step": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "codes": torch.arange(5, dtype=torch.uint8),
        "empty": torch.zeros(0, 4),
    }


def test_a_state_comes_back_equal_with_memory_of_its_own() -> None:
    state = example_state()
    data = encode_state(state)
    back = decode_state(data, max_bytes=len(data))
    assert list(back) == sorted(state)
    for name, tensor in state.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)
    back["weight"].zero_()
    assert torch.equal(decode_state(data, max_bytes=len(data))["weight"], state["weight"])
    assert torch.equal(back["bias"], state["bias"]) and bool(state["weight"].any())


def test_the_bytes_of_a_state_do_not_depend_on_order_layout_or_sharing() -> None:
    state = example_state()
    data = encode_state(state)
    for seed in range(5):
        names = list(state)
        random.Random(seed).shuffle(names)
        assert encode_state({name: state[name].clone() for name in names}) == data
    alias = torch.ones(4)
    assert encode_state({"a": alias, "b": alias}) == encode_state({"b": torch.ones(4), "a": torch.ones(4)})
    assert (
        hashlib.sha256(encode_state({"x": torch.arange(3.0)})).hexdigest()
        == hashlib.sha256(safetensors.torch.save({"x": torch.tensor([0.0, 1.0, 2.0])})).hexdigest()
    )


def test_a_state_that_is_too_large_malformed_or_not_finite_is_refused_with_its_reason() -> None:
    def reason(data: bytes, max_bytes: int = MIB) -> Reason:
        with pytest.raises(BlobError) as caught:
            decode_state(data, max_bytes=max_bytes)
        return caught.value.reason

    data = encode_state(example_state())
    assert reason(data, len(data) - 1) is Reason.TOO_LARGE
    for cut in range(0, len(data), 7):
        assert reason(data[:cut]) is Reason.MALFORMED
    assert reason(data + b"\0") is Reason.MALFORMED
    assert reason(struct.pack("<Q", 2**62) + b"{}") is Reason.MALFORMED
    for bad in (float("nan"), float("inf")):
        assert reason(encode_state({"x": torch.tensor([1.0, bad])})) is Reason.NOT_FINITE
    assert reason(safetensors.torch.save({"x": torch.zeros(2, dtype=torch.complex64)})) is Reason.MALFORMED
    with pytest.raises(BlobError, match="complex"):
        encode_state({"x": torch.zeros(2, dtype=torch.complex64)})


@given(st.binary(max_size=200), st.integers(0, 120))
def test_arbitrary_bytes_decode_to_a_typed_refusal_or_to_tensors(junk: bytes, header: int) -> None:
    for data in (junk, struct.pack("<Q", header) + junk):
        reason = None
        try:
            decode_state(data, max_bytes=MIB)
        except BlobError as error:
            reason = error.reason
        assert reason in (None, Reason.MALFORMED, Reason.NOT_FINITE)


def test_a_flat_tensor_comes_back_equal_and_nothing_else_passes_for_one() -> None:
    gradient = torch.randn(1000, dtype=torch.float64)
    data = encode_flat(gradient)
    assert torch.equal(decode_flat(data, max_bytes=len(data)), gradient)
    with pytest.raises(BlobError, match="not a single tensor"):
        decode_flat(encode_state({"flat": gradient, "more": gradient}), max_bytes=MIB)
