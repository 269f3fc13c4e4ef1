"""`fp16`: IEEE half precision, clamped to its range. Relative error ≤ 2^-11 for magnitudes in [6.1e-5, 65504].

Smaller magnitudes keep an absolute error ≤ 2^-25; larger ones become ±65504 instead of infinity. float64 goes through
float32, on every device alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.protocol.codecs.base import from_raw, raw, require_length

LARGEST = 65504.0


@dataclass(frozen=True, slots=True)
class Half:
    name: str = "fp16"
    number: int = 2

    def max_payload_bytes(self, numel: int, dtype: torch.dtype) -> int:
        return 2 * numel

    def encode(self, values: Tensor) -> Sequence[memoryview]:
        return (raw(values.float().clamp(-LARGEST, LARGEST).half(), "<f2"),)

    def decode(self, payload: memoryview, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        require_length(payload, 2 * numel)
        return from_raw(payload, "<f2").to(device).to(dtype)
