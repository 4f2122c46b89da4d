"""The loops of coder "m", compiled by numba: contexts, counters, the mixer, the range coder. SPEC.md defines every number here.

All values are integers, most of them in one int64 array, `work`, whose parts the names below find; `tables` is squash, stretch, steps
and lengths one after the other. 64 bits hold every intermediate value. Nothing is read or written outside of the arrays, whatever the
bytes are: codes are held within their sides as they are decoded. Not covered: what the arrays start with (`mixing`).
"""

# numba compiles these functions; their types are those of the arguments, which the docstrings state.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,assignment,call-overload"
from __future__ import annotations

import numpy as np
from numba import njit

from clipq_ray.compiled import cached

NODES = 10  # decisions: 0 zero? 1 positive? 2 above 1? 3 above 3? 4 is it 3? (not 2), 5 to 9 above 7, 15, 31, 63, 127?
KINDS = 6  # decisions that have a mixer and a final map of their own; 5 to 9 share one
INPUTS = 8
NEIGHBOURS, AVERAGES = 10, 3  # what predicts a code
EACH = NEIGHBOURS + AVERAGES
# Where contexts begin: the layer's is 0, the row's 1, then 81 of four neighbours, 25 x 25 of place and two neighbours, 225 of four signed
# ones, 80 of the expected magnitude, 40 x 16 of it and the expected value, one per column.
ROW, FOUR, PLACE, SIGNED, EXPECTED, BOTH, COLUMN = 1, 2, 83, 708, 933, 1013, 1653
SURE = (1 << 22) - 1  # a counter's certainty
MASK = (1 << 32) - 1
LEAST, MOST = 16, 65520  # of a probability in 1/65536
RATE = 6
FULL, DAMAGED = -1, -2
# Where the parts of `tables`, then of `work` begin.
STRETCH, STEPS, LENGTHS = 4096, 8192, 9216
CONTEXTS, FLIPS, X, WEIGHTS, MAPS = 0, 16, 32, 40, 88
LOW, RANGE, DONE, AHEAD, FAILED = 286, 287, 288, 289, 290
NEAR, MEANS, SUMS, STATE = 291, 301, 304, 308


