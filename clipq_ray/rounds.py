"""Fine-tuning in rounds until the promise is kept: choose a plan for a size, train, pack, look at the decoded file, and try another size.

With `--rungs` a size is approached in several rounds, each asked for a smaller file than the one before; with `--search-again` each
further round has a search of its own, from the weights of the one before. Everything is decided on validation images; the test set is not touched. Not covered: what a round is (`making`), and what is tried next (`intent`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clipq_ray.choice import MILDEST, Choice, choose, choose_for_bytes
from clipq_ray.config import Config
from clipq_ray.errors import DivergedError
from clipq_ray.intent import (
    Intent,
    best,
    codes_follow,
    harmless,
    keeps,
    next_request,
    rung_sizes,
    sizes_on,
    to_ask,
)  # fmt: skip
from clipq_ray.making import FAR, Given, Making, Round
from clipq_ray.network import Inventory
from clipq_ray.searching import Searched
from clipq_ray.stages import Run
from clipq_ray.together import added


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


def run_rounds(run: Run, given: Given) -> Rounds:
    """At least one round, and as many as the intent, `--rounds` and the deadline leave; one that diverges behind a finished one is the end, too."""
    intent = Intent.of(run.config, given.inventory.bytes_before)
    making = Making(run, given, intent)
    done = making.done
    making.search_once_more()
    requested, *rungs = _requests(intent, making.searched, making.other, run.config)
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
        elif done and requested is not None:
            making.search_once_more(requested)
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
    if outcome.predicted <= planned and not (mildest and outcome.predicted < FAR * planned):
        return
    asked = math.floor(made.intent.value) if made.intent.kind == "bytes" else outcome.requested
    milder = " (it has nothing milder)" if outcome.predicted < planned else ""
    run.notes.append(
        f"asked for {asked:,} bytes; the nearest that the search measured{milder} were taken, {outcome.predicted:,} bytes before training"
    )
    run.reporter.say(run.notes[-1])


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
    if requested is None:
        return _choice(intent, making, None), None
    for size in sizes_on(intent, [one.outcome for one in making.done], requested):
        choice = _choice(intent, making, size, on_the_way)
        if not making.made(choice, size):
            break
    return choice, size


def _say(run: Run, intent: Intent, done: Sequence[Round], bytes_before: int) -> None:
    outcome = done[-1].outcome
    verdict = "" if intent.kind == "tradeoff" else (", kept" if keeps(intent, outcome) else ", not kept")
    run.reporter.say(
        f"round {len(done)}: {outcome.bytes:,} bytes ({bytes_before / outcome.bytes:.1f}x), validation top-1 "
        f"{outcome.drop.words()}; {intent.words()}{verdict}"
    )
