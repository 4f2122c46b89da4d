"""The Triton kernels of the operator on a GPU: what each launch does to all layers of a network at once (`on_gpu` says in which order).

A program that goes over weights takes one block of one layer; programs that decide something take one layer, or one side of one. Rows are sides: 2 x layer for
the negative one, 2 x layer + 1 for the positive one. Atomics are relaxed: nobody reads what they make before the next launch. float64 serves for edges and
means; kernels that compute with it are built without fused multiply-adds, which would change bits. Not covered: NaN and infinity, which only raise a flag.
"""

# Triton compiles these kernels; their arguments have no Python types.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

_NOT_FINITE = tl.constexpr(0x7F800000)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_ROUNDS = tl.constexpr(
    6755399441055744.0
)  # 1.5 x 2^52: adding and taking it away rounds to an integer, ties to even
_ROUNDED = tl.constexpr(2251799813685248.0)  # 2^51: a float32 times a power of two is an integer from here on


_HALF_WINDOW = tl.constexpr(1 << 20)  # an eighth of an octave, in steps of a float32's magnitude
_STEPS_PER_BIN = tl.constexpr(1 << 10)


@triton.jit
def _place(blocks, sizes, BLOCK: tl.constexpr):
    """This program's layer, its offsets in the layer, and which of them are inside."""
    layer = tl.load(blocks + 2 * tl.program_id(0))
    offsets = tl.load(blocks + 2 * tl.program_id(0) + 1) + tl.arange(0, BLOCK)
    return layer, offsets, offsets < tl.load(sizes + layer)


