"""The order of units, which no output depends on, as the codec likes it best: those with most weights first, those without any last.

Where a linear layer or a convolution leads to a next one and nothing else sees its units (`chains`, batch norm included), they are sorted by how many of
their incoming and outgoing weights are not zero. What is dead then stands at the end, where it takes no bytes (SPEC.md, trimmed layers), and rows of like
density stand together, which the adaptive models learn sooner. The function of the network stays the same up to the rounding of sums. Not covered: channels of
residual sums, and units that belong to groups.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipq_ray import codec
from clipq_ray.chains import BY_CHANNEL, FLAT, MAX_POOL, NORM, NOTHING, RELU, Chain, chains, changed

_THROUGH = (*RELU, *MAX_POOL, *NOTHING, *FLAT, *NORM, *BY_CHANNEL)


@torch.no_grad()
def sort(
    model: nn.Module, layers: Mapping[str, codec.CodedLayer], sample: Tensor, kept: Collection[str] = ()
) -> dict[str, codec.CodedLayer]:
    """Sort the units of `model`, whose weights are those of `layers` (by parameter name), in place; the layers then.

    `kept`: what the file holds beside them, by name. `sample`: float32 (n, c, h, w); where the outputs for it are not the same afterwards, everything is as it was."""
    pairs = [
        one
        for one in chains(model, _THROUGH, layers, kept)
        if getattr(model.get_submodule(one.first), "groups", 1) == 1
    ]
    sorted_layers = dict(layers)
    if not pairs:
        return sorted_layers

    def move() -> bool:
        return sum(_move(model, sorted_layers, chain) for chain in pairs) > 0

    return sorted_layers if changed(model, sample, move) else dict(layers)


def _move(model: nn.Module, layers: dict[str, codec.CodedLayer], chain: Chain) -> bool:
    """Sort the units between two layers; whether any moved."""
    first, second = f"{chain.first}.weight", f"{chain.second}.weight"
    units = len(layers[first].codes)
    used = (layers[first].codes != 0).reshape(units, -1).sum(1)
    used = used + (_by_unit(layers[second].codes, units) != 0).sum((0, 2))
    order = np.argsort(-used, kind="stable")
    if (order == np.arange(units)).all():
        return False
    layers[first] = replace(layers[first], codes=np.ascontiguousarray(layers[first].codes[order]))
    between = _by_unit(layers[second].codes, units)[:, order]
    layers[second] = replace(
        layers[second], codes=np.ascontiguousarray(between.reshape(layers[second].shape))
    )
    index = torch.from_numpy(order)
    for name in (chain.first, *chain.norms):
        for value in _by_first_side(model.get_submodule(name), units):
            value.copy_(value[index.to(value.device)])
    weight: Any = model.get_parameter(second)
    parts = _by_unit(weight.data, units)
    weight.data.copy_(parts[:, index.to(weight.device)].reshape(weight.shape))
    return True


def _by_unit(weight: Any, units: int) -> Any:
    """(outputs of the second layer, units of the first, weights between them)"""
    return weight.reshape(len(weight), units, -1)


def _by_first_side(module: nn.Module, units: int) -> list[Tensor]:
    """Parameters and buffers of a module that have an entry for each unit."""
    values = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return [value.data for value in values if value.dim() and len(value) == units]
