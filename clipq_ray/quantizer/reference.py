"""The exact CLIP-Q operator on one tensor. This docstring is its definition; every faster kernel gives the same bits.

Source: Tung and Mori, CVPR 2018, section 3.1; what the paper leaves open is fixed here. Let w be the weights of a layer as float32
(float16 and bfloat16 widen exactly), p in [0, 1) the pruning rate, b in 2..8 the bit width, K = 2^b - 1. The two *sides* are the
weights > 0 and the weights < 0; zeros (also -0.0) belong to none. On a side everything is in magnitudes |w|.

1. Clip. Of the n weights of a side, k = floor(p n + 1/2), computed in float64. c is the k-th smallest magnitude, 0 if k = 0. Every
   weight with a magnitude <= c is clipped: exactly k of them, more only where ties with c are clipped along. k may reach n.
2. Share. K intervals are divided between the sides in proportion to their lengths L = max - c (float64; max is the largest magnitude
   of the side): positive = floor(K L+ / (L+ + L-) + 1/2), evaluated from left to right in float64, then at least 1 and at most K - 1;
   negative = K - positive. If one side has no weight above its c, the other gets all K; if neither has, both get 0. The share is
   decided once per layer and then handed in again at every step.
3. Partition. A side with s intervals has the edges edge_j = float32(c + (max - c) * (j / s)), computed in float64, j = 0..s, with
   edge_0 = c and edge_s = max exactly. Interval j = 1..s is (edge_{j-1}, edge_j]: open towards zero, closed away from it. Its weights
   have the code +j (positive side) or -j (negative side); clipped weights and zeros have the code 0.
   A side with s = 0 in a share that was handed in (it had no weights when the share was decided) is clipped as a whole: its c is max.
4. Level. The level of an interval is the mean of its weights; of code 0 it is 0; of an empty interval it is nan. So that the order of
   addition cannot matter, sums are taken in integers: let N be the number of elements of the tensor, e the integer with
   max/2 < 2^(e-1) <= max < 2^e over both sides (0 if all weights are zero), and t = 62 - bit_length(N) - e. A weight counts as the
   integer round(w 2^t), ties to even; the magnitudes of any set of weights sum to at most 2^62. The level is
   float32(float64(sum) / float64(count) * 2^-t), then moved, if it lies outside its interval, to the interval's nearest float32.

What this means for a level: it differs from the true mean by at most half a unit in the last place of float32 (and a float64 error
far below it) plus 2^-(t+1), which is at most max N 2^-61. That second part matters only for levels many orders of magnitude below
the layer's largest weight: with a million weights it passes the first part below max 2^-17, and a relative 1e-6 below max 2^-21.
There the last step keeps the level inside its interval, so levels always ascend strictly with the code, none of a non-empty interval
is 0, and a level falls into the interval that it stands for.

What it means for users of it: the result is a function of the multiset of weights and, per element, of its own weight. It does not
depend on the order of elements, on strides, threads or device; scaling by a power of two scales it (while nothing is denormal);
negating the weights with the mirrored share mirrors it.

It is *not* idempotent in general: the second time, max is the outermost level, so the edges move and two levels can fall into one
interval, and p > 0 clips again. It is, bit for bit, where the second pass has p = 0, each of its intervals holds at most one distinct
value, and no weight but 0 has a magnitude below max 2^(bit_length(N) - 38), whose last bits the sums would round away. So it is for
the share (1, 1), and for weights whose distinct magnitudes lie further apart on each side than max / s, in that range.

float64 is refused, since narrowing it silently would break "levels are the means of the weights". Empty tensors and 0-d tensors are
allowed. Not covered: flushing denormals to zero (`torch.set_flush_denormal`), tensors without storage (meta, fake), sparse tensors,
devices without float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipq_ray.errors import ConfigError, ModelError
from clipq_ray.plan import BITS_MIN, Share, Theta

_Row = npt.NDArray[np.float32]
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_SUM_BITS = 62  # int64 without its sign, and one bit that stays free
# Temporaries of a chunk stay in the caches, and torch works on so few elements without starting threads.
_CHUNK = 1 << 14
# Selection by sampling pays from here on (measured), with one weight in 16, at most so many.
_SAMPLED_FROM, _SAMPLE = 1 << 16, 1 << 14


@dataclass(frozen=True)
class Quantized:
    """One quantized weight tensor.

    values: the quantized weights; shape, dtype, device and order of dimensions in memory of the weight
    codes: int16, same shape: 0 = clipped, +1..+k counted away from zero on the positive side, -1..-k on the negative one
    levels: float32 (share.negative + 1 + share.positive,), ascending by code: `levels[code + share.negative]`, 0 for code 0,
        nan for an empty interval
    clips: (c-, c+), magnitudes in units of the weights; 0.0 where the side clips nothing
    """

    values: Tensor
    codes: Tensor
    levels: Tensor
    clips: tuple[float, float]


@dataclass(frozen=True)
class Side:
    """One side in magnitudes: the threshold c and the largest weight; both 0 if the side is empty."""

    clip: float
    largest: float

    @property
    def length(self) -> float:
        """What the side's intervals divide."""
        return self.largest - self.clip


