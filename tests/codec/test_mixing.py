"""Coder "m": mirrors, an independent decoder, damage, golden bytes."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest
import spec_coders
from crafted import one_tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from clipq_ray import codec
from clipq_ray.codec import layers, mixing
from clipq_ray.errors import ArtifactError


def codes_of(
    shape: tuple[int, ...], negative: int, positive: int, zeros: float, seed: int
) -> npt.NDArray[np.int16]:
    """Codes with some structure: rows and places of different spread."""
    rng = np.random.default_rng(seed)
    spread = rng.gamma(2.0, size=(*shape[:1], *(1 for _ in shape[1:])))
    codes = np.rint(rng.laplace(size=shape) * spread * (negative + positive) / 6)
    codes = np.where(rng.random(shape) < zeros, 0, codes)
    return np.asarray(np.clip(codes, -negative, positive)).astype(np.int16)


@settings(max_examples=150, deadline=None)
@given(
    shape=st.lists(st.integers(0, 7), min_size=0, max_size=5).map(tuple),
    negative=st.integers(0, 255),
    positive=st.integers(0, 255),
    zeros=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_codes_come_back_exactly(
    shape: tuple[int, ...], negative: int, positive: int, zeros: float, seed: int
) -> None:
    before = codes_of(shape, negative, positive, zeros, seed)
    blob = mixing.encode(before, negative, positive)
    after = mixing.decode(blob, shape, negative, positive)
    assert after.dtype == np.int16
    assert after.shape == shape
    np.testing.assert_array_equal(after, before)
    if before.size:
        with pytest.raises(ArtifactError):
            mixing.decode(blob + b"\0", shape, negative, positive)


@pytest.mark.parametrize(
    ("shape", "negative", "positive", "zeros"),
    [
        ((9, 8, 3, 3), 1, 2, 0.5),
        ((9, 8, 3, 3), 7, 8, 0.3),
        ((5, 4, 5, 5), 255, 255, 0.0),
        ((30, 20), 3, 0, 0.8),
        ((6, 1, 7), 0, 40, 0.1),
        ((3, 2, 6, 6), 2, 3, 0.4),
        ((2, 2, 2, 3, 4), 3, 3, 0.4),
        ((2, 1, 1, 1100), 1, 1, 0.4),
        ((40,), 4, 4, 0.2),
        ((), 1, 1, 0.0),
    ],
)
def test_an_independent_decoder_reads_the_same_codes(
    shape: tuple[int, ...], negative: int, positive: int, zeros: float
) -> None:
    before = codes_of(shape, negative, positive, zeros, 1)
    blob = mixing.encode(before, negative, positive)
    assert spec_coders.codes("m", blob, shape, (negative, positive)) == before.reshape(-1).tolist()


@pytest.mark.parametrize("code", [-255, 0, 255])
def test_a_constant_layer_costs_almost_nothing(code: int) -> None:
    before = np.full((64, 64, 3, 3), code, np.int16)
    blob = mixing.encode(before, 255, 255)
    assert len(blob) < 160
    np.testing.assert_array_equal(mixing.decode(blob, before.shape, 255, 255), before)


def test_codes_that_are_as_long_as_can_be_come_back() -> None:
    rng = np.random.default_rng(0)
    before = np.where(np.arange(4000) < 3000, 1, rng.integers(-255, 256, 4000)).astype(np.int16)
    blob = mixing.encode(before, 255, 255)
    np.testing.assert_array_equal(mixing.decode(blob, (4000,), 255, 255), before)


def test_rows_and_neighbours_of_different_spread_make_a_layer_smaller() -> None:
    before = codes_of((64, 32, 3, 3), 3, 4, 0.3, 1)
    layer = codec.CodedLayer(before, np.arange(-3, 5).astype(np.float32), 3)
    coder, blob = layers.smallest(layer, "small")
    assert coder == "mh"
    assert len(blob) < 0.97 * len(layers.write(layer))
    np.testing.assert_array_equal(layers.read(blob, before.shape, coder).codes, before)


def test_damaged_bytes_decode_or_are_a_named_error() -> None:
    before = codes_of((12, 9, 3, 3), 5, 4, 0.4, 2)
    blob = mixing.encode(before, 5, 4)
    rng = np.random.default_rng(3)
    refused = 0
    for trial in range(400):
        damaged = bytearray(blob)
        for at in rng.integers(0, len(blob), 1 + trial % 3):
            damaged[at] = rng.integers(256)
        if trial % 4 == 1:
            damaged = bytearray(rng.bytes(len(blob)))
        data = bytes(damaged[: len(blob) - (trial % 5) * (trial % 7)])
        try:
            after = mixing.decode(data, before.shape, 5, 4)
            assert after.min() >= -5
            assert after.max() <= 4
        except ArtifactError:
            refused += 1
    assert refused > 200


@settings(max_examples=200, deadline=None)
@given(
    blob=st.binary(max_size=40),
    shape=st.lists(st.integers(0, 40), max_size=4).map(tuple),
    sides=st.tuples(st.integers(0, 255), st.integers(0, 255)),
)
def test_any_bytes_decode_or_are_a_named_error(
    blob: bytes, shape: tuple[int, ...], sides: tuple[int, int]
) -> None:
    try:
        after = mixing.decode(blob, shape, *sides)
    except ArtifactError:
        return
    assert mixing.decode(blob, shape, *sides).tolist() == after.tolist()


def test_every_truncation_is_a_named_error() -> None:
    before = codes_of((6, 5, 3, 3), 2, 2, 0.4, 2)
    blob = mixing.encode(before, 2, 2)
    for size in range(len(blob)):
        with pytest.raises(ArtifactError):
            mixing.decode(blob[:size], before.shape, 2, 2)


@pytest.mark.parametrize(
    ("blob", "shape", "negative", "positive"),
    [
        (bytes(8), (4,), 1, 1),
        (b"", (4,), 1, 1),
        (b"\x01\x01", (2**33,), 1, 1),
        (b"\x01\x01\x01", (1, 1, 2**20, 2**10), 1, 1),
        (b"\x01", (0,), 1, 1),
        (b"\x01\x01", (4,), 256, 1),
        (b"\x01\x01", (4,), 1, -1),
    ],
)
def test_what_no_encoder_writes_is_a_named_error(
    blob: bytes, shape: tuple[int, ...], negative: int, positive: int
) -> None:
    with pytest.raises(ArtifactError):
        mixing.decode(blob, shape, negative, positive)


def test_codes_outside_of_their_sides_are_a_named_error() -> None:
    with pytest.raises(ArtifactError, match="expected codes"):
        mixing.encode(np.array([0, 3], np.int16), 1, 2)


def test_an_unknown_coder_is_named() -> None:
    layer = codec.CodedLayer(np.ones((2, 2), np.int16), np.array([0, 1], np.float32), 0)
    data = codec.encode(codec.Packed({}, {"w": layer}))
    assert codec.decode(data).tensors["w"].codes.tolist() == [[1, 1], [1, 1]]  # type: ignore[union-attr]
    for version in (1, 2, 3):
        with pytest.raises(ArtifactError, match="this file needs coder 'zz'; use a newer clipq_ray"):
            codec.decode(one_tensor([0], "zz", b"", version))


def test_the_same_codes_give_the_same_bytes_forever() -> None:
    """Golden bytes; a change here breaks files out there."""
    at = np.arange(16 * 8 * 9)
    codes = np.where(at * 7919 % 11 < 5, 0, at * at * 104729 % 97 % 12 - 5).astype(np.int16)
    blob = mixing.encode(codes.reshape(16, 8, 3, 3), 5, 6)
    assert (
        hashlib.sha256(blob).hexdigest() == "086ea0925dc3288b6e3dc0ba33768a0e990f55aa47cf265db1c0db4445026939"
    )


def test_files_without_coder_m_open_without_it() -> None:
    program = (
        "import sys; from clipq_ray import codec; from clipq_ray.codec import layers; import numpy as np;"
        "layer = codec.CodedLayer(np.ones((2, 2), np.int16), np.array([0, 1], np.float32), 0);"
        "layers.read(layers.write(layer), (2, 2)); print('clipq_ray.codec.mixing' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
