"""The .clq file: mirrors, sizes, and damage."""

from __future__ import annotations

import hashlib
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipq_ray import codec
from clipq_ray.codec import layers
from clipq_ray.errors import ArtifactError

META = {"architecture": {"name": "lenet5", "kwargs": {"num_classes": 10}}, "classes": 10}


def layer(shape: tuple[int, ...], negative: int, positive: int, zeros: float, seed: int) -> codec.CodedLayer:
    rng = np.random.default_rng(seed)
    codes = rng.integers(-negative, positive + 1, size=shape).astype(np.int16)
    codes[rng.random(shape) < zeros] = 0
    levels = np.sort(rng.normal(size=negative + positive + 1)).astype(np.float32)
    levels = (
        np.concatenate([-np.arange(negative, 0, -1), [0.0], np.arange(1, positive + 1)]).astype(np.float32)
        * 0.1
    )
    return codec.CodedLayer.from_quantized(codes, levels, negative)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 7), min_size=1, max_size=4).map(tuple),
    negative=st.integers(0, 127),
    positive=st.integers(0, 127),
    zeros=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_codes_and_levels_come_back_exactly(
    shape: tuple[int, ...], negative: int, positive: int, zeros: float, seed: int
) -> None:
    before = layer(shape, negative, positive, zeros, seed)
    packed = codec.encode(codec.Packed(META, {"w": before}))
    after = codec.decode(packed).tensors["w"]
    assert isinstance(after, codec.CodedLayer)
    np.testing.assert_array_equal(after.codes, before.codes)
    np.testing.assert_array_equal(after.levels, before.levels)
    assert after.negative == before.negative
    assert codec.entries(packed)[0].bytes == codec.layer_bytes(before)


def decode_by_the_specification(blob: bytes, count: int) -> list[int]:
    """SPEC.md in plain integers, without constriction: symbols of a coder-q blob."""
    negative, positive = blob[0], blob[1]
    at = 2 + 4 * (negative + positive)
    table = []
    for _ in range(negative + positive):
        value = shift = 0
        while True:
            byte = blob[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        table.append(value)
    table.append(2**14 - sum(table))
    words = list(struct.unpack(f"<{(len(blob) - at) // 4}I", blob[at:]))
    state = (words.pop() << 32 | words.pop()) if len(words) > 1 else words.pop()
    result = []
    for _ in range(count):
        quantile = state & (2**24 - 1)
        low = symbol = 0
        while quantile >= low + (table[symbol] << 10):
            low += table[symbol] << 10
            symbol += 1
        width = table[symbol] << 10
        state = (state >> 24) * width + quantile - low
        if state < 2**32 and words:
            state = state << 32 | words.pop()
        result.append(symbol - negative)
    return result


@pytest.mark.parametrize("seed", range(8))
def test_an_independent_decoder_in_integers_reads_the_same_codes(seed: int) -> None:
    before = layer((50, 40), 1 + seed, 2 + 3 * seed, 0.1 * seed, seed)
    assert decode_by_the_specification(layers.write(before), 2000) == before.codes.reshape(-1).tolist()


def test_a_large_layer_takes_at_most_one_percent_over_its_entropy() -> None:
    before = layer((512, 512), 3, 4, 0.8, 1)
    p = np.unique(before.codes, return_counts=True)[1] / before.codes.size
    entropy = -(p * np.log2(p)).sum() * before.codes.size / 8
    assert codec.layer_bytes(before) < 1.01 * entropy + 64


def test_other_tensors_come_back_at_the_stated_precision() -> None:
    rng = np.random.default_rng(0)
    plain = rng.normal(size=100).astype(np.float32)
    tiny = np.array([1e-30, 1.0], dtype=np.float32)
    integers = np.arange(5)
    packed = codec.encode(codec.Packed({}, {"a": plain, "tiny": tiny, "i": integers}))
    after = codec.decode(packed).tensors
    assert np.all(np.abs(after["a"] - plain) <= 2.0**-10 * np.abs(plain))
    np.testing.assert_array_equal(after["tiny"], tiny)
    np.testing.assert_array_equal(after["i"], integers)
    np.testing.assert_array_equal(codec.stored(plain), after["a"])


def small_file() -> bytes:
    return codec.encode(codec.Packed(META, {"w": layer((4, 5), 1, 2, 0.5, 3), "b": np.ones(3, np.float32)}))


def test_every_truncation_is_a_named_error() -> None:
    data = small_file()
    for size in range(len(data)):
        with pytest.raises(ArtifactError):
            codec.decode(data[:size])


def test_every_flipped_byte_is_a_named_error() -> None:
    data = small_file()
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 0x55
        with pytest.raises(ArtifactError):
            codec.decode(bytes(damaged))


def test_a_header_that_promises_more_than_its_bytes_carry_allocates_nothing() -> None:
    blob = layers.write(layer((4, 5), 1, 2, 0.5, 3))
    with pytest.raises(ArtifactError, match="more codes"):
        layers.read(blob, (2**20, 2**13))


def test_some_tensors_are_decoded_alone() -> None:
    assert list(codec.decode(small_file(), ["b"]).tensors) == ["b"]
    with pytest.raises(ArtifactError, match="nope"):
        codec.decode(small_file(), ["nope"])


def test_the_same_content_gives_the_same_bytes_in_every_version_of_the_code() -> None:
    """The golden bytes of version 1 and its coders: they change only where a new coder takes fewer bytes (`test_promises`: old files open)."""
    data = small_file()
    assert data[:4] == b"CLQ\x01"
    assert zlib.crc32(data[12 : 12 + int.from_bytes(data[4:8], "little")]) == int.from_bytes(
        data[8:12], "little"
    )
    assert (
        hashlib.sha256(data).hexdigest() == "f345f84971230906d85a5c7d5c8a0dabdb567a4486d9eb66ad1171844c245176"
    )
