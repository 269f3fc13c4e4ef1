"""An invite: one short string that says which run to join and where to knock.

`shoal1-` + two base58 digits (length of the rest) + base58 of: run id (32 bytes), coordinator's PeerID (its 32-byte
SHA-256), token (length, bytes), addresses (count, each packed), checksum (4 bytes of SHA-256). The checksum finds
mistakes, not attacks: what the invite promises is checked against the signed manifest (run id and coordinator).

`Maddr` is the part of multiaddr that shoal dials: ip4 / ip6 / dns over TCP, directly or through a relay.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import struct
from dataclasses import dataclass

import base58

from shoal.protocol.identity import peer_id_bytes, peer_id_text

VERSION = 1
MAX_ADDRESSES = 8
MAX_TOKEN_CHARS = 64
MAX_MADDR_CHARS = 200
MAX_INVITE_CHARS = 2048

_ALPHABET = base58.BITCOIN_ALPHABET.decode()
_CHECKSUM_BYTES = 4
_DNS_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
_KINDS = ("ip4", "ip6", "dns", "dns4", "dns6")
_TEXT = 15  # an address that has no packed form
_OTHER_PEER = 0x80  # flag: the address's PeerID is not the coordinator's and follows


class InviteError(Exception):
    """The invite cannot be used; the message is one line that says what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class Maddr:
    """/KIND/HOST/tcp/PORT[/p2p/PEER] or /KIND/HOST/tcp/PORT/p2p/RELAY/p2p-circuit[/p2p/PEER]; `str` is the text."""

    kind: str
    host: str
    port: int
    peer: str | None = None
    relay: str | None = None

    @staticmethod
    def parse(text: str) -> Maddr:
        """Raises ValueError with a one-line reason."""
        if len(text) > MAX_MADDR_CHARS:
            raise ValueError(f"an address has at most {MAX_MADDR_CHARS} characters")
        parts = text.split("/")
        if len(parts) < 5 or parts[0] != "" or parts[1] not in _KINDS or parts[3] != "tcp":
            raise ValueError("an address looks like /ip4/203.0.113.5/tcp/4001 (ip4, ip6, dns, dns4 or dns6, over tcp)")
        kind, host, port = parts[1], parts[2], parts[4]
        if re.fullmatch(r"[1-9][0-9]{0,4}", port) is None or int(port) > 65535:
            raise ValueError("the port of an address is a number from 1 to 65535")
        host = _checked_host(kind, host)
        peer: str | None = None
        relay: str | None = None
        match parts[5:]:
            case []:
                pass
            case ["p2p", peer]:
                peer_id_bytes(peer)
            case ["p2p", relay, "p2p-circuit"]:
                peer_id_bytes(relay)
            case ["p2p", relay, "p2p-circuit", "p2p", peer]:
                peer_id_bytes(relay)
                peer_id_bytes(peer)
            case _:
                raise ValueError("an address may end in /p2p/PEERID, nothing else")
        return Maddr(kind, host, int(port), peer, relay)

    @property
    def dialable(self) -> str:
        """The text without the peer's own /p2p suffix: what `Transport.learn_address` takes."""
        text = f"/{self.kind}/{self.host}/tcp/{self.port}"
        return text if self.relay is None else f"{text}/p2p/{self.relay}/p2p-circuit"

    def __str__(self) -> str:
        return self.dialable if self.peer is None else f"{self.dialable}/p2p/{self.peer}"


