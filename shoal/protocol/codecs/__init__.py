"""Tensors as bytes: self-describing, deterministic, bounded before allocation, checked for finite numbers.

`encode`/`decode` move one tensor through a codec of the closed registry `CODECS` (none, fp16, blockwise8);
`pack`/`unpack` put several byte strings into one body. Every refusal is a typed `Refused`.
"""

from shoal.protocol.codecs.base import Codec
from shoal.protocol.codecs.frames import pack, unpack
from shoal.protocol.codecs.wire import CODECS, HEADER_BYTES, MAX_DIMS, decode, encode, max_encoded_bytes

__all__ = ["CODECS", "HEADER_BYTES", "MAX_DIMS", "Codec", "decode", "encode", "max_encoded_bytes", "pack", "unpack"]
