"""Coder "a": codes come back, an independent decoder reads them, damage is a named error, and it pays."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import spec_coders
from hypothesis import given, settings
from hypothesis import strategies as st

from clipq_ray.codec import adaptive, coders, layers, static
from clipq_ray.codec.layers import CodedLayer
from clipq_ray.errors import ArtifactError


def codes_of(
    shape: tuple[int, ...], negative: int, positive: int, seed: int, zeros: float = 0.6
) -> npt.NDArray[np.int16]:
    """Codes whose spread differs by row and by column."""
    random = np.random.default_rng(seed)
    spread = random.uniform(0.3, 2.0, shape[:1] + (1,) * (len(shape) - 1)) if shape else 1.0
    values = random.normal(0.0, 1.0, shape) * spread * max(negative, positive, 1) / 2
    result = np.where(random.random(shape) < zeros, 0, np.rint(values))
    return np.clip(result, -negative, positive).astype(np.int16)


SHAPES = st.sampled_from(
    [(), (1,), (300,), (20, 30), (0, 4), (8, 4, 3, 3), (6, 5, 1, 1), (5, 3, 5, 5), (4, 3, 7), (2, 2, 40, 40)]
)


@settings(max_examples=60, deadline=None)
@given(
    shape=SHAPES,
    negative=st.integers(0, 255),
    positive=st.integers(0, 255),
    zeros=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_codes_come_back_exactly(
    shape: tuple[int, ...], negative: int, positive: int, zeros: float, seed: int
) -> None:
    before = codes_of(shape, negative, positive, seed, zeros)
    blob = adaptive.encode(before, negative, positive)
    np.testing.assert_array_equal(adaptive.decode(blob, shape, negative, positive), before)


@pytest.mark.parametrize("sides", [(1, 2), (0, 3), (3, 4), (7, 8), (100, 155)])
@pytest.mark.parametrize("shape", [(40, 30), (20, 9, 3, 3), (30, 7, 1, 1), (3, 2, 33, 33)])
def test_an_independent_decoder_reads_the_same_codes(shape: tuple[int, ...], sides: tuple[int, int]) -> None:
    before = codes_of(shape, *sides, seed=len(shape) + sides[0])
    blob = adaptive.encode(before, *sides)
    assert spec_coders.codes("a", blob, shape, sides) == before.reshape(-1).tolist()


def test_every_truncation_is_a_named_error() -> None:
    before = codes_of((10, 6, 3, 3), 2, 2, 5)
    blob = adaptive.encode(before, 2, 2)
    for size in range(len(blob)):
        with pytest.raises(ArtifactError):
            adaptive.decode(blob[:size], before.shape, 2, 2)
    with pytest.raises(ArtifactError, match="leave bytes over"):
        adaptive.decode(blob + b"\1\0", before.shape, 2, 2)


@settings(max_examples=300, deadline=None)
@given(
    blob=st.binary(min_size=0, max_size=60),
    shape=SHAPES,
    sides=st.tuples(st.integers(0, 255), st.integers(0, 255)),
)
def test_any_bytes_decode_or_are_a_named_error(
    blob: bytes, shape: tuple[int, ...], sides: tuple[int, int]
) -> None:
    try:
        after = adaptive.decode(blob, shape, *sides)
    except ArtifactError:
        return
    assert after.shape == shape
    assert not after.size or (after.min() >= -sides[0] and after.max() <= sides[1])


def test_more_codes_than_bytes_can_carry_are_refused_before_anything_is_allocated() -> None:
    with pytest.raises(ArtifactError, match="more codes than its bytes"):
        adaptive.decode(b"\1\1\1\1", (1 << 20, 1 << 14), 1, 1)


def test_rows_and_columns_of_different_spread_make_a_layer_smaller() -> None:
    before = codes_of((64, 32, 3, 3), 3, 4, 1, zeros=0.0)
    assert len(adaptive.encode(before, 3, 4)) < 0.98 * len(static.encode(before, 3, 4))


def test_the_fast_profile_writes_by_it() -> None:
    before = CodedLayer(codes_of((32, 16, 3, 3), 1, 2, 3), np.array([-0.3, 0, 0.1, 0.3], np.float32), 1)
    coder, blob = layers.smallest(before)
    assert coder == "a"
    np.testing.assert_array_equal(layers.read(blob, before.codes.shape, coder).codes, before.codes)
    assert layers.smallest(before, "fast") == (coder, blob)


@pytest.mark.parametrize(
    ("shape", "sides", "profile", "tried"),
    [
        ((4, 5), (1, 2), "fast", "a"),
        ((4, 5), (1, 2), "small", "am"),
        ((300, 300), (1, 2), "small", "am"),
        ((4, 5), (0, 0), "small", "q"),
        ((0, 5), (1, 2), "small", "q"),
        ((1, 2**20 + 1), (1, 2), "small", "q"),
    ],
)
def test_what_a_profile_tries(
    shape: tuple[int, ...], sides: tuple[int, int], profile: Any, tried: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    encode = coders.encode
    monkeypatch.setattr(coders, "encode", lambda letter, *rest: found.append(letter) or encode(letter, *rest))
    coders.smallest(codes_of(shape, *sides, seed=0), *sides, profile)
    assert "".join(found) == tried


def test_levels_that_float16_holds_take_two_bytes() -> None:
    before = CodedLayer(codes_of((32, 16, 3, 3), 1, 2, 3), np.array([-0.25, 0, 0.125, 0.5], np.float32), 1)
    coder, blob = layers.smallest(before)
    assert coder.endswith("h")
    after = layers.read(blob, before.codes.shape, coder)
    assert after.levels.tobytes() == before.levels.tobytes()


def test_the_same_codes_give_the_same_bytes_forever() -> None:
    codes = (np.arange(16 * 8 * 9) * 7919 % 23 // 3 - 3).astype(np.int16).reshape(16, 8, 3, 3)
    assert f"{zlib.crc32(adaptive.encode(codes, 3, 4)):08x}" == "c7ef2f91"
