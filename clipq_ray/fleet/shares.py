"""One intent for networks that vote together: their bytes in total, or what their vote may lose, shared out by their measured curves.

Every member is searched by itself. A budget for all is spent where it removes the most error, whichever member that layer belongs to: one lambda over
all members' layers. Then all members are fine-tuned in rounds, side by side, and after each round their averaged probabilities of the decoded files on
validation images are held against those of the references (`intent` decides what is tried next). Not covered: what the test images say (`ensembles`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from torch import nn

from clipq_ray import identity, loading, logs, search, stages
from clipq_ray.aim import Aim
from clipq_ray.choice import Choice, choose, choose_for_bytes
from clipq_ray.errors import ClipqError, DataError, DivergedError, HeldError, RunError
from clipq_ray.fleet.ensembles import Votes, classes_of, probabilities, together
from clipq_ray.fleet.file import Ensemble
from clipq_ray.intent import (
    Drop,
    Intent,
    Outcome,
    before_training,
    best,
    harmless,
    keeps,
    next_request,
    sizes_on,
    to_ask,
)
from clipq_ray.making import Making
from clipq_ray.original import inputs_of
from clipq_ray.pipeline import Opened, Prepared, Result, close_rounds, open_rounds
from clipq_ray.rounds import Rounds, Shared
from clipq_ray.source import Source
from clipq_ray.states import put_state, read_state
from clipq_ray.work import prepare_process

T = TypeVar("T")


@dataclass(frozen=True)
class Curves:
    """What the search measured of a member: its trials, its original's error on the same images, its bytes before, and those of the file that are no
    layers."""

    trials: Mapping[str, Sequence[search.Trial]]
    error: float
    bytes_before: int
    other: int


@dataclass(frozen=True)
class Share:
    """What a member gets: a point for each of its groups, and the bytes that its file then takes before training."""

    choice: Choice
    bytes: int
    added: float

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `steps` name the trials."""
        return {
            "requested_bytes": self.bytes, "added_error_points": 100 * self.added,
            "steps": {group: trial.step for group, trial in self.choice.trials.items()},
        }  # fmt: skip


def shared_out(members: Sequence[Curves], budget: int) -> list[Share]:
    """Each member's share of `budget` bytes, by one lambda for a bit whomever it belongs to; the smallest shares where the budget is too small."""
    left = budget - sum(one.other for one in members)
    return _split(members, choose_for_bytes(_pooled(members), left))


def _pooled(members: Sequence[Curves]) -> dict[str, list[search.Trial]]:
    """All groups of all members; what a point saves is a share of all members' bytes, so that lambda prices a byte the same everywhere."""
    whole = sum(one.bytes_before for one in members)
    return {
        f"{number} {group}": [
            replace(trial, saved=trial.saved * one.bytes_before / whole) for trial in trials
        ]
        for number, one in enumerate(members)
        for group, trials in one.trials.items()
    }


def _split(members: Sequence[Curves], choice: Choice) -> list[Share]:
    found = []
    for number, one in enumerate(members):
        steps = {group: choice.trials[f"{number} {group}"].step for group in one.trials}
        found.append(_share(one, steps, choice.tradeoff))
    return found


def _share(one: Curves, steps: Mapping[str, int], tradeoff: float) -> Share:
    mine = Choice(tradeoff, {group: one.trials[group][step] for group, step in steps.items()})
    added = sum(trial.error - one.error for trial in mine.trials.values())
    return Share(mine, mine.bytes + one.other, added)


def _stated(one: Curves, share: Mapping[str, Any], tradeoff: float) -> Share:
    """The mirror of `Share.to_json`; its bytes as they are stated, which hold what was known in its round."""
    return replace(_share(one, share["steps"], tradeoff), bytes=share["requested_bytes"])


def first_budget(intent: Intent, members: Sequence[Curves]) -> int:
    """The bytes to begin with: those that are wanted, or the fewest that add no more error per member than one network would begin with."""
    if intent.kind == "bytes":
        return to_ask(intent)
    pooled = _pooled(members)
    found = harmless(
        intent,
        lambda tradeoff: _split(members, choose(pooled, tradeoff)),
        lambda shares: sum(one.added for one in shares) / len(shares),
    )
    return sum(one.bytes for one in found)


