"""The coders `q`, `a` and `m` of .clq files in plain Python, for spec_decoder.py: from the prose of SPEC.md."""

from __future__ import annotations

import itertools
import math
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Any


class Refused(Exception):
    """A file that the specification refuses."""


def demand(condition: bool, lacking: str) -> None:
    """Refuse the file unless the condition holds."""
    if not condition:
        raise Refused(lacking)


class Cursor:
    """Bytes, read from the first to the last."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        demand(self.at + count <= len(self.data), "bytes are missing")
        self.at += count
        return self.data[self.at - count : self.at]

    def rest(self) -> bytes:
        return self.take(len(self.data) - self.at)

    def leb128(self, bits: int) -> int:
        value = 0
        for shift in range(0, bits, 7):
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                demand(value < 1 << bits, "a number too large")
                return value
        raise Refused("a number too long")


def codes(letter: str, rest: bytes, shape: tuple[int, ...], sides: tuple[int, int]) -> list[int]:
    """The codes from step 3 of coder `q` on; `sides` are N and P."""
    if not math.prod(shape):
        demand(not rest, "bytes behind a layer without elements")
        return []
    return CODERS[letter](rest, shape, sides)


def _static(rest: bytes, shape: tuple[int, ...], sides: tuple[int, int]) -> list[int]:
    """Coder `q`, from step 4 on."""
    count, cursor, total = math.prod(shape), Cursor(rest), 1 << 14
    found = [cursor.leb128(15) for _ in range(sum(sides))]
    demand(sum(found) <= total, "frequencies")
    frequencies = [*found, total - sum(found)]
    words = cursor.rest()
    if total in frequencies:
        demand(not words, "bytes behind a constant layer")
        return [frequencies.index(total) - sides[0]] * count
    demand(count <= len(rest) << 22, "more codes than the bytes can hold")
    demand(len(words) % 4 == 0 and any(words[-4:]), "words of the coder")
    stack = list(struct.unpack(f"<{len(words) // 4}I", words))
    starts = list(itertools.accumulate(frequencies, initial=0))
    state = stack.pop()
    if stack:
        state = state << 32 | stack.pop()
    result = []
    for _ in range(count):
        at = state % (1 << 24)
        symbol = bisect_right(starts, at >> 10) - 1
        state = (state >> 24) * (frequencies[symbol] << 10) + at - (starts[symbol] << 10)
        if state < 1 << 32 and stack:
            state = state << 32 | stack.pop()
        result.append(symbol - sides[0])
    demand(not stack and not state, "words are left")
    return result


def _geometry(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Rows, columns, codes per kernel and its width."""
    rows, columns = (*shape, 1, 1)[:2]
    kernel, width = (math.prod(shape[2:]), shape[-1]) if len(shape) > 2 else (1, 1)
    return (rows, columns, kernel, width) if kernel <= 1024 else (rows, columns * kernel, 1, 1)


def _start(rest: bytes, shape: tuple[int, ...]) -> tuple[int, int, bytes]:
    """D, T and the range coder's bytes of coders `a` and `m`."""
    _, columns, kernel, _ = _geometry(shape)
    demand(columns * kernel <= 1 << 20, "a row too long")
    demand(len(rest) >= 2 and rest[1] > 0, "density and magnitude")
    demand(math.prod(shape) <= len(rest) << 15, "more codes than the bytes can hold")
    return rest[0], rest[1], rest[2:]


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)


