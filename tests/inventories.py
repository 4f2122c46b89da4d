"""Images for an inventory of a network, and what it found."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipq_ray.network import Inventory


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def kinds(found: Inventory) -> dict[str, str]:
    return {layer.name: layer.kind for layer in found.layers}


def assert_complete(model: nn.Module, found: Inventory) -> None:
    """Every tensor is in exactly one group."""
    grouped = [*kinds(found), *found.kept, *found.integers, *found.counters, *found.ties, *found.dropped]
    assert sorted(grouped) == sorted(model.state_dict())