class Joining(NamedTuple):
    """A network that is to be a member of an ensemble with one intent: what decides it, and about its bytes before."""

    source: Source
    inputs: Mapping[str, Any]
    bytes_before: int

    @classmethod
    def of(cls, source: Source) -> Joining:
        """What is known of it before it is prepared; fails as that would."""
        inputs = inputs_of(source)
        return cls(source, inputs, sum(4 * value.numel() for value in source.network().state_dict().values()))


def as_members(ensemble: Ensemble, joining: Sequence[Joining]) -> list[Source]:
    """The sources of all members with the identity of their ensemble, and with the ratio that it is to have, where that is its intent."""
    assert ensemble.wants is not None
    before = sum(one.bytes_before for one in joining)
    intent = ensemble.intent_of(before)
    smaller = before / intent.value if intent.kind == "bytes" else None
    inputs = {one.source.name: one.inputs for one in joining}
    same = identity.of_ensemble(*ensemble.wants, inputs, None if smaller is None else Aim.at(smaller))
    return [replace(one.source, ensemble=same, smaller=smaller) for one in joining]


def finish_ensemble(ensemble: Ensemble, members: Sequence[Prepared | Result], parallel: bool) -> list[Result]:
    """Everything behind the search of an ensemble with one intent, for all members; those that are committed already are taken as they are."""
    waiting = [one for one in members if isinstance(one, Prepared)]
    if not waiting:
        return [one for one in members if isinstance(one, Result)]
    stated = [one.manifest["promise"]["ensemble"] for one in members if isinstance(one, Result)]
    with stages.going_on(waiting[0].run):
        vote = _Vote(ensemble, waiting, parallel)
        document = vote.again(stated[0]) if stated else vote.rounds()
        made = iter(vote.closed(document))
    return [one if isinstance(one, Result) else next(made) for one in members]


