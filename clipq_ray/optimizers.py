"""What a training's gradients move weights by, and how much of that a checkpoint holds.

Source: Sutskever et al. 2013 (SGD with Nesterov momentum); Kingma and Ba 2015 (Adam). Not covered: rates over time (`finetune`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from clipq_ray.finetune import Schedule

_KEPT = {"momentum_buffer": "momentum", "exp_avg": "mean", "exp_avg_sq": "square", "step": "step"}
"""An optimizer's names for its tensors, and those in a checkpoint."""


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
                optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)
