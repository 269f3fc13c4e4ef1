"""Peer records: what a peer says about itself in the DHT and on request. Signed, bounded, schema-checked, expiring.

A record is trusted as far as its subject: that it comes from this PeerID and is fresh is checked; that its throughput
is true is not. Times are unix seconds; `now` is an argument, so the same code runs under a virtual clock.
"""

from __future__ import annotations

import enum
import json
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, model_validator

from shoal.protocol.events import Reason
from shoal.protocol.identity import Identity, Sealed, malformed, peer_id_bytes
from shoal.protocol.invite import MAX_MADDR_CHARS, Maddr
from shoal.protocol.transport import Message, Refused

DOMAIN = "shoal/peer-record/v1"
MAX_RECORD_BYTES = 8 * 1024
MAX_MADDRS = 16
MAX_LIFETIME_S = 600.0
MAX_SKEW_S = 60.0  # how far ahead of ours another peer's clock may be


class PeerStatus(enum.StrEnum):
    """Where a node is in its life (DESIGN 4.9), as others see it."""

    STARTING = "starting"
    CHECKING = "checking"
    JOINING = "joining"
    SYNCING = "syncing"
    WORKING = "working"
    PAUSED = "paused"
    DRAINING = "draining"
    LEFT = "left"


def _peer_id(text: str) -> str:
    peer_id_bytes(text)
    return text


def _listen_address(text: str) -> str:
    if Maddr.parse(text).peer is not None:
        raise ValueError("a record's addresses do not repeat the peer's own /p2p suffix")
    return text


PeerIdText = Annotated[str, Field(max_length=64), AfterValidator(_peer_id)]
RunIdText = Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]
ListenAddress = Annotated[str, Field(max_length=MAX_MADDR_CHARS), AfterValidator(_listen_address)]
UnixSeconds = Annotated[float, Field(ge=0, le=1e11)]


class PeerRecord(Message):
    """One peer's statement about itself. Construction checks everything that needs no clock and no key."""

    model_config = ConfigDict(allow_inf_nan=False)

    run: RunIdText
    peer: PeerIdText
    name: Annotated[str, Field(pattern=r"\A[a-z0-9-]{1,40}\z")]
    maddrs: Annotated[tuple[ListenAddress, ...], Field(max_length=MAX_MADDRS)]  # without the /p2p/PEER suffix
    public_key: Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]  # Ed25519 run key, hex
    stage: Annotated[int, Field(ge=0, lt=256)] | None
    step: Annotated[int, Field(ge=0, le=2**53)]
    status: PeerStatus
    can_feed: bool
    samples_per_s: Annotated[float, Field(ge=0, le=1e12)]
    memory_bytes: Annotated[int, Field(ge=0, le=2**53)]
    counter: Annotated[int, Field(ge=0, le=2**53)]  # rises with every record of this peer: the newer one wins
    issued_at: UnixSeconds
    expires_at: UnixSeconds

    @model_validator(mode="after")
    def _lifetime(self) -> PeerRecord:
        if not 0 < self.expires_at - self.issued_at <= MAX_LIFETIME_S:
            raise ValueError(f"a record lives longer than 0 and at most {MAX_LIFETIME_S:g} s")
        return self


def seal(record: PeerRecord, identity: Identity) -> bytes:
    """The record as bytes for the wire, at most MAX_RECORD_BYTES. Raises ValueError for somebody else's record."""
    if record.peer != identity.peer or record.public_key != identity.public_key.hex():
        raise ValueError("a peer seals records about itself only")
    payload = json.dumps(record.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False)
    data = identity.seal(DOMAIN, payload).to_bytes()
    if len(data) > MAX_RECORD_BYTES:
        raise ValueError(f"the record has {len(data)} bytes, allowed are {MAX_RECORD_BYTES}: give it fewer addresses")
    return data


def open_record(data: bytes, *, now: float, expected_run: str, expected_peer: str | None = None) -> PeerRecord:
    """The record, if all of it holds: size, form, signature, owner, run, lifetime at `now` (unix seconds).

    Raises Refused and nothing else: TOO_LARGE, MALFORMED, BAD_SIGNATURE (also: not the expected peer's), WRONG_RUN,
    EXPIRED (also: issued more than MAX_SKEW_S after `now`)."""
    sealed = Sealed.from_bytes(data, max_bytes=MAX_RECORD_BYTES)
    peer, run_key = sealed.verify(DOMAIN)
    try:
        record = PeerRecord.model_validate_json(sealed.payload)
    except ValidationError as error:
        raise malformed(error) from None
    if record.peer != peer or record.public_key != run_key.hex():
        raise Refused(Reason.BAD_SIGNATURE, "the record is about another peer than its signer")
    if expected_peer is not None and peer != expected_peer:
        raise Refused(Reason.BAD_SIGNATURE, "the record is not from the expected peer")
    if record.run != expected_run:
        raise Refused(Reason.WRONG_RUN, "the record belongs to another run")
    if not now < record.expires_at:
        raise Refused(Reason.EXPIRED, f"the record expired {now - record.expires_at:.0f} s ago")
    if record.issued_at > now + MAX_SKEW_S:
        raise Refused(
            Reason.EXPIRED, f"the record was issued {record.issued_at - now:.0f} s in the future: a clock is wrong"
        )
    return record
