"""One tensor as bytes: a fixed header of 32 bytes, then the codec's payload; nothing else is accepted.

Header, little-endian: magic "SHT1" (4), codec (u8), dtype (u8), number of dimensions ≤ 4 (u8), zero (u8),
4 × dimension (u32, unused ones zero), payload length in bytes (u64). Every bound is checked before anything is
allocated, and no value that is not finite gets through.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from shoal.protocol.codecs.base import Buffer, Codec
from shoal.protocol.codecs.blockwise import Blockwise8
from shoal.protocol.codecs.half import Half
from shoal.protocol.codecs.plain import Plain
from shoal.protocol.events import Reason
from shoal.protocol.transport import Refused

MAX_DIMS = 4
_HEADER = struct.Struct("<4sBBBB4IQ")
_MAGIC = b"SHT1"
HEADER_BYTES = _HEADER.size
_DTYPES: dict[int, torch.dtype] = {1: torch.float32, 2: torch.float64, 3: torch.int64}
_DTYPE_NUMBERS = {dtype: number for number, dtype in _DTYPES.items()}

_REGISTRY: tuple[Codec, ...] = (Plain(), Half(), Blockwise8())
CODECS: dict[str, Codec] = {codec.name: codec for codec in _REGISTRY}
_BY_NUMBER = {codec.number: codec for codec in _REGISTRY}


def _codec_for(name: str, dtype: torch.dtype) -> Codec:
    return CODECS[name] if dtype.is_floating_point else CODECS["none"]


def max_encoded_bytes(shape: Sequence[int], dtype: torch.dtype, codec: str) -> int:
    """The largest `encode` result, in bytes, for a tensor of that shape and dtype. Known without the tensor."""
    return HEADER_BYTES + _codec_for(codec, dtype).max_payload_bytes(math.prod(shape), dtype)


def _finite(values: Tensor) -> bool:
    if values.numel() == 0 or not values.dtype.is_floating_point:
        return True
    low, high = torch.aminmax(values)  # NaN goes through both
    return math.isfinite(low.item()) and math.isfinite(high.item())


def encode(tensor: Tensor, codec: str, *, check: bool = True) -> bytes:
    """A tensor's bytes. tensor: float32, float64 or int64, at most 4 dimensions, any device; int64 always goes as
    `none`. Deterministic, the same on every device.

    Raises Refused(NOT_FINITE) for NaN or infinity; with `check=False` it encodes NaN instead, under every codec, so
    that it is the receiver who refuses. Raises KeyError for an unknown codec, TypeError or ValueError for a tensor
    that no codec takes."""
    chosen = CODECS[codec]
    if tensor.dtype not in _DTYPE_NUMBERS:
        raise TypeError(f"no codec takes {tensor.dtype}; use float32, float64 or int64")
    if tensor.ndim > MAX_DIMS or any(size >= 2**32 for size in tensor.shape):
        raise ValueError(f"no codec takes shape {tuple(tensor.shape)}: at most {MAX_DIMS} dimensions below 2^32")
    values = tensor.detach().contiguous().view(-1)
    if not _finite(values):
        if check:
            raise Refused(Reason.NOT_FINITE, "the tensor to send holds NaN or infinity")
        values = torch.full_like(values, math.nan)  # infinity must not pass a codec that clamps
    chosen = _codec_for(codec, tensor.dtype)
    pieces = chosen.encode(values)
    dims = (*tensor.shape, *(0,) * (MAX_DIMS - tensor.ndim))
    length = sum(piece.nbytes for piece in pieces)
    header = _HEADER.pack(_MAGIC, chosen.number, _DTYPE_NUMBERS[tensor.dtype], tensor.ndim, 0, *dims, length)
    return b"".join((header, *pieces))


def decode(
    data: Buffer,
    *,
    max_elements: int,
    expect_shape: Sequence[int] | None = None,
    expect_dtype: torch.dtype | None = None,
    allow_codecs: Collection[str] | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The tensor in `data`, which must hold exactly one. The result owns writable memory on `device`.

    `allow_codecs` (names; None: any) does not concern int64 tensors, which always travel as `none`.
    Raises Refused: MALFORMED (not such bytes, or another shape, dtype or codec than expected), TOO_LARGE (more than
    `max_elements`), NOT_FINITE."""
    view = memoryview(data)
    if view.nbytes < HEADER_BYTES:
        raise Refused(Reason.MALFORMED, f"{view.nbytes} bytes are no tensor")
    magic, codec_number, dtype_number, ndim, zero, *dims, length = _HEADER.unpack_from(view)
    codec, dtype = _BY_NUMBER.get(codec_number), _DTYPES.get(dtype_number)
    if magic != _MAGIC or codec is None or dtype is None or ndim > MAX_DIMS or zero or any(dims[ndim:]):
        raise Refused(Reason.MALFORMED, "not a tensor header")
    shape = tuple(dims[:ndim])
    numel = math.prod(shape)
    if numel > max_elements or math.prod(max(size, 1) for size in shape) >= 2**62:  # no strides fit (0, huge, huge)
        raise Refused(Reason.TOO_LARGE, f"{numel} elements where at most {max_elements} are taken")
    if length != view.nbytes - HEADER_BYTES or length > codec.max_payload_bytes(numel, dtype):
        raise Refused(Reason.MALFORMED, f"{view.nbytes} bytes do not match the tensor header")
    if codec is not _codec_for(codec.name, dtype):
        raise Refused(Reason.MALFORMED, f"{dtype} does not travel as {codec.name}")
    if expect_shape is not None and shape != tuple(expect_shape):
        raise Refused(Reason.MALFORMED, f"shape {shape} where {tuple(expect_shape)} belongs")
    if expect_dtype is not None and dtype != expect_dtype:
        raise Refused(Reason.MALFORMED, f"{dtype} where {expect_dtype} belongs")
    if allow_codecs is not None and dtype.is_floating_point and codec.name not in allow_codecs:
        raise Refused(Reason.MALFORMED, f"codec {codec.name} is not used here")
    values = codec.decode(view[HEADER_BYTES:], numel, dtype, torch.device(device))
    if not _finite(values):
        raise Refused(Reason.NOT_FINITE, "the tensor holds NaN or infinity")
    return values.view(shape)
