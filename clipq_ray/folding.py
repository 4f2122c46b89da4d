"""Batch norm as scale and shift of each channel, and all short tensors on grids: what a file holds besides its layers.

A batch norm in inference is y = a x + b with a = weight / sqrt(variance + eps), b = bias - a mean. The file holds a and b; the network that
is loaded has them as weight and bias, a mean of 0 and a variance of 1. So it gives the same outputs, and trains differently: its
running statistics are gone. Not covered: which precision loses nothing (`packing`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from clipq_ray import codec

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Precision:
    """Steps of a grid per mean magnitude of a scale, and per root mean square of a shift or bias."""

    scale: int
    shift: int

    def __str__(self) -> str:
        return f"scales to 1/{self.scale} of their mean, shifts to 1/{self.shift} of their root mean square"


_DEAD = 1e-6  # of the eps beside it
_COARSEST, _FEWEST = 16, 8  # steps of the mean and of the median scale
LADDER = (
    Precision(16, 2),
    Precision(16, 4),
    Precision(16, 8),
    Precision(24, 12),
    Precision(32, 16),
    Precision(48, 24),
    Precision(64, 32),
    Precision(128, 64),
)
"""From coarse to fine: about 4.7 to 7.7 bits a number in the file, fewer for the first two (bench/LOG.md)."""
USUAL = Precision(24, 12)
"""What most files have, for predictions."""


def on_grids(
    model: nn.Module, kept: Collection[str], precision: Precision, shared: Collection[str] = ()
) -> tuple[dict[str, codec.Vector], tuple[str, ...]]:
    """The tensors among `kept` (names in the state dict) that go on grids, and the modules of the batch norms that are folded.

    `shared`: names whose tensor has further names. A batch norm that shares some of its tensors with another one is not folded, since each would
    need values of its own; one that is used under two names is. What does not fit a grid, or is no batch norm and no parameter of one dimension, is left out: it is stored as it is.
    """
    result: dict[str, codec.Vector] = {}
    norms = []
    inside: set[str] = set()
    for module, norm in model.named_modules():
        names = codec.norm_names(module)
        alone = len(set(names) & set(shared)) in (0, len(names))
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and set(names) <= set(kept) and alone:
            found = _folded(norm, precision)
            inside |= set(names)
            if found is not None:
                result |= dict(zip(names, found, strict=False))
                norms.append(module)
    for name, parameter in model.named_parameters():
        short = parameter.numel() == max(parameter.shape, default=1) and parameter.numel() > 0
        if name in kept and name not in inside and short and parameter.is_floating_point():
            values = parameter.detach().cpu().double().numpy()
            vector = _scale(values, precision) if name.endswith("weight") else _shift(values, precision)
            if vector is not None:
                result[name] = vector
    return result, tuple(norms)


def _folded(norm: Any, precision: Precision) -> tuple[codec.Vector, codec.Vector] | None:
    """Scale and shift of a batch norm on grids, None where they do not fit."""
    weight, bias, mean, variance = (
        value.detach().cpu().double().numpy()
        for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )
    # in training the channel was always its mean: its scale, large as it may be, did not count; an average that decays
    # never comes to 0, it ends at the smallest float32 there is
    dead = variance < norm.eps * _DEAD
    loaded = np.sqrt(1 + norm.eps)  # what the loaded network divides by, its variance being 1
    scale = _scale(np.where(dead, 0.0, loaded * weight / np.sqrt(variance + norm.eps)), precision)
    if scale is None:
        return None
    # from the scale as it is stored, so that its rounding moves no channel's mean
    shift = _shift(bias - scale.values().astype(np.float64) / loaded * mean, precision)
    return None if shift is None else (scale, shift)


def _scale(values: Float64, precision: Precision) -> codec.Vector | None:
    """On the grid, or on the next coarser one that can hold the largest scale, unless it is too coarse for the others."""
    sizes, parts = np.abs(values), precision.scale
    while (found := codec.on_grid(values, float(sizes.mean()), parts)) is None and parts > _COARSEST:
        parts //= 2
    spoilt = parts < precision.scale and float(sizes.mean()) / parts > float(np.median(sizes)) / _FEWEST
    return None if spoilt else found


def _shift(values: Float64, precision: Precision) -> codec.Vector | None:
    # zeros, as of dead units, are on every grid
    used = values[values != 0]
    return codec.on_grid(
        values, float(np.sqrt(np.square(used).mean())) if used.size else 0.0, precision.shift
    )