@dataclass(frozen=True, slots=True)
class Invite:
    """What a joiner needs. run: hex SHA-256; coordinator: PeerID; maddrs: bootstrap addresses, each with /p2p/PEERID.

    Construction normalises the addresses and raises InviteError if anything is out of bounds."""

    run: str
    coordinator: str
    maddrs: tuple[str, ...]
    token: str = ""

    def __post_init__(self) -> None:
        if re.fullmatch(r"[0-9a-f]{64}", self.run) is None:
            raise InviteError("an invite's run id is 64 lowercase hex digits")
        try:
            if peer_id_bytes(self.coordinator)[0] != 0x12:
                raise ValueError
        except ValueError:
            raise InviteError("an invite's coordinator is the PeerID of an RSA key") from None
        if not 1 <= len(self.maddrs) <= MAX_ADDRESSES:
            raise InviteError(f"an invite holds 1 to {MAX_ADDRESSES} bootstrap addresses, not {len(self.maddrs)}")
        addresses = []
        for text in self.maddrs:
            try:
                address = Maddr.parse(text)
            except ValueError as error:
                raise InviteError(f"a bootstrap address of the invite is not usable: {error}") from None
            if address.peer is None:
                raise InviteError("each bootstrap address of an invite ends in /p2p/PEERID")
            addresses.append(str(address))
        object.__setattr__(self, "maddrs", tuple(addresses))
        if len(self.token) > MAX_TOKEN_CHARS or re.fullmatch(r"[!-~]*", self.token) is None:
            raise InviteError(f"an invite's token has at most {MAX_TOKEN_CHARS} printable characters and no spaces")

    def encode(self) -> str:
        """The string to hand out; about 110 characters with one IPv4 address."""
        body = bytearray(bytes.fromhex(self.run))
        body += peer_id_bytes(self.coordinator)[2:]
        body += bytes([len(self.token)]) + self.token.encode()
        body += bytes([len(self.maddrs)])
        for text in self.maddrs:
            body += _pack(Maddr.parse(text), self.coordinator)
        body += _checksum(bytes(body))
        encoded = base58.b58encode(bytes(body)).decode()
        high, low = divmod(len(encoded), 58)
        result = f"shoal{VERSION}-{_ALPHABET[high]}{_ALPHABET[low]}{encoded}"
        if len(result) > MAX_INVITE_CHARS:
            raise InviteError("the invite would be too long; give it fewer or shorter addresses")
        return result

    @staticmethod
    def decode(text: str) -> Invite:
        """Read an invite as a person pasted it: line breaks and spaces inside are ignored. Raises InviteError."""
        if len(text) > 2 * MAX_INVITE_CHARS:
            raise InviteError("this is far too long for an invite; paste only the string that starts with shoal1-")
        text = "".join(text.split())
        if not text:
            raise InviteError("the invite is empty; paste the string that starts with shoal1-")
        head = re.match(r"shoal([0-9]{1,4})-", text, re.ASCII)
        if head is None:
            raise InviteError("this is not an invite; an invite starts with shoal1-")
        if int(head[1]) > VERSION:
            raise InviteError(f"this invite was made by a newer shoal (format {int(head[1])}); update shoal")
        if int(head[1]) < VERSION:
            raise InviteError("this is not an invite; an invite starts with shoal1-")
        if len(text) > MAX_INVITE_CHARS:
            raise InviteError("this is too long for an invite; paste only the string that starts with shoal1-")
        for at, char in enumerate(text[head.end() :], start=head.end() + 1):
            if char not in _ALPHABET:
                raise InviteError(
                    f"the invite is mistyped: character {at} is {char!a}, which invites never use; copy it again"
                )
        digits, encoded = text[head.end() : head.end() + 2], text[head.end() + 2 :]
        expected = _ALPHABET.index(digits[0]) * 58 + _ALPHABET.index(digits[1]) if len(digits) == 2 else None
        if expected is None or len(encoded) < expected:
            raise InviteError("the invite is cut short (or mistyped); copy the whole string again")
        if len(encoded) > expected:
            raise InviteError("the invite has characters too many (or is mistyped); copy exactly the string again")
        data = base58.b58decode(encoded)
        if len(data) < _CHECKSUM_BYTES or _checksum(data[:-_CHECKSUM_BYTES]) != data[-_CHECKSUM_BYTES:]:
            raise InviteError("the invite is mistyped or was changed (its checksum is wrong); copy it again")
        try:
            invite = _unpack(_Reader(data[:-_CHECKSUM_BYTES]))
        except ValueError:
            raise InviteError("the invite is not well-formed; ask the coordinator for a new one") from None
        if invite.encode() != text:  # bytes too many, or a form that `encode` would not have chosen
            raise InviteError("the invite is not in its normal form; ask the coordinator for a new one")
        return invite


def _checked_host(kind: str, host: str) -> str:
    if kind in ("ip4", "ip6"):
        try:
            ip = ipaddress.IPv4Address(host) if kind == "ip4" else ipaddress.IPv6Address(host)
        except ValueError:
            raise ValueError(f"not an {kind} address: {host[:45]!a}") from None
        if isinstance(ip, ipaddress.IPv6Address) and ip.scope_id is not None:
            raise ValueError("an ip6 address with a zone means nothing to other machines")
        if ip.is_unspecified or ip.is_multicast:
            raise ValueError(f"{ip} cannot be dialled; name the address that other machines reach")
        return str(ip)
    if len(host) > 253 or not all(_DNS_LABEL.fullmatch(label) for label in host.split(".")):
        raise ValueError(f"not a host name: {host[:45]!a}")
    return host.lower()


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(b"shoal/invite/v1\0" + body).digest()[:_CHECKSUM_BYTES]


def _pack(address: Maddr, coordinator: str) -> bytes:
    assert address.peer is not None
    peer = peer_id_bytes(address.peer)
    if address.relay is not None or peer[0] != 0x12:
        text = str(address).encode()
        return bytes([_TEXT, len(text)]) + text
    tail = b"" if address.peer == coordinator else peer[2:]
    kind = bytes([_KINDS.index(address.kind) | (_OTHER_PEER if tail else 0)])
    if address.kind == "ip4":
        host = ipaddress.IPv4Address(address.host).packed
    elif address.kind == "ip6":
        host = ipaddress.IPv6Address(address.host).packed
    else:
        host = bytes([len(address.host)]) + address.host.encode()
    return kind + host + struct.pack(">H", address.port) + tail


class _Reader:
    """Takes bytes from the front; ValueError when there are not enough."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        part = self._data[self._at : self._at + count]
        if len(part) != count:
            raise ValueError("cut short")
        self._at += count
        return part

    def byte(self) -> int:
        return self.take(1)[0]

    def text(self) -> str:
        return self.take(self.byte()).decode("ascii")


def _unpack(reader: _Reader) -> Invite:
    run = reader.take(32).hex()
    coordinator = _peer(reader.take(32))
    token = reader.text()
    addresses = []
    for _ in range(reader.byte()):
        kind = reader.byte()
        if kind == _TEXT:
            addresses.append(reader.text())
            continue
        index = kind & ~_OTHER_PEER
        if index >= len(_KINDS):
            raise ValueError("unknown kind of address")
        name = _KINDS[index]
        if name == "ip4":
            host = str(ipaddress.IPv4Address(reader.take(4)))
        elif name == "ip6":
            host = str(ipaddress.IPv6Address(reader.take(16)))
        else:
            host = reader.text()
        (port,) = struct.unpack(">H", reader.take(2))
        peer = _peer(reader.take(32)) if kind & _OTHER_PEER else coordinator
        addresses.append(f"/{name}/{host}/tcp/{port}/p2p/{peer}")
    return Invite(run, coordinator, tuple(addresses), token)


def _peer(digest: bytes) -> str:
    return peer_id_text(b"\x12\x20" + digest)
