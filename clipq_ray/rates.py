"""The pruning rates of a network while it is trained: how they rise to the plan's, and how they follow the size of the file.

A plan for a size is made of layers that were measured one by one before training. What units die and which codes fall together is known afterwards: files
end up to a fifth beside their plan (bench/LOG.md), and a further round that mends it costs accuracy and time. So, for a size, what the file would take by
now is measured at ends of epochs, and one number scales the share of weights that every layer keeps. Not covered: how a file is measured (`packing`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from clipq_ray.plan import Plan

BEGIN, END = 0.5, 0.95
"""Of a schedule, the part in which rates follow the size: not before the network is near its plan, and not when it has no time left to recover."""
STEP, LEAST, MOST = 1.1, 0.5, 4.0
"""What weights may be scaled by after one epoch, and in all: a size further off is a matter for another plan. In very small files most units die and what
was planned for them with them: a LeNet-300-100 for 2,500 bytes keeps 1.7 to 3.5 times what is planned (bench/LOG.md)."""


@dataclass(frozen=True)
class Ramp:
    """Pruning rates that rise while a network is trained, by the cubic of Zhu and Gupta 2017, so that no step clips more than training can follow.

    start: the first rates, one per layer of the plan; share: the part of the schedule, in (0, 1], that it takes to reach the plan's.
    """

    start: tuple[float, ...]
    share: float

    def rates(self, plan: Plan, done: float) -> list[float]:
        """The rates when a part `done` (0..1) of the schedule is over."""
        left = max(0.0, 1.0 - done / self.share) ** 3
        return [
            first * left + layer.theta.p * (1 - left)
            for layer, first in zip(plan.layers, self.start, strict=True)
        ]


@dataclass(frozen=True)
class Held:
    """The `bytes` that a file is held at; `measure`: those of the file that a network of given full-precision weights would make with a plan."""

    bytes: int
    measure: Callable[[Mapping[str, Tensor], Plan], int]


def looked_at(done: float, ramp: Ramp | None) -> bool:
    """Whether a size that is held is looked at when a part `done` of a schedule with this ramp is over."""
    return max(BEGIN, ramp.share if ramp else 0.0) <= done + 1e-9 and done < END - 1e-9


class Rates:
    """The pruning rates of one training: `now`, one per layer of `plan`.

    `ramp` None: the plan's from the start. `held`: what the file is held at. `done`: the part of the schedule that is over, `scale`: of the weights that the plan
    keeps, both as a checkpoint has them.
    """

    def __init__(
        self,
        plan: Plan,
        ramp: Ramp | None = None,
        held: Held | None = None,
        *,
        done: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        self._plan, self._ramp, self._held = plan, ramp, held
        # beyond it every layer keeps all of its weights
        self._most = min(MOST, max((1.0 / (1.0 - layer.theta.p) for layer in plan.layers), default=1.0))
        self.scale = scale
        self.now = self._at(done)

    def _at(self, done: float) -> list[float]:
        planned = [layer.theta.p for layer in self._plan.layers]
        rates = self._ramp.rates(self._plan, done) if self._ramp else planned
        if self.scale == 1.0:  # not even rounding
            return rates
        return [max(0.0, 1.0 - (1.0 - p) * self.scale) for p in rates]

    def move(self, done: float) -> bool:
        """To the rates for when a part `done` of the schedule is over; whether they are others than before."""
        before, self.now = self.now, self._at(done)
        return self.now != before

    def rising(self, done: float) -> bool:
        """Whether the network is on its way to its plan when a part `done` of the schedule is over: what is moved later has no time to recover."""
        return done <= max(BEGIN, self._ramp.share if self._ramp else 0.0) + 1e-9

    def follows(self, done: float) -> bool:
        """Whether the size is looked at when a part `done` of the schedule is over."""
        return self._held is not None and looked_at(done, self._ramp)

    def scale_for(self, weights: Mapping[str, Tensor]) -> float:
        """The scale from now on, for a network of these full-precision weights: fewer weights where its file would be too large, more where it would be
        too small."""
        if self._held is None:
            return self.scale
        off = self._held.bytes / self._held.measure(weights, self.plan)
        return min(self._most, max(LEAST, self.scale * min(STEP, max(1 / STEP, off))))

    @property
    def plan(self) -> Plan:
        """The plan with the rates that the ramp ends at, scaled as now: what a training that is cut off on the way up is packed with too."""
        return self._plan.at(self._at(1.0))
