"""One round of fine-tuning after another: from a choice of points to a packed file and what it loses on validation images.

The first round starts from the given weights, each further one from the full-precision weights of the one before, with half the epochs and
half the rate. Not covered: which sizes are asked for, and when it ends (`rounds`, `fleet.shares`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from clipq_ray import fitting, packing, stages
from clipq_ray.aim import LEAST_RATIO, START_RATIO
from clipq_ray.choice import MILDEST, Choice, choose, choose_for_bytes
from clipq_ray.config import Config
from clipq_ray.evaluate import Evaluation
from clipq_ray.groups import Group
from clipq_ray.intent import (
    Drop,
    Intent,
    Outcome,
    before_training,
    codes_follow,
    may_add,
    to_ask,
)  # fmt: skip
from clipq_ray.network import Inventory
from clipq_ray.operator import make_plan, mildest_rates
from clipq_ray.optimizers import Schedule
from clipq_ray.places import Costs
from clipq_ray.plan import Plan
from clipq_ray.rates import END, Ramp, looked_at
from clipq_ray.searching import Searched, search_again, search_once_more
from clipq_ray.stages import Run
from clipq_ray.states import put_state, read_state
from clipq_ray.storage import Store
from clipq_ray.together import added
from clipq_ray.training import Size, epochs_in, plan_after

FAR = 0.8
"""Of what a plan may take: where the mildest points that were measured take less, they are said to be, and are not what a promised drop ends with."""

_MILD = START_RATIO / 2
"""The ratio at which a second search looks at most."""
_FIRST = 2
"""Of the mildest plan, the size at which it looks where that adds too much error for a first round."""


@dataclass(frozen=True)
class Round:
    """One round: the search that it is from, the plan and what became of it; `held`: the bytes that it was held at, if it was; `on_the_way`: whether more were
    to follow it on the way to a size; `fitted`: the levels and codes trained behind it that the file has, if it has them; `planned`: the bytes that its plan was to take before training, where a size was asked for."""

    searched: Searched
    choice: Choice
    held: int | None
    on_the_way: bool
    plan: Plan
    tuned: Store
    fitted: Store | None
    packed: packing.PackedNetwork
    outcome: Outcome
    planned: int | None = None


@dataclass(frozen=True)
class Given:
    """What all rounds share: the search before them, the original's weights and scores, the file's metadata."""

    searched: Searched
    groups: Sequence[Group]
    weights: Store
    inventory: Inventory
    reference: Evaluation
    source_sha256: str
    work: Store


class Making:
    """The rounds of one network, made one after another, each from the weights of the one before; `intent`: what is promised of it alone.
    `most_bytes`: what a file may take at most with levels that are trained behind it, where a size is promised."""

    def __init__(self, run: Run, given: Given, intent: Intent | None = None) -> None:
        self.run, self.given, self._intent = run, given, intent
        self.most_bytes = math.floor(intent.value) if intent is not None and intent.kind == "bytes" else None
        self._model = run.source.network()
        put_state(self._model, read_state(given.weights))
        # what the file holds besides layers: predicted, then as in the last round
        self.other = packing.other_bytes(run.source, self._model, given.inventory, run.data)
        self.searched = given.searched
        self.done: list[Round] = []
        self._once_more = False

    def made(self, choice: Choice, requested: int | None, rungs_left: int = 0) -> bool:
        """Whether a round of this choice was made, held at the same size and trained as long: one on the way has fewer epochs."""
        held = self.size(requested, rungs_left)
        wanted = (_thetas(choice), held and held.bytes)
        alike = [one for one in self.done if rungs_left or not one.on_the_way]
        return any(wanted == (_thetas(one.choice), one.held) for one in alike)

    def planned(self, requested: int | None) -> int | None:
        """The bytes to plan for a file of `requested` bytes."""
        if requested is None or not self.done:
            return requested
        last = self.done[-1]
        # what the file holds besides layers is as it was found, not as it was predicted: only layers are learned from
        return before_training(requested, replace(last.outcome, predicted=last.choice.bytes + self.other))

    def search_again(self, requested: int, time_share: float = 1.0) -> None:
        """Search anew for a file of `requested` bytes, from the weights of the last round."""
        last = self.done[-1]
        ratio = self.given.inventory.bytes_before / requested
        self.searched = search_again(
            self.run, last.tuned, last.plan, self.given.inventory, self.given.groups, ratio, time_share
        )

    def search_once_more(self, requested: int | None = None) -> None:
        """Measure milder points of the given weights, where a promised drop needs a larger file than any that was measured: one of `requested` bytes, or for the
        first round where even the mildest points add more error than may do. Once, since it takes as long as the search before it."""
        intent, given = self._intent, self.given
        if intent is None or intent.kind != "max_drop" or self._once_more or self.searched.plan is not None:
            return
        trials, wanted = self.searched.trials, self.planned(requested)
        largest = choose_for_bytes(trials, sys.maxsize)
        size = largest.bytes + self.other
        if wanted is None:
            enough = added(choose(trials, MILDEST), self.searched.error) <= may_add(intent)
        else:
            enough = wanted <= size or (size >= FAR * wanted and not self.made(largest, requested))
        if enough or size * LEAST_RATIO > FAR * given.inventory.bytes_before:
            return
        # of a network of which nothing as mild was measured, though it lies far out, milder points than its size alone would say
        ratio = given.inventory.bytes_before / (wanted or _FIRST * size)
        ratio = min(_MILD, max(LEAST_RATIO, ratio))
        self.run.notes.append(
            f"search: nothing that was measured is mild enough, so once more for files {ratio:.1f} times smaller"
        )
        self.run.reporter.say(self.run.notes[-1])
        self._once_more = True
        search_once_more(self.run, self.searched, given.inventory, given.groups, ratio)

    def make(self, choice: Choice, requested: int | None, rungs_left: int = 0) -> Round:
        """The next round; `requested`: the bytes of the file that were asked for; `rungs_left`: how many rounds are to follow it on the way to a size."""
        one = _round(self, choice, requested, rungs_left)
        self.done.append(one)
        self.other = packing.other_bytes_of(one.packed.file, one.packed.clips)
        return one

    def size(self, requested: int | None, rungs_left: int) -> Size | None:
        """What a round for `requested` bytes is held at, where a size is promised; where a drop is, a smaller file is welcome."""
        intent = self._intent
        if requested is None or intent is None or intent.kind != "bytes" or not self.run.config.hold_size:
            return None
        precision = self.done[-1].packed.precision if self.done else packing.usual(self.run.source)
        held = requested if rungs_left else min(requested, to_ask(intent, codes_follow(self.run.config)))
        return Size(held, self.given.inventory, precision)

    def initial(self) -> nn.Module:
        """The network with the weights from which the next round starts."""
        put_state(self._model.cpu(), read_state(self.start))
        return self._model

    @property
    def start(self) -> Store:
        """Where those weights are."""
        return self.done[-1].tuned if self.done else self.given.weights


def _thetas(choice: Choice) -> list[Any]:
    return [trial.theta for trial in choice.trials.values()]


def _round(making: Making, choice: Choice, requested: int | None, rungs_left: int) -> Round:
    run, given, before = making.run, making.given, making.done
    number, predicted, planned = len(before) + 1, choice.bytes + making.other, making.planned(requested)
    run.reporter.say(
        f"round {number}: lambda {choice.tradeoff:.4g}, predicted {predicted:,} bytes "
        f"({given.inventory.bytes_before / predicted:.1f}x)"
    )
    model = making.initial()
    plan = make_plan(model, choice.thetas(given.groups))
    further = any(not one.on_the_way for one in before)
    schedule, size = _schedule(run.config, rungs_left, further), making.size(requested, rungs_left)
    ramp = _ramp(run.config, model, plan, before)
    power = run.config.rate_distortion
    costs = Costs(power, divided=bool(before)) if power else None
    run.notes += _idle(number, schedule.epochs, ramp, size, costs)
    tuned = stages.trained(
        run, "finetune", schedule, making.start, plan, given.work, number, ramp, 1 / (1 + rungs_left), size,
        costs,
    )  # fmt: skip
    plan, scale = plan_after(tuned, plan)
    if scale != 1.0:
        run.reporter.say(f"pruning rates followed the size: {scale:.3f} of the planned weights")
    fitted, packed, further_trained = fitting.packed(
        run, tuned, plan, given.inventory, given.source_sha256, given.work, number,
        further=run.config.level_epochs > 0 and not rungs_left, held=size is not None, most_bytes=making.most_bytes,
    )  # fmt: skip
    trained = [one.tuned for one in before] + [tuned, *further_trained]
    epochs = sum(epochs_in(store) for store in trained)
    judged = packed.validation
    drop = Drop.between(given.reference.predictions, judged.predictions, judged.labels)
    outcome = Outcome(requested, predicted, len(packed.file), drop, epochs, scale)
    held = size.bytes if size else None
    return Round(making.searched, choice, held, rungs_left > 0, plan, tuned, fitted, packed, outcome, planned)


def _idle(
    number: int, epochs: int, ramp: Ramp | None, size: Size | None, costs: Costs | None
) -> Iterator[str]:
    """Notes on what was asked for of the `number`-th round and its epochs are too few for: both look at a network between two of them."""
    if size and not any(looked_at(epoch / epochs, ramp) for epoch in range(1, epochs)):
        yield f"round {number}: --hold-size had nothing to do, no epoch of {epochs} ends behind the ramp and before {END:.0%} of them; raise the epochs of the round or lower --ramp-share"
    if costs and epochs == 1:
        yield f"round {number}: --rate-distortion had nothing to do, weights are divided by their costs between two epochs; raise the epochs of the round"


def _schedule(config: Config, rungs_left: int, further: bool) -> Schedule:
    """All epochs in the round that is to keep the promise, fewer on the way to it, fewer at a lower rate in a `further` one, behind it."""
    epochs, rate = config.epochs, config.learning_rate
    if rungs_left:
        epochs = stages.rung_epochs(config)
    elif further:
        epochs, rate = config.round_epochs or math.ceil(epochs / 2), rate / 2
    return stages.schedule_of(config, epochs, rate)


def _ramp(config: Config, model: nn.Module, plan: Plan, before: Sequence[Round]) -> Ramp | None:
    """From the rates of the round before, or from the mildest for the given weights, to the plan's."""
    if not config.ramp_share:
        return None
    start = [layer.theta.p for layer in before[-1].plan.layers] if before else mildest_rates(model, plan)
    # a layer that gets more room than before has it at once
    return Ramp(
        tuple(min(p, layer.theta.p) for p, layer in zip(start, plan.layers, strict=True)), config.ramp_share
    )
