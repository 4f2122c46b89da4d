"""Coder "a": codes come back, an independent decoder reads them, damage is a named error, and it pays."""

from __future__ import annotations

import math
import zlib

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipq_ray.codec import adaptive, layers, static
from clipq_ray.codec.layers import CodedLayer
from clipq_ray.errors import ArtifactError

BOUNDS = [
    3,
    6,
    10,
    14,
    19,
    25,
    32,
    39,
    48,
    59,
    72,
    86,
    103,
    123,
    146,
    173,
    204,
    240,
    283,
    333,
    391,
    459,
    537,
    630,
    737,
    862,
    1008,
]


def codes_of(
    shape: tuple[int, ...], negative: int, positive: int, seed: int, zeros: float = 0.6
) -> npt.NDArray[np.int16]:
    """Codes whose spread differs by row and by column."""
    random = np.random.default_rng(seed)
    spread = random.uniform(0.3, 2.0, shape[:1] + (1,) * (len(shape) - 1)) if shape else 1.0
    values = random.normal(0.0, 1.0, shape) * spread * max(negative, positive, 1) / 2
    result = np.where(random.random(shape) < zeros, 0, np.rint(values))
    return np.clip(result, -negative, positive).astype(np.int16)


class Bits:
    """The range decoder of the specification, on Python's integers."""

    def __init__(self, words: bytes) -> None:
        self.words, self.at = words, 0
        self.code, self.range = 0, 1 << 48
        for _ in range(3):
            self.code = self.code << 16 | self.word()

    def word(self) -> int:
        self.at += 1
        return int.from_bytes(self.words[2 * self.at - 2 : 2 * self.at], "little")

    def read(self, counter: list[int]) -> bool:
        value, seen = counter
        bound = (self.range >> 16) * (value >> 8)
        one = self.code < bound
        if one:
            self.range = bound
        else:
            self.code, self.range = self.code - bound, self.range - bound
        goal = 65520 * 256 if one else 16 * 256
        counter[0] += ((goal - value) * (655360 // (10 * seen + 16))) >> 16
        counter[1] = min(seen + 1, 255)
        if self.range < 1 << 32:
            self.range, self.code = self.range << 16, self.code << 16 | self.word()
        return one


def decode_by_the_specification(blob: bytes, shape: tuple[int, ...], n: int, p: int) -> list[int]:
    """Coder "a" as the prose of SPEC.md says it, one code after the other."""
    density, typical = blob[:2]
    rows, columns = (*shape, 1, 1)[:2]
    kernel, width = math.prod(shape[2:]), shape[-1] if len(shape) > 2 else 1
    if kernel > 1024:
        columns, kernel, width = columns * kernel, 1, 1
    bits = Bits(blob[2:])
    w = [(64 * weight) // typical for weight in (104, 35, 68, 60, 39, 10, 4, 17)]
    counters: dict[tuple[int, ...], list[int]] = {}

    def decide(*name: int) -> bool:
        first = (2 * density + 1) << 15 if name[0] == 0 else 1 << 23
        return bits.read(counters.setdefault(name, [first, 1]))

    places = columns * kernel
    g = (2 * density + 1) * typical >> 1
    place_means, column_means = [g] * places, [g] * columns
    result: list[int] = []
    for row in range(rows):
        line: list[int] = []

        def back(i: int, by: int, line: list[int] = line) -> int:
            return line[i - by] if i >= by else 0

        mean = g
        for i in range(places):
            x, y = i % kernel % width, i % kernel // width
            if kernel == 1:
                up, channel = 2, 3
                near = w[3] * abs(back(i, 1)) + w[4] * abs(back(i, 2))
            else:
                up, channel = width, kernel
                near = (w[3] if x > 0 else w[7]) * abs(back(i, 1))
                near += w[4] * abs(back(i, width)) * (y > 0) + w[5] * abs(back(i, 2)) * (x > 1)
                near += w[6] * abs(back(i, 2 * width)) * (y > 1)
            expected = w[0] * mean + w[1] * place_means[i] + w[2] * column_means[i // kernel] + 256 * near
            bucket = sum(bound <= min(expected >> 16, 1023) for bound in BOUNDS)
            m, positive = 0, False
            if decide(0, bucket):
                signs = [
                    1 if c > 0 else 2 if c < 0 else 0 for c in (back(i, 1), back(i, up), back(i, channel))
                ]
                positive = decide(1, signs[0] + 3 * signs[1] + 9 * signs[2]) if n and p else p > 0
                largest, e = p if positive else n, 0
                while largest >= 2 << e and decide(2, e, bucket):
                    e += 1
                m = 1
                if e == 1 and largest == 2:
                    m = 2
                else:
                    for _ in range(e):
                        m = 2 * m + decide(3, e, m)
            line.append(m if positive else -m)
            mean += ((m << 8) - mean) >> 5
        shift = 2 + (row > 1) + (row > 5) + (row > 15)
        for c in range(columns):
            sizes = [abs(code) for code in line[c * kernel : (c + 1) * kernel]]
            for k, size in enumerate(sizes):
                place_means[c * kernel + k] += ((size << 8) - place_means[c * kernel + k]) >> shift
            column_means[c] += ((sum(sizes) * (65536 // kernel) >> 8) - column_means[c]) >> 4
        g += (mean - g) >> 3
        result += line
    return result


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
    assert decode_by_the_specification(blob, shape, *sides) == before.reshape(-1).tolist()


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


def test_a_layer_too_large_for_mixing_is_written_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = CodedLayer(codes_of((32, 16, 3, 3), 1, 2, 3), np.array([-0.3, 0, 0.1, 0.3], np.float32), 1)
    monkeypatch.setattr(layers, "MIXED_MOST", 100)
    coder, blob = layers.smallest(before)
    assert coder == "a"
    np.testing.assert_array_equal(layers.read(blob, before.codes.shape, coder).codes, before.codes)
    assert layers.smallest(before, "fast") == (coder, blob)


def test_levels_that_float16_holds_take_two_bytes() -> None:
    before = CodedLayer(codes_of((32, 16, 3, 3), 1, 2, 3), np.array([-0.25, 0, 0.125, 0.5], np.float32), 1)
    coder, blob = layers.smallest(before)
    assert coder.endswith("h")
    after = layers.read(blob, before.codes.shape, coder)
    assert after.levels.tobytes() == before.levels.tobytes()


def test_the_same_codes_give_the_same_bytes_forever() -> None:
    codes = (np.arange(16 * 8 * 9) * 7919 % 23 // 3 - 3).astype(np.int16).reshape(16, 8, 3, 3)
    assert f"{zlib.crc32(adaptive.encode(codes, 3, 4)):08x}" == "c7ef2f91"
