"""`none`: the values' own little-endian bytes. Bit exact, for float32, float64 and int64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.protocol.codecs.base import RAW_TYPES, from_raw, raw, require_length


@dataclass(frozen=True, slots=True)
class Plain:
    name: str = "none"
    number: int = 1

    def max_payload_bytes(self, numel: int, dtype: torch.dtype) -> int:
        return numel * dtype.itemsize

    def encode(self, values: Tensor) -> Sequence[memoryview]:
        return (raw(values, RAW_TYPES[values.dtype]),)

    def decode(self, payload: memoryview, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        require_length(payload, numel * dtype.itemsize)
        return from_raw(payload, RAW_TYPES[dtype]).to(device)