def _move(counter: list[int], goal: int, most: int) -> None:
    counter[0] += (goal - counter[0]) * (655360 // (10 * counter[1] + 16)) >> 16
    counter[1] = min(counter[1] + 1, most)


def _magnitude(most: int, more: Callable[[int], int], bit: Callable[[int, int], int]) -> int:
    """m by the questions for its first bit (`more`) and for those below."""
    e = 0
    while most >= 2 ** (e + 1) and more(e):
        e += 1
    if e == 1 and most == 2:
        return 2
    m = 1
    for _ in range(e):
        m = 2 * m + bit(e, m)
    demand(m <= most, "a code beyond the levels")
    return m


class _Words:
    """The range coder of coder `a`."""

    def __init__(self, data: bytes) -> None:
        demand(len(data) % 2 == 0, "an odd byte")
        self.words = struct.unpack(f"<{len(data) // 2}H", data)
        self.code, self.range, self.read = 0, 1 << 48, 0
        for _ in range(3):
            self.follow()

    def follow(self) -> None:
        self.code = self.code << 16 | (self.words[self.read] if self.read < len(self.words) else 0)
        self.read += 1

    def decide(self, counter: list[int]) -> int:
        bound = (self.range >> 16) * (counter[0] >> 8)
        one = self.code < bound
        if one:
            self.range = bound
        else:
            self.code, self.range = self.code - bound, self.range - bound
        _move(counter, (65520 if one else 16) * 256, 255)
        if self.range < 1 << 32:
            self.range <<= 16
            self.follow()
        return int(one)

    def end(self) -> None:
        more = len(self.words) - (self.read - 3)
        demand(self.code < 1 << 32 and (more == 0 or (more == 1 and self.words[-1] != 0)), "end of the words")


THRESHOLDS = (
    3, 6, 10, 14, 19, 25, 32, 39, 48, 59, 72, 86, 103, 123, 146, 173, 204, 240, 283, 333, 391, 459, 537,
    630, 737, 862, 1008,
)  # fmt: skip


def _adaptive(rest: bytes, shape: tuple[int, ...], sides: tuple[int, int]) -> list[int]:
    """Coder `a`."""
    density, typical, data = _start(rest, shape)
    words = _Words(data)
    counters: dict[tuple[int, ...], list[int]] = {}
    rows, columns, kernel, width = _geometry(shape)
    weights = [64 * weight // typical for weight in (104, 35, 68, 60, 39, 10, 4, 17)]
    length = columns * kernel
    g = (2 * density + 1) * typical >> 1
    by_column, by_i, result = [g] * columns, [g] * length, []

    def ask(*name: int) -> int:
        first = (2 * density + 1) << 15 if name[0] == 0 else 1 << 23
        return words.decide(counters.setdefault(name, [first, 1]))

    for a in range(rows):
        r, row = g, [0, 0, 0] + [0] * (2 * kernel)
        front = len(row)
        for i in range(length):
            E = weights[0] * r + weights[1] * by_i[i] + weights[2] * by_column[i // kernel]
            E = E + 256 * _nearby(row, i % kernel, kernel, width, weights) >> 16
            row.append(
                _adaptive_code(ask, row, bisect_right(THRESHOLDS, min(E, 1023)), (kernel, width), sides)
            )
            r += 256 * abs(row[-1]) - r >> 5
        row = row[front:]
        result += row
        h = 2 + (a > 1) + (a > 5) + (a > 15)
        by_i = [it + (256 * abs(v) - it >> h) for it, v in zip(by_i, row, strict=True)]
        for b, it in enumerate(by_column):
            total = sum(abs(v) for v in row[b * kernel : (b + 1) * kernel])
            by_column[b] += (total * (65536 // kernel) >> 8) - it >> 4
        g += r - g >> 3
    words.end()
    return result


def _nearby(row: list[int], k: int, kernel: int, width: int, weights: list[int]) -> int:
    """H of coder `a`."""
    if kernel == 1:
        return weights[3] * abs(row[-1]) + weights[4] * abs(row[-2])
    x, y = k % width, k // width
    H = weights[3 if x > 0 else 7] * abs(row[-1])
    H += weights[4] * abs(row[-width]) if y > 0 else 0
    H += weights[5] * abs(row[-2]) if x > 1 else 0
    return H + (weights[6] * abs(row[-2 * width]) if y > 1 else 0)


def _adaptive_code(
    ask: Callable[..., int], row: list[int], bucket: int, kernel: tuple[int, int], sides: tuple[int, int]
) -> int:
    if not ask(0, bucket):
        return 0
    negative, positive = sides
    above = positive > 0
    if negative and positive:
        u, c = (kernel[1], kernel[0]) if kernel[0] > 1 else (2, 3)
        s1, su, sc = (_sign(row[-j]) % 3 for j in (1, u, c))
        above = ask(1, s1 + 3 * su + 9 * sc) == 1
    m = _magnitude(positive if above else negative, lambda e: ask(2, e, bucket), lambda e, m: ask(3, e, m))
    return m if above else -m


class _Bytes:
    """The range coder of coder `m`."""

    def __init__(self, data: bytes) -> None:
        self.data, self.moved, self.low, self.range = data, 0, 0, 1 << 32
        self.code = int.from_bytes(data[:4].ljust(4, b"\0"), "big")

    def decide(self, p: int) -> int:
        bound = self.range * p >> 16
        one = (self.code - self.low) % (1 << 32) < bound
        if one:
            self.range = bound
        else:
            self.low, self.range = self.low + bound, self.range - bound
        while self.range < 1 << 24:
            follows = self.data[self.moved + 4] if self.moved + 4 < len(self.data) else 0
            self.code = self.code << 8 & 0xFFFFFFFF | follows
            self.low, self.range, self.moved = self.low << 8 & 0xFFFFFFFF, self.range << 8, self.moved + 1
        return int(one)

    def end(self) -> None:
        last = (self.low + (1 << 24) - 1 >> 24) % 256
        demand(len(self.data) == self.moved + (self.low > 0) and self.code == last << 24, "end of the bytes")


def _clip(value: int, low: int, high: int) -> int:
    return min(max(value, low), high)


def _squash(x: int) -> int:
    j, f = x + 2048 >> 7, x + 2048 & 127
    return _clip(KNOTS[j] * (128 - f) + KNOTS[j + 1] * f + 64 >> 7, 16, 65520)


KNOTS = (
    22, 36, 60, 98, 162, 267, 439, 720, 1179, 1921, 3108, 4971, 7812, 11955, 17625, 24743, 32768, 40793,
    47911, 53581, 57724, 60565, 62428, 63615, 64357, 64816, 65097, 65269, 65374, 65438, 65476, 65500, 65514,
)  # fmt: skip
SQUASHED = [_squash(x) for x in range(-2048, 2048)]
STRETCHED = [
    min(next((x for x, p in enumerate(SQUASHED) if p >= 16 * q + 8), 4095), 4095) - 2048 for q in range(4096)
]


class _Mixer:
    """The mixed and the plain decisions of coder `m`."""

    def __init__(self, data: bytes, density: int) -> None:
        self.coder = _Bytes(data)
        self.counters: dict[Any, list[int]] = {(0, node, 0): [1 << 21, 1] for node in range(10)}
        self.counters[0, 0, 0] = [(2 * density + 1) << 13, 30]
        self.weights = [[65536, 22000, 26000, 5000, 11000, 18000, 18000, 15000] for _ in range(6)]
        self.weights[1] = [48000, -4000, 9000, 12000, 20000, 11000, 14000, 19000]
        self.maps = [[64 * _squash(min(128 * j - 2048, 2047)) for j in range(33)] for _ in range(6)]

    def plain(self, name: tuple[int, int]) -> int:
        counter = self.counters.setdefault(name, [1 << 21, 1])
        y = self.coder.decide(_clip(counter[0] >> 6, 16, 65520))
        _move(counter, ((1 << 22) - 1) * y, 1000)
        return y

    def mixed(self, node: int, keys: Iterable[Any], mirrors: tuple[int, ...]) -> int:
        """A decision; for nodes but 1 all mirrors are 1."""
        layer = self.counters[0, node, 0][0]
        first = 1 << 21 if node == 1 else layer
        counters = [self.counters.setdefault((j, node, key), [first, 1]) for j, key in enumerate(keys)]
        inputs = [STRETCHED[counter[0] >> 10] * z for counter, z in zip(counters, mirrors, strict=True)]
        if node != 1:
            inputs[1:] = [x - inputs[0] for x in inputs[1:]]
        weights, final = self.weights[min(node, 5)], self.maps[min(node, 5)]
        x = _clip(sum(w * x for w, x in zip(weights, inputs, strict=True)) >> 16, -2047, 2047)
        squashed, j, f = _squash(x), x + 2048 >> 7, x + 2048 & 127
        mapped = final[j] * (128 - f) + final[j + 1] * f >> 13
        y = self.coder.decide(_clip(3 * squashed + mapped >> 2, 16, 65520))
        goal = (1 << 22) - 1
        final[j + (f > 64)] += goal * y - final[j + (f > 64)] >> 6
        for at, x in enumerate(inputs):
            weights[at] += x * (65536 * y - squashed) * 6 + (1 << 17) >> 18
        for counter, z in zip(counters, mirrors, strict=True):
            _move(counter, goal * (y if z > 0 else 1 - y), 1000)
        return y


def _fold(v: int, d: int, most: int) -> int:
    e = (v + 16).bit_length() - 5
    return min(most, (e << d) + (v + 16 >> e + 4 - d) % (1 << d))


def _mixing(rest: bytes, shape: tuple[int, ...], sides: tuple[int, int]) -> list[int]:
    """Coder `m`."""
    density, typical, data = _start(rest, shape)
    mixer = _Mixer(data, density)
    rows, columns, kernel, width = _geometry(shape)
    g = (2 * density + 1) * (2 * typical + 1)
    by_column, by_i = [g] * columns, [g] * (columns * kernel)
    u, v, t = ([[first] * n for _ in range(kernel)] for first, n in ((0, 10), (2000, 10), (15000, 3)))
    result: list[int] = []
    for a in range(rows):
        r = g
        for i in range(columns * kernel):
            b, k = divmod(i, kernel)
            n = _neighbours(result, (a, b, k), columns * kernel, kernel, width)
            sizes, h = [abs(it) for it in n], (r, by_column[b], by_i[i])
            value = _dot(u[k], n) >> 6
            size = max(0, 1024 * _dot(v[k], sizes) + _dot(t[k], h) >> 16)
            code = _mixed_code(mixer, _contexts(n, typical, (a, b, k), value, size), sides)
            m, squares = abs(code), 1024 + 1024 * _dot(n, n)
            for_u, for_v = squares.bit_length(), (squares + sum(it * it >> 10 for it in h)).bit_length()
            u[k] = [w + ((1024 * code - value) * it * 8192 >> for_u) for w, it in zip(u[k], n, strict=True)]
            v[k] = [w + ((1024 * m - size) * it * 4096 >> for_v) for w, it in zip(v[k], sizes, strict=True)]
            t[k] = [
                w + (((1024 * m - size) * it >> 10) * 4096 >> for_v) for w, it in zip(t[k], h, strict=True)
            ]
            r = _mean(r, m, min((i >> 1) + 6, 200))
            by_column[b] = _mean(by_column[b], m, min(a * kernel + k + 3, 200))
            by_i[i] = _mean(by_i[i], m, min(a + 2, 60))
            g += 1024 * m - g >> 8
            result.append(code)
    mixer.coder.end()
    return result


def _dot(left: Iterable[int], right: Iterable[int]) -> int:
    return sum(x * y for x, y in zip(left, right, strict=True))


def _mean(it: int, m: int, s: int) -> int:
    return it + ((1024 * m - it) * (655360 // (10 * s + 16)) >> 16)


def _neighbours(
    before: list[int], at: tuple[int, int, int], length: int, kernel: int, width: int
) -> list[int]:
    """The ten codes around the next one, or 0 where there is none."""
    a, b, k = at
    x, y = k % width, k // width
    there = (
        (1, x >= 1), (width, y >= 1), (width + 1, x >= 1 and y >= 1), (width - 1, y >= 1 and x + 1 < width),
        (2, x >= 2), (2 * width, y >= 2), (kernel, b >= 1), (2 * kernel, b >= 2), (length, a >= 1), (2 * length, a >= 2),
    )  # fmt: skip
    return [before[-back] if exists else 0 for back, exists in there]


def _contexts(
    n: list[int], typical: int, at: tuple[int, int, int], value: int, size: int
) -> tuple[Any, Any, Any]:
    """Contexts of nodes but 1, of node 1, and the mirrors of node 1."""
    a, b, k = at
    kinds = [_sign(it) * (0 if 4 * abs(it) < typical else 1 if abs(it) <= typical else 2) for it in n]
    P = kinds[0] + 5 * kinds[1]
    S = P + 25 * _sign(kinds[2]) + 75 * _sign(kinds[3])
    G = _sign(n[0]) + 3 * _sign(n[1]) + 9 * _sign(n[6]) + 27 * _sign(n[8])
    Q, R, place = _fold(abs(value) >> 3, 1, 15), _fold(size >> 2, 1, 39), min(k, 24)
    around = tuple(abs(kinds[j]) for j in (0, 1, 6, 8))
    others = (0, a, b, around, (place, abs(P)), abs(S), _fold(size >> 2, 2, 79), (R, Q))
    signs = (0, a, b, abs(G), (place, abs(P)), abs(S), Q, (R, Q))
    return others, signs, (1, 1, 1, *(-1 if it < 0 else 1 for it in (G, P, S, value, value)))


def _mixed_code(mixer: _Mixer, contexts: tuple[Any, Any, Any], sides: tuple[int, int]) -> int:
    others, signs, mirrors = contexts
    straight = (1,) * 8
    if not mixer.mixed(0, others, straight):
        return 0
    negative, positive = sides
    above = mixer.mixed(1, signs, mirrors) == 1 if negative and positive else positive > 0
    m = _magnitude(
        positive if above else negative,
        lambda e: mixer.mixed(e + 2 if e < 2 else e + 3, others, straight),
        lambda e, m: mixer.plain((e, m)) if e > 1 else mixer.mixed(4, others, straight),
    )
    return m if above else -m


CODERS = {"q": _static, "a": _adaptive, "m": _mixing}
