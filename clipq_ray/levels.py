"""Levels and codes fitted to the loss, where what is clipped stays clipped.

While a network is trained with the operator, weights change sides at the threshold to the end, each by a whole level, and levels are what quantizing moves least, not
what the loss likes best. `Levels` takes the operator's place in a training behind it, in which only kept weights move: each has the level next to its full-precision twin,
rare ones a little further off where their bits have a price, and a level is the mean of its twins, as in CLIP-Q. A twin receives the gradient of its weight, straight through, and that of its level, the sum over the level's n weights, divided by the root of n.
All else that a network learns (biases, batch norm) is trained along. A file differs by what other codes, vectors and grids take.

A twin that lies near a border of two levels goes to and fro between them as long as there is a rate to move it by, and each time the others have to follow; what such weights cost is more than what
their codes could gain. So a code that keeps changing is settled: for the rest of the training it is the one of the twin's running mean.

Source: Han et al., ICLR 2016, section 3 (levels trained), and Esser et al., ICLR 2020, section 2.2 (the scale of their gradient), Chou et al. 1989 (bits in the
distance), Nagel et al., ICML 2022, section 4.3 (weights that oscillate are frozen). Not covered: the schedule (`finetune`).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
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
_MEMORY = 0.99
"""What one step leaves of the running means."""
_SETTLES = 0.015
"""Changes of a code per step, as a running mean, beyond which it is settled: by a second one within some 70 steps."""

_STATE = ("codes", "levels", "changes", "means", "settled")
"""What a checkpoint has of a layer besides its twin."""


@dataclass
class _Layer:
    """One parameter, which holds quantized weights between steps; `twin`: the full-precision ones, zero where clipped; `kept`: where the n weights lie that are
    not, an index per dimension; `codes`: int64 (n,), which of the `levels`, none of them zero, each of these has; `changes`: float32 (n,), how often that changes, `means`: of their twins, both over some
    100 steps; `settled`: bool (n,), which codes stay as they are."""

    name: str
    parameter: nn.Parameter
    twin: Tensor
    kept: tuple[Tensor, ...]
    codes: Tensor
    levels: Tensor
    changes: Tensor
    means: Tensor
    settled: Tensor

    def assign(self, price: float) -> None:
        """Every kept weight to the level on its twin's side of zero that costs least, its square distance and `price` for each bit of its code, in the mean square of the
        distances of neighbouring levels, but for those that are settled; then every level to the mean of its twins."""
        twins, before = self.twin[self.kept], self.codes
        borders = self._borders(price)
        self.codes = torch.where(self.settled, before, self._cheapest(twins, borders))
        self.changes.lerp_((self.codes != before).to(self.changes), 1 - _MEMORY)
        self.means.lerp_(twins.to(self.means), 1 - _MEMORY)
        settling = (self.changes > _SETTLES) & ~self.settled
        self.codes = torch.where(settling, self._cheapest(self.means, borders), self.codes)
        self.settled |= settling
        totals = _sums(twins, self.codes, len(self.levels))
        # a level that nothing has is there for weights that come; none leaves its side of zero, where a layer of one side may have no place for it
        means = (totals / self._counts().clamp(min=1)).to(self.levels.dtype)
        self.levels = torch.where(totals * self.levels > 0, means, self.levels)
        self.put()

    def _borders(self, price: float) -> list[tuple[bool, list[int], list[float]]]:
        """Of each side of zero that has levels: whether it is the positive one, its levels in the order of their places, and the borders between these."""
        levels, n = self.levels.tolist(), self._counts().tolist()
        gaps = [(after - before) ** 2 for before, after in pairwise(sorted(levels)) if before * after > 0]
        gap = sum(gaps) / max(1, len(gaps))
        costs = [price * gap * math.log2((sum(n) + len(n)) / (one + 1)) for one in n]
        found = (
            (side, *nearest({number: one for number, one in enumerate(levels) if (one > 0) == side}, costs))
            for side in (False, True)
        )
        return [one for one in found if one[1]]

    def _cheapest(self, twins: Tensor, borders: list[tuple[bool, list[int], list[float]]]) -> Tensor:
        """The codes of `twins`; on a side of zero without levels those that there are."""
        codes = self.codes
        for positive, numbers, walls in borders:
            found = codes.new_tensor(numbers)[torch.bucketize(twins, twins.new_tensor(walls))]
            codes = torch.where((twins > 0) == positive, found, codes)
        return codes

    def _counts(self) -> Tensor:
        """How many weights each level has."""
        return torch.bincount(self.codes, minlength=len(self.levels))

    def put(self) -> None:
        """The quantized weights into the parameter, which is zero elsewhere."""
        self.parameter.index_put_(self.kept, self.levels[self.codes].to(self.parameter.dtype))

    def spread_gradient(self) -> None:
        """The gradient of the quantized weights becomes that of their twins."""
        if self.parameter.grad is None:
            return
        given = self.parameter.grad[self.kept]
        totals = _sums(given, self.codes, len(self.levels)) / self._counts().clamp(min=1).sqrt()
        self.parameter.grad.zero_().index_put_(self.kept, given + totals.to(given.dtype)[self.codes])


def nearest(levels: Mapping[int, float], costs: Sequence[float]) -> tuple[list[int], list[float]]:
    """Which of `levels`, by number, some place is nearest to, where the square of its distance is raised by the level's of `costs`; ascending, and the borders between
    them, of which the lower one has what lies on it. Of parabolas of one shape each is the lowest in one interval, if anywhere."""
    chosen: list[int] = []
    borders: list[float] = []
    for number in sorted(levels, key=lambda one: (levels[one], costs[one])):
        while chosen:
            level, last = levels[number], levels[chosen[-1]]
            if level == last:  # and it costs no less
                break
            border = (level + last) / 2 + (costs[number] - costs[chosen[-1]]) / (2 * (level - last))
            if len(chosen) == 1 or border > borders[-1]:
                borders.append(border)
                chosen.append(number)
                break
            chosen.pop()
            borders.pop()
        else:
            chosen.append(number)
    return chosen, borders


def _sums(values: Tensor, codes: Tensor, count: int) -> Tensor:
    """float64 (count,): the sum of the `values` of each of `codes`, added in an order that is always the same, so that all ranks get the same."""
    if values.device.type == "cpu":
        return torch.bincount(codes, values.double(), minlength=count)
    return torch.stack([(values * (codes == one)).sum(dtype=torch.float64) for one in range(count)])


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
            one.name: zlib.crc32(one.parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
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
            for what in _STATE
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The mirror of `state`, where the parameters hold the checkpoint's twins."""
        for number, one in enumerate(self._layers):
            one.twin.copy_(one.parameter)
            for what in _STATE:
                getattr(one, what).copy_(state[f"{what}/{number}"])
            one.put()

    def detach(self) -> None:
        """Leave the quantized weights in the parameters."""
        self._layers = []


@torch.no_grad()
def _layer(name: str, parameter: nn.Parameter, one: Quantized) -> _Layer:
    """A layer as `bake` has left it: the twins begin as the quantized weights."""
    values = parameter.detach()
    kept = (one.codes != 0).to(values.device).nonzero(as_tuple=True)
    levels = one.levels[~one.levels.isnan() & (one.levels != 0)].to(values.device)
    if not len(levels):  # all is clipped
        levels = values.new_zeros(1)
    # the nearest, which a parameter of half the bits may have lost the last bits of
    between = levels.double()
    codes = torch.bucketize(values[kept].double(), (between[1:] + between[:-1]) / 2)
    settled = torch.zeros_like(codes, dtype=torch.bool)
    return _Layer(
        name, parameter, values.clone(), kept, codes, levels, settled.float(), values[kept].float(), settled
    )


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
