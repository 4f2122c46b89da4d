"""Levels and codes fitted to the loss, where what is clipped stays clipped.

While a network is trained with the operator, weights change sides at the threshold to the end, each by a whole level, and levels are what quantizing moves least, not
what the loss likes best. `Levels` takes the operator's place in a training behind it, in which only kept weights move: each has the level next to its full-precision twin,
rare ones a little further off where their bits have a price, and a level is the mean of its twins, as in CLIP-Q. A twin receives the gradient of its weight, straight through, and that of its level, the sum over the level's n weights, divided by the root of n.
All else that a network learns (biases, batch norm) is trained along. A file differs by what other codes, vectors and grids take.

Source: Han et al., ICLR 2016, section 3 (levels trained), and Esser et al., ICLR 2020, section 2.2 (the scale of their gradient), Chou et al. 1989 (bits in the
distance). Not covered: the schedule (`finetune`).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from clipq_ray.operator import Recovery, bake
from clipq_ray.plan import Plan, Share
from clipq_ray.quantizer import Quantized

PRICE = 0.1
"""Of a bit, in the mean square of the distances of a layer's neighbouring levels: a file stays about as large as it was. Without a price rare levels fill up, and a LeNet-5 of 1,470 bytes
takes 30 to 55 more; one that follows the size of the file from epoch to epoch loses rare levels and brings no bytes back (bench/LOG.md)."""


@dataclass
class _Layer:
    """One parameter, which holds quantized weights between steps; `twin`: the full-precision ones, zero where clipped; `codes`: which of the ascending
    `levels`, none of them zero, each kept weight has (of the others nothing is meant)."""

    name: str
    parameter: nn.Parameter
    twin: Tensor
    kept: Tensor
    codes: Tensor
    levels: Tensor

    def masks(self) -> Iterator[tuple[int, Tensor]]:
        """The levels' numbers with the weights that have them."""
        for number in range(len(self.levels)):
            yield number, self.kept & (self.codes == number)

    def assign(self, price: float) -> None:
        """Every kept weight to the level on its twin's side of zero that costs least, its square distance and `price` for each bit of its code, in the mean square of the
        distances of neighbouring levels; then every level to the mean of its twins."""
        n = [int(mask.sum()) for _, mask in self.masks()]
        gaps = [
            (after - before) ** 2 for before, after in pairwise(self.levels.tolist()) if before * after > 0
        ]
        gap = sum(gaps) / max(1, len(gaps))
        least = torch.full_like(self.twin, torch.inf)
        for number, level in enumerate(self.levels):
            bits = math.log2((sum(n) + len(n)) / (n[number] + 1))
            costs = (self.twin - level).square_().add_(price * gap * bits)
            better = (costs < least) & ((self.twin > 0) == (level > 0))
            self.codes[better] = number
            least = torch.where(better, costs, least)
        for number, mask in self.masks():
            # a level that nothing has is there for weights that come; none leaves its side of zero, where a layer of one side may have no place for it
            total = (self.twin * mask).sum(dtype=torch.float64)
            if total * self.levels[number] > 0:
                self.levels[number] = total / mask.sum()
        self.put()

    def put(self) -> None:
        """The quantized weights into the parameter."""
        self.parameter.copy_(torch.where(self.kept, self.levels[self.codes], 0.0))

    def spread_gradient(self) -> None:
        """The gradient of the quantized weights becomes that of their twins."""
        given = self.parameter.grad
        if given is None:
            return
        given.mul_(self.kept)
        # masks and sums, not scattered additions: on a GPU their order would be another on every rank
        of_levels = [
            (mask, (given * mask).sum() / mask.sum().clamp(min=1).sqrt()) for _, mask in self.masks()
        ]
        for mask, gradient in of_levels:
            given.add_(mask * gradient)


