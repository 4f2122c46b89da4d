"""Levels and codes fitted to the loss, where what is clipped stays clipped.

While a network is trained with the operator, weights change sides at the threshold to the end, each by a whole level, and levels are what quantizing moves least, not
what the loss likes best. `Levels` takes the operator's place in a training behind it, in which only kept weights move: each has the level next to its full-precision twin,
and a level is the mean of its twins, as in CLIP-Q. A twin receives the gradient of its weight, straight through, and that of its level, the sum over the level's n weights, divided by the root of n.
All else that a network learns (biases, batch norm) is trained along. A file differs by what other codes, vectors and grids take: rare levels fill up. Where it may not grow, codes stay as they are.

A twin near a border of two levels goes to and fro between them as long as there is a rate to move it by, and each time all other weights have to follow. So a code that
changes back soon is settled (`_Settling`): from then on it is the one of its twin's running mean, and of gradients the twin gets its level's alone.

Source: Han et al., ICLR 2016, section 3 (levels trained), Esser et al., ICLR 2020, section 2.2 (the scale of their gradient), Nagel et al., ICML 2022, section 4.3 (weights that oscillate are frozen; there by how often they turn back and to the mean of their codes). Not covered: the schedule (`finetune`).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clipq_ray.operator import Recovery, bake
from clipq_ray.plan import Plan, Share
from clipq_ray.quantizer import Quantized

_MEMORY = 0.99
"""What one step leaves of the running means."""
_SETTLES = 0.015
"""Changes of a code per step, as a running mean, beyond which it is settled when it changes back: two within 69 steps."""
_SETTLED_BITS = 4
"""Only codes of layers of up to so many bits are settled: between more levels a step goes as far as from one to the next, which costs little."""


class _Settling:
    """Which of a layer's n codes go to and fro.

    `changes`: float32 (n,), changes of a code per step, a running mean; `means`: float32 (n,), of its twin; `last`: int8 (n,), 1 where the last change was to a higher level, -1 to a lower, 0
    where there was none.
    """

    STATE = ("changes", "means", "last")

    def __init__(self, twins: Tensor) -> None:
        self.means = twins.float()
        self.changes = torch.zeros_like(self.means)
        self.last = torch.zeros_like(self.means, dtype=torch.int8)

    def step(self, moved: Tensor, twins: Tensor) -> Tensor:
        """The indices of those that this step found; `moved`: (n,), by what each weight's level is another one than before."""
        direction = moved.sign().to(torch.int8)
        changed = direction != 0
        turned = changed & (direction == -self.last)
        self.last = torch.where(changed, direction, self.last)
        self.changes.lerp_(changed.float(), 1 - _MEMORY)
        self.means.lerp_(twins.float(), 1 - _MEMORY)
        return (turned & (self.changes > _SETTLES)).nonzero(as_tuple=True)[0]


