"""One suite for every codec of the registry, then what is special about each."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.protocol.codecs import CODECS, HEADER_BYTES, decode, encode, max_encoded_bytes, pack, unpack
from shoal.protocol.codecs.blockwise import BLOCK, dynamic_map
from shoal.protocol.events import Reason
from shoal.protocol.transport import Refused

FLOATS = (torch.float32, torch.float64)
SHAPES = [(), (0,), (1,), (7,), (BLOCK,), (BLOCK + 1,), (3, 0, 2), (2, 3, 5, 7), (4 * BLOCK,), (10_007,)]

each_codec = pytest.mark.parametrize("codec", sorted(CODECS))
each_float = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def values(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Heavy-tailed values (Student t with 3 degrees of freedom), as gradients are."""
    g = torch.Generator().manual_seed(seed)
    chi = torch.randn((3, *shape), generator=g, dtype=torch.float64).square().mean(0).sqrt()
    return (scale * torch.randn(shape, generator=g, dtype=torch.float64) / chi).to(dtype)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def refusal(data: bytes, max_elements: int = 100_000, **expected: object) -> Reason:
    with pytest.raises(Refused) as refused:
        decode(data, max_elements=max_elements, **expected)  # type: ignore[arg-type]
    return refused.value.reason


def tolerance(codec: str, x: Tensor) -> Tensor:
    """The error that each codec declares, per value, float64, the shape of x."""
    x = x.double()
    if codec == "none":
        return torch.zeros_like(x)
    if codec == "fp16":
        return torch.maximum(x.abs() * 2.0**-11, torch.tensor(2.0**-25, dtype=torch.float64))
    flat = x.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    return (0.0076 * blocks.abs().amax(1, keepdim=True)).expand_as(blocks).reshape(-1)[: flat.numel()].view(x.shape)


# --- the conformance suite -------------------------------------------------------------------------------------------
@each_codec
@each_float
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip_keeps_shape_dtype_and_values_within_the_declared_error(codec, dtype, shape):
    x = values(*shape, dtype=dtype)
    data = encode(x, codec)
    y = decode(data, max_elements=x.numel(), expect_shape=shape, expect_dtype=dtype, allow_codecs=(codec,))
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert ((y.double() - x.double()).abs() <= tolerance(codec, x)).all()
    assert len(data) <= max_encoded_bytes(shape, dtype, codec)


@each_codec
@each_float
@pytest.mark.parametrize("scale", [1e-30, 1e-7, 1.0, 1e4])
def test_encoding_is_deterministic_and_encoding_the_decoded_changes_no_byte(codec, dtype, scale):
    x = values(5_003, dtype=dtype, scale=scale)
    data = encode(x, codec)
    assert encode(x.clone(), codec) == data
    assert encode(decode(data, max_elements=5_003), codec) == data


@each_codec
def test_the_decoded_tensor_owns_writable_memory(codec):
    data = bytearray(encode(values(300), codec))
    y = decode(memoryview(data), max_elements=300)
    before = bits(y)
    data[HEADER_BYTES:] = bytes(len(data) - HEADER_BYTES)
    assert bits(y) == before
    y.add_(1)
    assert y.untyped_storage().nbytes() < 2 * bits(y).__sizeof__()  # no hidden larger buffer behind a small tensor


@each_codec
def test_a_strided_or_differentiable_tensor_encodes_like_its_plain_copy(codec):
    x = values(40, 30)
    assert encode(x.t(), codec) == encode(x.t().contiguous(), codec)
    assert encode(x.clone().requires_grad_(), codec) == encode(x, codec)


@each_codec
@each_float
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, 299])
def test_what_is_not_finite_is_refused_by_the_sender_and_a_sender_that_does_not_check_by_the_receiver(
    codec, dtype, bad, at
):
    x = values(300, dtype=dtype)
    x[at] = bad
    with pytest.raises(Refused) as refused:
        encode(x, codec)
    assert refused.value.reason is Reason.NOT_FINITE
    assert refusal(encode(x, codec, check=False)) is Reason.NOT_FINITE


@each_codec
def test_integers_travel_bit_exact_under_every_codec_name(codec):
    x = torch.tensor([[0, -1, 2**62], [-(2**63), 2**63 - 1, 255]])
    y = decode(encode(x, codec), max_elements=6, expect_dtype=torch.int64, allow_codecs=(codec,))
    assert torch.equal(x, y)


