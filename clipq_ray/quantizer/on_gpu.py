"""The operator on all layers of a network by Triton kernels: the bits of `reference`, a fixed number of launches, no host in between.

1. Thresholds: three histograms of the magnitude's bits (11, 10 and 10), all layers in one launch each; after each one a program per side
   finds the bin that holds the threshold's rank. Three rounds name all 31 bits, so the threshold is exact.
2. A program per layer makes the walls between intervals; then every weight finds its interval by bisection, and integer sums and counts
   are taken (in blocks where there are few intervals, by atomics where there are many).
3. A program per layer makes the levels; then every weight becomes its level.

Buffers are made once, and the tables of addresses again only when a tensor has moved, so a pass over tensors that stay can be captured in
a CUDA graph. float64 serves for edges and means; kernels that compute with it are built without fused multiply-adds, which would change
bits. NaN and infinity only raise a flag on the device, for `check`. Not covered: more than one device; speed on a real GPU has not been
measured, and Triton's interpreter, by which the tests run these kernels on a CPU, shows neither that nor what fusing would do.
"""

# Triton compiles these kernels; their arguments have no Python types.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipq_ray.errors import ModelError
from clipq_ray.plan import Share, Theta
from clipq_ray.quantizer.on_cpu import NonFinite
from clipq_ray.quantizer.reference import in_memory_order
from clipq_ray.sending import sent

MOST_WEIGHTS = 2**31 - 1
_BLOCK = 4096
_BINS = 2048
_INDICES = 256
_BY_BLOCK = 32
"""Up to so many indices, sums are taken in the block first: atomics of every weight to few addresses would queue."""
_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

