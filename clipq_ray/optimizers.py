"""What a training's gradients move weights by and at which rate, and how much of that a checkpoint holds.

Source: Sutskever et al. 2013 (SGD with Nesterov momentum). Not covered: the loop (`finetune`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Schedule:
    """SGD with Nesterov momentum, linear warm-up and one cosine to zero; `batch_size` is over all ranks; `cutout_pixels`: side of a square that is masked in
    every image (`data.augment`), 0: none."""

    epochs: int
    batch_size: int
    learning_rate: float
    warmup_epochs: float
    momentum: float
    weight_decay: float
    label_smoothing: float
    cutout_pixels: int = 0

    def rate(self, done: float, epoch: float) -> float:
        """The learning rate when a part `done` (0..1) of the schedule is over, `epoch` epochs from the start."""
        rate = self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))
        return rate * min(1.0, (epoch + 0.01) / self.warmup_epochs) if self.warmup_epochs > 0 else rate


def sgd(model: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """For all that `model` learns."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(
        learned, lr=schedule.learning_rate, momentum=schedule.momentum, weight_decay=schedule.weight_decay,
        nesterov=schedule.momentum > 0,
    )  # fmt: skip


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of a checkpoint."""
    return {
        f"momentum/{name}": momentum
        for name, parameter in model.named_parameters()
        if (momentum := optimizer.state.get(parameter, {}).get("momentum_buffer")) is not None
    }


def load_state(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The mirror of `state`."""
    for name, parameter in model.named_parameters():
        if f"momentum/{name}" in tensors:
            # in the parameter's layout, which the steps that go over all tensors at once want
            optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(
                tensors[f"momentum/{name}"]
            )