def thresholds(weight: Tensor, p: float) -> tuple[float, float]:
    """The clips (c-, c+) of step 1 as magnitudes.

    weight: float32, float16 or bfloat16, any shape; p: pruning rate in [0, 1). `ModelError` for NaN, infinity or another dtype,
    `ConfigError` for another p.
    """
    p = Theta(p, BITS_MIN).p
    negative, positive = _sides(_flat(_dense(weight)), p)
    return negative.clip, positive.clip


def decide_share(weight: Tensor, theta: Theta) -> Share:
    """How the 2^b - 1 intervals are divided between the sides (step 2), from the weights with which fine-tuning starts.

    weight: as for `thresholds`, with the same errors.
    """
    return share_of(_sides(_flat(_dense(weight)), theta.p), theta.intervals)


def quantize(weight: Tensor, theta: Theta, share: Share | None = None) -> Quantized:
    """Clip, partition and quantize one tensor (steps 1 to 4); no gradient flows through it.

    weight: float32, float16 or bfloat16, any shape, any strides, any device
    share: the layer's share of intervals, decided once; None decides it from this weight
    Errors: `ModelError` (NaN, infinity, another dtype), `ConfigError` (a share of more than 2^b - 1 intervals).
    """
    dense, inverse = _dense(weight), back(in_memory_order(weight))
    flat = _flat(dense)
    sides = _sides(flat, theta.p)
    share = share_of(sides, theta.intervals) if share is None else fitting(share, theta)
    negative, positive = _edges(sides[0], share.negative), _edges(sides[1], share.positive)

    codes = torch.empty(dense.shape, dtype=torch.int16, device=weight.device)
    exponent = _SUM_BITS - flat.numel().bit_length() - math.frexp(max(side.largest for side in sides))[1]
    sums, counts = _assign(flat, negative, positive, exponent, codes.view(-1))
    levels = torch.from_numpy(_levels(sums, counts, exponent, negative, positive)).to(weight.device)
    values = _look_up(codes, levels.to(weight.dtype), share.negative)
    return Quantized(
        values.permute(inverse), codes.permute(inverse), levels, (float(negative[0]), float(positive[0]))
    )


def in_memory_order(weight: Tensor) -> tuple[int, ...]:
    """The dimensions in their order in memory, the slowest first; `ModelError` for another dtype than the three.

    So a channels-last weight is read without a copy and its quantized values are channels-last too.
    """
    if weight.dtype not in _FLOATS:
        raise ModelError(
            f"expected weights of float32, float16 or bfloat16, got {weight.dtype}; convert them with .float()"
        )
    strides = weight.stride()
    return tuple(sorted(range(weight.dim()), key=lambda dim: -strides[dim]))


def back(order: tuple[int, ...]) -> tuple[int, ...]:
    """The permutation that undoes `order`."""
    return tuple(order.index(dim) for dim in range(len(order)))


def _dense(weight: Tensor) -> Tensor:
    """The weight in memory order, contiguous."""
    return weight.detach().permute(in_memory_order(weight)).contiguous()


def _flat(dense: Tensor) -> Tensor:
    """float32 (n,)."""
    return dense.view(-1).float()


