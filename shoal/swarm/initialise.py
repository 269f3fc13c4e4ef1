"""Seeded initialisation that depends on neither device, split, thread count nor library version.

Every parameter is filled from its own stream, keyed by (run seed, full parameter name in the unsplit model), so a stage
draws the same values whoever holds it. The stream is numpy's Philox bit generator (Salmon et al., SC 2011; its raw
output is stable by numpy's own promise). A normal variate is the centred sum of eight 16-bit uniforms: integers until
one IEEE division, so there is no logarithm whose last bit could differ between processors (tails end at 4.9 σ: fine
for an initialisation).
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_LANES = np.uint64(0x0000FFFF0000FFFF)
_LOW = np.uint64(0xFFFFFFFF)
_CENTRE = 8 * 65535 / 2
_SIGMA = math.sqrt(8 * (65536.0**2 - 1) / 12)
_CHUNK = 1 << 15


def normals(seed: int, name: str, count: int) -> npt.NDArray[np.float64]:
    """`count` values of mean 0 and variance 1, float64 (count,), a pure function of (seed, name, position)."""
    digest = hashlib.blake2b(f"shoal initialise {seed} {name}".encode(), digest_size=16).digest()
    stream = np.random.Philox(key=int.from_bytes(digest, "little"))
    out = np.empty(count, dtype=np.float64)
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        words = stream.random_raw(2 * size).astype(np.uint64, copy=False)
        lanes = (words & _LANES) + ((words >> np.uint64(16)) & _LANES)  # two sums of two uniforms in each word
        both = lanes[0::2] + lanes[1::2]
        total = (both & _LOW) + (both >> np.uint64(32))
        out[start : start + size] = (total.astype(np.float64) - _CENTRE) / _SIGMA
    return out


def normal(name: str, shape: tuple[int, ...], *, seed: int, std: float, dtype: torch.dtype) -> Tensor:
    """The initial value of a matrix or embedding `name`: CPU tensor of `shape` and `dtype`, computed in float64."""
    values = normals(seed, name, math.prod(shape)) * std
    return torch.from_numpy(values).to(dtype).reshape(shape)
