"""The first pass of the CPU operator, compiled by numba: sizes, largest weights and thresholds of both sides.

Magnitudes are compared as integers: the bits of a float32 without its sign are ordered as the magnitudes are, and NaN and infinity lie
above all numbers. A bracket around a threshold is only a guess: the counts prove whether the threshold lies inside. All functions
release the GIL; a range is worked on by one thread. Not covered: what is done with the thresholds (`kernels`).
"""

# numba compiles these functions; their types are those of the arguments, which the docstrings state.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,call-overload,assignment"
from __future__ import annotations

import math

import numpy as np
from numba import int32, int64

from clipq_ray.compiled import cached

CHUNK = 1024
_BLOCK = 32
_MAGNITUDE = np.int32(0x7FFFFFFF)
NOT_FINITE = np.int32(0x7F800000)
"""Magnitude bits from here on are those of infinity and NaN."""
_ZERO = np.int32(0)
_SAMPLE = 1 << 14
_NARROWEST, _WIDEST = 16, 1 << 20  # half a bracket in units of the last place; 2^20 is a tenth of a threshold
_FEWEST = 256  # candidates that a bracket should hold

# Columns of a survey's result, for the negative and then the positive side.
SIZE, LARGEST, BELOW, INSIDE = 0, 2, 4, 6
SURVEY = 8


@cached(nogil=True)
def _count(bits, lo, hi, found):
    """Fills found int32 (8,): sizes, at most lo and at most hi (zeros counted along), largest magnitude; vectorised."""
    below = above = low_n = low_p = high_n = high_p = int32(0)
    most_n = most_p = int32(0)
    lo_n, lo_p, hi_n, hi_p = lo[0], lo[1], hi[0], hi[1]
    for i in range(bits.shape[0]):
        magnitude = int32(bits[i] & _MAGNITUDE)
        negative = int32(magnitude if bits[i] < 0 else _ZERO)
        positive = int32(_ZERO if bits[i] < 0 else magnitude)
        most_n, most_p = int32(max(most_n, negative)), int32(max(most_p, positive))
        below, above = int32(below + int32(negative > 0)), int32(above + int32(positive > 0))
        low_n, low_p = int32(low_n + int32(negative <= lo_n)), int32(low_p + int32(positive <= lo_p))
        high_n, high_p = int32(high_n + int32(negative <= hi_n)), int32(high_p + int32(positive <= hi_p))
    found[0], found[1], found[2], found[3] = below, above, most_n, most_p
    found[4], found[5], found[6], found[7] = low_n, low_p, high_n, high_p


@cached(nogil=True)
def _collect(bits, lo, hi, inside, kept):
    """Appends the magnitudes in (lo, hi] of each side to inside int32 (2, capacity); kept int64 (2,) counts them all."""
    lo_n, lo_p, hi_n, hi_p = lo[0], lo[1], hi[0], hi[1]
    for start in range(0, bits.shape[0], _BLOCK):
        block = bits[start : start + _BLOCK]
        hits = int32(0)
        for i in range(block.shape[0]):
            magnitude = int32(block[i] & _MAGNITUDE)
            negative = (block[i] < 0) & (magnitude > lo_n) & (magnitude <= hi_n)
            positive = (block[i] >= 0) & (magnitude > lo_p) & (magnitude <= hi_p)
            hits = int32(hits + int32(negative | positive))
        if hits == 0:
            continue
        for i in range(block.shape[0]):
            magnitude = int32(block[i] & _MAGNITUDE)
            side = int64(block[i] >= 0)
            if magnitude > lo[side] and magnitude <= hi[side]:
                if kept[side] < inside.shape[1]:
                    inside[side, kept[side]] = magnitude
                kept[side] += 1


@cached(nogil=True)
def survey(bits, lo, hi, result, inside):
    """One pass over a range: what both sides hold, and the candidates in the bracket (lo, hi].

    bits: int32 (n,); lo, hi: int32 (2,), lo >= 0 (a zero belongs to no side); result: int64 (8,), see SIZE, LARGEST, BELOW (at most lo)
    and INSIDE; inside: int32 (2, capacity), filled as far as it goes.
    """
    found = np.empty(SURVEY, np.int32)
    kept = np.zeros(2, np.int64)
    for i in range(SURVEY):
        result[i] = 0
    for start in range(0, bits.shape[0], CHUNK):
        part = bits[start : start + CHUNK]
        _count(part, lo, hi, found)
        for side in range(2):
            zeros = (
                part.shape[0] - found[side]
            )  # elements that are not of this side count as 0, which is <= lo
            result[SIZE + side] += found[side]
            result[LARGEST + side] = max(result[LARGEST + side], found[2 + side])
            result[BELOW + side] += found[4 + side] - zeros
        if found[6] + found[7] > found[4] + found[5]:
            _collect(part, lo, hi, inside, kept)
    result[INSIDE], result[INSIDE + 1] = kept[0], kept[1]


