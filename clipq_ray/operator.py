"""CLIP-Q in training: forward and backward on quantized weights, the optimizer's step on the full-precision ones.

`Operator` works on parameters, not modules: between steps a parameter holds its quantized weights and the operator their
full-precision twin; inside `full_precision()` they are exchanged, so the optimizer (with momentum, weight decay, gradient clipping, an
average of the weights) acts on full precision. The gradient with respect to the quantized weights is what the full-precision ones
receive, clipped ones included: the straight-through estimator, without a custom autograd function. Tied weights are one parameter and
are quantized once; convolutions, linear layers and attention projections are the same to it.

Source: Tung and Mori, CVPR 2018, section 3.1, and Courbariaux et al. 2015 for the straight-through gradient.
Not covered: which parameters (`network`), the schedule (`finetune`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from clipq_ray.errors import ModelError
from clipq_ray.plan import LayerPlan, Plan, Theta
from clipq_ray.quantizer import Quantized, decide_share, quantize


class Operator:
    """The operator attached to a network's parameters.

    `model` is changed in place: at once its planned parameters hold quantized weights. `ModelError` where the plan names a
    parameter that the network lacks, or a weight is NaN or infinite (the training diverged).
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self._layers: list[tuple[LayerPlan, nn.Parameter]] = []
        for layer in plan.layers:
            self._layers.append((layer, _parameter(model, layer.layer)))
        self._other = [parameter.detach().clone() for _, parameter in self._layers]
        self._full_in_place = True  # whether the parameters hold the full-precision weights now
        self._swap()
        self.requantize()

    def _swap(self) -> None:
        for index, (_, parameter) in enumerate(self._layers):
            parameter.data, self._other[index] = self._other[index], parameter.data
        self._full_in_place = not self._full_in_place

    @torch.no_grad()
    def requantize(self) -> None:
        """Clips, levels and assignments anew from the full-precision weights, into the parameters."""
        for (layer, parameter), full in zip(self._layers, self._other, strict=True):
            parameter.data.copy_(_named(layer, full).values)

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """The parameters hold full precision inside; what was changed there is quantized anew on leaving."""
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

    def detach(self) -> None:
        """Leave the full-precision weights in the parameters; the operator is done."""
        if not self._full_in_place:
            self._swap()
        self._layers = []


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
def bake(model: nn.Module, plan: Plan) -> dict[str, Quantized]:
    """Quantize `model`'s full-precision weights in place, for good; codes and levels of every layer by name."""
    result = {}
    for layer in plan.layers:
        parameter = _parameter(model, layer.layer)
        result[layer.layer] = _named(layer, parameter)
        parameter.copy_(result[layer.layer].values)
    return result
