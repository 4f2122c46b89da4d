"""What the places of a layer cost the file, and full-precision weights that are divided by it: clipping by rate and distortion.

A weight that is not clipped takes bits of the file by where it stands, few in a row, column and place of a kernel where many others stand, up to ten more where
it is alone. Clipping moves the layer by the weight's square, so with a price of lambda a bit those weights are to be clipped whose square is below lambda times
their bits: a threshold for every place, in proportion to the root of its bits. The operator, which has one threshold for a layer, does the same with weights that
are divided by that root, whatever else quantizes them later. Their gradients are divided too: of a step that went to the weights themselves they get what is left.

Source: rate-distortion optimal quantization, as in Sullivan 1996 and, for networks with entropies of whole layers, Marban et al. 2020 (EC2T).
Not covered: the pruning rates (`rates`), and the coder that takes the bits (`codec`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from clipq_ray.codec import codes

_LEAST, _MOST = 1.0, 16.0
"""Bits of a place, of its sign and magnitude too."""
_REST = 2.0
"""Bits of sign and magnitude, about."""
_NEW = 0.5
"""Part of the newest densities in those that count: who is dear now is rarer at the next look, and dearer still."""


@dataclass(frozen=True)
class Costs:
    """`power`: of a place's bits over the mean, by which its weights are divided; 0.5 follows from the square error. `divided`: the weights at the beginning are
    divided already, by what follows from densities that lie beside them."""

    power: float
    divided: bool = False


class Places:
    """Densities of one layer by row, column and place of a kernel, as its coders see a shape, and the divisors that follow from them."""

    def __init__(self, kept: Tensor, costs: Costs, densities: Tensor | None = None) -> None:
        """`kept`: bool, the weight's shape: which weights are not clipped at the beginning; `densities`: by which these are divided already."""
        self._power = costs.power
        self._sides = codes.geometry(tuple(kept.shape))[:3]
        self.divisors = torch.empty_like(kept, dtype=torch.float32)
        if densities is None:
            densities = torch.full_like(self.found(kept), float(kept.double().mean()))
        self.set(densities.to(kept.device))

    def set(self, densities: Tensor) -> None:
        """The divisors of these densities."""
        self.densities = densities
        self.divisors.copy_(self._of(densities).reshape(self.divisors.shape))

    def found(self, kept: Tensor) -> Tensor:
        """float64: the densities of all rows, then columns, then places; each drawn to the layer's as by one weight more."""
        sides = self._sides
        counts = kept.reshape(sides)
        mean, n = counts.double().mean(), kept.numel()
        return torch.cat(
            [(counts.sum(others).double() + mean) / (n / side + 1) for side, others in zip(sides, ((1, 2), (0, 2), (0, 1)), strict=True)]
        )  # fmt: skip

    def _of(self, densities: Tensor) -> Tensor:
        """float32, (rows, columns, places): bits over their mean, to the power."""
        rows, columns, places = (_log_odds(part).float() for part in densities.split(list(self._sides)))
        whole = _log_odds(densities[: self._sides[0]].mean()).float()
        odds = rows[:, None, None] + (columns[:, None] + (places - 2 * whole))
        bits = (_REST - odds).clamp_(_LEAST, _MOST)
        share = torch.sigmoid(odds * math.log(2))  # of the weights at a place, those that are kept
        return bits.div_((bits * share).sum() / share.sum()).pow_(self._power)

    def follow(self, weight: Tensor, kept: Tensor) -> None:
        """Look at which weights are `kept` by now, and divide `weight` by what that changes; in place."""
        weight.mul_(self.divisors)
        self.set((1 - _NEW) * self.densities + _NEW * self.found(kept))
        weight.div_(self.divisors)


def _log_odds(density: Tensor) -> Tensor:
    """In bits."""
    inside = density.clamp(1e-9, 1 - 1e-9)
    return torch.log2(inside / (1 - inside))
