"""The loops of the CPU operator, compiled by numba: walls, assignment, level sums and look-up in chunks that stay in cache.

`reference` defines what they compute; every step here is a comparison or integer arithmetic, or float64 arithmetic in the order of the
definition (numba contracts nothing without `fastmath`), so results are the same bits on every machine and for any split into ranges.
All functions release the GIL. Not covered: thresholds (`selection`) and who calls these functions (`on_cpu`).
"""

# numba compiles these functions; their types are those of the arguments, which the docstrings state.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
from __future__ import annotations

import math

import numpy as np
from numba import float64, int32, int64, uint8, uint32

from clipq_ray.compiled import cached, source_of
from clipq_ray.quantizer import selection
from clipq_ray.quantizer.selection import CHUNK, SURVEY, guess, rank_of, select, settle, survey, track

_CELLS = 4096
_FIRST, _LAST = np.float32(0), np.float32(_CELLS - 1)
_NARROW, _WIDE = 1e-30, 1e30  # between them the width of a cell is far from float32's limits
_COMPARED = 31
"""Up to so many walls, comparing with each costs less than a look-up by cell (measured: 0.03 ns each against 1.2 ns)."""
_STEPS = 4
_SELECTION = source_of(selection)


@cached(nogil=True)
def prepare(clips, largest, share, n, edges, walls, numbers):
    """Edges and walls of a layer of n elements; fills numbers float32 (2,) with the clips, gives 2^t."""
    most = largest.view(np.float32)
    below = clips.view(np.float32)
    for side in range(2):
        numbers[side] = (
            below[side] if share[side] else most[side]
        )  # a side without intervals is clipped as a whole
    boundaries(numbers, most, share, edges, walls)
    return scale_of(n, max(most[0], most[1]))


@cached(nogil=True)
def boundaries(clips, largest, share, edges, walls):
    """Step 3: fills edges float32 (2, 257) in magnitudes and walls float32 (K,), the boundaries on the signed axis; gives K.

    clips, largest: float32 (2,); share: int64 (2,). code + share[0] = how many walls are below w. An interval is closed away from
    zero, which on the negative side is its left end: w < -edge is w <= the next float below.
    """
    for side in range(2):
        intervals = share[side]
        clip, length = float64(clips[side]), float64(largest[side]) - float64(clips[side])
        for j in range(intervals):
            edges[side, j] = clip + length * (j / intervals)
        edges[side, intervals] = largest[side]
    negative, positive = share[0], share[1]
    for j in range(negative):
        walls[negative - 1 - j] = edges[0, j]
    next_up = walls.view(np.int32)
    for j in range(negative):
        next_up[j] += 1
        walls[j] = -walls[j]
    for j in range(positive):
        walls[negative + j] = edges[1, j]
    return negative + positive


@cached(nogil=True)
def scale_of(n, largest):
    """2^t of step 4 for n elements with the largest magnitude `largest`."""
    bits = 0
    while n >> bits:
        bits += 1
    return math.ldexp(1.0, 62 - bits - math.frexp(float64(largest))[1])


@cached(nogil=True)
def _compare(part, a, b, c, d, index):
    """Adds to index uint8 (m,) how many of four walls part float32 (m,) is above; vectorised."""
    for i in range(part.shape[0]):
        first = uint8(uint8(part[i] > a) + uint8(part[i] > b))
        second = uint8(uint8(part[i] > c) + uint8(part[i] > d))
        index[i] = uint8(index[i] + uint8(first + second))


@cached(nogil=True)
def _cell(x, first, per_cell):
    """The cell of x, float32: monotone in x, as difference, product and truncation are; so only walls in the same cell need comparing."""
    return uint32(min(max((x - first) * per_cell, _FIRST), _LAST))


@cached(nogil=True)
def _cells(walls, k, first, per_cell, table):
    """Fills table uint32 (_CELLS,): how many of k walls lie in earlier cells; gives the most walls in one cell."""
    most, j = 0, 0
    for cell in range(_CELLS):
        table[cell] = j
        here = 0
        while j < k and _cell(walls[j], first, per_cell) == cell:
            j += 1
            here += 1
        most = max(most, here)
    return most


@cached(nogil=True)
def _look_for(part, walls, first, per_cell, table, steps, index):
    """As `_compare` over all walls, which infinite ones follow, by cell."""
    if steps == 1:
        for i in range(part.shape[0]):
            at = table[_cell(part[i], first, per_cell)]
            index[i] = uint8(uint32(at + uint32(part[i] > walls[at])))
        return
    for i in range(part.shape[0]):
        at = table[_cell(part[i], first, per_cell)]
        for _ in range(steps):
            at = uint32(at + uint32(part[i] > walls[at]))
        index[i] = uint8(at)


@cached(nogil=True)
def _bisect(part, walls, k, index):
    """As `_compare` over all k walls, where they are too close together for cells."""
    for i in range(part.shape[0]):
        at, end = 0, k
        while at < end:
            middle = (at + end) // 2
            if walls[middle] < part[i]:
                at = middle + 1
            else:
                end = middle
        index[i] = at


@cached(nogil=True)
def _integers(part, scale, whole):
    """Fills whole int64 (m,) with round(w scale), ties to even; vectorised."""
    for i in range(part.shape[0]):
        whole[i] = int64(np.rint(float64(part[i]) * scale))