@each_codec
def test_every_bound_and_expectation_is_checked(codec):
    data = encode(values(10, 30), codec)
    assert refusal(data, max_elements=299) is Reason.TOO_LARGE
    assert refusal(data, expect_shape=(300,)) is Reason.MALFORMED
    assert refusal(data, expect_dtype=torch.float64) is Reason.MALFORMED
    assert refusal(data, allow_codecs=[name for name in CODECS if name != codec]) is Reason.MALFORMED
    assert refusal(data + b"\0") is Reason.MALFORMED
    for cut in (0, 1, HEADER_BYTES - 1, HEADER_BYTES, len(data) - 1):
        assert refusal(data[:cut]) is Reason.MALFORMED


@each_codec
@pytest.mark.parametrize(
    "dims", [(2**32 - 1,) * 4, (2**32 - 1, 0, 2**32 - 1, 2**32 - 1), (2**20, 2**20, 0, 0)], ids=str
)
def test_huge_announced_shapes_are_refused_before_anything_is_allocated(codec, dims):
    header = struct.pack("<4sBBBB4IQ", b"SHT1", CODECS[codec].number, 1, sum(d > 0 for d in dims) or 4, 0, *dims, 0)
    assert refusal(header, max_elements=2**30) in (Reason.TOO_LARGE, Reason.MALFORMED)


@each_codec
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_are_refused_or_decode_to_finite_numbers_and_nothing_else_happens(codec, data):
    good = bytearray(encode(values(2, 3, dtype=data.draw(st.sampled_from(FLOATS))), codec))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    damaged = bytes(good[: data.draw(st.integers(0, len(good)))]) if data.draw(st.booleans()) else bytes(good)
    try:
        y = decode(damaged, max_elements=64)
    except Refused as refused:
        reason = refused.reason
    else:
        assert y.numel() <= 64 and y.isfinite().all()
        return
    assert reason in (Reason.MALFORMED, Reason.TOO_LARGE, Reason.NOT_FINITE)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=96), st.booleans())
def test_random_bytes_are_refused(noise, with_magic):
    with pytest.raises(Refused):
        decode(b"SHT1" + noise if with_magic and len(noise) < HEADER_BYTES - 4 else noise, max_elements=1_000)


@each_codec
@each_float
def test_the_same_bytes_and_the_same_values_on_cpu_and_gpu(codec, dtype):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here: equality of bytes between CPU and GPU is not tested")
    for n, scale in ((100_003, 1.0), (BLOCK * 64, 1e-20), (BLOCK * 64, 1e30)):
        x = values(n, dtype=dtype, scale=scale)
        data = encode(x, codec)
        assert encode(x.cuda(), codec) == data
        y = decode(data, max_elements=n, device="cuda")
        assert y.is_cuda and bits(y.cpu()) == bits(decode(data, max_elements=n))


def test_names_and_numbers_are_unique_and_these_are_all():
    assert {name: codec.number for name, codec in CODECS.items()} == {"none": 1, "fp16": 2, "blockwise8": 3}
    assert all(name == codec.name for name, codec in CODECS.items())


def test_what_no_codec_takes_is_a_programming_error_with_a_clear_message():
    with pytest.raises(KeyError):
        encode(torch.zeros(1), "zip")
    with pytest.raises(TypeError, match="bfloat16"):
        encode(torch.zeros(1, dtype=torch.bfloat16), "none")
    with pytest.raises(ValueError, match="dimensions"):
        encode(torch.zeros(1, 1, 1, 1, 1), "none")


# --- none ------------------------------------------------------------------------------------------------------------
@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=40))
def test_none_is_bit_exact_for_every_float(numbers):
    x = torch.tensor(numbers, dtype=torch.float64)  # subnormal numbers and -0.0 among them
    assert bits(decode(encode(x, "none"), max_elements=40)) == bits(x)


def test_the_wire_format_is_pinned():
    assert encode(torch.tensor([[1.0, -2.0]]), "none").hex() == (
        "53485431" + "01010200" + "0100000002000000" + "00" * 8 + "0800000000000000" + "0000803f000000c0"
    )


