"""Units that feed nothing or say nothing: what they leave in a file that no output needs.

Where a linear layer or a convolution A leads to a next one B through nothing but activations and poolings (seen by `torch.fx`), a unit of A whose outgoing
weights are all zero has no influence: its incoming weights and its bias become zero. A unit whose incoming weights are all zero says the same for every
image: its share goes into B's bias, and its outgoing weights and its own bias become zero. One can make the next one dead, so this is repeated. The
function of the network stays the same up to the rounding of sums. Not covered: units behind batch norm or in branches.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipq_ray import codec
from clipq_ray.chains import FLAT, MAX_POOL, NOTHING, RELU, Chain, chains, changed

_THROUGH = (*RELU, *MAX_POOL, *NOTHING, *FLAT)
"""Besides ReLU they give one value where there is one value everywhere."""


@torch.no_grad()
def drop(
    model: nn.Module, layers: Mapping[str, codec.CodedLayer], sample: Tensor, kept: Collection[str] = ()
) -> tuple[dict[str, codec.CodedLayer], int]:
    """Take dead units out of `model`, whose weights are those of `layers` (by parameter name), in place; the layers then, and how many units went.

    `kept`: what the file holds beside them, by name. `sample`: float32 (n, c, h, w); where the outputs for it are not the same afterwards, everything is as it was."""
    pairs = chains(model, _THROUGH, layers, kept)
    if not pairs:
        return dict(layers), 0
    gone: set[tuple[str, int]] = set()

    def remove() -> bool:
        while found := [(chain.first, unit) for chain in pairs for unit in _dead(model, chain)]:
            gone.update(found)
        return bool(gone)

    if not changed(model, sample, remove):
        return dict(layers), 0
    return {name: _masked(layer, model.get_parameter(name)) for name, layer in layers.items()}, len(gone)


def _masked(layer: codec.CodedLayer, weight: Tensor) -> codec.CodedLayer:
    codes = np.where((weight == 0).cpu().numpy(), np.int16(0), layer.codes)
    return codec.CodedLayer.from_quantized(codes, layer.levels, layer.negative)


def _dead(model: nn.Module, chain: Chain) -> list[int]:
    """Units of the first layer that can go now; they are gone afterwards."""
    first: Any = model.get_submodule(chain.first)
    second: Any = model.get_submodule(chain.second)
    units = len(first.weight)
    # (outputs of the second, units of the first, weights between them)
    between = second.weight.data.reshape(len(second.weight), units, -1)
    bias = torch.zeros(units, device=between.device) if first.bias is None else first.bias.data
    says = bias.clamp(min=0) if chain.relu else bias
    reached = first.weight.data.flatten(1).ne(0).any(1)
    feeds = between.ne(0).any(2).any(0)
    dead = ~feeds & (reached | bias.ne(0)) | feeds & ~reached & (says.eq(0) | _takes_constants(second))
    constant = dead & feeds
    if constant.any():
        if second.bias is not None:
            second.bias.data += (between[:, constant].sum(2).double() @ says[constant].double()).float()
        between[:, constant] = 0
        second.weight.data.copy_(between.reshape(second.weight.shape))
    first.weight.data[dead] = 0
    bias[dead] = 0
    return [int(unit) for unit in dead.nonzero()]


def _takes_constants(second: Any) -> bool:
    """Whether a constant input is the same constant for every output: not where zeros are padded around it."""
    if second.bias is None:
        return False
    return isinstance(second, nn.Linear) or not any(_padding(second))


def _padding(convolution: Any) -> Sequence[int]:
    given = convolution.padding
    return (given != "valid",) if isinstance(given, str) else tuple(given)