_inner = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""For functions that only compiled ones call: a quarter less to compile; `layer` caches them with itself."""


@_inner
def _length(value, tables):
    """The number of bits of `value`."""
    result = 0
    while value > 1023:
        value >>= 10
        result += 10
    return result + tables[LENGTHS + value]


@_inner
def _fold(value, bits, most, tables):
    """The logarithm of (value + 16) / 16 to 2^-bits octaves, by its leading bits, at most `most`."""
    value += 16
    above = _length(value, tables) - 5
    result = (above << bits) | ((value >> (above + 4 - bits)) & ((1 << bits) - 1))
    return result if result < most else most


@_inner
def _class(value, typical):
    """-2 .. 2: none or far below the typical magnitude, up to it, above it; with the sign."""
    size = abs(value)
    result = 0 if 4 * size < typical else (1 if size <= typical else 2)
    return result if value >= 0 else -result


@_inner
def _sign(value):
    return 1 if value > 0 else (-1 if value < 0 else 0)


@_inner
def _emit(data, work, value):
    """One byte; the ninth bit of `value` is a carry into those before."""
    at = work[DONE]
    if at >= len(data):
        work[FAILED] = FULL
        return
    data[at] = value & 255
    work[DONE] = at + 1
    if value > 255:
        at -= 1
        while data[at] == 255:
            data[at] = 0
            at -= 1
        data[at] += 1


@_inner
def _bit(bit, decoding, data, p, work):
    """One decision written, or read and given; p = probability of 1 in 1/65536. Ahead is the code less low."""
    bound = (work[RANGE] * p) >> 16
    if decoding:
        bit = 1 if work[AHEAD] < bound else 0
    if bit:
        work[RANGE] = bound
    else:
        work[LOW] += bound
        work[RANGE] -= bound
        work[AHEAD] -= bound
    while work[RANGE] < 1 << 24:
        if decoding:
            at = work[DONE] + 4
            work[AHEAD] = (work[AHEAD] << 8) | (data[at] if at < len(data) else 0)
            work[DONE] += 1
        else:
            _emit(data, work, work[LOW] >> 24)
        work[LOW] = (work[LOW] & 0xFFFFFF) << 8
        work[RANGE] <<= 8
    return bit


@_inner
def _finish(decoding, data, work):
    """The last byte, if one is needed; gives the bytes used, below 0 where the data are full or not what an encoder writes."""
    last = (work[LOW] + 0xFFFFFF) >> 24
    if decoding:
        right = (work[LOW] + work[AHEAD]) & MASK == (last & 255) << 24
        if not right or work[DONE] + (last > 0) != len(data):
            return DAMAGED
        return len(data)
    if last > 0:
        _emit(data, work, last)
    return work[FAILED] if work[FAILED] < 0 else work[DONE]


@_inner
def _predict(node, kind, side, counters, work, tables):
    """The mixed log-odds of a decision; fills the inputs. A context met for the first time takes over the layer's counter."""
    own = WEIGHTS + kind * INPUTS
    first = np.int64(counters[node])
    base = np.int64(tables[STRETCH + (first >> 20)])
    work[X] = base
    dot = work[own] * base
    for j in range(1, INPUTS):
        at = work[CONTEXTS + side * INPUTS + j] * NODES + node
        counter = np.int64(counters[at])
        if counter == 0:
            counter = (1 << 31 if side else first >> 10 << 10) | 1
            counters[at] = counter
        x = np.int64(tables[STRETCH + (counter >> 20)]) * work[FLIPS + side * INPUTS + j]
        work[X + j] = x if side else x - base
        dot += work[own + j] * work[X + j]
    dot >>= 16
    return -2047 if dot < -2047 else (2047 if dot > 2047 else dot)


@_inner
def _moved(counter, goal, tables):
    """A counter after one more decision."""
    seen, value = counter & 1023, counter >> 10
    value += ((goal - value) * tables[STEPS + seen]) >> 16
    return (value << 10) | (seen + 1 if seen < 1000 else seen)


@_inner
def _learn(bit, p, node, kind, side, counters, work, tables):
    """Moves the mixer's weights and the counters towards what came."""
    own = WEIGHTS + kind * INPUTS
    error = ((bit << 16) - p) * RATE
    for j in range(INPUTS):
        work[own + j] += (work[X + j] * error + (1 << 17)) >> 18
        at = work[CONTEXTS + side * INPUTS + j] * NODES + node
        goal = SURE if (bit == 1) == (work[FLIPS + side * INPUTS + j] > 0) else 0
        counters[at] = _moved(np.int64(counters[at]), goal, tables)


@_inner
def _decide(bit, decoding, data, node, counters, work, tables):
    """One mixed decision, written or read."""
    side, kind = (1 if node == 1 else 0), (node if node < KINDS else KINDS - 1)
    s = _predict(node, kind, side, counters, work, tables)
    p = np.int64(tables[s + 2048])
    at, part = MAPS + kind * 33 + ((s + 2048) >> 7), (s + 2048) & 127
    mapped = (work[at] * (128 - part) + work[at + 1] * part) >> 13
    sent = (3 * p + mapped) >> 2
    sent = LEAST if sent < LEAST else (MOST if sent > MOST else sent)
    bit = _bit(bit, decoding, data, sent, work)
    if part > 64:
        at += 1
    work[at] += ((SURE if bit else 0) - work[at]) >> 6
    _learn(bit, p, node, kind, side, counters, work, tables)
    return bit