class _Vote:
    """An ensemble in the making."""

    def __init__(self, ensemble: Ensemble, members: Sequence[Prepared], parallel: bool) -> None:
        self._ensemble, self._members = ensemble, members
        self._names = [one.run.source.name for one in members]
        self._turn, self._parallel = members[0].run.turn, parallel
        self._opened: list[Opened] = self._each(open_rounds, members)
        self._making = [Making(one.prepared.run, one.given) for one in self._opened]
        self._curves = [
            Curves(
                one.given.searched.trials,
                one.given.searched.error,
                one.prepared.inventory.bytes_before,
                making.other,
            )
            for one, making in zip(self._opened, self._making, strict=True)
        ]
        self._intent = ensemble.intent_of(sum(one.bytes_before for one in self._curves))

    def _each(self, step: Callable[[Any], T], given: Sequence[Any]) -> list[T]:
        """What `step` makes of each member: one after the other in this process, side by side while they train."""

        def in_turn(number: int) -> T:
            run = self._members[number].run
            with self._turn, logs.about(run.source.name):
                prepare_process(run.config.threads_per_worker)
                return step(given[number])

        with self._members[0].run.away():
            if not self._parallel:
                return [in_turn(number) for number in range(len(given))]
            pool = ThreadPoolExecutor(len(given))
            try:
                made = [pool.submit(in_turn, number) for number in range(len(given))]
                # one that fails leaves no training behind that nobody watches and whose claim is given back
                wait(made)
                # that one diverged may be no end, and hides nothing that is
                for one in sorted(made, key=lambda one: isinstance(one.exception(), DivergedError)):
                    one.result()
                return [one.result() for one in made]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def rounds(self) -> dict[str, Any]:
        """Make rounds until the promise is kept by the smallest files that were found; what is to be said of them."""
        reference, labels = self._reference()
        outcomes: list[Outcome] = []
        shared: list[list[Share]] = []
        requested: int | None = first_budget(self._intent, self._curves)
        seconds = 0.0
        while requested is not None:
            shares, requested = self._other(requested, shared, outcomes)
            if shares is None:
                self._note(
                    f"no further round of ensemble {self._ensemble.name}: the search has no other point in that direction"
                )
                break
            if outcomes and self._late(seconds):
                self._note(f"no further round of ensemble {self._ensemble.name} before --deadline-hours")
                break
            started = time.monotonic()
            try:
                self._made(shares, self._intent, sum(one.bytes for one in shares))
            except DivergedError as error:
                if not outcomes:
                    raise
                self._give_up(outcomes, error)
                break
            seconds = time.monotonic() - started
            shared.append(shares)
            outcomes.append(self._outcome(requested, reference, labels))
            self._say(outcomes)
            rounds = min(one.run.config.rounds for one in self._members)
            requested = next_request(self._intent, outcomes, rounds)
        return self._document(outcomes, shared)

    def again(self, stated: Mapping[str, Any]) -> dict[str, Any]:
        """The rounds that the committed members state, for the others: their trainings are there."""
        for one in stated["rounds"]:
            self._made(
                [
                    _stated(curves, one["shares"][name], one["tradeoff"])
                    for name, curves in zip(self._names, self._curves, strict=True)
                ],
                Intent(stated["intent"], stated["value"]),
                sum(share["requested_bytes"] for share in one["shares"].values()),
            )
        return dict(stated)

    def closed(self, document: Mapping[str, Any]) -> list[Result]:
        """Commit the round that is stated, of every member."""
        shared = Shared(document["round"] - 1, document)

        def close(number: int) -> Result:
            making = self._making[number]
            made = Rounds(self._intent, making.given.inventory, tuple(making.done), shared)
            return close_rounds(self._opened[number], made)

        return self._each(close, range(len(self._members)))

    def _made(self, shares: Sequence[Share], intent: Intent, whole: int) -> None:
        """A round of each member; `whole`: the bytes of all shares, also of members that are committed. With levels trained behind it a file takes at most its part of a promised size."""

        def make(number: int) -> None:
            if intent.kind == "bytes":
                self._making[number].most_bytes = math.floor(intent.value * shares[number].bytes / whole)
            self._making[number].make(shares[number].choice, shares[number].bytes)

        self._each(make, range(len(self._members)))

    def _note(self, note: str) -> None:
        """In every member's manifest, and said once."""
        for one in self._members:
            one.run.notes.append(note)
        self._members[0].run.reporter.about(f"ensemble {self._ensemble.name}").say(note)

    def _give_up(self, outcomes: Sequence[Outcome], error: DivergedError) -> None:
        """End behind the rounds of `outcomes`, which all members have: the next one of a member diverged."""
        of = next(
            name
            for name, making in zip(self._names, self._making, strict=True)
            if len(making.done) == len(outcomes)
        )
        note = (
            f"round {len(outcomes) + 1} of ensemble {self._ensemble.name} came to nothing with {of} and no round follows it, "
            f"the files are those of round {1 + best(self._intent, outcomes)}: {error}"
        )
        for making in self._making:
            del making.done[len(outcomes) :]  # what the others have made of it, nobody votes with
        self._note(note)

    def _other(
        self, requested: int, before: Sequence[Sequence[Share]], outcomes: Sequence[Outcome]
    ) -> tuple[list[Share] | None, int]:
        """The shares of `requested` bytes; where they were tried already, and all sizes so far lie on one side of the promise, the next ones further on, or None."""
        tried, last = [_steps(one) for one in before], self._last(outcomes)
        # what the files hold besides layers is as it was found, as in `_last`: of two values the difference would be taken for growth of layers
        curves = [
            replace(one, other=making.other) for one, making in zip(self._curves, self._making, strict=True)
        ]
        for size in sizes_on(self._intent, outcomes, requested):
            shares = shared_out(curves, before_training(size, last))
            if _steps(shares) not in tried:
                return shares, size
        return None, requested

    def _last(self, outcomes: Sequence[Outcome]) -> Outcome | None:
        """The last round's outcome, predicted with what the files hold besides layers as it was found: only layers are learned from (`Making.planned`)."""
        if not outcomes:
            return None
        predicted = sum(making.done[-1].choice.bytes + making.other for making in self._making)
        return replace(outcomes[-1], predicted=predicted)

    def _late(self, seconds: float) -> bool:
        return any(
            left is not None and seconds > left for left in (one.run.seconds_left for one in self._members)
        )

    def _reference(self) -> tuple[Votes, npt.NDArray[np.int64]]:
        """The references' votes on validation images, and the labels."""
        votes, labels = [], None
        for one in self._opened:
            source = one.prepared.run.source
            model = source.network()
            put_state(model, read_state(one.reference))
            vote, found = self._vote(source, model, "reference")
            votes.append(vote)
            if labels is not None and not np.array_equal(labels, found):
                raise DataError(
                    f"ensemble {self._ensemble.name}: expected all members to have the same validation images, got others for {source.name}; "
                    "give them the same data options"
                )
            labels = found
        assert labels is not None
        return together(self._ensemble, self._names, votes), labels

    def _vote(self, source: Source, model: nn.Module, what: str) -> tuple[Votes, npt.NDArray[np.int64]]:
        """Of a member on validation images, and their labels."""
        reporter = self._members[0].run.reporter.about(f"ensemble {self._ensemble.name}")
        with reporter.stage(f"vote of {source.name}, {what}") as progress:
            return probabilities(source, model, source.data().validation, progress)

    def _outcome(self, requested: int, reference: Votes, labels: npt.NDArray[np.int64]) -> Outcome:
        votes = []
        for one, making in zip(self._opened, self._making, strict=True):
            source, file = one.prepared.run.source, making.done[-1].packed.file
            decoded = loading.from_bytes(file, factory=source.network)
            votes.append(self._vote(source, decoded, "file")[0])
        total = together(self._ensemble, self._names, votes)
        drop = Drop.between(classes_of(reference), classes_of(total), labels)
        last = [making.done[-1].outcome for making in self._making]
        predicted, size = sum(one.predicted for one in last), sum(one.bytes for one in last)
        return Outcome(requested, predicted, size, drop, max(one.epochs for one in last))

    def _say(self, outcomes: Sequence[Outcome]) -> None:
        last = outcomes[-1]
        verdict = "kept" if keeps(self._intent, last) else "not kept"
        self._members[0].run.reporter.about(f"ensemble {self._ensemble.name}").say(
            f"round {len(outcomes)}: {last.bytes:,} bytes, validation top-1 of the vote {last.drop.words()}; {self._intent.words()}, {verdict}"
        )

    def _document(self, outcomes: Sequence[Outcome], shared: Sequence[Sequence[Share]]) -> dict[str, Any]:
        number = best(self._intent, outcomes)
        chosen = outcomes[number]
        rows = [
            {
                **outcome.to_json(), "tradeoff": shares[0].choice.tradeoff,
                "shares": {
                    name: {**share.to_json(), "bytes": making.done[index].outcome.bytes}
                    for name, share, making in zip(self._names, shares, self._making, strict=True)
                },
            }
            for index, (outcome, shares) in enumerate(zip(outcomes, shared, strict=True))
        ]  # fmt: skip
        return {
            "name": self._ensemble.name, "members": self._names, "intent": self._intent.kind, "value": self._intent.value,
            "words": self._intent.words() + " together", "kept": keeps(self._intent, chosen), "round": number + 1,
            "reference": "control" if any(one.control for one in self._opened) else "original",
            "validation_images": chosen.drop.n, **chosen.to_json(), "rounds": rows,
        }  # fmt: skip


def _steps(shares: Sequence[Share]) -> list[list[int]]:
    return [[trial.step for trial in one.choice.trials.values()] for one in shares]


def without(ensemble: Ensemble, failed: Mapping[str, ClipqError]) -> RunError:
    """Why the other members of an ensemble with one intent are not made."""
    names = ", ".join(failed)
    why = f"{names} failed; run again when that is mended"
    if all(isinstance(error, HeldError) for error in failed.values()):
        why = f"another job makes {names}; run again when it has ended"
    return RunError(f"its ensemble {ensemble.name} has one intent for all members, and {why}")
