"""Fine-tuning in rounds until the promise is kept: choose a plan for a size, train, pack, look at the decoded file, and try another size.

The first round starts from the given weights, each further one from the full-precision weights of the one before, with half the epochs and
half the rate. With `--rungs` a size is approached in several rounds, each asked for a smaller file than the one before; with `--search-again` each
further round has a search of its own, from the weights of the one before. Everything is decided on validation images; the test set is not touched. Not covered: what is tried next (`intent`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from clipq_ray import fitting, packing, stages
from clipq_ray.choice import MILDEST, Choice, choose, choose_for_bytes
from clipq_ray.config import Config
from clipq_ray.errors import DivergedError
from clipq_ray.evaluate import Evaluation
from clipq_ray.groups import Group
from clipq_ray.intent import (
    STEPS,
    Drop,
    Intent,
    Outcome,
    before_training,
    best,
    codes_follow,
    harmless,
    keeps,
    next_request,
    rung_sizes,
    step_on,
    to_ask,
)  # fmt: skip
from clipq_ray.network import Inventory
from clipq_ray.operator import make_plan, mildest_rates
from clipq_ray.optimizers import Schedule
from clipq_ray.places import Costs
from clipq_ray.plan import Plan
from clipq_ray.rates import END, Ramp, looked_at
from clipq_ray.searching import Searched, search_again
from clipq_ray.stages import Run
from clipq_ray.states import put_state, read_state
from clipq_ray.storage import Store
from clipq_ray.together import added
from clipq_ray.training import Size, epochs_in, plan_after

_FAR = 0.8
"""Of what a plan may take: where the mildest points that were measured take less, it is said."""


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
class Shared:
    """What an ensemble with one intent decides for a member: the number of its round to commit, and what is promised of all together."""

    number: int
    document: Mapping[str, Any]


@dataclass(frozen=True)
class Rounds:
    """All rounds, in order, and the one to commit; `shared` where an ensemble decides that."""

    intent: Intent
    inventory: Inventory
    all: tuple[Round, ...]
    shared: Shared | None = None

    @property
    def best(self) -> Round:
        """The one to commit."""
        if self.shared is not None:
            return self.all[self.shared.number]
        # a round on the way is trained little: it counts where it keeps the promise, and is not the closest to one that none keeps
        looked = [
            one for one in self.all if not one.on_the_way or keeps(self.intent, one.outcome)
        ] or self.all
        return looked[best(self.intent, [one.outcome for one in looked])]

    @property
    def searches(self) -> dict[int, Searched]:
        """All that was searched, by the number of the first round that it served, from 1."""
        found: dict[int, Searched] = {}
        for number, one in enumerate(self.all, 1):
            if one.searched not in found.values():
                found[number] = one.searched
        return found

    @property
    def kept(self) -> bool:
        """Whether it keeps the promise."""
        if self.shared is not None:
            return bool(self.shared.document["kept"])
        return keeps(self.intent, self.best.outcome)

    @property
    def words(self) -> str:
        """The promise."""
        if self.shared is not None:
            return f"ensemble {self.shared.document['name']}: {self.shared.document['words']}"
        return self.intent.words()

    def document(self, reference: str) -> dict[str, Any]:
        """What the manifest says of the promise; `reference`: what the drop is measured against."""
        outcome, kind, value = self.best.outcome, str(self.intent.kind), self.intent.value
        if self.shared is not None:
            kind, value = "ensemble", float(outcome.requested or 0)
        return {
            "intent": kind, "value": value, "words": self.words, "kept": self.kept,
            "reference": reference, "validation_images": outcome.drop.n, "confidence_percent": 95,
            "bytes": outcome.bytes, "drop_points": outcome.drop.points, "drop_low_points": outcome.drop.low, "drop_high_points": outcome.drop.high,
            "predicted_bytes": outcome.predicted, "round": 1 + self.all.index(self.best), "rounds": [one.outcome.to_json() for one in self.all],
            **({"ensemble": dict(self.shared.document)} if self.shared else {}),
        }  # fmt: skip


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

    def make(self, choice: Choice, requested: int | None, rungs_left: int = 0) -> Round:
        """The next round; `requested`: the bytes of the file that were asked for; `rungs_left`: how many rounds are to follow it on the way to a size."""
        one = _round(self, choice, requested, rungs_left)
        self.done.append(one)
        self.other = packing.other_bytes_of(one.packed)
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


def run_rounds(run: Run, given: Given) -> Rounds:
    """At least one round, and as many as the intent, `--rounds` and the deadline leave; one that diverges behind a finished one is the end, too."""
    intent = Intent.of(run.config, given.inventory.bytes_before)
    making = Making(run, given, intent)
    done = making.done
    requested, *rungs = _requests(intent, given.searched, making.other, run.config)
    if run.config.rungs > 1 and not rungs:
        run.notes.append(
            "--rungs had nothing to do: the size that is asked for is no smaller than what one round may begin with"
        )
    seconds = 0.0
    while True:
        left = run.seconds_left
        if done and left is not None and seconds > left:
            run.notes.append("no further round before --deadline-hours")
            break
        started = time.monotonic()
        if done and requested is not None and run.config.search_again:
            making.search_again(requested, 1 / (1 + len(rungs)))
        choice, requested = _other_choice(intent, making, requested, on_the_way=bool(rungs))
        if not making.made(choice, requested, len(rungs)):
            try:
                making.make(choice, requested, len(rungs))
            except DivergedError as error:
                if not done:
                    raise
                _say_diverged(run, Rounds(intent, given.inventory, tuple(done)), error)
                break
            seconds = time.monotonic() - started
            _say(run, intent, done, given.inventory.bytes_before)
        elif not rungs:
            run.notes.append("no further round: the search has no other point in that direction")
            break
        if rungs:
            requested = rungs.pop(0)
            continue
        # rounds on the way to a size are none of those that look for the promise
        looked = [one.outcome for one in done if not one.on_the_way]
        requested = next_request(intent, looked, run.config.rounds, codes_follow(run.config))
        if requested is None:
            break
    made = Rounds(intent, given.inventory, tuple(done))
    _say_smallest(run, made)
    return made


def _say_diverged(run: Run, made: Rounds, error: DivergedError) -> None:
    """A note on the round behind those that were made, of which there is no file."""
    lost, taken = len(made.all) + 1, 1 + made.all.index(made.best)
    run.notes.append(
        f"round {lost} came to nothing and no round follows it, the file is that of round {taken}: {error}"
    )
    run.reporter.say(run.notes[-1])


def _say_smallest(run: Run, made: Rounds) -> None:
    """A note where the search had nothing as small, or nothing near as large, as what was asked for."""
    planned, outcome = made.best.planned, made.best.outcome
    if made.best.on_the_way:  # the size that was asked for never was in a round
        return
    if planned is None or outcome.requested is None:
        return
    mildest = (
        made.intent.kind == "bytes"
        and choose(made.best.searched.trials, MILDEST).bytes <= made.best.choice.bytes
    )
    if outcome.predicted <= planned and not (mildest and outcome.predicted < _FAR * planned):
        return
    asked = math.floor(made.intent.value) if made.intent.kind == "bytes" else outcome.requested
    milder = " (it has nothing milder)" if outcome.predicted < planned else ""
    run.notes.append(
        f"asked for {asked:,} bytes; the nearest that the search measured{milder} were taken, {outcome.predicted:,} bytes before training"
    )
    run.reporter.say(run.notes[-1])


def _thetas(choice: Choice) -> list[Any]:
    return [trial.theta for trial in choice.trials.values()]


def _requests(intent: Intent, searched: Searched, other: int, config: Config) -> tuple[int | None, ...]:
    """The bytes to ask the first rounds for: one number, or with a size as many as there are rungs on the way to it; None where lambda is given."""
    if intent.kind == "tradeoff":
        return (None,)
    if intent.kind == "bytes":
        rungs, codes = config.rungs, codes_follow(config)
        return (
            (to_ask(intent, codes),)
            if rungs < 2
            else _rungs(intent, codes, _mild(Intent("max_drop", 0.0), searched, other), rungs)
        )
    return (_mild(intent, searched, other),)


def _rungs(intent: Intent, codes: bool, mild: int, rungs: int) -> tuple[int, ...]:
    """Rounds that lead to a size from a `mild` one; where it is mild itself, the one round that there would be without them."""
    sizes = rung_sizes(mild, math.floor(intent.value), rungs)
    return sizes if len(sizes) > 1 else (to_ask(intent, codes),)


def _mild(intent: Intent, searched: Searched, other: int) -> int:
    """The bytes of the smallest file that seems harmless enough for a first round."""
    found = harmless(
        intent,
        lambda tradeoff: choose(searched.trials, tradeoff),
        lambda choice: added(choice, searched.error),
    )
    return found.bytes + other


def _choice(intent: Intent, making: Making, requested: int | None, on_the_way: bool = False) -> Choice:
    trials, planned = making.searched.trials, making.planned(requested)
    if planned is None:
        return choose(trials, intent.value)
    # a rung need not be met: a step that is too long costs accuracy that no later round brings back
    return choose_for_bytes(trials, planned - making.other, nearest=on_the_way)


def _other_choice(
    intent: Intent, making: Making, requested: int | None, on_the_way: bool = False
) -> tuple[Choice, int | None]:
    """The choice for `requested` bytes; where it was tried already, and all sizes so far lie on one side of the promise, the next one further on."""
    choice = _choice(intent, making, requested, on_the_way)
    step = step_on(intent, [one.outcome for one in making.done])
    if requested is None or step is None:
        return choice, requested
    for _ in range(STEPS):
        if not making.made(choice, requested):
            break
        requested = max(1, math.ceil(requested * step))
        choice = _choice(intent, making, requested)
    return choice, requested


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


def _say(run: Run, intent: Intent, done: Sequence[Round], bytes_before: int) -> None:
    outcome = done[-1].outcome
    verdict = "" if intent.kind == "tradeoff" else (", kept" if keeps(intent, outcome) else ", not kept")
    run.reporter.say(
        f"round {len(done)}: {outcome.bytes:,} bytes ({bytes_before / outcome.bytes:.1f}x), validation top-1 "
        f"{outcome.drop.words()}; {intent.words()}{verdict}"
    )