@dataclass
class _Layer:
    """One parameter, which holds quantized weights between steps; `twin`: the full-precision ones, zero where clipped; `kept`: where the n weights lie that are
    not, an index per dimension; `codes`: int64 (n,), which of the `levels`, none of them zero, each of these has; `settled`: bool (n,), whose code stays as it is;
    `settling`: None where no more codes are settled."""

    name: str
    parameter: nn.Parameter
    twin: Tensor
    kept: tuple[Tensor, ...]
    codes: Tensor
    levels: Tensor
    settled: Tensor
    settling: _Settling | None

    def assign(self) -> None:
        """Every kept weight that is not settled to the level next to its twin, on its side of zero; then every level to the mean of its twins."""
        twins, before = self.twin[self.kept], self.codes
        sides = self._sides()
        self.codes = torch.where(self.settled, before, _nearest(twins, before, sides))
        if self.settling:
            new = self.settling.step(self.levels[self.codes] - self.levels[before], twins)
            self.codes[new] = _nearest(self.settling.means[new], self.codes[new], sides)
            self.settled[new] = True
        totals = _sums(twins, self.codes, len(self.levels))
        # a level that nothing has is there for weights that come; none leaves its side of zero, where a layer of one side may have no place for it
        means = (totals / self._counts().clamp(min=1)).to(self.levels.dtype)
        self.levels = torch.where(totals * self.levels > 0, means, self.levels)
        self.put()

    def _sides(self) -> list[tuple[bool, Tensor, Tensor]]:
        """Of each side of zero that has levels: whether it is the positive one, the numbers of its levels by place, and the borders halfway between these."""
        places, numbers = self.levels.sort()  # some may have passed each other
        found = []
        for positive in (False, True):
            here = (places > 0) == positive
            if here.any():
                found.append((positive, numbers[here], (places[here][1:] + places[here][:-1]) / 2))
        return found

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
        given = given.masked_fill(self.settled, 0)
        self.parameter.grad.zero_().index_put_(self.kept, given + totals.to(given.dtype)[self.codes])

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has of it besides the twin, as it is now."""
        found = {"codes": self.codes, "levels": self.levels, "settled": self.settled}
        if self.settling:
            found |= {name: getattr(self.settling, name) for name in _Settling.STATE}
        return {name: one.clone() for name, one in found.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The mirror of `state`, where the parameter holds the checkpoint's twin."""
        self.twin.copy_(self.parameter)
        for name in ("codes", "levels", "settled"):
            getattr(self, name).copy_(state[name])
        if self.settling:
            for name in _Settling.STATE:
                getattr(self.settling, name).copy_(state[name])
        self.put()


def _nearest(twins: Tensor, codes: Tensor, sides: Sequence[tuple[bool, Tensor, Tensor]]) -> Tensor:
    """The codes of `twins` by the borders of `sides`; `codes`: those on a side of zero without levels."""
    for positive, numbers, borders in sides:
        found = numbers[torch.bucketize(twins, borders.to(twins))]
        codes = torch.where((twins > 0) == positive, found, codes)
    return codes


def _sums(values: Tensor, codes: Tensor, count: int) -> Tensor:
    """float64 (count,): the sum of the `values` of each of `codes`, added in an order that is always the same, so that all ranks get the same."""
    if values.device.type == "cpu":
        return torch.bincount(codes, values.double(), minlength=count)
    return torch.stack([(values * (codes == one)).sum(dtype=torch.float64) for one in range(count)])


class Levels:
    """The levels of a network's planned parameters, trainable, and where they are `free` their codes; `model` is changed in place: at once its planned parameters hold quantized weights.

    `ModelError` where the plan names a parameter that the network lacks, or a weight is NaN or infinite."""

    def __init__(self, model: nn.Module, plan: Plan, free: bool) -> None:
        self._layers = [
            _layer(name, model.get_parameter(name), one, free) for name, one in bake(model, plan).items()
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
                one.assign()

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
            f"{what}/{number}": tensor
            for number, one in enumerate(self._layers)
            for what, tensor in one.state().items()
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The mirror of `state`, where the parameters hold the checkpoint's twins."""
        for number, one in enumerate(self._layers):
            one.load_state({what: state[f"{what}/{number}"] for what in one.state()})

    def detach(self) -> None:
        """Leave the quantized weights in the parameters."""
        self._layers = []


@torch.no_grad()
def _layer(name: str, parameter: nn.Parameter, one: Quantized, free: bool) -> _Layer:
    """A layer as `bake` has left it: the twins begin as the quantized weights."""
    values = parameter.detach()
    kept = (one.codes != 0).to(values.device).nonzero(as_tuple=True)
    levels = one.levels[~one.levels.isnan() & (one.levels != 0)].to(values.device)
    if not len(levels):  # all is clipped
        levels = values.new_zeros(1)
    # the nearest, which a parameter of half the bits may have lost the last bits of
    between = levels.double()
    codes = torch.bucketize(values[kept].double(), (between[1:] + between[:-1]) / 2)
    settled = torch.full_like(codes, not free, dtype=torch.bool)
    settling = _Settling(values[kept]) if free and len(levels) < 2**_SETTLED_BITS else None
    return _Layer(name, parameter, values.clone(), kept, codes, levels, settled, settling)


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
