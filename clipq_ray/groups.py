"""Which layers share one theta: each by itself, blocks of the network, all of them, or as the user names them; and how long each group takes.

The search measures one group at a time, so a group is its unit of work. `by_layer` spreads what was found over the layers again. Not covered:
which tensors are layers (`network`).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from clipq_ray.errors import ConfigError
from clipq_ray.evaluate import evaluating

BLOCKS, NETWORK = "blocks", "network"
T = TypeVar("T")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Group:
    """`layers` are names of weights in the order of the network; `name` is the weight's, the block's, or the pattern."""

    name: str
    layers: tuple[str, ...]


def grouped(model: nn.Module, layers: Sequence[str], wanted: Sequence[str]) -> tuple[Group, ...]:
    """Every one of `layers` in one group, groups in the order of their first layers.

    `wanted`: nothing for each layer by itself, "blocks", "network", or patterns (`fnmatch`) of which each makes a group of what it matches and
    what it does not match stays by itself. `ConfigError` for a pattern that matches nothing or what another one has.
    """
    if list(wanted) == [NETWORK]:
        names = dict.fromkeys(layers, NETWORK)
    elif list(wanted) == [BLOCKS]:
        blocks = _blocks(model, layers)
        names = {
            layer: next((one for one in blocks if layer.startswith(f"{one}.")), layer) for layer in layers
        }
    else:
        names = _by_pattern(layers, wanted)
    found: dict[str, list[str]] = {}
    for layer in layers:
        found.setdefault(names[layer], []).append(layer)
    return tuple(Group(name, tuple(members)) for name, members in found.items())


def _by_pattern(layers: Sequence[str], patterns: Sequence[str]) -> dict[str, str]:
    names: dict[str, str] = {}
    for word in (BLOCKS, NETWORK):
        if word in patterns:
            raise ConfigError(
                f"--groups: expected {word} by itself, got {', '.join(patterns)}; leave the others out"
            )
    for pattern in patterns:
        matched = [layer for layer in layers if fnmatch.fnmatchcase(layer, pattern)]
        if not matched:
            raise ConfigError(
                f"--groups: expected {BLOCKS}, {NETWORK} or patterns of layers, got {pattern!r}, which matches none (commas "
                f"separate patterns); layers are {', '.join(layers[:3])}, ..."
            )
        for layer in matched:
            if layer in names:
                raise ConfigError(
                    f"--groups: expected every layer in one group, got {layer} in {names[layer]!r} and {pattern!r}; change one of them"
                )
            names[layer] = pattern
    return {layer: names.get(layer, layer) for layer in layers}


def _blocks(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """Modules that are blocks, outermost ones only: no mere container, some but not all layers inside, and at most one smaller block (squeeze and
    excitation, attention): what holds more is a stage or a network."""
    found: list[str] = []
    for path, module in reversed(list(model.named_modules())):  # from the inside
        inside = [layer for layer in layers if layer.startswith(f"{path}.")]
        smaller = [one for one in found if one.startswith(f"{path}.")]
        if (
            path
            and not isinstance(module, _CONTAINERS)
            and 1 < len(inside) < len(layers)
            and len(smaller) <= 1
        ):
            found = [one for one in found if one not in smaller] + [path]
    return found


def by_layer(groups: Sequence[Group], found: Mapping[str, T]) -> dict[str, T]:
    """What was found for each group, for each of its layers."""
    return {layer: found[group.name] for group in groups for layer in group.layers}


@torch.no_grad()
def work(model: nn.Module, groups: Sequence[Group], images: Tensor) -> dict[str, int]:
    """What one evaluation of each group costs [FLOP per batch of `images`]: all products from its first layer on, in the order of the network.

    An estimate that puts groups in order: branches beside a layer count as behind it, and where products cannot be counted weights do.
    """
    layers = {layer for group in groups for layer in group.layers}
    order = [name for name, _ in model.named_parameters(remove_duplicate=False) if name in layers]
    each = _products(model, order, images)
    behind, left = {}, sum(each.values())
    for name in order:
        behind[name] = left
        left -= each[name]
    return {group.name: max(behind.get(layer, 0) for layer in group.layers) for group in groups}


def _products(model: nn.Module, layers: Sequence[str], images: Tensor) -> dict[str, int]:
    try:
        with evaluating(model), FlopCounterMode(display=False) as counter:
            model(images)
    except Exception:  # counting watches every operation of a foreign network
        return {layer: model.get_parameter(layer).numel() for layer in layers}
    counts = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    root = type(model).__name__
    return {layer: counts.get(f"{root}.{layer.rpartition('.')[0]}", 0) for layer in layers}
