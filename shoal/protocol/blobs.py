"""Immutable blobs named by their content: cut into chunks, hashed, stored, served (DESIGN 4.8).

A blob is bytes (a stage's snapshot, a round's reduced gradient). Its `BlobIndex` lists the SHA-256 of every chunk; the
SHA-256 of the index names the blob, and this digest is what the run log pins. `blob_fetch.fetch` gets one from others.

Keys in the store: `blob/<digest>/chunk/<number>`, then `blob/<digest>/index` (there = complete), and while a fetch is
under way `blob/<digest>/partial` (the checked index).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

import safetensors.torch
import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor

from shoal.protocol.events import Reason
from shoal.protocol.store import Data, Store, StoreError
from shoal.protocol.transport import Empty, Message, Method, Refused, Reply, Request, Transport

MIB = 1 << 20
MAX_CHUNK_BYTES = 16 * MIB
MAX_CHUNKS = 32_000
_INDEX_HEADER = struct.Struct("<8sQI")  # magic, blob bytes, chunk bytes; the 32-byte chunk hashes follow
_INDEX_MAGIC = b"shoalidx"
MAX_INDEX_BYTES = _INDEX_HEADER.size + 32 * MAX_CHUNKS  # just below 1 MiB


class BlobError(Exception):
    """A blob cannot be used. `reason` is typed: TOO_LARGE, MALFORMED, NOT_FINITE, NOT_FOUND."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