# --- fp16 ------------------------------------------------------------------------------------------------------------
@each_float
def test_fp16_clamps_to_its_range(dtype):
    y = decode(encode(torch.tensor([1e30, -1e30, 65_520.0, 1.0], dtype=dtype), "fp16"), max_elements=4)
    assert y.tolist() == [65_504.0, -65_504.0, 65_504.0, 1.0] and y.dtype == dtype


def test_fp16_takes_half_the_bytes_and_blockwise8_a_quarter():
    sizes = [
        max_encoded_bytes((2**20,), torch.float32, codec) - HEADER_BYTES for codec in ("none", "fp16", "blockwise8")
    ]
    assert sizes == [2**22, 2**21, 2**20 + 4 * 2**20 // BLOCK]


# --- blockwise8 ------------------------------------------------------------------------------------------------------
def test_the_dynamic_map_is_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    theirs = functional.create_dynamic_map().sort().values
    assert torch.allclose(dynamic_map(), theirs, rtol=1e-6, atol=0)
    assert dynamic_map().unique().numel() == 256 and dynamic_map()[-1] == 1


def test_blockwise8_is_as_accurate_as_bitsandbytes_at_the_same_block_size():
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    x = values(2**16)
    theirs = functional.dequantize_blockwise(*functional.quantize_blockwise(x, blocksize=BLOCK))
    ours = decode(encode(x, "blockwise8"), max_elements=2**16)
    assert (ours - x).norm() <= 1.01 * (theirs - x).norm()


@pytest.mark.parametrize("scale", [1.0, -1.0, 3e38, -1e-29, 0.1])
def test_blockwise8_decodes_every_map_entry_and_the_extreme_of_a_block_exactly(scale):
    x = dynamic_map() * torch.tensor(scale)
    assert bits(decode(encode(x, "blockwise8"), max_elements=256)) == bits(x)


def test_blockwise8_error_stays_inside_its_block():
    x = torch.cat([torch.full((BLOCK,), 1e6), values(BLOCK)])
    y = decode(encode(x, "blockwise8"), max_elements=2 * BLOCK)
    assert (y[BLOCK:] - x[BLOCK:]).abs().max() <= 0.0076 * x[BLOCK:].abs().max()


@each_float
def test_blockwise8_of_zeros_and_of_vanishing_values_is_zero(dtype):
    for x in (torch.zeros(300, dtype=dtype), torch.full((300,), 1e-35, dtype=dtype)):
        assert not decode(encode(x, "blockwise8"), max_elements=300).any()


def test_the_recorded_error_of_the_block_size_still_holds():
    normal = torch.randn(2**18, generator=torch.Generator().manual_seed(0))
    for x, percent in ((normal, 1.08), (values(2**18), 1.44)):
        error = decode(encode(x, "blockwise8"), max_elements=2**18) - x
        assert 100 * float(error.norm() / x.norm()) == pytest.approx(percent, rel=0.05)


# --- several byte strings in one body --------------------------------------------------------------------------------
@given(st.lists(st.binary(max_size=20), max_size=6))
def test_pack_round_trips(parts):
    assert [bytes(part) for part in unpack(pack(parts), max_parts=6)] == parts


@given(st.binary(max_size=60), st.booleans())
def test_unpack_refuses_what_pack_did_not_make(noise, with_magic):
    data = b"SHP1" + noise if with_magic else noise
    try:
        parts = unpack(data, max_parts=3)
    except Refused as refused:
        reason = refused.reason
    else:
        assert pack(parts) == data
        return
    assert reason in (Reason.MALFORMED, Reason.TOO_LARGE)


def test_unpack_bounds_the_number_of_parts_before_it_reads_them():
    assert len(unpack(pack([b"a", b"b"]), max_parts=2)) == 2
    for data in (pack([b"a", b"b"]), b"SHP1" + b"\xff" * 4):
        with pytest.raises(Refused) as refused:
            unpack(data, max_parts=1)
        assert refused.value.reason is Reason.TOO_LARGE


def test_tensors_travel_in_packs_without_alignment():
    x = values(5, dtype=torch.float64)
    _, tensor = unpack(pack([b"x", encode(x, "none")]), max_parts=2)
    assert torch.equal(decode(tensor, max_elements=5), x)
