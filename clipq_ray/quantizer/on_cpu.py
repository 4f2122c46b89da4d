"""The operator on all layers of a network at memory speed, on a CPU: the bits of `reference`, in three passes over the weights.

1. A survey counts both sides and keeps the few magnitudes inside a bracket around the last thresholds; the count proves that the
   threshold is among them, and then it is exact. Where it is not (the first pass, a jump), histograms select it from all weights.
2. Every weight is assigned to its interval, and integer sums and counts are taken.
3. Every weight becomes its level.

Small layers are done by one thread each, large ones by all threads in ranges; sums are integers, so threads change nothing. Kept per
weight: one byte, its index (`code + share.negative`). Threads are those that torch has when the object is made. Not covered: GPUs
(`on_gpu`), and the definition (`reference`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipq_ray.plan import Share, Theta
from clipq_ray.quantizer import kernels, selection
from clipq_ray.quantizer.reference import in_memory_order, refuse

_RANGED_FROM = 1 << 20
"""Layers of so many weights are shared by all threads; smaller ones stay in one thread's cache."""
_THREADED_FROM = 1 << 18
"""Networks of fewer weights take less time than it takes to wake a thread (measured: 0.1 ms)."""
_ALL_KEPT = 4096
"""Layers up to this size keep every magnitude as a candidate; larger ones one in 32."""