class Levels:
    """The levels and codes of a network's planned parameters, trainable; `model` is changed in place: at once its planned parameters hold quantized weights.
    `price` of a bit: `PRICE` for a file that stays as large, 0 where it may grow.

    `ModelError` where the plan names a parameter that the network lacks, or a weight is NaN or infinite."""

    def __init__(self, model: nn.Module, plan: Plan, price: float) -> None:
        self._price = price
        self._layers = [
            _layer(name, model.get_parameter(name), one) for name, one in bake(model, plan).items()
        ]

    def _swap(self) -> None:
        for one in self._layers:
            one.parameter.data, one.twin = one.twin, one.parameter.data

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """The parameters hold their twins inside, and gradients are theirs; what was changed there is quantized anew on leaving."""
        with torch.no_grad():
            for one in self._layers:
                one.spread_gradient()
        with self.reading_full_precision():
            yield
        with torch.no_grad():
            for one in self._layers:
                one.assign(self._price)

    @contextmanager
    def reading_full_precision(self) -> Iterator[None]:
        """As `full_precision`, for readers: nothing is quantized anew."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def requantize(self) -> None:
        """Nothing: no rate moves."""

    def check(self) -> None:
        """Nothing: a loss that is not finite says what there is to say."""

    def code_hashes(self) -> dict[str, int]:
        """A CRC-32 of every layer's quantized weights: equal where ranks hold the same."""
        return {
            one.name: zlib.crc32(one.parameter.detach().cpu().contiguous().numpy().tobytes())
            for one in self._layers
        }

    def recovery(self) -> dict[str, Recovery]:
        """Nothing: no weight is clipped anew."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs besides the twins; which weights are kept follows from the first ones."""
        return {
            f"{what}/{number}": getattr(one, what)
            for number, one in enumerate(self._layers)
            for what in ("codes", "levels")
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The mirror of `state`, where the parameters hold the checkpoint's twins."""
        for number, one in enumerate(self._layers):
            one.twin.copy_(one.parameter)
            one.codes.copy_(state[f"codes/{number}"])
            one.levels.copy_(state[f"levels/{number}"])
            one.put()

    def detach(self) -> None:
        """Leave the quantized weights in the parameters."""
        self._layers = []


@torch.no_grad()
def _layer(name: str, parameter: nn.Parameter, one: Quantized) -> _Layer:
    """A layer as `bake` has left it: the twins begin as the quantized weights."""
    values, kept = parameter.detach(), one.codes != 0
    levels = one.levels[~one.levels.isnan() & (one.levels != 0)].to(values.device)
    if not len(levels):  # all is clipped
        levels = values.new_zeros(1)
    return _Layer(name, parameter, values.clone(), kept, _passed(values, levels[:-1]), levels)


def _passed(values: Tensor, walls: Tensor) -> Tensor:
    """int32, in the memory order of `values`: how many of `walls` each is beyond."""
    passed = torch.zeros_like(values, dtype=torch.int32)
    for wall in walls:
        passed += values > wall
    return passed


def read(weights: Mapping[str, Tensor], plan: Plan) -> dict[str, Quantized]:
    """Levels and codes of the layers of `plan` that a training with `Levels` left in `weights`; clips, which it knows nothing of, are nan."""
    return {layer.layer: _read(weights[layer.layer], layer.share) for layer in plan.layers}


def _read(weight: Tensor, share: Share) -> Quantized:
    found = weight.unique().float()
    levels = weight.new_full((share.negative + 1 + share.positive,), torch.nan, dtype=torch.float32)
    levels[share.negative] = 0.0
    codes = torch.zeros_like(weight, dtype=torch.int16)
    # levels that nothing has any more are the outer ones
    for sign, side in ((-1, found[found < 0].flip(0)), (1, found[found > 0])):
        for number, level in enumerate(side.tolist(), 1):
            levels[share.negative + sign * number] = level
            codes[weight == level] = sign * number
    return Quantized(weight, codes, levels, (math.nan, math.nan))
