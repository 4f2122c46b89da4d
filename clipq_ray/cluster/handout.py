"""Which trial of the search begins when: in the order given, as far as the job's room lets it.

All trials of a Tuner are there from the start, paused, and hold nothing. Tune asks its scheduler which of them to run, and its search algorithm whether
more may come: while one may, it keeps the actor of a trial that has ended for the next one, else it lets the actor go with what it holds. Not covered:
what a trial does (`ray_search`), and who may take what (`room`).
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from clipq_ray.cluster.room import Amount, Room

PLACED_BY = "STRICT_PACK"
"""One bundle is always together; by this word its placement group can be told from those of trainings."""


class HandOut:
    """Hands out the trials `place` = 0, 1, ... in this order. `tasks`: the task of each; `amounts`: what a trial of each task takes; `over` is told a
    task's number when its last trial has ended, with what ended those that were given up."""

    def __init__(
        self,
        room: Room,
        tasks: Sequence[int],
        amounts: Sequence[Amount],
        over: Callable[[int, Sequence[Exception]], None],
        why: Callable[[int, Exception], Exception] = lambda place, error: error,
    ) -> None:
        """`why`: the reason why the trial of a place was given up, where that is known better than from what Ray says."""
        self._room, self._tasks, self._amounts, self._over, self._why = room, tasks, amounts, over, why
        self._waiting: list[Trial] = []
        self._anew: list[Trial] = []  # in place of such as were given up too soon; Tune has yet to take them
        self._ended: list[Trial] = []  # and nobody has their seats yet
        self._known: set[str] = set()
        self._left = Counter(tasks)
        self._lost: dict[int, list[Exception]] = {number: [] for number in self._left}
        self._failed: Exception | None = None
        self.scheduler, self.generator = _Scheduler(self), _Generator(self)

    def requests(self) -> list[tune.PlacementGroupFactory]:
        """What the trial of each place takes, as Tune wants it."""
        return [_request(self._amount(place)) for place in range(len(self._tasks))]

    def _amount(self, place: int) -> Amount:
        return self._amounts[self._tasks[place]]

    def add(self, trial: Trial) -> None:
        """A new one waits, behind those before it; one whose actor was lost has its seat, and Tune starts it again by itself."""
        if trial.trial_id not in self._known:
            self._known.add(trial.trial_id)
            trial.set_status(Trial.PAUSED)
            bisect.insort(self._waiting, trial, key=lambda one: int(one.config["place"]))

    def next(self) -> Trial | None:
        """The trial that begins now, if one does."""
        ended, self._ended = self._ended, []
        first = self._waiting[0] if self._waiting else None
        if ended and first is not None and self._follows(ended[0], first):
            self._room.follow(ended.pop(0).trial_id, first.trial_id)
        elif first is not None and not self._room.begin(first.trial_id, self._amount(first.config["place"])):
            first = None
        for trial in ended:
            self._room.end(trial.trial_id)
        return self._waiting.pop(0) if first is not None else None

    def keeps(self) -> bool:
        """Whether the actor of a trial that has just ended is kept for the next one."""
        return (
            len(self._ended) == 1 and bool(self._waiting) and self._follows(self._ended[0], self._waiting[0])
        )

    def _follows(self, before: Trial, trial: Trial) -> bool:
        same = self._amount(before.config["place"]) == self._amount(trial.config["place"])
        return same and self._room.may_follow()

    def heard(self, trial: Trial, result: dict[str, Any]) -> None:
        """A trial has made a step."""
        self._room.runs(trial.trial_id, result.get("group"))

    def begin_anew(self, trial: Trial) -> None:
        """A trial was given up that may still fail: another one does its work."""
        self._room.end(trial.trial_id)
        self._anew.append(trial.reset())

    def anew(self) -> Trial | None:
        """One for Tune to take, if there is one."""
        return self._anew.pop(0) if self._anew else None

    def expects_more(self) -> bool:
        """Whether Tune is not to take the trials that it has for all that there are."""
        return self.keeps() or bool(self._anew)

    def end(self, trial: Trial, error: Exception | None) -> None:
        """A trial has ended."""
        if error is None:
            self._ended.append(trial)
        else:
            self._room.end(trial.trial_id)
        number = self._tasks[trial.config["place"]]
        if error is not None:
            self._lost[number].append(self._why(trial.config["place"], error))
        self._left[number] -= 1
        if self._left[number] == 0:
            self._tell(number)

    def _tell(self, number: int) -> None:
        # Tune would take an error of ours for one of the trial, and make that again
        try:
            self._over(number, self._lost[number])
        except Exception as error:
            self._failed = self._failed or error

    def close(self) -> None:
        """No trial takes anything of the room any more, whatever ended Tune: trainings wait for it."""
        for trial in self._known:
            self._room.end(trial)

    def tell_rest(self) -> None:
        """After the end: tell `over` of tasks whose trials did not all come to an end; raises what `over` has raised of any."""
        for number in [number for number, left in self._left.items() if left > 0]:
            self._left[number] = 0
            self._tell(number)
        if self._failed is not None:
            raise self._failed


def _request(amount: Amount) -> tune.PlacementGroupFactory:
    bundle = {"CPU": amount.cpus, **({"GPU": amount.gpus} if amount.gpus else {})}
    return tune.PlacementGroupFactory([bundle], strategy=PLACED_BY)


def _error(trial: Trial) -> Exception:
    """What Ray says of a trial that it gives up; where Tune keeps it for later it has not come yet."""
    said = trial.error_file if trial.storage is not None else None
    return RuntimeError(Path(said).read_text() if said and Path(said).exists() else "the trial failed")


class _Scheduler(FIFOScheduler):  # type: ignore[misc]
    """Tune's side of it."""

    def __init__(self, handout: HandOut) -> None:
        super().__init__()
        self._handout = handout

    def __reduce__(self) -> Any:  # Tune pickles what it was given, and nobody reads it
        return FIFOScheduler, ()

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        self._handout.add(trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        self._handout.heard(trial, result)
        return str(self.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        self._handout.heard(trial, result)
        self._handout.end(trial, None)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        if trial.status == Trial.ERROR:
            return  # Tune says it before it starts a lost one again; of one that is given up it says it before it changes the status
        if trial.status == Trial.PENDING:
            # An actor kept from the trial before was lost: Tune hears of that as the actor's end, upon which the trial is to start again, and as the
            # end of the task that would have made the actor this trial's, for which it gives up whatever does not run.
            if (
                trial in tune_controller._staged_trials
            ):  # an exception in that task leaves it there, and its seat with Tune
                tune_controller._unstage_trial_with_resources(trial)
            self._handout.begin_anew(trial)
            return
        self._handout.end(trial, _error(trial))

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        return self._handout.next()


class _Generator(BasicVariantGenerator):  # type: ignore[misc]
    """Makes all trials at once, and those that are begun anew; says that it is finished while no actor is to be kept."""

    def __init__(self, handout: HandOut) -> None:
        super().__init__()
        self._handout = handout

    def __reduce__(self) -> Any:
        return BasicVariantGenerator, ()

    def next_trial(self) -> Trial | None:
        return self._handout.anew() or super().next_trial()

    def is_finished(self) -> bool:
        return bool(super().is_finished()) and not self._handout.expects_more()

    def save_to_dir(self, dirpath: str, session_str: str) -> None:
        """Nothing: what must last is in the store."""