@cached(nogil=True)
def select(bits, side, rank):
    """The magnitude bits at `rank` (from 0) among a side's ascending magnitudes, whatever they are: two passes of histograms."""
    upper = np.zeros(1 << 16, np.int64)
    for i in range(bits.shape[0]):
        magnitude = bits[i] & _MAGNITUDE
        if magnitude > 0 and int64(bits[i] >= 0) == side:
            upper[magnitude >> 15] += 1
    at = 0
    while rank >= upper[at]:
        rank -= upper[at]
        at += 1
    lower = np.zeros(1 << 15, np.int64)
    for i in range(bits.shape[0]):
        magnitude = bits[i] & _MAGNITUDE
        if magnitude > 0 and int64(bits[i] >= 0) == side and magnitude >> 15 == at:
            lower[magnitude & 0x7FFF] += 1
    low = 0
    while rank >= lower[low]:
        rank -= lower[low]
        low += 1
    return int32(at << 15 | low)


@cached(nogil=True)
def _smallest(values, rank):
    """The value at `rank` (from 0) of the ascending order; values, int32 (n,), are reordered.

    Hoare's selection, the middle of three as pivot: numba's own sort and partition take seconds to compile.
    """
    first, last = 0, values.shape[0] - 1
    while first < last:
        low, middle, high = values[first], values[(first + last) // 2], values[last]
        pivot = max(min(low, middle), min(max(low, middle), high))
        i, j = first, last
        while i <= j:
            while values[i] < pivot:
                i += 1
            while values[j] > pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if rank <= j:
            last = j
        elif rank >= i:
            first = i
        else:
            break
    return values[rank]


@cached(nogil=True)
def guess(bits, p, lo, hi):
    """A bracket around both thresholds from a regular sample of int32 (n,); fills lo, hi. A bad guess only costs time."""
    step = max(bits.shape[0] // _SAMPLE, 1)
    sample = np.empty((2, bits.shape[0] // step + 1), np.int32)
    sizes = np.zeros(2, np.int64)
    for i in range(0, bits.shape[0], step):
        magnitude = bits[i] & _MAGNITUDE
        if magnitude > 0:
            side = int64(bits[i] >= 0)
            sample[side, sizes[side]] = magnitude
            sizes[side] += 1
    for side in range(2):
        n = sizes[side]
        margin = int64(3.3 * math.sqrt(n * p * (1 - p))) + 3
        first, last = int64(p * n) - margin, int64(p * n) + margin
        lo[side] = _smallest(sample[side, :n], first) if first >= 0 and n > 0 else 0
        hi[side] = _smallest(sample[side, :n], last) if last < n else _MAGNITUDE


@cached(nogil=True)
def settle(results, inside, p, clips, largest):
    """Step 1 from the surveys of a layer's ranges: fills clips and largest, magnitude bits int32 (2,).

    results: int64 (ranges, 8); inside: int32 (ranges, 2, capacity). Gives -1 for NaN or infinity, else the sum of 1 (negative) and 2
    (positive) for the sides whose threshold is not among the candidates.
    """
    missing = 0
    for side in range(2):
        largest[side] = 0
        below, kept, most = 0, 0, 0
        for r in range(results.shape[0]):
            largest[side] = max(largest[side], results[r, LARGEST + side])
            below += results[r, BELOW + side]
            kept += results[r, INSIDE + side]
            most = max(most, results[r, INSIDE + side])
        if largest[side] >= NOT_FINITE:
            return -1
        rank = rank_of(results, side, p)
        clips[side] = 0
        if rank < 0:
            continue
        if not below <= rank < below + kept or most > inside.shape[2]:
            missing += 1 + side
            continue
        candidates, at = np.empty(kept, np.int32), 0
        for r in range(results.shape[0]):
            for i in range(results[r, INSIDE + side]):
                candidates[at] = inside[r, side, i]
                at += 1
        clips[side] = _smallest(candidates, rank - below)
    return missing


@cached(nogil=True)
def rank_of(results, side, p):
    """The rank (from 0) of a side's threshold among its magnitudes; -1 if nothing is clipped."""
    n = 0
    for r in range(results.shape[0]):
        n += results[r, SIZE + side]
    return int64(math.floor(p * n + 0.5)) - 1


@cached(nogil=True)
def track(clips, halves, missing, n, results, lo, hi):
    """The bracket of the next pass, around the thresholds: twice as wide as they moved, and wide enough for some candidates.

    clips: int32 (2,); halves: int64 (2,), half widths, 0 before the first pass; n: weights of the layer; results: of this pass's
    surveys; lo, hi: this pass's bracket on entry. A threshold moves by a few ranks a step, so a bracket with n / 4096 candidates is
    rarely left; leaving it costs ten times what they cost (measured).
    """
    wanted = max(_FEWEST, n // 4096)
    for side in range(2):
        width = int64(hi[side]) - lo[side]
        moved = abs(int64(clips[side]) - (int64(lo[side]) + hi[side]) // 2)
        kept = 0
        for r in range(results.shape[0]):
            kept += results[r, INSIDE + side]
        if halves[side] == 0:  # after a bracket from a sample
            moved = 0
        enough = min(width * wanted // (2 * kept), 4 * width) if kept else 4 * width
        if missing & (1 + side) and kept >= wanted:  # a jump, or more candidates than there is room for
            enough = 2 * enough
        halves[side] = min(max(2 * moved, enough, _NARROWEST), _WIDEST)
        lo[side] = max(0, clips[side] - halves[side])
        hi[side] = min(int64(_MAGNITUDE), clips[side] + halves[side]) if clips[side] else 0
