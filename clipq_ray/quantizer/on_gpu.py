"""The operator on all layers of a network by Triton kernels: the bits of `reference`, a fixed number of launches, no host in between.

1. Thresholds: weights in a window around the last pass's threshold are counted by bins, and in the bin that holds the threshold's rank one by one, so the
   threshold is exact. Where the window has missed (first pass, other rates), two histograms over all magnitudes find the bin instead; programs of layers
   that were hit end at once.
2. A program per layer makes the walls between intervals; then every weight finds its interval, and integer sums and counts are taken (in blocks where there
   are few intervals, by atomics where there are many).
3. A program per layer makes the levels; then every weight becomes its level.

Buffers are made once, and the tables of addresses again only when a tensor has moved; the second pass over the same tensors is recorded as a CUDA graph, since
launching takes the host longer than the device needs. NaN and infinity only raise a flag on the device, for `check`. Not covered: more than one device; what
Triton's interpreter, by which the tests run these kernels on a CPU, cannot show: speed, and what fusing would do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from clipq_ray.errors import ModelError
from clipq_ray.plan import Share, Theta
from clipq_ray.quantizer import triton_kernels as kernels
from clipq_ray.quantizer.on_cpu import NonFinite
from clipq_ray.quantizer.reference import in_memory_order
from clipq_ray.sending import sent

MOST_WEIGHTS = 2**31 - 1
_BLOCK = 4096
_BINS = 2048
_INDICES = 256
_FEW = 32
"""Up to so many indices, walls are gone through one by one and sums are taken in the block first."""
_WARPS = 8
_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def try_out(device: torch.device) -> None:
    """One small kernel on `device`: raises what Triton says where it finds nothing to compile its launcher with, which it does on the node at the first launch."""
    with torch.device(device):
        kernels.one[(1,)](torch.zeros(1, dtype=torch.int32))


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
        rows = 2 * count
        self._scratch = torch.zeros(rows * (3 + 4 * _BINS), dtype=torch.int32, device=device)
        """int32: largest, numbers and below by side, then four histograms by side; zero at the start of a pass."""
        self._found = torch.zeros(count, 2, 2, dtype=torch.int32, device=device)
        self._missed = torch.zeros(count, 2, dtype=torch.int32, device=device)
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
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._last: tuple[int, int] | None = None
        # on the device: every pass launches the same kernels, so the second one can be recorded
        self._fresh = torch.ones(1, dtype=torch.int32, device=device)

    def set_rates(self, rates: Sequence[float]) -> None:
        """As `fast.Requantizer.set_rates`."""
        self._rates.copy_(sent(torch.tensor(list(rates), dtype=torch.float64), self._rates.device))

    def run(self, weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Quantize `weights` into `values`; nothing waits for the device, except the second pass over the same tensors, which records it."""
        if not self._count:
            return
        source, target = self._table_of(weights), self._table_of(values)
        key = (source.data_ptr(), target.data_ptr())
        if key in self._graphs:
            self._graphs[key].replay()
        elif source.is_cuda and key == self._last:
            graph = torch.cuda.CUDAGraph()
            # other threads may go on: they prepare batches
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._pass(source, target)
            self._graphs[key] = graph
            graph.replay()
        else:
            self._pass(source, target)
        self._last = key

    def _pass(self, source: Tensor, target: Tensor) -> None:
        """All launches of one pass; `source` and `target` are tables of addresses."""
        self._scratch.zero_()
        self._sums.zero_()
        self._thresholds(source)
        largest = self._scratch
        kernels.prepare[(self._count,)](
            self._found, largest, self._share_table, self._lengths, self._walls, self._clips, self._powers,
            self.not_finite, INDICES=_INDICES, enable_fp_fusion=False,
        )  # fmt: skip
        for dtype, blocks in self._groups:
            kernels.assign[(len(blocks),)](
                blocks, self._sizes, source, self._starts, self._share_table, self._walls, self._powers, self._all, self._sums[0],
                self._sums[1], self.changes, self._fresh, DTYPE=dtype, INDICES=_INDICES, FEW=_FEW, BLOCK=self._block,
                num_warps=_WARPS, enable_fp_fusion=False,
            )  # fmt: skip
        kernels.means[(self._count,)](
            self._found, largest, self._share_table, self._powers, self._sums[0], self._sums[1], self._levels,
            INDICES=_INDICES, enable_fp_fusion=False,
        )  # fmt: skip
        for dtype, blocks in self._groups:
            kernels.look_up[(len(blocks),)](
                blocks, self._sizes, target, self._starts, self._all, self._levels, DTYPE=dtype, INDICES=_INDICES, BLOCK=self._block,
                num_warps=_WARPS,
            )  # fmt: skip
        self._fresh.zero_()

    def _thresholds(self, source: Tensor) -> None:
        """Into `_found`, and the largest weights into the scratch."""
        rows = 2 * self._count
        largest, numbers, below = (self._scratch[number * rows :] for number in range(3))
        near, first, second, last = (self._scratch[rows * (3 + number * _BINS) :] for number in range(4))
        common = {"BINS": _BINS, "BLOCK": self._block, "num_warps": _WARPS}
        for dtype, blocks in self._groups:
            kernels.track[(len(blocks),)](
                blocks, self._sizes, source, self._found, largest, numbers, below, near, DTYPE=dtype, **common
            )
        kernels.settle[(rows,)](
            self._found, self._rates, numbers, below, near, self._missed, BINS=_BINS, enable_fp_fusion=False
        )
        for round_, histogram in enumerate((first, second)):
            for dtype, blocks in self._groups:
                kernels.search[(len(blocks),)](
                    blocks,
                    self._sizes,
                    source,
                    self._found,
                    self._missed,
                    histogram,
                    ROUND=round_,
                    DTYPE=dtype,
                    **common,
                )
            kernels.narrow[(rows,)](self._found, self._missed, histogram, ROUND=round_, BINS=_BINS)
        for dtype, blocks in self._groups:
            kernels.exact[(len(blocks),)](
                blocks, self._sizes, source, self._found, last, DTYPE=dtype, **common
            )
        kernels.pick[(rows,)](self._found, last, BINS=_BINS)

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
                self._graphs.clear()
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