# --- the index -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class BlobIndex:
    """What a blob consists of: `chunks[i]` is the SHA-256 (hex) of bytes [i*chunk_bytes, (i+1)*chunk_bytes).

    Raises BlobError (MALFORMED or TOO_LARGE) if the numbers do not fit together or are beyond this module's bounds."""

    size_bytes: int
    chunk_bytes: int
    chunks: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.size_bytes < 0 or self.chunk_bytes < 1:
            raise BlobError(Reason.MALFORMED, "an index with impossible sizes")
        if self.chunk_bytes > MAX_CHUNK_BYTES or len(self.chunks) > MAX_CHUNKS:
            raise BlobError(Reason.TOO_LARGE, f"an index of {len(self.chunks)} chunks of {self.chunk_bytes} bytes")
        if len(self.chunks) != -(-self.size_bytes // self.chunk_bytes):
            raise BlobError(Reason.MALFORMED, "an index whose number of chunks does not match its size")

    def chunk_size(self, number: int) -> int:
        """Bytes of chunk `number`; only the last may be shorter than `chunk_bytes`."""
        return min(self.chunk_bytes, self.size_bytes - number * self.chunk_bytes)

    def canonical(self) -> bytes:
        """The one encoding: at most MAX_INDEX_BYTES. Raises ValueError if a chunk hash is not 64 hex digits."""
        hashes = b"".join([bytes.fromhex(chunk) for chunk in self.chunks])
        if len(hashes) != 32 * len(self.chunks):
            raise ValueError("a chunk hash is not a SHA-256")
        return _INDEX_HEADER.pack(_INDEX_MAGIC, self.size_bytes, self.chunk_bytes) + hashes

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical bytes: the blob's name."""
        return sha256_hex(self.canonical())

    @classmethod
    def parse(cls, data: bytes) -> BlobIndex:
        """Inverse of `canonical`. Raises BlobError (MALFORMED or TOO_LARGE)."""
        if len(data) > MAX_INDEX_BYTES:
            raise BlobError(Reason.TOO_LARGE, f"an index of {len(data)} bytes")
        if len(data) < _INDEX_HEADER.size or (len(data) - _INDEX_HEADER.size) % 32:
            raise BlobError(Reason.MALFORMED, "not an index")
        magic, size_bytes, chunk_bytes = _INDEX_HEADER.unpack_from(data)
        if magic != _INDEX_MAGIC:
            raise BlobError(Reason.MALFORMED, "not an index")
        hashes = [data[at : at + 32].hex() for at in range(_INDEX_HEADER.size, len(data), 32)]
        return cls(size_bytes, chunk_bytes, tuple(hashes))


def chunk_bytes_for(size_bytes: int) -> int:
    """1 MiB, doubled until MAX_CHUNKS are enough. Raises BlobError TOO_LARGE above 500 GiB."""
    chunk_bytes = MIB
    while size_bytes > chunk_bytes * MAX_CHUNKS:
        chunk_bytes *= 2
    if chunk_bytes > MAX_CHUNK_BYTES:
        raise BlobError(Reason.TOO_LARGE, f"a blob of {size_bytes} bytes")
    return chunk_bytes


def index_of(data: Data, *, chunk_bytes: int | None = None) -> BlobIndex:
    """The index of a blob. Everyone who is to agree on a digest must use the same `chunk_bytes`: leave it out."""
    view = memoryview(data).cast("B")
    step = chunk_bytes or chunk_bytes_for(view.nbytes)
    return BlobIndex(view.nbytes, step, tuple([sha256_hex(view[at : at + step]) for at in range(0, view.nbytes, step)]))


def sha256_hex(data: Data) -> str:
    return hashlib.sha256(data).hexdigest()


# --- the blobs that this node holds ----------------------------------------------------------------------------------
class BlobStore:
    """Blobs in a `Store`. A blob is complete or absent; what is missing from an interrupted `fetch` stays for the next.

    Digests are 64 lower-case hex digits; anything else is absent (or, where a key must be made of it, a ValueError)."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def put(self, data: Data, *, chunk_bytes: int | None = None) -> str:
        """Store a blob durably and return its digest. `data` must not change meanwhile.

        Raises StoreError (nothing of a new blob stays behind) and BlobError TOO_LARGE."""
        view = memoryview(data).cast("B")
        step = chunk_bytes or chunk_bytes_for(view.nbytes)
        parts = [view[at : at + step] for at in range(0, view.nbytes, step)]
        hashes = []
        for part in parts:
            hashes.append(sha256_hex(part))
            await asyncio.sleep(0)  # at most one chunk's hashing at a time between turns of the loop
        index = BlobIndex(view.nbytes, step, tuple(hashes))
        digest = index.digest
        fresh = not self._store.keys(f"blob/{digest}/")
        try:
            for first in range(0, len(parts), 4):  # a few at a time: syncing overlaps, memory and threads stay bounded
                numbers = range(first, min(first + 4, len(parts)))
                puts = [self._store.put(_chunk_key(digest, number), parts[number]) for number in numbers]
                for outcome in await asyncio.gather(*puts, return_exceptions=True):
                    if isinstance(outcome, BaseException):
                        raise outcome
            await self._complete(digest, index)
        except StoreError:
            if fresh:
                with contextlib.suppress(StoreError):
                    await self.delete(digest)
            raise
        return digest

    def has(self, digest: str) -> bool:
        """Whether the blob is complete here (damage inside it shows only when it is read)."""
        return _is_digest(digest) and self._store.size(_index_key(digest)) is not None

    def digests(self) -> list[str]:
        """All complete blobs, sorted."""
        return [digest for digest in self._all() if self.has(digest)]

    def incomplete(self) -> list[str]:
        """Blobs of which only parts are here, sorted: interrupted fetches and puts. Fetch them again or delete them."""
        return [digest for digest in self._all() if not self.has(digest)]

    async def get(self, digest: str) -> bytes | None:
        """The blob, every byte checked against the digest; None if absent. A blob found damaged becomes incomplete, so
        that a `fetch` mends it. Memory: twice the blob while it is put together."""
        index = await self.index(digest)
        if index is None:
            return None
        parts: list[bytes] = []
        for number in range(len(index.chunks)):
            part = await self._checked_chunk(digest, index, number)
            if part is None:
                await self._demote(digest, index)
                return None
            parts.append(part)
        return b"".join(parts)

    async def delete(self, digest: str) -> None:
        """Remove the blob and whatever parts of it there are."""
        require_digest(digest)
        await self._store.delete(_index_key(digest))  # first: from here on it is not complete
        for key in self._store.keys(f"blob/{digest}/"):
            await self._store.delete(key)

    async def index(self, digest: str) -> BlobIndex | None:
        """The index of a complete blob, None if absent."""
        if not self.has(digest):
            return None
        return await self._read_index(_index_key(digest), digest)

    async def chunk(self, digest: str, number: int, *, max_bytes: int) -> bytes | None:
        """One chunk of a complete blob, None if there is none. Raises BlobError TOO_LARGE, before reading it."""
        if not self.has(digest) or not 0 <= number < MAX_CHUNKS:
            return None
        size = self._store.size(_chunk_key(digest, number))
        if size is None:
            return None
        if size > max_bytes:
            raise BlobError(Reason.TOO_LARGE, f"a chunk of {size} bytes")
        return await self._store.get(_chunk_key(digest, number))

    # --- for fetch ---------------------------------------------------------------------------------------------------
    async def partial(self, digest: str) -> BlobIndex | None:
        """The index of an interrupted fetch, None if there is none."""
        require_digest(digest)
        return await self._read_index(_partial_key(digest), digest)

    async def begin(self, digest: str, index: BlobIndex) -> None:
        await self._store.put(_partial_key(digest), index.canonical())

    async def put_chunk(self, digest: str, number: int, data: bytes) -> None:
        """Store a chunk that the caller has checked."""
        await self._store.put(_chunk_key(digest, number), data)

    async def missing(self, digest: str, index: BlobIndex) -> list[int]:
        """Numbers of the chunks that are not here; those that are were read and checked against their hashes."""
        numbers = range(len(index.chunks))
        return [number for number in numbers if await self._checked_chunk(digest, index, number) is None]

    async def finish(self, digest: str, index: BlobIndex) -> None:
        """All chunks are here: the blob is complete from now on."""
        await self._complete(digest, index)

    # --- inside ------------------------------------------------------------------------------------------------------
    async def _complete(self, digest: str, index: BlobIndex) -> None:
        await self._store.put(_index_key(digest), index.canonical())
        if self._store.size(_partial_key(digest)) is not None:
            await self._store.delete(_partial_key(digest))

    async def _demote(self, digest: str, index: BlobIndex) -> None:
        await self.begin(digest, index)
        await self._store.delete(_index_key(digest))

    async def _read_index(self, key: str, digest: str) -> BlobIndex | None:
        data = await self._store.get(key)
        if data is None or sha256_hex(data) != digest:
            return None
        return BlobIndex.parse(data)

    async def _checked_chunk(self, digest: str, index: BlobIndex, number: int) -> bytes | None:
        key = _chunk_key(digest, number)
        if self._store.size(key) != index.chunk_size(number):
            return None
        data = await self._store.get(key)
        return data if data is not None and sha256_hex(data) == index.chunks[number] else None

    def _all(self) -> list[str]:
        names = dict.fromkeys([key.split("/")[1] for key in self._store.keys("blob/")])
        return [name for name in names if _is_digest(name)]


def _is_digest(digest: str) -> bool:
    return len(digest) == 64 and not digest.strip("0123456789abcdef")


def require_digest(digest: str) -> None:
    if not _is_digest(digest):
        raise ValueError(f"not a digest: {digest[:80]!r}")


def _index_key(digest: str) -> str:
    return f"blob/{digest}/index"


def _partial_key(digest: str) -> str:
    return f"blob/{digest}/partial"


def _chunk_key(digest: str, number: int) -> str:
    return f"blob/{digest}/chunk/{number}"


# --- serving ---------------------------------------------------------------------------------------------------------
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class IndexRequest(Message):
    digest: Digest


class ChunkRequest(Message):
    digest: Digest
    chunk: Annotated[int, Field(ge=0, lt=MAX_CHUNKS)]


INDEX = Method("blob.index", IndexRequest, Empty, max_reply_bytes=MAX_INDEX_BYTES)
"""The reply's body is the canonical index. Refused: NOT_MEMBER, NOT_FOUND."""


def chunk_method(max_bytes: int) -> Method[ChunkRequest, Empty]:
    """The reply's body is the chunk, at most `max_bytes`. Refused: NOT_MEMBER, NOT_FOUND, TOO_LARGE."""
    return Method("blob.chunk", ChunkRequest, Empty, max_reply_bytes=max_bytes)


def serve_blobs(
    transport: Transport, blobs: BlobStore, *, max_chunk_bytes: int = MAX_CHUNK_BYTES, allow: Callable[[str], bool]
) -> None:
    """Give complete blobs to the peers that `allow` accepts (called with the sender's PeerID on every request)."""

    def admit(sender: str) -> None:
        if not allow(sender):
            raise Refused(Reason.NOT_MEMBER, "blobs are for members of the run")

    async def give_index(request: Request[IndexRequest]) -> Reply[Empty]:
        admit(request.sender)
        index = await blobs.index(request.header.digest)
        if index is None:
            raise Refused(Reason.NOT_FOUND, "no such blob here")
        return Reply(Empty(), index.canonical())

    async def give_chunk(request: Request[ChunkRequest]) -> Reply[Empty]:
        admit(request.sender)
        try:
            data = await blobs.chunk(request.header.digest, request.header.chunk, max_bytes=max_chunk_bytes)
        except BlobError as error:
            raise Refused(error.reason, error.detail) from error
        if data is None:
            raise Refused(Reason.NOT_FOUND, "no such chunk here")
        return Reply(Empty(), data)

    transport.serve(INDEX, give_index)
    transport.serve(chunk_method(max_chunk_bytes), give_chunk)


# --- tensors as bytes ------------------------------------------------------------------------------------------------
_DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


def encode_state(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors of any shape and device as safetensors bytes: the same bytes for equal names, dtypes, shapes and values,
    whatever the order of the mapping and the layout in memory.

    Raises BlobError MALFORMED for a dtype beyond float64/32/16, bfloat16, int64/32/16/8, uint8 and bool."""
    plain: dict[str, Tensor] = {}
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu")
        if tensor.dtype not in _DTYPES:
            raise BlobError(Reason.MALFORMED, f"tensor {name!r} has dtype {tensor.dtype}")
        owns_all = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        shared = any(tensor.data_ptr() == other.data_ptr() for other in plain.values()) if owns_all else False
        plain[name] = tensor if owns_all and not shared else tensor.clone(memory_format=torch.contiguous_format)
    return safetensors.torch.save(plain)


def decode_state(data: bytes, *, max_bytes: int) -> dict[str, Tensor]:
    """Inverse of `encode_state`: tensors on the CPU with memory of their own, names sorted. Nothing is executed.

    Raises BlobError: TOO_LARGE (more than `max_bytes` of data), MALFORMED, NOT_FINITE (a NaN or infinity)."""
    if len(data) > max_bytes:
        raise BlobError(Reason.TOO_LARGE, f"a state of {len(data)} bytes, allowed are {max_bytes}")
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, OverflowError, AssertionError) as error:
        raise BlobError(Reason.MALFORMED, "not a state in the safetensors format") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise BlobError(Reason.MALFORMED, f"tensor {name[:100]!r} has dtype {tensor.dtype}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise BlobError(Reason.NOT_FINITE, f"tensor {name[:100]!r} holds NaN or infinity")
    return {name: tensors[name] for name in sorted(tensors)}


_FLAT = "flat"


def encode_flat(tensor: Tensor) -> bytes:
    """One tensor, for example a flat gradient of shape (numel,), as `encode_state` bytes."""
    return encode_state({_FLAT: tensor})


def decode_flat(data: bytes, *, max_bytes: int) -> Tensor:
    """Inverse of `encode_flat`. Raises BlobError like `decode_state`."""
    tensors = decode_state(data, max_bytes=max_bytes)
    if list(tensors) != [_FLAT]:
        raise BlobError(Reason.MALFORMED, "not a single tensor")
    return tensors[_FLAT]
