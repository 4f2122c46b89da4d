"""Coder "m": mirrors, an independent decoder, damage, golden bytes."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
import time
from collections import defaultdict

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipq_ray import codec
from clipq_ray.codec import layers, mixing, plain
from clipq_ray.errors import ArtifactError

KNOTS = [
    22, 36, 60, 98, 162, 267, 439, 720, 1179, 1921, 3108, 4971, 7812, 11955, 17625, 24743, 32768, 40793, 47911, 53581, 57724,
    60565, 62428, 63615, 64357, 64816, 65097, 65269, 65374, 65438, 65476, 65500, 65514,
]  # fmt: skip


def codes_of(
    shape: tuple[int, ...], negative: int, positive: int, zeros: float, seed: int
) -> npt.NDArray[np.int16]:
    """Codes with some structure: rows and places of different spread."""
    rng = np.random.default_rng(seed)
    spread = rng.gamma(2.0, size=(*shape[:1], *(1 for _ in shape[1:])))
    codes = np.rint(rng.laplace(size=shape) * spread * (negative + positive) / 6)
    codes = np.where(rng.random(shape) < zeros, 0, codes)
    return np.asarray(np.clip(codes, -negative, positive)).astype(np.int16)


def clip(value: int, least: int, most: int) -> int:
    return min(max(value, least), most)


def squash(x: int) -> int:
    j, f = (x + 2048) >> 7, (x + 2048) & 127
    return clip((KNOTS[j] * (128 - f) + KNOTS[j + 1] * f + 64) >> 7, 16, 65520)


def stretches() -> list[int]:
    result, x = [], -2048
    for q in range(4096):
        while x < 2047 and squash(x) < 16 * q + 8:
            x += 1
        result.append(x)
    return result


STRETCH = stretches()


class Counter:
    def __init__(self, q: int = 1 << 21, s: int = 1) -> None:
        self.q, self.s = q, s

    def learn(self, y: int) -> None:
        self.q += (((1 << 22) - 1 if y else 0) - self.q) * (655360 // (10 * self.s + 16)) >> 16
        self.s = min(self.s + 1, 1000)


class Bits:
    """The range coder of SPEC.md, with code and low as they stand there."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.low, self.range = data, 4, 0, 1 << 32
        self.code = int.from_bytes(data[:4].ljust(4, b"\0"), "big")

    def read(self, p: int) -> int:
        bound = self.range * p >> 16
        if y := (self.code - self.low) % 2**32 < bound:
            self.range = bound
        else:
            self.low, self.range = self.low + bound, self.range - bound
        while self.range < 1 << 24:
            self.code = self.code % 2**24 * 256 + (self.data[self.at] if self.at < len(self.data) else 0)
            self.low, self.range, self.at = self.low % 2**24 * 256, self.range * 256, self.at + 1
        return int(y)

    def ended(self) -> bool:
        last = ((self.low + 2**24 - 1) >> 24) % 256
        return len(self.data) == self.at - 4 + (self.low != 0) and self.code == last << 24