class _Layer:
    """One layer's arrays, made once. `ranges`: the slices of its flat weights that threads work on."""

    def __init__(self, theta: Theta, share: Share, weight: Tensor, threads: int) -> None:
        self.p, self.n = theta.p, weight.numel()
        self.share = np.array([share.negative, share.positive], np.int64)
        k = share.negative + share.positive
        count = threads if self.n >= _RANGED_FROM else 1
        cuts = [self.n * r // count for r in range(count + 1)]
        self.ranges = [slice(first, last) for first, last in itertools.pairwise(cuts)]
        capacity = self.n if self.n <= _ALL_KEPT else max(_ALL_KEPT, self.n // count // 32)
        self.inside = np.empty((count, 2, capacity), np.int32)
        self.lo, self.hi = np.zeros(2, np.int32), np.full(2, np.iinfo(np.int32).max, np.int32)
        self.halves = np.zeros(2, np.int64)
        self.walls, self.edges = np.empty(k, np.float32), np.empty((2, 257), np.float32)
        self.clips = np.zeros(2, np.float32)
        self.index = np.zeros(self.n, np.uint8)
        self.levels = np.zeros(k + 1, np.float32)
        self.counts = np.zeros(k + 1, np.int64)
        self.results = np.empty((count, selection.SURVEY), np.int64)
        self.sums = np.empty((2, count, k + 1), np.int64)  # sums and counts by range
        self.changed = np.zeros(count, np.int64)
        self.scale = 1.0
        # of the pass under way
        self.weights: npt.NDArray[np.float32] = np.empty(0, np.float32)
        self.values: npt.NDArray[np.float32] = self.weights

    def whole(self, fresh: bool) -> int:
        """All steps by this thread; the number of changed states, -1 for NaN or infinity."""
        changes: int = kernels.whole_layer(
            self.weights, self.values, self.index, fresh, self.p, self.share, self.lo, self.hi, self.halves, self.inside,
            self.walls, self.edges, self.clips, self.levels, self.counts,
        )  # fmt: skip
        return changes

    def survey(self, rank: int) -> None:
        """Pass 1 on range `rank`."""
        bits = self.weights[self.ranges[rank]].view(np.int32)
        selection.survey(bits, self.lo, self.hi, self.results[rank], self.inside[rank])

    def settle(self) -> bool:
        """Thresholds and walls after pass 1; False for NaN or infinity."""
        clips, largest = np.empty(2, np.int32), np.empty(2, np.int32)
        missing = selection.settle(self.results, self.inside, self.p, clips, largest)
        if missing < 0:
            return False
        for side in range(2):
            if missing & (1 + side):
                rank = selection.rank_of(self.results, side, self.p)
                clips[side] = selection.select(self.weights.view(np.int32), side, rank)
        selection.track(clips, self.halves, missing, self.n, self.results, self.lo, self.hi)
        self.scale = kernels.prepare(clips, largest, self.share, self.n, self.edges, self.walls, self.clips)
        return True

    def assign(self, rank: int) -> None:
        """Pass 2 on range `rank`."""
        part = self.ranges[rank]
        self.changed[rank] = kernels.assign(
            self.weights[part], self.walls, self.share[0], self.scale, self.index[part], self.sums[0, rank], self.sums[1, rank]
        )  # fmt: skip

    def finish(self) -> None:
        """Levels after pass 2."""
        sums, self.counts = self.sums.sum(1)
        kernels.levels(sums, self.counts, self.scale, self.edges, self.share, self.levels)

    def look_up(self, rank: int) -> None:
        """Pass 3 on range `rank`."""
        part = self.ranges[rank]
        kernels.look_up(self.index[part], self.levels, self.values[part])


class CpuRequantizer:
    """Quantizes the same layers again and again.

    layers: (theta, share) each; weights: float32, float16 or bfloat16 on the CPU, any shape and strides, which all later ones share.
    """

    def __init__(self, layers: Sequence[tuple[Theta, Share]], weights: Sequence[Tensor]) -> None:
        self._threads = torch.get_num_threads() if sum(w.numel() for w in weights) >= _THREADED_FROM else 1
        self._layers = [
            _Layer(theta, share, weight, self._threads)
            for (theta, share), weight in zip(layers, weights, strict=True)
        ]
        self._orders = [in_memory_order(weight) for weight in weights]
        self._fresh = True
        self.changes = torch.zeros(len(self._layers), dtype=torch.int64)
        """int64 (layers,): how often a weight went between zero and non-zero since the first pass."""
        self.indices = [torch.from_numpy(layer.index) for layer in self._layers]
        """uint8 (n,) each, in memory order: code + share.negative of the last pass."""
        self._ranged = [layer for layer in self._layers if layer.n >= _RANGED_FROM]
        self._small = _dealt(
            [(index, layer) for index, layer in enumerate(self._layers) if layer.n < _RANGED_FROM],
            self._threads,
        )
        self._pool = ThreadPoolExecutor(self._threads - 1) if self._threads > 1 else None

    def run(self, weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Quantize `weights` into `values` (shapes, strides and dtypes of the weights).

        `NonFinite` with the layer's number for NaN or infinity; values are unspecified then.
        """
        copies: list[tuple[Tensor, Tensor]] = []
        for layer, order, weight, value in zip(self._layers, self._orders, weights, values, strict=True):
            layer.weights = _flat(weight, order).numpy()
            target = value.detach().permute(order)
            if value.dtype == torch.float32 and target.is_contiguous():
                layer.values = target.view(-1).numpy()
            else:  # half precision, or strides that no flat view has
                whole = torch.empty(target.shape, dtype=torch.float32)
                layer.values = whole.view(-1).numpy()
                copies.append((target, whole))
        self._everywhere(self._run_small)
        self._run_ranged()
        for target, whole in copies:
            target.copy_(whole)
        self._fresh = False

    def _run_small(self, rank: int) -> None:
        for index, layer in self._small[rank]:
            changes = layer.whole(self._fresh)
            if changes < 0:
                raise NonFinite(index)
            self.changes[index] += changes

    def _run_ranged(self) -> None:
        if not self._ranged:
            return
        for layer in self._ranged if self._fresh else ():
            selection.guess(layer.weights.view(np.int32), layer.p, layer.lo, layer.hi)
        self._everywhere(lambda rank: _each(_Layer.survey, self._ranged, rank))
        for layer in self._ranged:
            if not layer.settle():
                raise NonFinite(self._layers.index(layer))
        self._everywhere(lambda rank: _each(_Layer.assign, self._ranged, rank))
        for layer in self._ranged:
            layer.finish()
            if not self._fresh:
                self.changes[self._layers.index(layer)] += int(layer.changed.sum())
        self._everywhere(lambda rank: _each(_Layer.look_up, self._ranged, rank))

    def _everywhere(self, work: Callable[[int], Any]) -> None:
        """`work(rank)` on every thread, this one included; the first error is raised when all have ended."""
        others = [self._pool.submit(work, rank) for rank in range(1, self._threads)] if self._pool else []
        try:
            work(0)
        finally:
            failed = [error for other in others if (error := other.exception())]
        if failed:
            raise failed[0]

    def set_rates(self, rates: Sequence[float]) -> None:
        """As `fast.Requantizer.set_rates`."""
        for layer, p in zip(self._layers, rates, strict=True):
            layer.p = p

    def check(self) -> None:
        """Nothing is left to find: `run` raises at once."""

    def levels(self, layer: int) -> Tensor:
        """float32 (share.negative + 1 + share.positive,) of a layer's last pass; nan for an empty interval."""
        return torch.from_numpy(self._layers[layer].levels.copy())

    def clips(self, layer: int) -> tuple[float, float]:
        """(c-, c+) of a layer's last pass, as magnitudes."""
        negative, positive = self._layers[layer].clips
        return float(negative), float(positive)


class NonFinite(Exception):
    """A weight of layer number `args[0]` is NaN or infinite."""


def _each(step: Callable[[_Layer, int], None], layers: list[_Layer], rank: int) -> None:
    for layer in layers:
        step(layer, rank)


def _flat(weight: Tensor, order: tuple[int, ...]) -> Tensor:
    """float32 (n,) in memory order; a view where it can be."""
    return weight.detach().permute(order).contiguous().view(-1).float()


def _dealt(layers: list[tuple[int, _Layer]], threads: int) -> list[list[tuple[int, _Layer]]]:
    """Layers shared out over threads, the largest first, each to whom has least."""
    hands: list[list[tuple[int, _Layer]]] = [[] for _ in range(threads)]
    loads = [0] * threads
    for index, layer in sorted(layers, key=lambda one: -one[1].n):
        least = loads.index(min(loads))
        hands[least].append((index, layer))
        loads[least] += layer.n + 10_000  # a call's own cost in weights
    return hands


def thresholds_of(weight: Tensor, p: float) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Clips and largest magnitudes, float32 (2,) each, negative side first; `ModelError` for NaN and infinity."""
    bits = _flat(weight, in_memory_order(weight)).numpy().view(np.int32)
    lo, hi = np.zeros(2, np.int32), np.full(2, np.iinfo(np.int32).max, np.int32)
    capacity = len(bits) if len(bits) <= _ALL_KEPT else max(_ALL_KEPT, len(bits) // 16)
    results, inside = np.empty((1, selection.SURVEY), np.int64), np.empty((1, 2, capacity), np.int32)
    if len(bits) > capacity:
        selection.guess(bits, p, lo, hi)
    selection.survey(bits, lo, hi, results[0], inside[0])
    clips, largest = np.empty(2, np.int32), np.empty(2, np.int32)
    missing = selection.settle(results, inside, p, clips, largest)
    if missing < 0:
        refuse(weight)
    for side in range(2):
        if missing & (1 + side):
            clips[side] = selection.select(bits, side, selection.rank_of(results, side, p))
    return clips.view(np.float32), largest.view(np.float32)
