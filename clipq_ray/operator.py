"""CLIP-Q in training: forward and backward on quantized weights, the optimizer's step on the full-precision ones.

`Operator` works on parameters, not modules: between steps a parameter holds its quantized weights and the operator their
full-precision twin; inside `full_precision()` they are exchanged, so the optimizer (with momentum, weight decay, gradient clipping, an
average of the weights) acts on full precision. The gradient with respect to the quantized weights is what the full-precision ones
receive, clipped ones included: the straight-through estimator, without a custom autograd function. Tied weights are one parameter and
are quantized once; convolutions, linear layers and attention projections are the same to it.

With a `Ramp`, pruning rates rise while the network is trained; the paper has them fixed. With `Costs`, full-precision weights are divided by what their places
cost the file (`places`).

Source: Tung and Mori, CVPR 2018, section 3.1, and Courbariaux et al. 2015 for the straight-through gradient.
Not covered: which parameters (`network`), the schedule (`finetune`).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from clipq_ray.errors import ModelError
from clipq_ray.places import Costs, Places
from clipq_ray.plan import LayerPlan, Plan, Theta
from clipq_ray.quantizer import NonFinite, Quantized, decide_share, quantize, requantizer

_RATE_STEP = 1 / 32


@dataclass(frozen=True)
class Recovery:
    """One layer: weights that the first pass clipped, how many of them are not clipped now, and how often any weight changed sides."""

    clipped_first: int
    recovered: int
    changes: int


class Operator:
    """The operator attached to a network's parameters.

    `model` is changed in place: at once its planned parameters hold quantized weights. `ModelError` where the plan names a
    parameter that the network lacks, or a weight is NaN or infinite (the training diverged).
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        rates: Sequence[float] | None = None,
        costs: Costs | None = None,
        densities: Sequence[Tensor] | None = None,
    ) -> None:
        """`rates`: pruning rates to begin with instead of the plan's; `costs`: what `follow_costs` goes by; `densities`: of each layer, by which its weights
        are divided already."""
        self._layers: list[tuple[LayerPlan, nn.Parameter]] = []
        for layer in plan.layers:
            self._layers.append((layer, _parameter(model, layer.layer)))
        self._other = [parameter.detach().clone() for _, parameter in self._layers]
        self._full_in_place = True  # whether the parameters hold the full-precision weights now
        self._swap()
        planned = [(layer.theta, layer.share) for layer, _ in self._layers]
        self._requantizer = requantizer(planned, self._other)
        self._changes_before = torch.zeros(len(planned), dtype=torch.int64)
        if rates is not None:
            self._requantizer.set_rates(rates)
        self.requantize()
        self._clipped_first = [np.packbits(zero) for zero in self._clipped()]
        self._places = []
        if costs:
            before: Sequence[Tensor | None] = densities or [None] * len(planned)
            self._places = [Places(kept, costs, one) for kept, one in zip(self._kept(), before, strict=True)]

    @property
    def densities(self) -> list[Tensor]:
        """Of each layer's places, by which its full-precision weights are divided; none without costs."""
        return [one.densities for one in self._places]

    def _kept(self) -> list[Tensor]:
        return [parameter.detach() != 0 for _, parameter in self._layers]

    @torch.no_grad()
    def follow_costs(self) -> None:
        """Divide the full-precision weights by what their places cost by now, and quantize them anew; nothing without costs."""
        if not self._places:
            return
        kept = self._kept()
        with self.full_precision():
            for places, (_, parameter), those in zip(self._places, self._layers, kept, strict=True):
                if parameter.requires_grad:  # nothing would train back what that changes
                    places.follow(parameter, those)

    def _swap(self) -> None:
        for index, (_, parameter) in enumerate(self._layers):
            parameter.data, self._other[index] = self._other[index], parameter.data
        self._full_in_place = not self._full_in_place

    @torch.no_grad()
    def requantize(self) -> None:
        """Clips, levels and assignments anew from the full-precision weights, into the parameters."""
        with self._naming_layers():
            self._requantizer.run(self._other, [parameter.data for _, parameter in self._layers])

    def set_rates(self, rates: Sequence[float]) -> None:
        """Other pruning rates, one per layer of the plan, from the next `requantize` on."""
        self._requantizer.set_rates(rates)

    def check(self) -> None:
        """`ModelError` if a weight was NaN or infinite; on a GPU this is found here, at the price of waiting for it."""
        with self._naming_layers():
            self._requantizer.check()

    @contextmanager
    def _naming_layers(self) -> Iterator[None]:
        try:
            yield
        except NonFinite as error:
            number: int = error.args[0]
            raise ModelError(
                f"layer {self._layers[number][0].layer}: expected finite weights, got NaN or infinity; use another checkpoint "
                "or a lower learning rate"
            ) from error

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """The parameters hold full precision inside, and gradients are those of weights that were divided; what was changed there is quantized anew on leaving."""
        for places, (_, parameter) in zip(self._places, self._layers, strict=False):
            if parameter.grad is not None:
                parameter.grad.div_(places.divisors)
        self._swap()
        try:
            yield
        finally:
            self._swap()
        self.requantize()

    @contextmanager
    def reading_full_precision(self) -> Iterator[None]:
        """As `full_precision`, for readers: nothing is quantized anew."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _clipped(self) -> list[npt.NDArray[np.bool_]]:
        """Which weights have the code 0, in memory order."""
        return [
            index.cpu().numpy() == layer.share.negative
            for (layer, _), index in zip(self._layers, self._requantizer.indices, strict=True)
        ]

    def code_hashes(self) -> dict[str, int]:
        """A CRC-32 of every layer's codes: equal where ranks hold the same quantized weights."""
        return {
            layer.layer: zlib.crc32(index.cpu().numpy().tobytes())
            for (layer, _), index in zip(self._layers, self._requantizer.indices, strict=True)
        }

    def recovery(self) -> dict[str, Recovery]:
        """What became of the weights that the first pass clipped, by layer."""
        changes = self._changes_before + self._requantizer.changes.cpu()
        result = {}
        for number, (now, first) in enumerate(zip(self._clipped(), self._clipped_first, strict=True)):
            then = np.unpackbits(first, count=now.size).view(bool)
            name = self._layers[number][0].layer
            result[name] = Recovery(int(then.sum()), int((then & ~now).sum()), int(changes[number]))
        return result

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs for `recovery` and `follow_costs`, besides the full-precision weights."""
        first = {
            f"clipped_first/{number}": torch.from_numpy(bits)
            for number, bits in enumerate(self._clipped_first)
        }
        densities = {f"densities/{number}": one for number, one in enumerate(self.densities)}
        return {**first, **densities, "changes": self._changes_before + self._requantizer.changes.cpu()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The mirror of `state`, on an operator that was made from the checkpoint's full-precision weights."""
        self._clipped_first = [
            state[f"clipped_first/{number}"].numpy() for number in range(len(self._layers))
        ]
        self._changes_before = state["changes"] - self._requantizer.changes.cpu()
        for number, one in enumerate(self._places):
            one.set(state[f"densities/{number}"].to(one.densities.device))

    def detach(self) -> None:
        """Leave the full-precision weights in the parameters; the operator is done."""
        if not self._full_in_place:
            self._swap()
        self._layers = []


