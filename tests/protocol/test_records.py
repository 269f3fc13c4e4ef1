"""A record is accepted from its subject, for this run, while it is fresh; everything else is refused typed."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shoal.protocol.events import Reason
from shoal.protocol.identity import Identity, Sealed, peer_id_of
from shoal.protocol.records import DOMAIN, MAX_RECORD_BYTES, PeerRecord, PeerStatus, open_record, seal
from shoal.protocol.transport import Refused

RUN, NOW = "ab" * 32, 1_000_000.0


@pytest.fixture(scope="module")
def alice(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return Identity.create(tmp_path_factory.mktemp("a") / "k")


@pytest.fixture(scope="module")
def bob(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return Identity.create(tmp_path_factory.mktemp("b") / "k")


def fields(identity: Identity, **change: Any) -> dict[str, Any]:
    return {
        "run": RUN, "peer": identity.peer, "name": identity.name, "maddrs": ("/ip4/127.0.0.1/tcp/4001",),
        "public_key": identity.public_key.hex(), "stage": 1, "step": 7, "status": PeerStatus.WORKING, "can_feed": True,
        "samples_per_s": 12.5, "memory_bytes": 1 << 30, "counter": 3, "issued_at": NOW, "expires_at": NOW + 60,
        **change,
    }  # fmt: skip


def record(identity: Identity, **change: Any) -> PeerRecord:
    return PeerRecord(**fields(identity, **change))


def reason_of(data: bytes, **change: Any) -> Reason:
    with pytest.raises(Refused) as caught:
        open_record(data, **{"now": NOW, "expected_run": RUN, **change})
    assert "\n" not in caught.value.detail and len(caught.value.detail) <= 200
    return caught.value.reason


def forged(identity: Identity, **change: Any) -> bytes:
    """A record whose signature is right and whose content need not be."""
    payload = {**fields(identity, status="working"), **change}
    return identity.seal(DOMAIN, json.dumps({k: v for k, v in payload.items() if v is not ...})).to_bytes()


def test_open_inverts_seal(alice: Identity) -> None:
    for one in (record(alice), record(alice, stage=None, maddrs=(), status=PeerStatus.LEFT, samples_per_s=0.0)):
        assert open_record(seal(one, alice), now=NOW, expected_run=RUN, expected_peer=alice.peer) == one


def test_the_forgeries_below_are_right_up_to_their_fault(alice: Identity) -> None:
    assert open_record(forged(alice), now=NOW, expected_run=RUN) == record(alice)


def test_the_largest_valid_record_fits(alice: Identity) -> None:
    address = "/dns6/" + ".".join(["a" * 61] * 3)[:184] + "/tcp/65535"
    largest = record(
        alice, name="x" * 40, maddrs=(address,) * 16, step=2**53, samples_per_s=0.1234567890123456e12, counter=2**53,
        memory_bytes=2**53, issued_at=1e11 - 599.1234567, expires_at=1e11,
    )  # fmt: skip
    assert len(address) == 200 and len(seal(largest, alice)) <= MAX_RECORD_BYTES


@pytest.mark.parametrize(
    "change",
    [
        {"run": "ab"}, {"run": RUN + "\n"}, {"peer": "x" * 46}, {"name": "\x1b[31m"}, {"name": ""}, {"name": "a" * 41},
        {"maddrs": ["/ip4/1.2.3.4/tcp/1"] * 17}, {"maddrs": ["/ip4/0.0.0.0/tcp/1"]}, {"maddrs": "x"},
        {"maddrs": [f"/ip4/1.2.3.4/tcp/1/p2p/{peer_id_of(b'x')}"]}, {"public_key": "00"}, {"stage": -1}, {"stage": 256},
        {"stage": "1"}, {"stage": 1.0}, {"step": -1}, {"step": 2**60}, {"step": True}, {"status": "dancing"},
        {"can_feed": 1}, {"samples_per_s": -1.0}, {"samples_per_s": float("nan")}, {"samples_per_s": float("inf")},
        {"samples_per_s": 1e300}, {"memory_bytes": -1}, {"memory_bytes": 10**400}, {"counter": -1},
        {"issued_at": float("nan")}, {"expires_at": float("inf")}, {"expires_at": NOW + 601}, {"expires_at": NOW},
        {"expires_at": NOW - 1}, {"extra": 1}, {"step": ...}, {"can_feed": None},
    ],
    ids=repr,
)  # fmt: skip
def test_wrong_content_is_malformed_however_well_it_is_signed(alice: Identity, change: dict[str, Any]) -> None:
    assert reason_of(forged(alice, **change)) is Reason.MALFORMED
    with pytest.raises((ValidationError, TypeError)):
        PeerRecord(**{k: v for k, v in fields(alice, **change).items() if v is not ...})


def test_somebody_else_s_record_is_refused(alice: Identity, bob: Identity) -> None:
    with pytest.raises(ValueError):
        seal(record(alice), bob)
    assert reason_of(forged(bob, peer=alice.peer)) is Reason.BAD_SIGNATURE
    assert reason_of(forged(bob, public_key=alice.public_key.hex())) is Reason.BAD_SIGNATURE
    assert reason_of(seal(record(bob), bob), expected_peer=alice.peer) is Reason.BAD_SIGNATURE


def test_a_signature_under_another_certificate_or_domain_is_refused(alice: Identity, bob: Identity) -> None:
    good = Sealed.from_bytes(seal(record(alice), alice), max_bytes=MAX_RECORD_BYTES)
    assert reason_of(Sealed(good.payload, bob.certificate, good.signature).to_bytes()) is Reason.BAD_SIGNATURE
    assert reason_of(alice.seal("shoal/other/v1", good.payload).to_bytes()) is Reason.BAD_SIGNATURE


def test_a_record_of_another_run_is_refused(alice: Identity) -> None:
    assert reason_of(seal(record(alice, run="cd" * 32), alice)) is Reason.WRONG_RUN


def test_a_record_holds_from_its_issue_to_its_expiry_with_a_minute_of_skew(alice: Identity) -> None:
    data = seal(record(alice), alice)
    for now in (NOW - 60, NOW, NOW + 59.999):
        assert open_record(data, now=now, expected_run=RUN).counter == 3
    for now in (NOW - 60.001, NOW + 60, NOW + 1e9, float("nan")):
        assert reason_of(data, now=now) is Reason.EXPIRED


def test_size_is_checked_before_anything_is_parsed() -> None:
    assert reason_of(b"[" * (MAX_RECORD_BYTES + 1)) is Reason.TOO_LARGE
    assert reason_of(b"[" * MAX_RECORD_BYTES) is Reason.MALFORMED


@settings(max_examples=150, deadline=None, database=None)
@given(data=st.data())
def test_no_flipped_bit_cut_or_insertion_is_accepted(alice: Identity, data: st.DataObject) -> None:
    good = seal(record(alice), alice)
    at = data.draw(st.integers(0, len(good) - 1))
    bad = data.draw(
        st.one_of(
            st.integers(0, 7).map(lambda bit: good[:at] + bytes([good[at] ^ (1 << bit)]) + good[at + 1 :]),
            st.just(good[:at]),
            st.binary(min_size=1, max_size=20).map(lambda extra: good[:at] + extra + good[at:]),
        )
    )
    reason_of(bad)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=10), inner, max_size=4)),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, database=None)
@given(noise=st.binary(max_size=500), name=st.sampled_from(sorted(PeerRecord.model_fields)), value=json_values)
def test_random_bytes_and_random_values_raise_nothing_but_refused(
    alice: Identity, noise: bytes, name: str, value: Any
) -> None:
    text = base64.b64encode(noise).decode()
    frames = [
        noise,
        json.dumps({"certificate": text, "payload": "{}", "signature": text}).encode(),
        alice.seal(DOMAIN, noise.decode("latin-1")).to_bytes(),
    ]
    for frame in frames:
        reason_of(frame)
    try:
        opened = open_record(forged(alice, **{name: value}), now=NOW, expected_run=RUN)
    except Refused:
        return
    assert opened.model_dump(mode="json")[name] == value