def _on_cpu(flat: Tensor) -> bool:
    """On a CPU, NumPy does selection, comparisons and rounding; elsewhere plain torch gives the same bits.

    NumPy is faster there (measured), and it starts no threads: on cores that several workers share, torch's wait for its second
    thread took up to 0.4 s per operation (measured), far longer than the work itself.
    """
    return flat.device.type == "cpu"


def _sides(flat: Tensor, p: float) -> tuple[Side, Side]:
    """Step 1: negative and positive side of float32 (n,)."""
    if flat.numel() == 0:
        return Side(0.0, 0.0), Side(0.0, 0.0)
    smallest, largest = _extremes(flat)  # NaN propagates
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        refuse(flat)
    below, above = _count(flat, -1), _count(flat, 1)
    k_below, k_above = math.floor(p * below + 0.5), math.floor(p * above + 0.5)
    # Ascending order has the negatives first, their smallest magnitude last; the positives end the row.
    clip_below = -_ranked(flat, below - k_below) if k_below else 0.0
    clip_above = _ranked(flat, flat.numel() - above + k_above - 1) if k_above else 0.0
    return Side(clip_below, max(0.0, -smallest)), Side(clip_above, max(0.0, largest))


def _extremes(flat: Tensor) -> tuple[float, float]:
    if _on_cpu(flat):
        array = flat.numpy()
        return float(array.min()), float(array.max())
    smallest, largest = torch.aminmax(flat)
    return float(smallest), float(largest)


def refuse(flat: Tensor) -> None:
    """Raise the `ModelError` for NaN or infinity among the weights."""
    nans, infinite = int(flat.isnan().sum()), int(flat.isinf().sum())
    raise ModelError(
        f"expected finite weights, got {nans} NaN and {infinite} infinite of {flat.numel()}; "
        "use another checkpoint or a lower learning rate"
    )


def _count(flat: Tensor, sign: int) -> int:
    """How many weights have the sign."""
    if _on_cpu(flat):
        array = flat.numpy()
        return int(np.count_nonzero(array < 0 if sign < 0 else array > 0))
    return int(torch.count_nonzero(flat < 0 if sign < 0 else flat > 0))


def _ranked(flat: Tensor, rank: int) -> float:
    """The element at `rank` (from 0) of the ascending order."""
    if not _on_cpu(flat):
        return float(flat.kthvalue(rank + 1).values)
    array = flat.numpy()
    inside, rank = _bracketed(array, rank) if array.size >= _SAMPLED_FROM else (array, rank)
    return float(np.partition(inside, rank)[rank])