@_inner
def _rest(size, top, decoding, data, work, tree, tables):
    """The bits of a magnitude below its first, bit `top`, by plain counters; gives the magnitude."""
    found = 1
    for place in range(top - 1, -1, -1):
        at = (top << 7) + found
        p = np.int64(tree[at]) >> 16
        p = LEAST if p < LEAST else (MOST if p > MOST else p)
        bit = _bit((size >> place) & 1, decoding, data, p, work)
        tree[at] = _moved(np.int64(tree[at]), SURE if bit else 0, tables)
        found = 2 * found + bit
    return found


@_inner
def _code(code, decoding, data, work, counters, tree, shape, tables):
    """One code, written or read and given."""
    negative, positive = shape[3], shape[4]
    size, most, sign = abs(code), negative + positive, 1 if positive > 0 else -1
    node, top, found, more = 0, 0, 1, True
    while more:
        if node == 0:
            asked = size > 0
        elif node == 1:
            asked = code > 0
        elif node == 4:
            asked = size == 3
        else:
            asked = size >= 2 << top
        bit = _decide(1 if asked else 0, decoding, data, node, counters, work, tables)
        if node == 0:
            if bit == 0:
                return 0
            if negative > 0 and positive > 0:
                node = 1
                continue
        elif node == 1:
            sign, most = (1, positive) if bit else (-1, negative)
        elif node == 4:
            found += bit
            break
        elif bit:
            top += 1
            found = 1 << top
        if (node < 2 or bit) and most >= 2 << top:
            node = top + 2 if top < 2 else top + 3
        else:
            node = 4
            more = top == 1 and most > 2
    if top > 1:
        found = _rest(size, top, decoding, data, work, tree, tables)
    if found > most:
        work[FAILED] = DAMAGED
        return 0
    return sign * found


@_inner
def _expect(k, weights, work, tables):
    """The expected value and magnitude in 1/1024 and their energies, into sums."""
    own = k * 2 * EACH
    value, size, energy, mean_energy = 0, 0, 1 << 10, 0
    for j in range(NEIGHBOURS):
        value += weights[own + j] * work[NEAR + j]
        size += weights[own + EACH + j] * abs(work[NEAR + j])
        energy += (work[NEAR + j] * work[NEAR + j]) << 10
    size <<= 10
    for j in range(AVERAGES):
        size += weights[own + EACH + NEIGHBOURS + j] * work[MEANS + j]
        mean_energy += (work[MEANS + j] * work[MEANS + j]) >> 10
    work[SUMS] = value >> 6
    work[SUMS + 1] = max(size >> 16, 0)
    work[SUMS + 2] = _length(energy, tables)
    work[SUMS + 3] = _length(energy + mean_energy, tables)


@_inner
def _correct(code, k, weights, work):
    """Moves both predictions towards what came, by the normalised least mean squares."""
    own = k * 2 * EACH
    error = (code << 10) - work[SUMS]
    surprise = (abs(code) << 10) - work[SUMS + 1]
    for j in range(NEIGHBOURS):
        if work[NEAR + j]:
            weights[own + j] += (error * work[NEAR + j] << 13) >> work[SUMS + 2]
            weights[own + EACH + j] += (surprise * abs(work[NEAR + j]) << 12) >> work[SUMS + 3]
    for j in range(AVERAGES):
        step = (surprise * work[MEANS + j] >> 10) << 12
        weights[own + EACH + NEIGHBOURS + j] += step >> work[SUMS + 3]


