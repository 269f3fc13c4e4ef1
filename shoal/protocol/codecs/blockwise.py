"""`blockwise8`: blockwise dynamic 8-bit quantisation (Dettmers et al., "8-bit Optimizers via Block-wise Quantization",
ICLR 2022, §2.1 and appendix on dynamic tree quantisation; the 256-entry map is that of bitsandbytes).

Each block of BLOCK values is divided by its largest magnitude s, and every quotient becomes the number of a nearby
entry of the map M ⊂ (-1, 1]; decoding is x̂ = M[code] · s. What we changed, and why:
- The map holds +1 and no -1, so s carries the *sign* of the block's extreme value: the extreme decodes exactly, and
  encoding x̂ again gives the same bytes.
- The entry is looked up by the quotient's upper 18 bits (sign, exponent, 9 mantissa bits) instead of a search. One IEEE
  division, one gather: the same bytes on every device, and ten times faster than a search.
- A block whose largest magnitude is below 2^-100 becomes zeros, so no subnormal number ever decides a byte.

Payload: ceil(n / BLOCK) float32 scales, then n codes of one byte. Error per value ≤ 0.0076 · |s| (half a step of the
map at the top, plus the lookup's rounding).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from shoal.protocol.codecs.base import from_raw, raw, require_length

# RMS error in % of the values' RMS, normal / heavy-tailed (Student t, 3 d.f.): blocks of 64 give 0.94 / 1.11, of 256
# 1.08 / 1.44, of 4096 1.30 / 1.98; the scales cost 6.3, 1.6 and 0.1 % of the bytes (tests/protocol/test_codecs.py).
BLOCK = 256
SMALLEST_SCALE = 2.0**-100
LARGEST = float(np.finfo(np.float32).max)
_SHIFT = 14  # float32 bits that the lookup ignores


@functools.cache
def dynamic_map() -> Tensor:
    """(256,) float32, ascending: 0, ±(means of 2^i equal intervals of [0.1, 1]) · 10^(i-6) for i = 0..6, and 1.

    Built from exact fractions, so that it is the same on every machine."""
    entries = [Fraction(0), Fraction(1)]
    for i in range(7):
        for k in range(2**i):
            value = (Fraction(1, 10) + Fraction(9, 10) * Fraction(2 * k + 1, 2 ** (i + 1))) / 10 ** (6 - i)
            entries += [value, -value]
    return torch.tensor([float(entry) for entry in sorted(entries)], dtype=torch.float64).float()


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """On `device`: the map (256,) float32, and the code (2^18,) uint8 of each cell of quotients."""
    entries = dynamic_map().numpy().astype(np.float64)
    cells = np.arange(2 ** (32 - _SHIFT), dtype=np.uint32) << _SHIFT
    centres = (cells | np.uint32(1 << (_SHIFT - 1))).view(np.float32)
    centres = np.where(np.isnan(centres), np.float32(0.0), centres).astype(np.float64)
    codes = np.searchsorted((entries[1:] + entries[:-1]) / 2, centres).astype(np.uint8)
    return dynamic_map().to(device), torch.from_numpy(codes).to(device)


def _blocks(values: Tensor) -> Tensor:
    """values (n,) as (ceil(n / BLOCK), BLOCK), the last block filled with zeros. A view if none is needed."""
    missing = -values.numel() % BLOCK
    return (torch.nn.functional.pad(values, (0, missing)) if missing else values).view(-1, BLOCK)


@dataclass(frozen=True, slots=True)
class Blockwise8:
    name: str = "blockwise8"
    number: int = 3

    def max_payload_bytes(self, numel: int, dtype: torch.dtype) -> int:
        return 4 * -(-numel // BLOCK) + numel

    def encode(self, values: Tensor) -> Sequence[memoryview]:
        numel = values.numel()
        if numel == 0:
            return ()
        if values.dtype != torch.float32:
            values = values.clamp(-LARGEST, LARGEST).float()
        blocks = _blocks(values)
        highest, lowest = blocks.amax(1), blocks.amin(1)  # (blocks,)
        scales = torch.where(highest >= -lowest, highest, lowest)
        scales = torch.where(scales.abs() < SMALLEST_SCALE, torch.zeros_like(scales), scales)
        divisors = torch.where(scales == 0, torch.ones_like(scales), scales)
        cells = ((blocks / divisors[:, None]).view(torch.int32) >> _SHIFT) & (2 ** (32 - _SHIFT) - 1)
        codes = _tables(values.device)[1].index_select(0, cells.view(-1)[:numel])
        return raw(scales, "<f4"), raw(codes, "|u1")

    def decode(self, payload: memoryview, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        scale_bytes = 4 * -(-numel // BLOCK)
        require_length(payload, scale_bytes + numel)
        if numel == 0:
            return torch.empty(0, dtype=dtype, device=device)
        scales = from_raw(payload[:scale_bytes], "<f4").to(device)
        codes = from_raw(payload[scale_bytes:], "|u1").to(device)
        entries = _tables(device)[0].index_select(0, codes.int())
        values = (_blocks(entries) * scales[:, None]).view(-1)[:numel]
        return values.to(dtype) if numel % BLOCK == 0 or dtype != torch.float32 else values.clone()