def _bracketed(array: _Row, rank: int) -> tuple[_Row, int]:
    """Fewer candidates for the element at `rank`, and its rank among them; exact, a bad guess only costs time.

    Floyd and Rivest's selection with one sample: the candidates lie between two order statistics of the sample.
    """
    sample = array[:: max(array.size // _SAMPLE, 16)]
    guess, margin = rank * sample.size // array.size, 3 * math.isqrt(sample.size)
    first, last = max(guess - margin, 0), min(guess + margin, sample.size - 1)
    sample = np.partition(sample, [first, last])
    low = sample[first] if first else -np.inf
    high = sample[last] if last < sample.size - 1 else np.inf
    inside = array[(array >= low) & (array <= high)]
    rank_inside = rank - int(np.count_nonzero(array < low))
    return (inside, rank_inside) if 0 <= rank_inside < inside.size else (array, rank)


def share_of(sides: tuple[Side, Side], intervals: int) -> Share:
    """Step 2."""
    negative, positive = (side.length for side in sides)
    if negative == 0 or positive == 0:
        return Share(intervals if negative else 0, intervals if positive else 0)
    wanted = math.floor(intervals * positive / (negative + positive) + 0.5)
    kept = min(max(wanted, 1), intervals - 1)
    return Share(intervals - kept, kept)


def fitting(share: Share, theta: Theta) -> Share:
    """`share`, if b allows that many intervals; else a `ConfigError`."""
    if share.negative + share.positive > theta.intervals:
        raise ConfigError(
            f"expected a share of at most {theta.intervals} intervals at b = {theta.b}, "
            f"got {share.negative} + {share.positive}; decide the share with the same b"
        )
    return share


def _edges(side: Side, intervals: int) -> _Row:
    """Step 3: edge_0..edge_s, float32 (s + 1,); for s = 0 the largest magnitude alone, so that all of the side is clipped."""
    if intervals == 0:
        return np.array([side.largest], np.float32)
    edges = side.clip + side.length * (np.arange(intervals + 1) / intervals)
    edges[-1] = side.largest
    return edges.astype(np.float32)


def _boundaries(negative: _Row, positive: _Row) -> _Row:
    """All inner boundaries on the signed axis, float32 ascending: code + share.negative = how many of them are < w.

    An interval is closed away from zero, which on the negative side is its left end: w < -edge is w <= the next float below.
    """
    with np.errstate(over="ignore"):  # below the largest float32 comes -inf
        beyond = np.nextafter(-negative[:-1], np.float32(-np.inf))
    return np.concatenate([beyond[::-1], positive[:-1]])


def _assign(
    flat: Tensor,
    negative: _Row,
    positive: _Row,
    exponent: int,
    codes: Tensor,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Fills codes, int16 (n,); gives the sum of round(w 2^exponent) and the count per code, int64 (intervals + 1,)."""
    boundaries = torch.from_numpy(_boundaries(negative, positive)).to(flat.device)
    sums = torch.zeros(len(boundaries) + 1, dtype=torch.int64, device=flat.device)
    counts = torch.zeros_like(sums)
    one = torch.ones((), dtype=torch.int64, device=flat.device)
    for part in _chunks(flat):
        index = _bucket(flat[part], boundaries)
        sums.scatter_add_(0, index, _whole(flat[part], 2.0**exponent))
        counts.scatter_add_(0, index, one.expand_as(index))
        torch.sub(index, len(negative) - 1, out=codes[part])
    return sums.cpu().numpy(), counts.cpu().numpy()


def _chunks(flat: Tensor) -> Iterator[slice]:
    """The parts in which a tensor (n,) is worked through: small on a CPU, for its caches; the whole elsewhere."""
    step = _CHUNK if _on_cpu(flat) else max(flat.numel(), 1)
    return (slice(start, start + step) for start in range(0, flat.numel(), step))


def _whole(part: Tensor, scale: float) -> Tensor:
    """round(w scale), ties to even, int64 (n,)."""
    if not _on_cpu(part):
        return part.double().mul_(scale).round_().long()
    return torch.from_numpy(np.rint(part.numpy() * np.float64(scale)).astype(np.int64))


def _bucket(part: Tensor, boundaries: Tensor) -> Tensor:
    """For each weight the number of boundaries below it, int64 (n,)."""
    if not _on_cpu(part):
        return torch.bucketize(part, boundaries)
    # 0.1 ns per weight and boundary (measured) against 5 to 20 ns per weight of a binary search.
    array = part.numpy()
    below = np.zeros(array.shape, np.uint8)  # at most 2^8 - 1
    for boundary in boundaries.numpy():
        below += (array > boundary).view(np.uint8)
    return torch.from_numpy(below).long()


def _levels(
    sums: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
    exponent: int,
    negative: _Row,
    positive: _Row,
) -> _Row:
    """Step 4: float32 (share.negative + 1 + share.positive,)."""
    zero = len(negative) - 1
    walls = np.concatenate([-negative[::-1], positive])
    lowest, highest = walls[:-1].copy(), walls[1:].copy()
    # 0/0 in an empty interval; no float above a wall at the largest one.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        means = (sums.astype(np.float64) / counts * 2.0**-exponent).astype(np.float32)
        lowest[zero + 1 :] = np.nextafter(positive[:-1], np.float32(np.inf))
    highest[:zero] = _boundaries(negative, positive)[:zero]
    levels: _Row = np.minimum(np.maximum(means, lowest), highest)
    levels[counts == 0] = np.nan
    levels[zero] = 0.0
    return levels


def _look_up(codes: Tensor, levels: Tensor, negative: int) -> Tensor:
    """levels[codes + negative], in the shape of codes."""
    flat = codes.view(-1)
    values = torch.empty(flat.shape, dtype=levels.dtype, device=levels.device)
    for part in _chunks(flat):
        torch.index_select(levels, 0, flat[part].int() + negative, out=values[part])
    return values.view(codes.shape)
