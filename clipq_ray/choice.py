"""The choice: of the measured points of every group, those that minimise the objective at one lambda, and the lambda that meets a size (method: CLIP-Q,
section 3.2). Pure decisions on what `search` measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from clipq_ray.groups import Group, by_layer
from clipq_ray.plan import Theta
from clipq_ray.search import Trial

MILDEST, STEEPEST = 1e-4, 1e6
"""Lambdas beyond which no choice is another one."""


@dataclass(frozen=True)
class Choice:
    """A point for every group of layers at one lambda, and the bytes that the layers take together before fine-tuning."""

    tradeoff: float
    trials: Mapping[str, Trial]

    @property
    def bytes(self) -> int:
        """Sum over layers, as the codec writes them."""
        return sum(trial.bytes for trial in self.trials.values())

    def thetas(self, groups: Sequence[Group]) -> dict[str, Theta]:
        """Theta of every layer, group by group."""
        return {layer: trial.theta for layer, trial in by_layer(groups, self.trials).items()}


def _whole(points: Sequence[Trial]) -> list[Trial]:
    """Those that were measured on all images; a bound says nothing at another lambda and has lost at its own."""
    return [point for point in points if not point.bound]


def choose(trials: Mapping[str, Sequence[Trial]], tradeoff: float) -> Choice:
    """The measured points that minimise the objective at lambda = `tradeoff`; of equals the smallest."""
    return Choice(
        tradeoff,
        {
            layer: min(_whole(points), key=lambda t: (t.objective(tradeoff), t.bytes, t.step))
            for layer, points in trials.items()
        },
    )


def choose_for_bytes(trials: Mapping[str, Sequence[Trial]], budget: int, *, nearest: bool = False) -> Choice:
    """The smallest lambda whose choice takes at most `budget` bytes; the largest lambda's where none does. `nearest`: where measured points leave a gap around
    `budget`, the choice above it if that is nearer, by ratio."""
    low, high = MILDEST, STEEPEST
    best, above = choose(trials, high), choose(trials, low)
    if best.bytes > budget:
        return best
    for _ in range(60):
        middle = (low * high) ** 0.5
        choice = choose(trials, middle)
        if choice.bytes <= budget:
            best, high = choice, middle
        else:
            above, low = choice, middle
    best = _fill(best, trials, budget, lambda trial: trial.error)
    # where no lambda is as mild, nothing more helps by errors, of a few images by now; by losses it does (bench/LOG.md)
    if above.bytes <= budget:
        best = _fill(best, trials, budget, lambda trial: math.inf if math.isnan(trial.loss) else trial.loss)
    # the product, since a ratio may be of 0 bytes
    return above if nearest and budget**2 > above.bytes * best.bytes and above.bytes > budget else best


def _fill(
    choice: Choice, trials: Mapping[str, Sequence[Trial]], budget: int, harm: Callable[[Trial], float]
) -> Choice:
    """Spend what is left of the budget, as between two lambdas: the most `harm` removed per byte first."""
    chosen = dict(choice.trials)
    left = budget - choice.bytes
    while True:
        steps = [
            ((harm(chosen[layer]) - harm(point)) / max(point.bytes - chosen[layer].bytes, 1), layer, point)
            for layer, points in trials.items()
            for point in _whole(points)
            if harm(point) < harm(chosen[layer]) and point.bytes - chosen[layer].bytes <= left
        ]
        if not steps:
            return Choice(choice.tradeoff, chosen)
        _, layer, point = max(steps, key=lambda step: (step[0], -step[2].step))
        left -= point.bytes - chosen[layer].bytes
        chosen[layer] = point