class Model:
    """The mixed decisions of SPEC.md."""

    def __init__(self, density: int, bits: Bits) -> None:
        self.bits = bits
        self.layer = [Counter((2 * density + 1) << 13, 30)] + [Counter() for _ in range(9)]
        self.counters: dict[tuple[object, ...], Counter] = {}
        common = [65536, 22000, 26000, 5000, 11000, 18000, 18000, 15000]
        sign = [48000, -4000, 9000, 12000, 20000, 11000, 14000, 19000]
        self.weights = [list(sign if kind == 1 else common) for kind in range(6)]
        self.maps = [[64 * squash(min(128 * j - 2048, 2047)) for j in range(33)] for _ in range(6)]

    def decide(self, node: int, contexts: list[tuple[object, ...]], mirrors: list[int]) -> int:
        first = self.layer[node]
        used = [first]
        for context in contexts:
            key = (node, *context)
            if key not in self.counters:
                self.counters[key] = Counter(1 << 21 if node == 1 else first.q)
            used.append(self.counters[key])
        base = STRETCH[first.q >> 10]
        x = [base]
        for counter, z in zip(used[1:], mirrors, strict=True):
            value = STRETCH[counter.q >> 10]
            x.append(value * z if node == 1 else value - base)
        kind = min(node, 5)
        weights, final = self.weights[kind], self.maps[kind]
        mixed = clip(sum(w * value for w, value in zip(weights, x, strict=True)) >> 16, -2047, 2047)
        p = squash(mixed)
        j, f = (mixed + 2048) >> 7, (mixed + 2048) & 127
        mapped = (final[j] * (128 - f) + final[j + 1] * f) >> 13
        y = self.bits.read(clip((3 * p + mapped) >> 2, 16, 65520))
        j += f > 64
        final[j] += (((1 << 22) - 1 if y else 0) - final[j]) >> 6
        for at, value in enumerate(x):
            weights[at] += (value * (65536 * y - p) * 6 + (1 << 17)) >> 18
        for counter, z in zip(used, [1, *mirrors], strict=True):
            counter.learn(y if node != 1 or z == 1 else 1 - y)
        return y


def sign(n: int) -> int:
    return (n > 0) - (n < 0)


def fold(value: int, d: int, most: int) -> int:
    e = (value + 16).bit_length() - 5
    return min(most, (e << d) + (((value + 16) >> (e + 4 - d)) % (1 << d)))


