"""The frame: whole or typed, whatever arrives and however it is cut."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol import wire
from shoal.protocol.events import Reason
from shoal.protocol.wire import Decoder, Frame, Kind, WireError

ALL = frozenset(Kind)
BOUND = 4096
FAILURES = {Reason.TORN_STREAM, Reason.BAD_DIGEST, Reason.TOO_LARGE, Reason.MALFORMED}
headers = st.binary(max_size=300)
bodies = st.binary(max_size=BOUND)
kinds = st.sampled_from([Kind.REQUEST, Kind.REPLY])


def decode(data: bytes) -> Frame:
    return wire.decode(data, ALL, max_body_bytes=BOUND)


@given(kind=kinds, header=headers, body=bodies)
def test_what_is_encoded_is_decoded(kind: Kind, header: bytes, body: bytes) -> None:
    assert decode(wire.encode(kind, header, body)) == Frame(kind, header, body)


@given(kind=kinds, header=headers, body=bodies, cuts=st.lists(st.integers(1, 700), min_size=1))
def test_how_the_bytes_are_cut_does_not_matter(kind: Kind, header: bytes, body: bytes, cuts: list[int]) -> None:
    data, at, turn = wire.encode(kind, header, body), 0, 0
    decoder = Decoder(ALL, max_body_bytes=BOUND)
    while decoder.wanted:
        size = min(decoder.wanted, cuts[turn % len(cuts)])
        decoder.feed(data[at : at + size])
        at, turn = at + size, turn + 1
    assert at == len(data) == decoder.received
    assert decoder.frame() == Frame(kind, header, body)


@given(header=headers, body=bodies, data=st.data())
def test_every_flipped_bit_is_found(header: bytes, body: bytes, data: st.DataObject) -> None:
    message = bytearray(wire.encode(Kind.REPLY, header, body))
    bit = data.draw(st.integers(0, 8 * len(message) - 1))
    message[bit // 8] ^= 1 << bit % 8
    with pytest.raises(WireError) as caught:
        decode(bytes(message))
    assert caught.value.reason in FAILURES


@given(header=headers, body=bodies, data=st.data())
def test_every_missing_end_is_torn(header: bytes, body: bytes, data: st.DataObject) -> None:
    message = wire.encode(Kind.REQUEST, header, body)
    with pytest.raises(WireError) as caught:
        decode(message[: data.draw(st.integers(0, len(message) - 1))])
    assert caught.value.reason is Reason.TORN_STREAM


@given(garbage=st.binary(max_size=2000))
def test_garbage_is_never_a_message(garbage: bytes) -> None:
    with pytest.raises(WireError) as caught:
        decode(garbage)
    assert caught.value.reason in FAILURES


@given(prefix=st.binary(max_size=12), rest=st.binary(max_size=500))
def test_garbage_behind_a_good_magic_is_never_a_message(prefix: bytes, rest: bytes) -> None:
    with pytest.raises(WireError):
        decode(wire.MAGIC + b"\x01" + prefix + rest)


def test_bytes_after_the_end_are_malformed() -> None:
    with pytest.raises(WireError) as caught:
        decode(wire.encode(Kind.REQUEST, b"{}") + b"x")
    assert caught.value.reason is Reason.MALFORMED


@pytest.mark.parametrize(
    ("prefix", "reason"),
    [
        (wire.PREFIX.pack(b"SHOA", 1, 0, 0, 2, BOUND + 1), Reason.TOO_LARGE),
        (wire.PREFIX.pack(b"SHOA", 1, 0, 0, 2, 2**64 - 1), Reason.TOO_LARGE),
        (wire.PREFIX.pack(b"SHOA", 1, 0, 0, wire.MAX_HEADER_BYTES + 1, 0), Reason.TOO_LARGE),
        (wire.PREFIX.pack(b"SHOA", 1, 2, 0, 2, 1), Reason.TOO_LARGE),  # a refusal has no body
        (wire.PREFIX.pack(b"SHOA", 2, 0, 0, 2, 0), Reason.MALFORMED),
        (wire.PREFIX.pack(b"SHOA", 1, 3, 0, 2, 0), Reason.MALFORMED),
        (wire.PREFIX.pack(b"SHOA", 1, 0, 1, 2, 0), Reason.MALFORMED),
        (wire.PREFIX.pack(b"HTTP", 1, 0, 0, 2, 0), Reason.MALFORMED),
    ],
)
def test_a_bad_announcement_is_refused_before_anything_else_is_read(prefix: bytes, reason: Reason) -> None:
    decoder = Decoder(ALL, max_body_bytes=BOUND)
    with pytest.raises(WireError) as caught:
        decoder.feed(prefix)
    assert caught.value.reason is reason


def test_a_kind_that_is_not_expected_is_malformed() -> None:
    with pytest.raises(WireError) as caught:
        wire.decode(wire.encode(Kind.REQUEST, b"{}"), frozenset({Kind.REPLY}), max_body_bytes=0)
    assert caught.value.reason is Reason.MALFORMED


def test_an_announced_body_allocates_nothing() -> None:
    decoder = Decoder(ALL, max_body_bytes=1 << 40)
    tracemalloc.start()
    try:
        decoder.feed(wire.PREFIX.pack(b"SHOA", 1, 0, 0, 0, 1 << 40))
        assert decoder.wanted == 1 << 40
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_a_header_above_the_bound_is_not_sent() -> None:
    with pytest.raises(WireError) as caught:
        wire.encode(Kind.REQUEST, bytes(wire.MAX_HEADER_BYTES + 1))
    assert caught.value.reason is Reason.TOO_LARGE


def test_a_decoder_takes_no_more_than_it_wants() -> None:
    decoder = Decoder(ALL, max_body_bytes=BOUND)
    with pytest.raises(ValueError, match="wanted"):
        decoder.feed(bytes(wire.PREFIX.size + 1))
    with pytest.raises(ValueError, match="wanted"):
        decoder.feed(b"")


def test_the_example_in_the_documentation_is_right() -> None:
    text = (Path(__file__).parents[2] / "docs" / "wire.md").read_text()
    example = text.split("```")[1]
    assert bytes.fromhex("".join(example.split())) == wire.encode(Kind.REQUEST, b"{}")
