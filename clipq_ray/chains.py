"""Layers that follow each other and nothing else: whose units may be changed without any other part of a network seeing it.

A linear layer or a convolution leads to a next one through nothing but modules and functions of given kinds, as `torch.fx` sees it in eval mode: in a straight line, with
no other user of what lies between, each called once, and no weight shared. Not covered: branches and residual sums; networks that cannot be traced have no chains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from clipq_ray.evaluate import evaluating, logits
from clipq_ray.prefix import traced
from clipq_ray.states import put_state

_CLOSE = 1e-4  # of the largest output
_UNITS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
RELU: tuple[Any, ...] = (nn.ReLU, F.relu, torch.relu, "relu", torch.relu_, "relu_")
MAX_POOL: tuple[Any, ...] = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d,
)  # fmt: skip
NOTHING: tuple[Any, ...] = (nn.Dropout, nn.Identity)
"""In inference."""
FLAT: tuple[Any, ...] = (nn.Flatten, torch.flatten, "flatten")
"""From the channels on, all into one dimension."""
NORM: tuple[Any, ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_AVERAGE_POOL: tuple[Any, ...] = (
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, F.avg_pool2d,
    F.adaptive_avg_pool2d,
)  # fmt: skip
BY_CHANNEL: tuple[Any, ...] = (
    nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    *_AVERAGE_POOL, F.relu6, F.silu, F.gelu, F.dropout, torch.sigmoid, torch.tanh,
)  # fmt: skip
"""What treats every channel by itself and all alike, beside the kinds above."""
_OF_CHANNELS = (*MAX_POOL, *_AVERAGE_POOL)
"""What knows channels by their dimension, the first behind the batch: a linear layer's units are in the last one."""


@dataclass(frozen=True)
class Chain:
    """Modules by name; `relu`: whether a ReLU lies between them; `norms`: the batch norms that do."""

    first: str
    second: str
    relu: bool
    norms: tuple[str, ...] = ()


def changed(model: nn.Module, sample: Tensor, change: Callable[[], bool]) -> bool:
    """Whether `change` says that it changed weights of `model`; where outputs for `sample`, float32 (n, c, h, w), are others afterwards, or no numbers
    to compare, the weights are as they were, and the answer is no."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with evaluating(model):
        wanted = logits(model(sample))
        bound = _CLOSE * float(wanted.abs().max())
        # within an infinite bound everything is the same
        if not math.isfinite(bound) or not change():
            return False
        found = logits(model(sample))
    if torch.allclose(wanted, found, rtol=0, atol=bound):
        return True
    put_state(model, before)  # copies have lost the versions of the modules' state
    return False


def chains(
    model: nn.Module, through: Collection[Any], weights: Collection[str], kept: Collection[str] = ()
) -> list[Chain]:
    """All pairs of layers whose weights (parameter names) are among `weights` and that follow each other through kinds in `through` only; none in a network
    that cannot be traced. What only a training reaches sees no units, unless it is among `kept`, names of the state dict that a file holds beside them."""
    graph_module = traced(model)
    if graph_module is None:  # control flow on values, and whatever else a network does
        return []
    found = _in_graph(graph_module.graph, model, through, weights)
    if not found or all(_reached(name, graph_module.graph) for name in kept):
        return found
    trained = traced(model, training=True)
    as_trained = [] if trained is None else _in_graph(trained.graph, model, through, weights)
    return [one for one in found if one in as_trained]


def _reached(name: str, graph: fx.Graph) -> bool:
    """Whether a graph reads this entry of the state dict."""
    targets = (str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr"))
    return any(name == target or name.startswith(f"{target}.") for target in targets)


def _in_graph(
    graph: fx.Graph, model: nn.Module, through: Collection[Any], weights: Collection[str]
) -> list[Chain]:
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = [node for node in graph.nodes if node.op == "call_module"]
    often = {node.target for node in calls if sum(one.target == node.target for one in calls) > 1}
    owners = [id(value) for _, value in model.named_parameters(remove_duplicate=False)]
    found = []
    for node in calls:
        chain = _followed(node, modules, through) if isinstance(modules[node.target], _UNITS) else None
        if chain is None or {chain.first, chain.second, *chain.norms} & often:
            continue
        if not {f"{chain.first}.weight", f"{chain.second}.weight"} <= set(weights):
            continue
        owned = [
            value
            for name in (chain.first, chain.second, *chain.norms)
            for value in modules[name].parameters(recurse=False)
        ]
        if all(owners.count(id(value)) == 1 for value in owned):
            found.append(chain)
    return found


def _followed(node: fx.Node, modules: Mapping[str, nn.Module], through: Collection[Any]) -> Chain | None:
    """From a layer's call to the next layer's, if nothing else sees what lies between."""
    first, relu, flat = str(node.target), False, False
    norms: list[str] = []
    units, linear = cast(Any, modules[first]).weight.shape[0], isinstance(modules[first], nn.Linear)
    while len(node.users) == 1:
        (node,) = node.users
        what = type(modules[str(node.target)]) if node.op == "call_module" else node.target
        if node.op not in ("call_module", "call_function", "call_method") or not node.args:
            return None
        if what in _UNITS:
            second = str(node.target)
            fits = _fits(modules[second], units, flat or linear)
            # else it may have taken several dimensions, of which units are the last
            fits = fits and (not (linear and flat) or cast(Any, modules[second]).in_features == units)
            return Chain(first, second, relu, tuple(norms)) if fits else None
        if what not in through or (linear and what in _OF_CHANNELS):
            return None
        if what in FLAT and not _from_channels(node, modules):
            return None
        relu, flat = relu or what in RELU, flat or what in FLAT
        if what in NORM:
            norms.append(str(node.target))
            if cast(Any, modules[norms[-1]]).num_features != units:
                return None
    return None


def _from_channels(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a flattening leaves the batch alone and takes all else."""
    if node.op == "call_module":
        module: Any = modules[str(node.target)]
        return bool((module.start_dim, module.end_dim) == (1, -1))
    given = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | dict(node.kwargs)
    return (given.get("start_dim", 0), given.get("end_dim", -1)) == (1, -1)


def _fits(second: Any, units: int, last: bool) -> bool:
    """Whether the second layer's inputs belong to the first one's `units` in equal parts; `last`: these lie in the last dimension, where a linear layer has its inputs."""
    if isinstance(second, nn.Linear):
        return last and second.in_features % units == 0
    return bool(not last and second.groups == 1 and second.in_channels == units)
