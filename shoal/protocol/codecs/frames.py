"""Several byte strings in one body: magic "SHP1", count (u32), count lengths (u64), then the parts; little-endian."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence

from shoal.protocol.codecs.base import Buffer
from shoal.protocol.events import Reason
from shoal.protocol.transport import Refused

_HEADER = struct.Struct("<4sI")
_MAGIC = b"SHP1"


def pack(parts: Sequence[Buffer]) -> bytes:
    """One body out of several; `unpack` gives them back in order."""
    lengths = [memoryview(part).nbytes for part in parts]
    return b"".join((_HEADER.pack(_MAGIC, len(parts)), struct.pack(f"<{len(parts)}Q", *lengths), *parts))


def unpack(data: Buffer, max_parts: int) -> tuple[memoryview, ...]:
    """The parts of a body made by `pack`, as views (no copy). Raises Refused: TOO_LARGE for more than `max_parts`,
    MALFORMED for anything that `pack` did not make."""
    view = memoryview(data)
    if view.nbytes < _HEADER.size:
        raise Refused(Reason.MALFORMED, f"{view.nbytes} bytes are no pack")
    magic, count = _HEADER.unpack_from(view)
    if magic != _MAGIC:
        raise Refused(Reason.MALFORMED, "not a pack")
    if count > max_parts:
        raise Refused(Reason.TOO_LARGE, f"{count} parts where at most {max_parts} are taken")
    start = _HEADER.size + 8 * count
    if view.nbytes < start:
        raise Refused(Reason.MALFORMED, "the pack ends in its header")
    lengths = struct.unpack_from(f"<{count}Q", view, _HEADER.size)
    if start + sum(lengths) != view.nbytes:
        raise Refused(Reason.MALFORMED, "the pack's parts do not fill it")
    ends = list(itertools.accumulate(lengths, initial=start))
    return tuple(view[begin:end] for begin, end in itertools.pairwise(ends))
