"""What a checkpoint holds of an optimizer goes on as if nothing had been."""

from __future__ import annotations

import torch
from torch import nn

from clipq_ray import optimizers
from clipq_ray.optimizers import Schedule

SCHEDULE = Schedule(2, 8, 0.1, 0.0, 0.9, 1e-4, 0.0)


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        images = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(3, 16, 3).to(memory_format=torch.channels_last)


def test_a_training_goes_on_from_a_checkpoint_to_the_same_weights_in_the_same_layout() -> None:
    whole, parted = network(), network()
    stepped(whole, one := optimizers.sgd(whole, SCHEDULE), 3)
    kept = {name: value.contiguous().clone() for name, value in optimizers.state(whole, one).items()}
    parted.load_state_dict(whole.state_dict())
    other = optimizers.sgd(parted, SCHEDULE)
    optimizers.load_state(parted, other, kept)
    stepped(whole, one, 2)
    stepped(parted, other, 2)
    for (name, before), (_, after) in zip(whole.named_parameters(), parted.named_parameters(), strict=True):
        assert torch.equal(before, after)
        held = optimizers.state(parted, other)
        assert all(held[key].stride() == after.stride() for key in held if key.endswith(name) and after.dim() == held[key].dim())  # fmt: skip
    assert len(kept) == len(held)