def decode_by_the_specification(
    blob: bytes, shape: tuple[int, ...], negative: int, positive: int
) -> list[int]:
    """SPEC.md in plain integers, without anything of `mixing`."""
    density, typical = blob[0], blob[1]
    rows, columns = (*shape, 1, 1)[:2]
    kernel, width = math.prod(shape[2:]), shape[-1] if len(shape) > 2 else 1
    if kernel > 1024:
        columns, kernel, width = columns * kernel, 1, 1
    bits = Bits(blob[2:])
    model = Model(density, bits)
    by_bits: defaultdict[tuple[int, int], Counter] = defaultdict(Counter)
    mean = (2 * density + 1) * (2 * typical + 1)
    by_column, by_place = [mean] * columns, [[mean] * kernel for _ in range(columns)]
    for_value = [[0] * 10 for _ in range(kernel)]
    for_size = [[2000] * 10 + [15000] * 3 for _ in range(kernel)]
    codes: dict[tuple[int, int, int], int] = {}

    def kind(n: int) -> int:
        return (0 if 4 * abs(n) < typical else 1 if abs(n) <= typical else 2) * sign(n)

    def one(contexts: list[tuple[object, ...]], signs: list[tuple[object, ...]], mirrors: list[int]) -> int:
        if not model.decide(0, contexts, [1] * 7):
            return 0
        plus = model.decide(1, signs, mirrors) if negative and positive else int(positive > 0)
        most, e = positive if plus else negative, 0
        while most >= 2 ** (e + 1):
            if not model.decide(e + 2 if e < 2 else e + 3, contexts, [1] * 7):
                break
            e += 1
        m = 1
        if e == 1:
            m = 2 + (model.decide(4, contexts, [1] * 7) if most > 2 else 0)
        elif e > 1:
            for _ in range(e):
                counter = by_bits[e, m]
                y = bits.read(clip(counter.q >> 6, 16, 65520))
                counter.learn(y)
                m = 2 * m + y
        assert m <= most
        return m if plus else -m

    for a in range(rows):
        by_row = mean
        for b in range(columns):
            for k in range(kernel):
                x, y = k % width, k // width
                n = [
                    codes.get((a, b, k - 1), 0) if x >= 1 else 0,
                    codes.get((a, b, k - width), 0) if y >= 1 else 0,
                    codes.get((a, b, k - width - 1), 0) if x >= 1 and y >= 1 else 0,
                    codes.get((a, b, k - width + 1), 0) if y >= 1 and x + 1 < width else 0,
                    codes.get((a, b, k - 2), 0) if x >= 2 else 0,
                    codes.get((a, b, k - 2 * width), 0) if y >= 2 else 0,
                    codes.get((a, b - 1, k), 0),
                    codes.get((a, b - 2, k), 0),
                    codes.get((a - 1, b, k), 0),
                    codes.get((a - 2, b, k), 0),
                ]
                h = [by_row, by_column[b], by_place[b][k]]
                u, v = for_value[k], for_size[k]
                expected = sum(w * value for w, value in zip(u, n, strict=True)) >> 6
                sizes = 1024 * sum(w * abs(value) for w, value in zip(v[:10], n, strict=True))
                size = max(0, (sizes + sum(w * value for w, value in zip(v[10:], h, strict=True))) >> 16)
                energy = 1024 + 1024 * sum(value * value for value in n)
                both = energy + sum(value * value >> 10 for value in h)

                place = kind(n[0]) + 5 * kind(n[1])
                four = place + 25 * sign(kind(n[2])) + 75 * sign(kind(n[3]))
                signs = sign(n[0]) + 3 * sign(n[1]) + 9 * sign(n[6]) + 27 * sign(n[8])
                q, r = fold(abs(expected) >> 3, 1, 15), fold(size >> 2, 1, 39)
                start: list[tuple[object, ...]] = [("row", a), ("column", b)]
                placed, signed = ("place", min(k, 24), abs(place)), ("signed", abs(four))
                sizes_of = ("four", *(abs(kind(n[j])) for j in (0, 1, 6, 8)))
                code = one(
                    [*start, sizes_of, placed, signed, ("size", fold(size >> 2, 2, 79)), ("both", r, q)],
                    [*start, ("signs", abs(signs)), placed, signed, ("value", q), ("both", r, q)],
                    [1, 1, *(-1 if value < 0 else 1 for value in (signs, place, four, expected, expected))],
                )
                codes[a, b, k] = code

                for j in range(10):
                    u[j] += ((1024 * code - expected) * n[j] * 2**13) >> energy.bit_length()
                    v[j] += ((1024 * abs(code) - size) * abs(n[j]) * 2**12) >> both.bit_length()
                for j in range(3):
                    v[10 + j] += (((1024 * abs(code) - size) * h[j] >> 10) * 2**12) >> both.bit_length()
                for what, s in ((0, (b * kernel + k >> 1) + 6), (1, a * kernel + k + 3), (2, a + 2)):
                    step = 655360 // (10 * min(s, 60 if what == 2 else 200) + 16)
                    moved = h[what] + ((1024 * abs(code) - h[what]) * step >> 16)
                    if what == 0:
                        by_row = moved
                    elif what == 1:
                        by_column[b] = moved
                    else:
                        by_place[b][k] = moved
                mean += (1024 * abs(code) - mean) >> 8
    assert bits.ended()
    return list(codes.values())


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
    assert decode_by_the_specification(blob, shape, negative, positive) == before.reshape(-1).tolist()


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
    coder, blob = layers.smallest(layer)
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
    began = time.perf_counter()
    with pytest.raises(ArtifactError):
        mixing.decode(blob, shape, negative, positive)
    assert time.perf_counter() - began < 30


def test_codes_outside_of_their_sides_are_a_named_error() -> None:
    with pytest.raises(ArtifactError, match="expected codes"):
        mixing.encode(np.array([0, 3], np.int16), 1, 2)


def test_an_unknown_coder_is_named() -> None:
    layer = codec.CodedLayer(np.ones((2, 2), np.int16), np.array([0, 1], np.float32), 0)
    data = codec.encode(codec.Packed({}, {"w": layer}))
    assert codec.decode(data).tensors["w"].codes.tolist() == [[1, 1], [1, 1]]  # type: ignore[union-attr]
    with pytest.raises(ArtifactError, match="this file needs coder zz; use a newer clipq_ray"):
        plain.read("zz", b"", (0,))


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
