"""Knowledge distillation: what a full network says of an image, as targets beside the label.

The loss is (1 - weight) x cross entropy + weight x temperature^2 x the Kullback-Leibler divergence of the student's from the teacher's class probabilities,
both softened by the temperature. The teacher is in eval mode and does not learn. Source: Hinton, Vinyals and Dean 2015, section 2. Not covered: features
between the layers as targets, and teachers of another architecture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipq_ray.evaluate import logits


@dataclass(frozen=True)
class Distillation:
    """`teacher`: URI of the store of its weights; `weight`: its part of the loss, in (0, 1]; `temperature` divides the logits of both."""

    teacher: str
    weight: float
    temperature: float


class Teacher:
    """A full network that says its soft labels; `network` is changed: no gradients, eval mode, the `device`."""

    def __init__(self, network: nn.Module, given: Distillation, device: torch.device) -> None:
        self._network: Any = network.to(device).to(memory_format=torch.channels_last)
        self._network.requires_grad_(False).eval()
        self._weight, self._temperature = given.weight, given.temperature

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Its class scores, float (n, classes)."""
        found: Tensor = logits(self._network(images))
        return found

    def mixed(self, loss: Tensor, output: Tensor, target: Tensor) -> Tensor:
        """The loss with its part: `loss` by labels, `output` and `target` the student's and its own logits, float32 (n, classes)."""
        student, teacher = (F.log_softmax(one / self._temperature, dim=1) for one in (output, target))
        divergence = F.kl_div(student, teacher, log_target=True, reduction="batchmean")
        return (1 - self._weight) * loss + self._weight * self._temperature**2 * divergence
