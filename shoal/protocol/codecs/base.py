"""The seam that every codec implements. A codec sees flat tensors; shapes, bounds and checks are `wire`'s work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from shoal.protocol.events import Reason
from shoal.protocol.transport import Refused

Buffer = bytes | memoryview

# dtype -> the little-endian numpy type of its raw form
RAW_TYPES: dict[torch.dtype, str] = {torch.float32: "<f4", torch.float64: "<f8", torch.int64: "<i8"}


class Codec(Protocol):
    """A pure, deterministic map between a flat tensor and a payload; the same bytes on every device.

    Encoding the decoded values again gives the same bytes (idempotence), so a tensor may pass any number of hops.
    """

    @property
    def name(self) -> str:
        """The codec's name in manifests and metrics."""
        ...

    @property
    def number(self) -> int:
        """The codec's number on the wire (1..255), never reused."""
        ...

    def max_payload_bytes(self, numel: int, dtype: torch.dtype) -> int:
        """The largest payload, in bytes, of `numel` values of `dtype`."""
        ...

    def encode(self, values: Tensor) -> Sequence[memoryview]:
        """The payload as pieces to be joined. values: flat (numel,), contiguous, float32, float64 (or int64: `none`
        only), on any device; all finite, or all NaN, which must decode to something that is not finite."""
        ...

    def decode(self, payload: memoryview, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A new flat tensor (numel,) of `dtype` on `device` that owns its memory. `numel` and the payload's upper
        bound were checked. Raises Refused(MALFORMED) unless the payload has exactly the right length."""
        ...


def raw(values: Tensor, kind: str) -> memoryview:
    """The values of a flat contiguous tensor as little-endian bytes of numpy type `kind`; no copy on a CPU tensor."""
    array = values.detach().cpu().numpy().astype(kind, copy=False)
    return array.data.cast("B") if array.size else memoryview(b"")


def from_raw(payload: memoryview, kind: str) -> Tensor:
    """A flat CPU tensor with a writable copy of little-endian values of numpy type `kind`. One copy."""
    native = np.dtype(kind).newbyteorder("=")
    return torch.from_numpy(np.frombuffer(payload, dtype=kind).astype(native, copy=True))


def require_length(payload: memoryview, expected: int) -> None:
    """Raises Refused(MALFORMED) unless the payload has exactly `expected` bytes."""
    if payload.nbytes != expected:
        raise Refused(Reason.MALFORMED, f"payload of {payload.nbytes} bytes where {expected} belong")