@torch.no_grad()
def bake_keeping(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """As `bake`; the full-precision weights by name."""
    full = {layer.layer: _parameter(model, layer.layer).detach().clone() for layer in plan.layers}
    bake(model, plan)
    return full


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    try:
        return model.get_parameter(name)
    except AttributeError as error:
        raise ModelError(f"the plan names {name}, which the network lacks; make a new plan") from error


def _named(layer: LayerPlan, full: Tensor) -> Quantized:
    try:
        return quantize(full, layer.theta, layer.share)
    except ModelError as error:
        raise ModelError(f"layer {layer.layer}: {error}") from error


@torch.no_grad()
def make_plan(model: nn.Module, thetas: dict[str, Theta]) -> Plan:
    """The plan of `thetas` (by parameter name); the share of intervals is decided here, once, from the weights in `model`."""
    return Plan(
        tuple(
            LayerPlan(name, theta, decide_share(_parameter(model, name), theta))
            for name, theta in thetas.items()
        )
    )


@torch.no_grad()
def mildest_rates(model: nn.Module, plan: Plan) -> tuple[float, ...]:
    """For every layer of `plan` the pruning rate up to its own, in steps of `_RATE_STEP`, at which quantizing moves the weights in `model` least."""
    return tuple(_mildest(layer, _parameter(model, layer.layer)) for layer in plan.layers)


def _mildest(layer: LayerPlan, weight: Tensor) -> float:
    def moved(p: float) -> float:
        theta = Theta(p, layer.theta.b)
        return float((weight - quantize(weight, theta, layer.share).values).double().square().sum())

    steps = int(layer.theta.p / _RATE_STEP)
    return min((step * _RATE_STEP for step in range(steps + 1)), key=moved)


@torch.no_grad()
def bake(model: nn.Module, plan: Plan) -> dict[str, Quantized]:
    """Quantize `model`'s full-precision weights in place, for good; codes and levels of every layer by name."""
    result = {}
    for layer in plan.layers:
        parameter = _parameter(model, layer.layer)
        result[layer.layer] = _named(layer, parameter)
        parameter.copy_(result[layer.layer].values)
    return result
