"""What a training's gradients move weights by and at which rate, and how much of that a checkpoint holds.

Source: Sutskever et al. 2013 (SGD with Nesterov momentum); Kingma and Ba 2015 (Adam). Not covered: the loop (`finetune`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_KEPT = {"momentum_buffer": "momentum", "exp_avg": "mean", "exp_avg_sq": "square", "step": "step"}
"""An optimizer's names for its tensors, and those in a checkpoint."""


@dataclass(frozen=True)
class Schedule:
    """SGD with Nesterov momentum, linear warm-up and one cosine to zero; `batch_size` is over all ranks."""

    epochs: int
    batch_size: int
    learning_rate: float
    warmup_epochs: float
    momentum: float
    weight_decay: float
    label_smoothing: float

    def rate(self, done: float, epoch: float) -> float:
        """The learning rate when a part `done` (0..1) of the schedule is over, `epoch` epochs from the start."""
        rate = self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))
        return rate * min(1.0, (epoch + 0.01) / self.warmup_epochs) if self.warmup_epochs > 0 else rate


def sgd(model: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """For weights at full precision."""
    return torch.optim.SGD(
        _learned(model), lr=schedule.learning_rate, momentum=schedule.momentum, weight_decay=schedule.weight_decay,
        nesterov=schedule.momentum > 0,
    )  # fmt: skip


def adam(model: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """For levels, of which some stand for ten weights and some for a million: steps do not grow with the gradient."""
    return torch.optim.Adam(_learned(model), lr=schedule.learning_rate)


def _learned(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of a checkpoint."""
    return {
        f"{kept}/{name}": found[key]
        for name, parameter in model.named_parameters()
        if (found := optimizer.state.get(parameter, {}))
        for key, kept in _KEPT.items()
        if found.get(key) is not None
    }


def load_state(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The mirror of `state`."""
    for name, parameter in model.named_parameters():
        for key, kept in _KEPT.items():
            if f"{kept}/{name}" in tensors:
                value = tensors[f"{kept}/{name}"]
                # Adam counts its steps on the CPU
                # in the parameter's layout, which the steps that go over all tensors at once want
                optimizer.state[parameter][key] = (
                    value if key == "step" else torch.empty_like(parameter).copy_(value)
                )
