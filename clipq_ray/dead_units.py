"""Units that feed nothing or say nothing: what they leave in a file that no output needs.

Where a linear layer or a convolution A leads to a next one B through nothing but activations and poolings (seen by `torch.fx`), a unit of A whose outgoing
weights are all zero has no influence: its incoming weights and its bias become zero. A unit whose incoming weights are all zero says the same for every
image: its share goes into B's bias, and its outgoing weights and its own bias become zero. One can make the next one dead, so this is repeated. The
function of the network stays the same up to the rounding of sums. Not covered: units behind batch norm or in branches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from clipq_ray import codec
from clipq_ray.evaluate import evaluating, logits

_UNITS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_RELU: tuple[Any, ...] = (nn.ReLU, F.relu, torch.relu, "relu", torch.relu_, "relu_")
_SAME: tuple[Any, ...] = (
    nn.Dropout,
    nn.Identity,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    F.max_pool1d,
    F.max_pool2d,
    F.max_pool3d,
)
"""Of a map that has one value everywhere they give that value."""
_FLAT: tuple[Any, ...] = (nn.Flatten, torch.flatten, "flatten")
_CLOSE = 1e-4  # of the largest output


@dataclass(frozen=True)
class _Chain:
    """Modules by name; `relu`: whether a ReLU lies between them."""

    first: str
    second: str
    relu: bool


@torch.no_grad()
def drop(
    model: nn.Module, layers: Mapping[str, codec.CodedLayer], sample: Tensor
) -> tuple[dict[str, codec.CodedLayer], int]:
    """Take dead units out of `model`, whose weights are those of `layers` (by parameter name), in place; the layers then, and how many units went.

    `sample`: float32 (n, c, h, w); where the outputs for it are not the same afterwards, everything is as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with evaluating(model):
        wanted = logits(model(sample))
        chains = [
            one
            for one in _chains(model)
            if f"{one.first}.weight" in layers and f"{one.second}.weight" in layers
        ]
        gone: set[tuple[str, int]] = set()
        while found := [(chain.first, unit) for chain in chains for unit in _dead(model, chain)]:
            gone |= set(found)
        found_now = logits(model(sample))
    if not gone:
        return dict(layers), 0
    if not torch.allclose(wanted, found_now, rtol=0, atol=_CLOSE * float(wanted.abs().max())):
        model.load_state_dict(before)
        return dict(layers), 0
    return {name: _masked(layer, model.get_parameter(name)) for name, layer in layers.items()}, len(gone)


def _masked(layer: codec.CodedLayer, weight: Tensor) -> codec.CodedLayer:
    codes = np.where(weight.cpu().numpy() == 0, np.int16(0), layer.codes)
    return codec.CodedLayer.from_quantized(codes, layer.levels, layer.negative)


def _chains(model: nn.Module) -> list[_Chain]:
    """All pairs of layers that follow each other and nothing else; none in a network that cannot be traced."""
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception:  # control flow on values, and whatever else a network does
        return []
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = [node for node in graph.nodes if node.op == "call_module"]
    often = {node.target for node in calls if sum(one.target == node.target for one in calls) > 1}
    owners = [id(value) for _, value in model.named_parameters(remove_duplicate=False)]
    found = []
    for node in calls:
        chain = _followed(node, modules) if isinstance(modules[node.target], _UNITS) else None
        if chain is None or {chain.first, chain.second} & often:
            continue
        weights = [
            value for name in (chain.first, chain.second) for value in modules[name].parameters(recurse=False)
        ]
        if all(owners.count(id(value)) == 1 for value in weights):
            found.append(chain)
    return found


def _followed(node: fx.Node, modules: Mapping[str, nn.Module]) -> _Chain | None:
    """From a layer's call to the next layer's, if nothing else sees what lies between."""
    first, relu = str(node.target), False
    while len(node.users) == 1:
        (node,) = node.users
        what = type(modules[str(node.target)]) if node.op == "call_module" else node.target
        if node.op not in ("call_module", "call_function", "call_method") or not node.args:
            return None
        if what in _UNITS:
            second = str(node.target)
            return _Chain(first, second, relu) if _fits(modules[first], modules[second]) else None
        if what in _RELU:
            relu = True
        elif what in _FLAT:
            if not _from_channels(node, modules):
                return None
        elif what not in _SAME:
            return None
    return None


def _from_channels(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a flattening leaves the batch alone and takes all else."""
    if node.op == "call_module":
        module: Any = modules[str(node.target)]
        return bool((module.start_dim, module.end_dim) == (1, -1))
    given = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | dict(node.kwargs)
    return (given.get("start_dim", 0), given.get("end_dim", -1)) == (1, -1)


def _fits(first: Any, second: Any) -> bool:
    """Whether the second layer's inputs belong to units of the first in equal parts."""
    units = first.weight.shape[0]
    if isinstance(second, nn.Linear):
        return bool(second.in_features % units == 0)
    return bool(second.groups == 1 and second.in_channels == units)


def _dead(model: nn.Module, chain: _Chain) -> list[int]:
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