@cached(nogil=True)
def _scatter(whole, index, sums):
    """Adds whole and 1 by index, to columns 2 index and 2 index + 1; four rows of sums int64 (4, 512), since one row would wait for
    its own last store, and pairs, since the count then costs next to nothing (both measured)."""
    rest = whole.shape[0] & ~3
    for i in range(0, rest, 4):
        for row in range(4):
            at = 2 * int64(index[i + row])
            sums[row, at] += whole[i + row]
            sums[row, at + 1] += 1
    for i in range(rest, whole.shape[0]):
        at = 2 * int64(index[i])
        sums[0, at] += whole[i]
        sums[0, at + 1] += 1


@cached(nogil=True)
def _changed(before, now, zero):
    """How many went between code 0 and another; vectorised."""
    changes = int32(0)
    for i in range(now.shape[0]):
        changes = int32(changes + int32((before[i] == zero) != (now[i] == zero)))
    return changes


@cached(nogil=True)
def assign(weights, walls, zero, scale, index, sums, counts):
    """Steps 3 and 4 on a range: index, and the integer sum and the count per index; gives how many weights changed their state.

    weights: float32 (n,); walls: float32 (K,) ascending; zero: the index of code 0; index: uint8 (n,), that of the last pass on
    entry; sums, counts: int64 (K + 1,), set.
    """
    k = walls.shape[0]
    rows, whole, fresh = np.zeros((4, 512), np.int64), np.empty(CHUNK, np.int64), np.empty(CHUNK, np.uint8)
    table, padded, steps = np.empty(_CELLS, np.uint32), np.empty(k + 4, np.float32), 0
    first, per_cell = np.float32(0), np.float32(0)
    for j in range(k + 4):
        padded[j] = walls[j] if j < k else np.inf
    if k > _COMPARED:
        first = walls[0]
        width = float64(walls[k - 1]) - float64(first)
        if _NARROW < width < _WIDE:
            per_cell = np.float32((_CELLS - 1) / width)
            steps = _cells(padded, k, first, per_cell, table)
        if steps > _STEPS:
            steps = 0
    changes = 0
    for start in range(0, weights.shape[0], CHUNK):
        part = weights[start : start + CHUNK]
        now, before = fresh[: part.shape[0]], index[start : start + CHUNK]
        if steps:
            _look_for(part, padded, first, per_cell, table, steps, now)
        elif k > _COMPARED:
            _bisect(part, walls, k, now)
        else:
            for i in range(now.shape[0]):
                now[i] = 0
            for j in range(0, k, 4):
                _compare(part, padded[j], padded[j + 1], padded[j + 2], padded[j + 3], now)
        _integers(part, scale, whole[: part.shape[0]])
        _scatter(whole[: part.shape[0]], now, rows)
        changes += _changed(before, now, zero)
        for i in range(now.shape[0]):
            before[i] = now[i]
    for j in range(k + 1):
        sums[j] = rows[0, 2 * j] + rows[1, 2 * j] + rows[2, 2 * j] + rows[3, 2 * j]
        counts[j] = rows[0, 2 * j + 1] + rows[1, 2 * j + 1] + rows[2, 2 * j + 1] + rows[3, 2 * j + 1]
    return changes


@cached(nogil=True)
def levels(sums, counts, scale, edges, share, result):
    """Step 4: fills result float32 (K + 1,): means, moved into their intervals; nan where an interval is empty."""
    negative, positive = share[0], share[1]
    wall = np.empty(1, np.float32)
    bits = wall.view(np.int32)
    for at in range(negative + 1 + positive):
        if at == negative or counts[at] == 0:
            result[at] = 0.0 if at == negative else np.nan
            continue
        side, j = (0, negative - at) if at < negative else (1, at - negative)
        sign = -1.0 if side == 0 else 1.0
        wall[0] = edges[side, j - 1]
        bits[0] += 1  # the next float: the interval is open towards zero
        mean = np.float32(sign * (float64(sums[at]) / float64(counts[at]) * (1.0 / scale)))
        result[at] = np.float32(sign) * min(max(mean, wall[0]), edges[side, j])


@cached(nogil=True)
def look_up(index, table, values):
    """values[i] = table[index[i]]; float32."""
    for i in range(index.shape[0]):
        values[i] = table[index[i]]


@cached(nogil=True)
def whole_layer(
    weights,
    values,
    index,
    fresh,
    p,
    share,
    lo,
    hi,
    halves,
    inside,
    walls,
    edges,
    numbers,
    table,
    counts,
    of=_SELECTION,
):
    """All steps on one layer by one thread; -1 for NaN or infinity, else how many weights changed their state.

    The arrays are those of `on_cpu._Layer`; `fresh` is 1 in the first pass, which has nothing to compare with; `of` is for the cache on disk.
    """
    bits = weights.view(np.int32)
    results, clips, largest = np.empty((1, SURVEY), np.int64), np.empty(2, np.int32), np.empty(2, np.int32)
    if fresh and bits.shape[0] > inside.shape[2]:
        guess(bits, p, lo, hi)
    survey(bits, lo, hi, results[0], inside[0])
    missing = settle(results, inside, p, clips, largest)
    if missing < 0:
        return -1
    for side in range(2):
        if missing & (1 + side):
            clips[side] = select(bits, side, rank_of(results, side, p))
    if bits.shape[0] > inside.shape[2]:
        track(clips, halves, missing, bits.shape[0], results, lo, hi)
    scale = prepare(clips, largest, share, bits.shape[0], edges, walls, numbers)
    sums = np.empty(walls.shape[0] + 1, np.int64)
    changes = assign(weights, walls, share[0], scale, index, sums, counts)
    levels(sums, counts, scale, edges, share, table)
    look_up(index, table, values)
    return 0 if fresh else changes
