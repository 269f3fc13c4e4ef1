"""The frame of one message: pure, no I/O. `docs/wire.md` describes it for people who write another implementation.

    offset  bytes  field
    0       4      magic "SHOA"
    4       1      version (1)
    5       1      kind: 0 request, 1 reply, 2 refusal
    6       2      zero
    8       4      length of the header in bytes (big-endian), at most 256 KiB
    12      8      length of the body in bytes (big-endian), at most what the method allows
    20      …      header (JSON, UTF-8), then body (opaque)
    end     32     SHA-256 of everything before it

The digest comes last, so that a sender hashes while it writes and a receiver while it reads. A stream that a dying peer
cut looks like a clean end, so nothing is handed out before its length and digest are right: `Decoder` either yields one
whole message or raises `WireError` with TORN_STREAM, BAD_DIGEST, TOO_LARGE or MALFORMED. It keeps only what arrived:
an announced length never allocates.
"""

from __future__ import annotations

import enum
import hashlib
import struct
from dataclasses import dataclass

from shoal.protocol.events import Reason
from shoal.protocol.transport import Message

MAGIC = b"SHOA"
VERSION = 1
PREFIX = struct.Struct(">4sBBHIQ")
DIGEST_BYTES = 32
MAX_HEADER_BYTES = 256 * 1024
MAX_DETAIL_CHARS = 300


class Kind(enum.IntEnum):
    REQUEST = 0
    REPLY = 1
    REFUSAL = 2


class Refusal(Message):
    """The header of a refusal; its body is empty. `reason` is a `Reason` value."""

    reason: str
    detail: str = ""


class WireError(Exception):
    """Bytes that are not one whole message. `reason`: TORN_STREAM, BAD_DIGEST, TOO_LARGE or MALFORMED."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Frame:
    """One verified message."""

    kind: Kind
    header: bytes
    body: bytes


def head(kind: Kind, header: bytes, body_bytes: int) -> bytes:
    """Prefix and header: what is sent before the body. Raises WireError(TOO_LARGE) for a header above the bound."""
    if len(header) > MAX_HEADER_BYTES:
        raise WireError(Reason.TOO_LARGE, f"a header of {len(header)} bytes; at most {MAX_HEADER_BYTES} are allowed")
    return PREFIX.pack(MAGIC, VERSION, kind, 0, len(header), body_bytes) + header


def digest(head_bytes: bytes, body: bytes) -> bytes:
    """What is sent after the body."""
    hasher = hashlib.sha256(head_bytes)
    hasher.update(body)
    return hasher.digest()


def encode(kind: Kind, header: bytes, body: bytes = b"") -> bytes:
    """A whole message in one piece."""
    front = head(kind, header, len(body))
    return b"".join((front, body, digest(front, body)))


class Decoder:
    """Turns bytes into one Frame. Feed it at most `wanted` bytes at a time until `wanted` is 0, then take `frame()`.

    kinds: the kinds that are acceptable here. max_body_bytes: bound on the body, applied to its announcement.
    """

    def __init__(self, kinds: frozenset[Kind], *, max_body_bytes: int) -> None:
        self._kinds = kinds
        self._max_body_bytes = max_body_bytes
        self._hasher = hashlib.sha256()
        self._sections = [PREFIX.size]  # lengths of prefix, header, body, digest; the last three follow the prefix
        self._section = 0
        self._left = PREFIX.size
        self._chunks: list[bytes] = []
        self._parts: list[bytes] = []  # whole sections
        self._kind = Kind.REQUEST
        self.received = 0  # bytes fed so far
        self.announced_bytes: int | None = None  # header + body, once the prefix is known

    @property
    def wanted(self) -> int:
        """How many bytes the current section still lacks; 0 when the message is complete."""
        return self._left

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes (1 … `wanted`). Raises WireError as soon as they cannot become an acceptable message."""
        if not 0 < len(chunk) <= self._left:
            raise ValueError(f"fed {len(chunk)} bytes where {self._left} were wanted")
        self.received += len(chunk)
        self._chunks.append(chunk)
        self._left -= len(chunk)
        if self._section < 3:
            self._hasher.update(chunk)
        while self._left == 0 and self._section < 4:
            self._finish_section()

    def torn(self) -> WireError:
        """The error for a stream that ends here."""
        return WireError(Reason.TORN_STREAM, f"the stream ended after {self.received} bytes of an incomplete message")

    def frame(self) -> Frame:
        """The verified message. Raises WireError(TORN_STREAM) while it is incomplete."""
        if self._section < 4:
            raise self.torn()
        return Frame(self._kind, self._parts[1], self._parts[2])

    def _finish_section(self) -> None:
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks = []
        self._parts.append(data)
        if self._section == 0:
            self._read_prefix(data)
        elif self._section == 3 and data != self._hasher.digest():
            raise WireError(Reason.BAD_DIGEST, "the message does not match its SHA-256 digest")
        self._section += 1
        if self._section < 4:
            self._left = self._sections[self._section]

    def _read_prefix(self, data: bytes) -> None:
        magic, version, kind, zero, header_bytes, body_bytes = PREFIX.unpack(data)
        if magic != MAGIC:
            raise WireError(Reason.MALFORMED, "this is not a shoal message")
        if version != VERSION:
            raise WireError(Reason.MALFORMED, f"message version {version}; this node speaks {VERSION}")
        if zero != 0 or kind not in self._kinds:
            raise WireError(Reason.MALFORMED, f"unexpected kind of message: {kind}, {zero}")
        self._kind = Kind(kind)
        max_body_bytes = 0 if self._kind is Kind.REFUSAL else self._max_body_bytes
        if header_bytes > MAX_HEADER_BYTES:
            raise WireError(Reason.TOO_LARGE, f"a header of {header_bytes} bytes; at most {MAX_HEADER_BYTES}")
        if body_bytes > max_body_bytes:
            raise WireError(Reason.TOO_LARGE, f"a body of {body_bytes} bytes; at most {max_body_bytes} are allowed")
        self._sections = [PREFIX.size, header_bytes, body_bytes, DIGEST_BYTES]
        self.announced_bytes = header_bytes + body_bytes


def decode(data: bytes, kinds: frozenset[Kind], *, max_body_bytes: int) -> Frame:
    """One whole message from one piece; bytes after it are MALFORMED. Raises WireError."""
    decoder = Decoder(kinds, max_body_bytes=max_body_bytes)
    at = 0
    while decoder.wanted and at < len(data):
        chunk = data[at : at + decoder.wanted]
        decoder.feed(chunk)
        at += len(chunk)
    frame = decoder.frame()
    if at != len(data):
        raise WireError(Reason.MALFORMED, f"{len(data) - at} bytes after the end of the message")
    return frame
