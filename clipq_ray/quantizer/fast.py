"""The same operator by the fastest means that the weights' device has: compiled loops on a CPU, plain torch elsewhere.

Codes and levels are those of `reference` to the bit. Not covered: the definition (`reference`), the loops (`kernels`).
"""

from __future__ import annotations

import functools
import subprocess
import warnings
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from clipq_ray.errors import ModelError
from clipq_ray.plan import Share, Theta
from clipq_ray.quantizer import reference
from clipq_ray.quantizer.on_cpu import CpuRequantizer, NonFinite, thresholds_of
from clipq_ray.quantizer.reference import Quantized, Side


class Requantizer(Protocol):
    """Quantizes the layers of a network again and again, as their full-precision weights change.

    indices: uint8 (n,) per layer, in memory order: code + share.negative of the last pass
    changes: int64 (layers,): how often a weight went between zero and non-zero since the first pass
    """

    indices: list[Tensor]
    changes: Tensor

    def run(self, weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Quantize `weights` into `values`: the shapes, strides, dtypes and device that the object was made for.

        `NonFinite` with the layer's number where a weight is NaN or infinite; on a GPU only `check` raises it.
        """

    def set_rates(self, rates: Sequence[float]) -> None:
        """Other pruning rates p, one per layer, from the next pass on; bit widths and shares stay."""

    def check(self) -> None:
        """`NonFinite` with the layer's number if any pass met NaN or infinity; waits for the device."""


class PlainRequantizer:
    """`Requantizer` by the reference: any device, slow."""

    def __init__(self, layers: Sequence[tuple[Theta, Share]], weights: Sequence[Tensor]) -> None:
        self._layers = list(layers)
        self._fresh = True
        self.indices = [torch.zeros(w.numel(), dtype=torch.uint8, device=w.device) for w in weights]
        self.changes = torch.zeros(len(self._layers), dtype=torch.int64)

    def run(self, weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """As `Requantizer.run`."""
        for number, ((theta, share), weight, value) in enumerate(
            zip(self._layers, weights, values, strict=True)
        ):
            try:
                found = reference.quantize(weight, theta, share)
            except ModelError as error:
                raise NonFinite(number) from error
            value.copy_(found.values)
            order = reference.in_memory_order(weight)
            index = (found.codes.permute(order).reshape(-1) + share.negative).to(torch.uint8)
            if not self._fresh:
                zero = share.negative
                self.changes[number] += int(((index == zero) != (self.indices[number] == zero)).sum())
            self.indices[number].copy_(index)
        self._fresh = False

    def set_rates(self, rates: Sequence[float]) -> None:
        """As `Requantizer.set_rates`."""
        self._layers = [
            (Theta(p, theta.b), share) for p, (theta, share) in zip(rates, self._layers, strict=True)
        ]

    def check(self) -> None:
        """Nothing is left to find: `run` raises at once."""


def requantizer(layers: Sequence[tuple[Theta, Share]], weights: Sequence[Tensor]) -> Requantizer:
    """The fastest `Requantizer` for weights that lie where `weights` do."""
    if all(weight.device.type == "cpu" for weight in weights):
        return CpuRequantizer(layers, weights)
    if all(weight.device.type == "cuda" for weight in weights):
        if (why := slow_on(weights[0].device)) is None:
            from clipq_ray.quantizer.on_gpu import GpuRequantizer

            return GpuRequantizer(layers, weights)
        _warn(why)
    return PlainRequantizer(layers, weights)


@functools.cache
def slow_on(device: torch.device) -> str | None:
    """Why the operator is slow on `device`, and what to do: Triton is missing, or what it compiles with on this node, or where it keeps what it has compiled;
    None where its kernels run, and for a CPU, which has none."""
    if device.type != "cuda":
        return None
    why = _no_kernels(device)
    return (
        None
        if why is None
        else (
            f"the operator runs by plain torch, slowly, since Triton's kernels cannot be made here ({why}); install triton, gcc and Python's headers, and let "
            "its cache be written"
        )
    )


def _no_kernels(device: torch.device) -> str | None:
    try:
        from clipq_ray.quantizer import on_gpu

        on_gpu.try_out(device)
    except (ImportError, OSError, subprocess.CalledProcessError) as error:
        return str(error)
    except RuntimeError as error:
        if "compiler" not in str(error):
            raise
        return str(error)
    return None


@functools.cache
def _warn(why: str) -> None:
    warnings.warn(why, stacklevel=3)


def decide_share(weight: Tensor, theta: Theta) -> Share:
    """How the 2^b - 1 intervals are divided between the sides, as `reference.decide_share`."""
    if weight.device.type != "cpu":
        return reference.decide_share(weight, theta)
    clips, largest = thresholds_of(weight, theta.p)
    negative, positive = (Side(float(clips[side]), float(largest[side])) for side in range(2))
    return reference.share_of((negative, positive), theta.intervals)


def quantize(weight: Tensor, theta: Theta, share: Share | None = None) -> Quantized:
    """Clip, partition and quantize one tensor, as `reference.quantize`."""
    if weight.device.type != "cpu":
        return reference.quantize(weight, theta, share)
    share = decide_share(weight, theta) if share is None else reference.fitting(share, theta)
    order = reference.in_memory_order(weight)
    shape = [weight.shape[dim] for dim in order]
    values = torch.empty(shape, dtype=weight.dtype).permute(reference.back(order))
    once = CpuRequantizer([(theta, share)], [weight])
    try:
        once.run([weight], [values])
    except NonFinite:
        reference.refuse(weight.detach().float())
    codes = (once.indices[0].short() - share.negative).view(shape).permute(reference.back(order))
    return Quantized(values, codes, once.levels(0), once.clips(0))
