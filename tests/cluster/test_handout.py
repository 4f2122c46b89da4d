"""Trials begin in order and as far as the room lets them; one whose actor was lost keeps its seat, one that is given up ends its task."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune import register_trainable
from ray.tune.experiment import Trial
from test_room import ONE, Desk, going, until

from clipq_ray.cluster.handout import HandOut
from clipq_ray.cluster.room import Room


def made(room: Room, tasks: list[int]) -> tuple[HandOut, list[Trial], list[tuple[int, int]]]:
    """Trials as Tune adds them, and what is told of tasks: number, and how many of its trials were given up."""
    told: list[tuple[int, int]] = []
    handout = HandOut(
        room, tasks, [ONE] * (1 + max(tasks)), lambda number, lost: told.append((number, len(lost)))
    )
    trials = [
        Trial("none", config={"place": place}, stub=True, trial_id=f"t{place}") for place in range(len(tasks))
    ]
    for trial in trials:
        handout.scheduler.on_trial_add(None, trial)
    assert {trial.status for trial in trials} == {Trial.PAUSED}
    return handout, trials, told


def chosen(handout: HandOut) -> Any:
    trial = handout.scheduler.choose_trial_to_run(None)
    if trial is not None:
        trial.set_status(Trial.RUNNING)
    return trial


def test_trials_follow_one_another_in_order_and_a_task_is_over_with_its_last() -> None:
    handout, trials, told = made(Room(Desk(1)), [0, 0, 1])
    assert chosen(handout) is trials[0]
    assert chosen(handout) is None
    for before, after in zip(trials, [*trials[1:], None], strict=True):
        assert not handout.keeps()
        handout.scheduler.on_trial_complete(None, before, {"group": "g"})
        assert handout.keeps() == (after is not None)  # its actor is kept for the next one
        assert chosen(handout) is after
    assert told == [(0, 0), (1, 0)]


def test_one_whose_actor_was_lost_keeps_its_seat_and_is_no_end() -> None:
    handout, trials, told = made(Room(Desk(1)), [0, 0])
    assert chosen(handout) is trials[0]
    trials[0].set_status(Trial.ERROR)  # as Tune does before it starts it again
    handout.scheduler.on_trial_error(None, trials[0])
    trials[0].set_status(Trial.PENDING)
    handout.scheduler.on_trial_add(None, trials[0])
    assert trials[0].status == Trial.PENDING
    assert chosen(handout) is None
    handout.scheduler.on_trial_complete(None, trials[0], {"group": "g"})
    assert chosen(handout) is trials[1]
    assert told == []


def test_one_whose_kept_actor_was_lost_is_not_given_up_but_begins_anew_before_those_behind_it() -> None:
    handout, trials, told = made(Room(Desk(1)), [0, 0, 0])
    register_trainable(trials[1].trainable_name, lambda config: None)
    assert chosen(handout) is trials[0]
    handout.scheduler.on_trial_complete(None, trials[0], {"group": "g"})
    assert chosen(handout) is trials[1]
    trials[1].set_status(Trial.ERROR)  # as Tune does when it hears that the actor was lost
    handout.scheduler.on_trial_error(None, trials[1])
    trials[1].set_status(Trial.PENDING)
    handout.scheduler.on_trial_add(None, trials[1])
    # and when it hears that the actor did not become this trial's
    handout.scheduler.on_trial_error(SimpleNamespace(_staged_trials=()), trials[1])
    trials[1].set_status(Trial.ERROR)
    assert not handout.generator.is_finished()
    again = handout.generator.next_trial()
    assert again is not None
    assert again.config == trials[1].config
    assert handout.generator.next_trial() is None
    handout.scheduler.on_trial_add(None, again)
    for trial in (again, trials[2]):
        assert chosen(handout) is trial
        assert told == []
        handout.scheduler.on_trial_complete(None, trial, {"group": "g"})
    assert told == [(0, 0)]


def test_one_that_is_given_up_ends_its_task_with_what_was_lost() -> None:
    handout, trials, told = made(Room(Desk(1)), [0, 1])
    assert chosen(handout) is trials[0]
    assert trials[0].status == Trial.RUNNING
    handout.scheduler.on_trial_error(None, trials[0])
    assert told == [(0, 1)]
    handout.tell_rest()
    assert told == [(0, 1), (1, 0)]


def test_an_error_behind_the_end_of_a_task_ends_the_search_at_its_end_and_no_trial() -> None:
    told = list[int]()

    def over(number: int, lost: object) -> None:
        told.append(number)
        if number == 0:
            raise OSError("no space left")

    handout = HandOut(Room(Desk(2)), [0, 1], [ONE, ONE], over)
    for place in (0, 1):
        trial = Trial("none", config={"place": place}, stub=True, trial_id=f"t{place}")
        handout.scheduler.on_trial_add(None, trial)
    for _ in range(2):
        handout.scheduler.on_trial_complete(None, chosen(handout), {"group": "g"})
    assert told == [0, 1]
    with pytest.raises(OSError, match="no space left"):
        handout.tell_rest()
    assert told == [0, 1]


def test_a_search_that_ends_with_an_error_of_its_own_leaves_the_whole_room_to_trainings() -> None:
    desk = Desk(1)
    room = Room(desk, ONE)
    handout, trials, told = made(room, [0, 0])
    assert chosen(handout) is trials[0]
    desk.place("a", ONE)
    handout.scheduler.on_trial_result(None, trials[0], {"group": "a"})
    with going(room) as trainings:
        trainings.start("training", ONE)
        time.sleep(0.5)
        assert trainings.let_in == []
        handout.close()
        desk.remove("a")  # as Ray does with what nobody holds any more
        until(lambda: trainings.let_in == ["training"])
    assert told == []