@triton.jit
def _weights(addresses, layer, offsets, inside, DTYPE: tl.constexpr):
    pointer = tl.load(addresses + layer).to(tl.pointer_type(DTYPE))
    return tl.load(pointer + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _low(found, row):
    """The least magnitude, as bits, of the window around a side's last threshold: 2048 bins of 1024 steps."""
    return tl.maximum(tl.maximum(tl.load(found + 2 * row), 0) - _HALF_WINDOW, 0)


@triton.jit
def track(blocks, sizes, addresses, found, largest, numbers, below, histogram, DTYPE: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """By side: the largest weight, how many there are, how many lie below the window, and those inside by bins; zeros count nowhere."""
    layer, offsets, inside = _place(blocks, sizes, BLOCK)
    bits = _weights(addresses, layer, offsets, inside, DTYPE).to(tl.int32, bitcast=True)
    magnitude = bits & _MAGNITUDE
    counted = inside & (magnitude > 0)
    low = tl.where(bits < 0, _low(found, 2 * layer), _low(found, 2 * layer + 1))
    bin_ = (magnitude - low) >> 10
    row = 2 * layer + tl.where(bits < 0, 0, 1)
    within = counted & (magnitude >= low) & (bin_ < BINS)
    tl.atomic_add(histogram + row * BINS + bin_, 1, mask=within, sem="relaxed")
    for side in tl.static_range(2):
        mine = counted & ((bits >= 0) == (side == 1))
        most = tl.max(tl.where(mine, magnitude, 0), 0)
        tl.atomic_max(largest + 2 * layer + side, most, sem="relaxed")
        tl.atomic_add(numbers + 2 * layer + side, tl.sum(mine.to(tl.int32), 0), sem="relaxed")
        under = tl.sum((mine & (magnitude < low)).to(tl.int32), 0)
        tl.atomic_add(below + 2 * layer + side, under, sem="relaxed")


@triton.jit
def _bin_of(histogram, row, rank, BINS: tl.constexpr):
    """The bin that holds `rank` (from 1), and how many lie in those before it and in all."""
    bins = tl.arange(0, BINS)
    counts = tl.load(histogram + row * BINS + bins)
    bin_ = tl.sum((tl.cumsum(counts, 0) < rank).to(tl.int32), 0)
    return bin_, tl.sum(tl.where(bins < bin_, counts, 0), 0), tl.sum(counts, 0)


@triton.jit
def settle(found, rates, numbers, below, histogram, missed, BINS: tl.constexpr):
    """One side: whether its threshold lies in the window. `found` holds then (least magnitude of its bin, rank inside), else (0, rank of all);
    (-1, 0) where nothing is clipped."""
    row = tl.program_id(0)
    n = tl.load(numbers + row).to(tl.float64)
    rank = tl.floor(tl.load(rates + row // 2) * n + 0.5).to(tl.int32)
    rest = rank - tl.load(below + row)
    bin_, before, inside = _bin_of(histogram, row, rest, BINS)
    hit = (rest > 0) & (rest <= inside)
    least = _low(found, row) + bin_ * _STEPS_PER_BIN
    tl.store(missed + row, ((rank > 0) & (hit == 0)).to(tl.int32))
    tl.store(found + 2 * row, tl.where(rank > 0, tl.where(hit, least, 0), -1))
    tl.store(found + 2 * row + 1, tl.where(rank > 0, tl.where(hit, rest - before, rank), 0))


@triton.jit
def search(
    blocks, sizes, addresses, found, missed, histogram, ROUND: tl.constexpr, DTYPE: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where the window has missed: magnitudes by their first 11 bits, then by the next 10."""
    layer, offsets, inside = _place(blocks, sizes, BLOCK)
    left, right = tl.load(missed + 2 * layer), tl.load(missed + 2 * layer + 1)
    if left + right > 0:
        bits = _weights(addresses, layer, offsets, inside, DTYPE).to(tl.int32, bitcast=True)
        magnitude = bits & _MAGNITUDE
        counted = inside & (magnitude > 0) & (tl.where(bits < 0, left, right) > 0)
        bin_ = magnitude >> 20
        if ROUND == 1:
            first = tl.where(bits < 0, tl.load(found + 4 * layer), tl.load(found + 4 * layer + 2))
            counted = counted & (bin_ == first)
            bin_ = (magnitude >> 10) & 1023
        row = 2 * layer + tl.where(bits < 0, 0, 1)
        tl.atomic_add(histogram + row * BINS + bin_, 1, mask=counted, sem="relaxed")


@triton.jit
def narrow(found, missed, histogram, ROUND: tl.constexpr, BINS: tl.constexpr):
    """One side that was missed: `found` holds (first 11 bits, rank inside) after round 0, then what `settle` leaves of others."""
    row = tl.program_id(0)
    if tl.load(missed + row) > 0:
        rank = tl.load(found + 2 * row + 1)
        bin_, before, _ = _bin_of(histogram, row, rank, BINS)
        if ROUND == 1:
            bin_ = ((tl.load(found + 2 * row) << 10) | bin_) << 10
        tl.store(found + 2 * row, bin_)
        tl.store(found + 2 * row + 1, rank - before)


@triton.jit
def exact(
    blocks, sizes, addresses, found, histogram, DTYPE: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """By side: the magnitudes of the bin that was found, one by one."""
    layer, offsets, inside = _place(blocks, sizes, BLOCK)
    bits = _weights(addresses, layer, offsets, inside, DTYPE).to(tl.int32, bitcast=True)
    magnitude = bits & _MAGNITUDE
    least = tl.where(bits < 0, tl.load(found + 4 * layer), tl.load(found + 4 * layer + 2))
    counted = inside & (magnitude > 0) & (least >= 0) & (magnitude >= least)
    bin_ = magnitude - least
    row = 2 * layer + tl.where(bits < 0, 0, 1)
    tl.atomic_add(histogram + row * BINS + bin_, 1, mask=counted & (bin_ < _STEPS_PER_BIN), sem="relaxed")


@triton.jit
def pick(found, histogram, BINS: tl.constexpr):
    """One side: `found` holds its threshold, 0 where nothing is clipped; it is what the next pass looks around."""
    row = tl.program_id(0)
    least, rank = tl.load(found + 2 * row), tl.load(found + 2 * row + 1)
    bin_, _, _ = _bin_of(histogram, row, rank, BINS)
    tl.store(found + 2 * row, tl.where(rank > 0, least + bin_, 0))


@triton.jit
def _edge(found, largest, layer, side, j, intervals):
    """edge_j of step 3, float32; `side`, `j`, `intervals` are blocks. The largest weight itself for j = intervals."""
    clip = tl.maximum(tl.load(found + 4 * layer + 2 * side), 0).to(tl.float32, bitcast=True)
    most = tl.load(largest + 2 * layer + side).to(tl.float32, bitcast=True)
    length = most.to(tl.float64) - clip.to(tl.float64)
    part = j.to(tl.float64) / tl.maximum(intervals, 1).to(tl.float64)
    edge = (clip.to(tl.float64) + length * part).to(tl.float32)
    return tl.where(j == intervals, most, edge)


@triton.jit
def _exponent(most):
    """e of step 4 from magnitude bits: max/2 < 2^(e-1) <= max < 2^e; 0 for 0. Of a denormal, its bits are an integer times 2^-149."""
    as_integer = most.to(tl.float32).to(tl.int32, bitcast=True)
    tiny = (as_integer >> 23) - 126 - 149
    return tl.where(most == 0, 0, tl.where(most < 0x00800000, tiny, (most >> 23) - 126))


@triton.jit
def _two_to(power):
    """2^power as float64, for powers of normal numbers."""
    return ((power + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def prepare(found, largest, shares, lengths, walls, clips, powers, not_finite, INDICES: tl.constexpr):
    """One layer: walls on the signed axis (infinite behind the last), clips, t, and the flag for NaN and infinity."""
    layer = tl.program_id(0)
    negative, positive = tl.load(shares + 2 * layer), tl.load(shares + 2 * layer + 1)
    at = tl.arange(0, INDICES)
    below = at < negative
    side = tl.where(below, 0, 1)
    j = tl.where(below, negative - 1 - at, at - negative)
    edge = _edge(found, largest, layer, side, tl.maximum(j, 0), tl.where(below, negative, positive))
    # an interval is closed away from zero: on the negative side w < -edge is w <= the next float below
    beyond = -((edge.to(tl.int32, bitcast=True) + 1).to(tl.float32, bitcast=True))
    wall = tl.where(below, beyond, edge)
    tl.store(walls + layer * INDICES + at, tl.where(at < negative + positive, wall, float("inf")))
    most = 0
    for one in tl.static_range(2):
        here = tl.load(largest + 2 * layer + one)
        clip = tl.maximum(tl.load(found + 4 * layer + 2 * one), 0)
        whole = tl.load(shares + 2 * layer + one) == 0  # a side without intervals is clipped as a whole
        tl.store(clips + 2 * layer + one, tl.where(whole, here, clip).to(tl.float32, bitcast=True))
        most = tl.maximum(most, here)
    tl.store(powers + layer, 62 - tl.load(lengths + layer) - _exponent(most))
    tl.atomic_max(not_finite + layer, (most >= _NOT_FINITE).to(tl.int32), sem="relaxed")


@triton.jit
def assign(
    blocks, sizes, addresses, starts, shares, walls, powers, indices, sums, counts, changes, fresh,
    DTYPE: tl.constexpr, INDICES: tl.constexpr, FEW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Index of every weight, integer sums and counts by index, and how many weights changed their state."""
    layer, offsets, inside = _place(blocks, sizes, BLOCK)
    weight = _weights(addresses, layer, offsets, inside, DTYPE)
    zero = tl.load(shares + 2 * layer)
    last = zero + tl.load(shares + 2 * layer + 1)
    row = layer * INDICES
    index = tl.zeros((BLOCK,), tl.int32)
    if last < FEW:
        for wall in range(0, last):
            index += (tl.load(walls + row + wall) < weight).to(tl.int32)
    else:
        for power in tl.static_range(8):
            step = 128 >> power
            index += tl.where(tl.load(walls + row + index + step - 1) < weight, step, 0)
    here = indices + tl.load(starts + layer) + offsets
    before = tl.load(here, mask=inside, other=0).to(tl.int32)
    changed = inside & ((before == zero) != (index == zero)) & (tl.load(fresh) == 0)
    tl.atomic_add(changes + layer, tl.sum(changed.to(tl.int32), 0).to(tl.int64), sem="relaxed")
    tl.store(here, index.to(tl.uint8), mask=inside)

    scaled = weight.to(tl.float64) * _two_to(tl.load(powers + layer))
    rounded = tl.where(tl.abs(scaled) < _ROUNDED, (scaled + _ROUNDS) - _ROUNDS, scaled)
    whole = rounded.to(tl.int64)
    counted = inside & (index != zero)
    if last < FEW:  # in the block first: atomics of every weight to few addresses would queue
        for number in range(0, last):
            one = tl.where(number < zero, number, number + 1)
            mine = counted & (index == one)
            tl.atomic_add(sums + row + one, tl.sum(tl.where(mine, whole, 0), 0), sem="relaxed")
            tl.atomic_add(counts + row + one, tl.sum(mine.to(tl.int32), 0).to(tl.int64), sem="relaxed")
    else:
        tl.atomic_add(sums + row + index, whole, mask=counted, sem="relaxed")
        tl.atomic_add(counts + row + index, tl.full((BLOCK,), 1, tl.int64), mask=counted, sem="relaxed")


@triton.jit
def means(found, largest, shares, powers, sums, counts, levels, INDICES: tl.constexpr):
    """One layer's levels: means, moved into their intervals; 0 for code 0, nan for an empty interval."""
    layer = tl.program_id(0)
    negative, positive = tl.load(shares + 2 * layer), tl.load(shares + 2 * layer + 1)
    at = tl.arange(0, INDICES)
    below = at < negative
    side = tl.where(below, 0, 1)
    intervals = tl.where(below, negative, positive)
    j = tl.where(below, negative - at, at - negative)
    total, count = tl.load(sums + layer * INDICES + at), tl.load(counts + layer * INDICES + at)
    mean = (
        tl.abs(total).to(tl.float64) / tl.maximum(count, 1).to(tl.float64) * _two_to(-tl.load(powers + layer))
    )
    inner = _edge(found, largest, layer, side, tl.maximum(j - 1, 0), intervals)
    lowest = (inner.to(tl.int32, bitcast=True) + 1).to(tl.float32, bitcast=True)
    outer = _edge(found, largest, layer, side, j, intervals)
    level = tl.minimum(tl.maximum(mean.to(tl.float32), lowest), outer)
    level = tl.where(count > 0, tl.where(below, -level, level), float("nan"))
    tl.store(levels + layer * INDICES + at, tl.where(at == negative, 0.0, level))


@triton.jit
def look_up(
    blocks,
    sizes,
    addresses,
    starts,
    indices,
    levels,
    DTYPE: tl.constexpr,
    INDICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every weight becomes its level."""
    layer, offsets, inside = _place(blocks, sizes, BLOCK)
    index = tl.load(indices + tl.load(starts + layer) + offsets, mask=inside, other=0).to(tl.int32)
    level = tl.load(levels + layer * INDICES + index)
    pointer = tl.load(addresses + layer).to(tl.pointer_type(DTYPE))
    if tl.bfloat16 == DTYPE:  # to the nearest, ties to even, spelled out: the interpreter cuts off
        bits = level.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(pointer + offsets, nearest.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        tl.store(pointer + offsets, level.to(DTYPE), mask=inside)


@triton.jit
def one(out):
    """Write a 1: the smallest kernel that there is."""
    tl.store(out, 1)
