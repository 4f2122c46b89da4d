"""What the searched layers do together: the front of size and error of the whole network, and how far errors of single layers add up.

The search measures one layer at a time. `front` sums what it measured; `interaction` compresses all layers of a plan at once, in one shot,
and says how far the sum is from that. Both before fine-tuning, on the images of the search. Not covered: what training makes of it (`rounds`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from clipq_ray.choice import Choice, choose
from clipq_ray.data import Split
from clipq_ray.evaluate import evaluate
from clipq_ray.operator import bake
from clipq_ray.plan import Plan
from clipq_ray.search import Trial

_TRADEOFFS = np.geomspace(1e-4, 1e6, 400)


@dataclass(frozen=True)
class Point:
    """One choice for all layers: their bytes, and the errors that they add one by one, summed, in points of top-1."""

    tradeoff: float
    bytes: int
    added_error_points: float


@dataclass(frozen=True)
class Interaction:
    """Top-1 errors in percent, on `images` training images, without training: of the original, and with all layers compressed; and the sum of
    what the layers add one by one, in points."""

    images: int
    original_percent: float
    together_percent: float
    sum_points: float

    @property
    def together_points(self) -> float:
        """What all layers add at once."""
        return self.together_percent - self.original_percent


def added(choice: Choice, original_error: float) -> float:
    """The errors that the layers add one by one, summed; as a fraction."""
    return sum(trial.error - original_error for trial in choice.trials.values())


def front(trials: Mapping[str, Sequence[Trial]], original_error: float) -> list[Point]:
    """The choices that some lambda makes and no other choice beats in size and error, from small to large."""
    found: dict[int, Point] = {}
    for tradeoff in _TRADEOFFS:
        choice = choose(trials, float(tradeoff))
        points = 100 * added(choice, original_error)
        found.setdefault(choice.bytes, Point(float(tradeoff), choice.bytes, points))
    result: list[Point] = []
    for point in sorted(found.values(), key=lambda one: (one.bytes, one.added_error_points)):
        if not result or point.added_error_points < result[-1].added_error_points:
            result.append(point)
    return result


@torch.no_grad()
def interaction(
    model: nn.Module, plan: Plan, choice: Choice, images: Split, original_error: float, *, batch_size: int,
    device: torch.device,
) -> Interaction:  # fmt: skip
    """Compress all layers of `model`, which is changed, by `plan` at once and score it."""
    bake(model, plan)
    result = evaluate(model.to(device), images, batch_size=batch_size, device=device)
    return Interaction(
        result.n, 100 * original_error, 100 * (1 - result.top1), 100 * added(choice, original_error)
    )


def document(points: Sequence[Point], found: Interaction) -> dict[str, Any]:
    """What the manifest says of both."""
    return {
        "front": [{"tradeoff": p.tradeoff, "bytes": p.bytes, "added_error_points": p.added_error_points} for p in points],
        "interaction": {
            "images": found.images, "original_error_percent": found.original_percent,
            "together_error_percent": found.together_percent, "together_points": found.together_points,
            "sum_points": found.sum_points,
        },
    }  # fmt: skip