_NOT_FINITE = tl.constexpr(0x7F800000)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_ROUNDS = tl.constexpr(
    6755399441055744.0
)  # 1.5 x 2^52: adding and taking it away rounds to an integer, ties to even
_ROUNDED = tl.constexpr(2251799813685248.0)  # 2^51: a float32 times a power of two is an integer from here on


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
def _histogram(
    blocks,
    sizes,
    addresses,
    found,
    histogram,
    largest,
    ROUND: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts magnitudes by the bits of this round, among those whose higher bits are `found` (layers, 2, 2); zeros count nowhere."""
    layer, offsets, inside = _place(blocks, sizes, BLOCK)
    bits = _weights(addresses, layer, offsets, inside, DTYPE).to(tl.int32, bitcast=True)
    magnitude = bits & _MAGNITUDE
    side = tl.where(bits < 0, 0, 1)
    counted = inside & (magnitude > 0)
    row = 2 * layer + side
    if ROUND == 0:
        for one in tl.static_range(2):
            most = tl.max(tl.where(counted & (side == one), magnitude, 0), 0)
            tl.atomic_max(largest + 2 * layer + one, most)
        bin_ = magnitude >> 20
    else:
        above = 20 if ROUND == 1 else 10
        counted = counted & ((magnitude >> above) == tl.load(found + 2 * row, mask=counted, other=-1))
        bin_ = (magnitude >> (above - 10)) & 1023
    tl.atomic_add(histogram + row * 2048 + bin_, 1, mask=counted)


@triton.jit
def _find(histogram, rates, found, ROUND: tl.constexpr, BINS: tl.constexpr):
    """One side of one layer: the bin of the threshold's rank. `found` holds (bits so far, rank from 1 inside); rank 0 clips nothing."""
    row = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.load(histogram + row * BINS + bins)
    upto = tl.cumsum(counts, 0)
    if ROUND == 0:
        n = tl.sum(counts, 0).to(tl.float64)
        rank = tl.floor(tl.load(rates + row // 2) * n + 0.5).to(tl.int32)
        so_far = 0
    else:
        rank = tl.load(found + 2 * row + 1)
        so_far = tl.load(found + 2 * row)
    bin_ = tl.sum((upto < rank).to(tl.int32), 0)
    before = tl.sum(tl.where(bins < bin_, counts, 0), 0)
    now = bin_ if ROUND == 0 else (so_far << 10) | bin_
    tl.store(found + 2 * row, tl.where(rank > 0, now, -1 if ROUND < 2 else 0))
    tl.store(found + 2 * row + 1, tl.where(rank > 0, rank - before, 0))


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
def _prepare(found, largest, shares, lengths, walls, clips, powers, not_finite, INDICES: tl.constexpr):
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
    tl.atomic_max(not_finite + layer, (most >= _NOT_FINITE).to(tl.int32))


@triton.jit
def _assign(
    blocks, sizes, addresses, starts, shares, walls, powers, indices, sums, counts, changes, fresh,
    DTYPE: tl.constexpr, INDICES: tl.constexpr, BY_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Index of every weight, integer sums and counts by index, and how many weights changed their state."""
    layer, offsets, inside = _place(blocks, sizes, BLOCK)
    weight = _weights(addresses, layer, offsets, inside, DTYPE)
    index = tl.zeros((BLOCK,), tl.int32)
    for power in tl.static_range(8):
        step = 128 >> power
        index += tl.where(tl.load(walls + layer * INDICES + index + step - 1) < weight, step, 0)
    zero = tl.load(shares + 2 * layer)
    here = indices + tl.load(starts + layer) + offsets
    before = tl.load(here, mask=inside, other=0).to(tl.int32)
    changed = inside & ((before == zero) != (index == zero)) & (tl.load(fresh) == 0)
    tl.atomic_add(changes + layer, tl.sum(changed.to(tl.int64), 0))
    tl.store(here, index.to(tl.uint8), mask=inside)

    exact = weight.to(tl.float64) * _two_to(tl.load(powers + layer))
    rounded = tl.where(tl.abs(exact) < _ROUNDED, (exact + _ROUNDS) - _ROUNDS, exact)
    whole = rounded.to(tl.int64)
    counted = inside & (index != zero)
    last = zero + tl.load(shares + 2 * layer + 1)
    row = layer * INDICES
    if last < BY_BLOCK:
        for one in range(0, last + 1):
            mine = counted & (index == one)
            tl.atomic_add(sums + row + one, tl.sum(tl.where(mine, whole, 0), 0))
            tl.atomic_add(counts + row + one, tl.sum(mine.to(tl.int64), 0))
    else:
        tl.atomic_add(sums + row + index, whole, mask=counted)
        tl.atomic_add(counts + row + index, tl.full((BLOCK,), 1, tl.int64), mask=counted)


@triton.jit
def _means(found, largest, shares, powers, sums, counts, levels, INDICES: tl.constexpr):
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
def _look_up(
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
def _one(out):
    tl.store(out, 1)


def try_out(device: torch.device) -> None:
    """One small kernel on `device`: raises what Triton says where it finds nothing to compile its launcher with, which it does on the node at the first launch."""
    with torch.device(device):
        _one[(1,)](torch.zeros(1, dtype=torch.int32))


class GpuRequantizer:
    """Quantizes the same layers again and again; as `on_cpu.CpuRequantizer`, but NaN and infinity are only found by `check`.

    layers: (theta, share) each; weights: float32, float16 or bfloat16 on one GPU, dense in memory; later ones share shape, strides and
    dtype. `ModelError` for a layer of more than 2^31 - 1 weights or with gaps in memory.
    """

    def __init__(
        self, layers: Sequence[tuple[Theta, Share]], weights: Sequence[Tensor], *, block: int = _BLOCK
    ) -> None:
        for weight in weights:
            _refuse(weight)
        self._shares = [share for _, share in layers]
        count, device = len(layers), weights[0].device if weights else torch.device("cpu")
        sizes = [weight.numel() for weight in weights]
        starts = [sum(sizes[:layer]) for layer in range(count)]

        def table(rows: Any, dtype: torch.dtype) -> Tensor:
            return torch.tensor(rows, dtype=dtype, device=device)

        self._sizes, self._starts = table(sizes, torch.int64), table(starts, torch.int64)
        self._lengths = table([size.bit_length() for size in sizes], torch.int32)
        self._rates = table([theta.p for theta, _ in layers], torch.float64)
        self._share_table = table([[share.negative, share.positive] for share in self._shares], torch.int32)
        self._groups = [
            (tl_dtype, table(_blocks([n if w.dtype == dtype else 0 for n, w in zip(sizes, weights, strict=True)], block), torch.int64))
            for dtype, tl_dtype in _DTYPES.items()
            if any(weight.dtype == dtype and weight.numel() for weight in weights)
        ]  # fmt: skip
        self._block, self._count = block, count
        self._histogram = torch.zeros(2 * count * _BINS, dtype=torch.int32, device=device)
        self._found = torch.zeros(count, 2, 2, dtype=torch.int32, device=device)
        self._largest = torch.zeros(count, 2, dtype=torch.int32, device=device)
        self._walls = torch.zeros(count, _INDICES, dtype=torch.float32, device=device)
        self._powers = torch.zeros(count, dtype=torch.int32, device=device)
        self._sums = torch.zeros(2, count, _INDICES, dtype=torch.int64, device=device)
        self._levels = torch.zeros(count, _INDICES, dtype=torch.float32, device=device)
        self._clips = torch.zeros(count, 2, dtype=torch.float32, device=device)
        self._all = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
        self.indices = list(self._all.split(sizes)) if sizes else []
        self.changes = torch.zeros(count, dtype=torch.int64, device=device)
        self.not_finite = torch.zeros(count, dtype=torch.int32, device=device)
        """int32 (layers,): 1 where a pass met NaN or infinity."""
        self._addresses: dict[tuple[int, ...], Tensor] = {}
        # on the device: every pass launches the same kernels, so one pass is enough before a CUDA graph is captured
        self._fresh = torch.ones(1, dtype=torch.int32, device=device)

    def set_rates(self, rates: Sequence[float]) -> None:
        """As `fast.Requantizer.set_rates`."""
        self._rates.copy_(sent(torch.tensor(list(rates), dtype=torch.float64), self._rates.device))

    def run(self, weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Quantize `weights` into `values`; nothing waits for the device."""
        if not self._count:
            return
        source, target = self._table_of(weights), self._table_of(values)
        self._largest.zero_()
        self._sums.zero_()
        for round_ in range(3):
            self._histogram.zero_()
            for dtype, blocks in self._groups:
                _histogram[(len(blocks),)](
                    blocks, self._sizes, source, self._found, self._histogram, self._largest, ROUND=round_, DTYPE=dtype,
                    BLOCK=self._block,
                )  # fmt: skip
            _find[(2 * self._count,)](
                self._histogram, self._rates, self._found, ROUND=round_, BINS=_BINS, enable_fp_fusion=False
            )
        _prepare[(self._count,)](
            self._found, self._largest, self._share_table, self._lengths, self._walls, self._clips, self._powers,
            self.not_finite, INDICES=_INDICES, enable_fp_fusion=False,
        )  # fmt: skip
        for dtype, blocks in self._groups:
            _assign[(len(blocks),)](
                blocks, self._sizes, source, self._starts, self._share_table, self._walls, self._powers, self._all, self._sums[0],
                self._sums[1], self.changes, self._fresh, DTYPE=dtype, INDICES=_INDICES, BY_BLOCK=_BY_BLOCK, BLOCK=self._block,
                enable_fp_fusion=False,
            )  # fmt: skip
        _means[(self._count,)](
            self._found, self._largest, self._share_table, self._powers, self._sums[0], self._sums[1], self._levels,
            INDICES=_INDICES, enable_fp_fusion=False,
        )  # fmt: skip
        for dtype, blocks in self._groups:
            _look_up[(len(blocks),)](
                blocks, self._sizes, target, self._starts, self._all, self._levels, DTYPE=dtype, INDICES=_INDICES, BLOCK=self._block,
            )  # fmt: skip
        self._fresh.zero_()

    def check(self) -> None:
        """`NonFinite` with the number of the first layer in which a pass met NaN or infinity; waits for the device."""
        bad = self.not_finite.nonzero()
        if len(bad):
            raise NonFinite(int(bad[0]))

    def levels(self, layer: int) -> Tensor:
        """float32 (share.negative + 1 + share.positive,) of a layer's last pass; nan for an empty interval."""
        share = self._shares[layer]
        return self._levels[layer, : share.negative + 1 + share.positive].clone()

    def clips(self, layer: int) -> tuple[float, float]:
        """(c-, c+) of a layer's last pass, as magnitudes."""
        negative, positive = self._clips[layer].tolist()
        return negative, positive

    def _table_of(self, tensors: Sequence[Tensor]) -> Tensor:
        """Addresses on the device, made once per set of tensors (training alternates between two)."""
        key = tuple(tensor.data_ptr() for tensor in tensors)
        if key not in self._addresses:
            if len(self._addresses) >= 4:
                self._addresses.clear()
            self._addresses[key] = torch.tensor(key, dtype=torch.int64, device=self._all.device)
        return self._addresses[key]


def _refuse(weight: Tensor) -> None:
    order = in_memory_order(weight)
    if weight.numel() > MOST_WEIGHTS:
        raise ModelError(
            f"expected layers of at most {MOST_WEIGHTS:,} weights on a GPU, got {weight.numel():,}; keep that layer (--keep)"
        )
    if not weight.permute(order).is_contiguous():
        raise ModelError(
            f"expected weights without gaps in memory, got strides {weight.stride()}; use .contiguous()"
        )


def _blocks(sizes: list[int], block: int) -> list[list[int]]:
    """(layer, first offset) of every program, largest layers in order; what is empty has none."""
    return [[layer, start] for layer, size in enumerate(sizes) for start in range(0, size, block)]