@_inner
def _choose(typical, k, column, work, tables):
    """The contexts of magnitudes (row 0) and of the sign (row 1), whose flips turn them into one of two mirrored ones."""
    left, up = _class(work[NEAR], typical), _class(work[NEAR + 1], typical)
    place = left + 5 * up
    corner, other = _class(work[NEAR + 2], typical), _class(work[NEAR + 3], typical)
    signed = place + 25 * _sign(corner) + 75 * _sign(other)
    channel, row = work[NEAR + 6], work[NEAR + 8]
    signs = _sign(work[NEAR]) + 3 * _sign(work[NEAR + 1]) + 9 * _sign(channel) + 27 * _sign(row)
    channel, row = abs(_class(channel, typical)), abs(_class(row, typical))
    value = _fold(abs(work[SUMS]) >> 3, 1, 15, tables)
    both = BOTH + _fold(work[SUMS + 1] >> 2, 1, 39, tables) * 16 + value
    work[CONTEXTS + 2] = work[CONTEXTS + 10] = COLUMN + column
    work[CONTEXTS + 3] = FOUR + abs(left) + 3 * abs(up) + 9 * channel + 27 * row
    work[CONTEXTS + 11] = FOUR + 40 + abs(signs)
    work[CONTEXTS + 4] = work[CONTEXTS + 12] = PLACE + min(k, 24) * 25 + 12 + abs(place)
    work[CONTEXTS + 5] = work[CONTEXTS + 13] = SIGNED + 112 + abs(signed)
    work[CONTEXTS + 6] = EXPECTED + _fold(work[SUMS + 1] >> 2, 2, 79, tables)
    work[CONTEXTS + 14] = EXPECTED + value
    work[CONTEXTS + 7] = work[CONTEXTS + 15] = both
    work[FLIPS + 11] = 1 if signs >= 0 else -1
    work[FLIPS + 12] = 1 if place >= 0 else -1
    work[FLIPS + 13] = 1 if signed >= 0 else -1
    work[FLIPS + 14] = work[FLIPS + 15] = 1 if work[SUMS] >= 0 else -1


@cached(nogil=True)
def layer(codes, data, decoding, shape, work, counters, tree, learned, back, lines, running, tables):
    """Writes `codes` into `data` or the reverse; gives the bytes used, or `FULL` or `DAMAGED`.

    codes: int16 (rows * columns * kernel,); data: uint8; shape: int64 (7,), rows, columns, kernel, most negative, most positive, the
    mean magnitude in 1/1024, the typical one; the rest as `_run` makes it
    """
    columns, kernel, mean = shape[1], shape[2], shape[5]
    places = columns * kernel
    width = places + 2 * kernel
    for row in range(shape[0]):
        now, before, earlier = row % 3 * width, (row + 2) % 3 * width, (row + 1) % 3 * width
        for at in range(now, now + width):
            lines[at] = 0
        for node in range(NODES):
            counters[ROW * NODES + node] = 0
        work[MEANS] = mean
        column, k = -1, kernel - 1
        for place in range(places):
            k = k + 1 if k + 1 < kernel else 0
            if k == 0:
                column += 1
            at = 2 * kernel + place
            for j in range(NEIGHBOURS - 2):
                work[NEAR + j] = lines[now + at - back[k * (NEIGHBOURS - 2) + j]]
            work[NEAR + 8], work[NEAR + 9] = lines[before + at], lines[earlier + at]
            work[MEANS + 1], work[MEANS + 2] = running[column], running[columns + place]
            _expect(k, learned, work, tables)
            _choose(shape[6], k, column, work, tables)
            here = row * places + place
            code = _code(np.int64(codes[here]), decoding, data, work, counters, tree, shape, tables)
            codes[here] = lines[now + at] = code
            _correct(code, k, learned, work)
            size = abs(code) << 10
            work[MEANS] += ((size - work[MEANS]) * tables[STEPS + min((place >> 1) + 6, 200)]) >> 16
            step = (size - running[column]) * tables[STEPS + min(row * kernel + k + 3, 200)]
            running[column] += step >> 16
            step = (size - running[columns + place]) * tables[STEPS + min(row + 2, 60)]
            running[columns + place] += step >> 16
            mean += (size - mean) >> 8
            if work[FAILED] < 0 or (decoding and work[DONE] > len(data)):
                return work[FAILED] if work[FAILED] < 0 else DAMAGED
    return _finish(decoding, data, work)
