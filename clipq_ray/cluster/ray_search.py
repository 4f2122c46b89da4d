"""The search as trials of Ray Tune: one Tuner for all networks of a job, one trial per (network, group of layers), network by network.

A trial's actor loads network and images once and is reused for further groups; every step is one suggestion and its measurement, and what was measured
lies in the store as JSON. Not covered: which trial begins when (`handout`), Ray itself and what a trial may take of it (`on_ray`).
"""

from __future__ import annotations

import functools
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray import tune

from clipq_ray import logs
from clipq_ray.cluster.apart import Apart
from clipq_ray.cluster.engine import Done
from clipq_ray.cluster.failures import actors_lost, reason
from clipq_ray.cluster.handout import HandOut
from clipq_ray.cluster.hangs import Limits, Worker
from clipq_ray.cluster.hosts import Hosts
from clipq_ray.cluster.metrics import Meter
from clipq_ray.cluster.room import Amount, Room
from clipq_ray.cluster.talk import ERROR, Watch, tell, told, visible_device
from clipq_ray.connections import answered
from clipq_ray.errors import ClipqError, RunError, StorageError
from clipq_ray.finetune import Progress
from clipq_ray.search import Trial
from clipq_ray.storage import Store
from clipq_ray.work import Searcher, SearchTask

log = logs.logger(__name__)
_IDLE_SECONDS = 0.1
STARTING = "starting"


class _GroupTrial(tune.Trainable):  # type: ignore[misc]
    """One group's search; the actor is reused, so a network and its images are loaded once. What was measured lies in the store after every
    evaluation, so an actor that is lost costs the evaluation under way; Tune keeps nothing."""

    def setup(
        self,
        config: dict[str, Any],
        tasks: Sequence[SearchTask],
        places: Sequence[tuple[int, int]],
        board: Any,
    ) -> None:
        answered()
        self._tasks, self._places, self._board = tasks, places, board
        self._searcher: Searcher | None = None
        group = ray.util.get_current_placement_group()
        self._group = group.id.hex() if group else None
        self._meter = Meter()
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._number, self._index = self._places[new_config["place"]]
        last = max(place for place, (number, _) in enumerate(self._places) if number == self._number)
        self._behind = len(self._places) - 1 - last  # groups of networks that come later
        self._trials: list[Trial] | None = None
        return True

    def step(self) -> dict[str, Any]:
        task = self._tasks[self._number]
        with logs.about(task.source.name):
            return self._step(task)

    def _step(self, task: SearchTask) -> dict[str, Any]:
        if self._trials is None:
            words = f"search: {task.source.name}, {task.groups[self._index].name}"
            self._board.begin.remote(self._item(), words, Worker.here())
        try:
            searcher = self._searching(task)
            if self._trials is None:
                self._board.loaded.remote(self._item())
                self._trials = searcher.begin(self._index, self._behind, self._under_way)
            before = len(self._trials)
            finished = searcher.step(self._index, self._trials)
        except ClipqError as error:
            tell(Store(task.output), error)
            self._board.leave.remote([self._item()])  # this process serves others from here on
            return {"done": True, "group": self._group}
        for trial in self._trials[before:]:
            self._meter.evaluated(task.source.name, task.images, trial.seconds)
        done = (
            task.settings.evaluations if finished else len(self._trials)
        )  # one that ends early counts as whole
        words = task.groups[self._index].name
        if len(self._tasks) > 1:
            words = f"{task.source.name}: {words}"
        self._board.write.remote(self._item(), done, evaluations(self._tasks), words)
        if finished:
            self._board.leave.remote([self._item()])
        return {"done": finished, "group": self._group}

    def _item(self) -> str:
        return _item((self._number, self._index))

    def _under_way(self) -> int:
        return int(ray.get(self._board.under_way.remote()))

    def _searching(self, task: SearchTask) -> Searcher:
        """Of this network; nothing is kept of the one before, since networks follow one another."""
        if self._searcher is None or self._searcher.task is not task:
            self._searcher = None
            self._searcher = Searcher(task, visible_device(task.source.config.device))
        return self._searcher


def _item(place: tuple[int, int]) -> str:
    """What the board calls a group of a task."""
    return f"{place[0]} {place[1]}"


class _Steps(tune.Callback):  # type: ignore[misc]
    """Says in one line what Tune says in a page: a trial was lost and is started again. Ends Tune's loop where nobody waits for it any more."""

    def __init__(
        self,
        tasks: Sequence[SearchTask],
        places: Sequence[tuple[int, int]],
        apart: Apart,
        keeps: Callable[[], bool],
    ) -> None:
        """`keeps`: whether an actor is kept for a trial that begins now."""
        self._tasks, self._places, self._apart, self._keeps = tasks, places, apart, keeps
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)

    def __reduce__(self) -> Any:  # Tune pickles what it was given, and nobody reads it
        return tune.Callback, ()

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        # where trainings have all the room Tune has nothing to wait for, and would take a whole core to find that out
        begun = any(trial.status in (trial.RUNNING, trial.PENDING) for trial in trials)
        idle = not begun and not self._keeps()
        self._apart.check(_IDLE_SECONDS if idle else 0.0)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number, index = self._places[trial.config["place"]]
        task = self._tasks[number]
        log.warning(
            "search: the worker of %s, %s, was lost; it goes on behind its last evaluation",
            task.source.name,
            task.groups[index].name,
        )


@contextmanager
def turn(lock: threading.Lock, tasks: Sequence[SearchTask]) -> Iterator[list[SearchTask]]:
    """While nobody else of this job searches; gives `tasks`, which had to wait for that and take their share of the time that is left then."""
    asked = time.monotonic()
    with lock:
        waited = time.monotonic() - asked
        yield [task.after(waited) for task in tasks]


def search(
    tasks: Sequence[SearchTask],
    amounts: Sequence[Amount],
    room: Room,
    folder: str,
    progress: Progress,
    done: Done,
    apart: Apart,
) -> None:
    """All open groups of all tasks as trials of one Tuner; `done` is told the number of each task when its last group has ended, with the error that
    ended it, if one did. `amounts`: what a trial of each task takes of `room`; `folder`: where Tune keeps what it wants to keep, on this machine, since
    nobody reads it; `apart`: the engine's threads."""

    def over(number: int, lost: Sequence[Exception]) -> None:
        try:
            error = ended(tasks[number], lost)
        except StorageError as failed:  # of this task; the others go on
            error = failed
        done(number, error)

    there: set[int] = set()

    def left() -> list[tuple[int, int]]:
        places = in_order(tasks)
        for number in sorted(set(range(len(tasks))) - {place[0] for place in places} - there):
            there.add(number)
            over(number, [])
        return places

    if not left():
        return
    began = time.monotonic()
    most = max(amounts, key=lambda one: (one.gpus, one.cpus))
    hosts, limits = Hosts("search", 1, most.resources), Limits.of([task.source.config for task in tasks])
    with Watch(apart, progress, limits, hosts, lease="search") as watch:
        tasks = [task.after(time.monotonic() - began) for task in tasks]
        places = left()  # another job's search of the same network may have gone before
        if not places:
            return
        why = functools.partial(_why, watch, places)
        handout = HandOut(room, [number for number, _ in places], amounts, over, why)
        apart.check()
        _begin(tasks, places, watch.board)
        steps = _Steps(tasks, places, apart, handout.keeps)
        try:
            with actors_lost():
                _tuner(tasks, places, handout, steps, watch.board, folder).fit()
        finally:
            handout.close()
        handout.tell_rest()


def _why(watch: Watch, places: Sequence[tuple[int, int]], place: int, error: Exception) -> Exception:
    """The reason why a trial was given up: that it hung, or what Ray says."""
    return watch.hangs.error(_item(places[place])) or error


def _begin(tasks: Sequence[SearchTask], places: Sequence[tuple[int, int]], board: Any) -> None:
    """Say what is there already."""
    total = evaluations(tasks)
    for number, task in enumerate(tasks):
        Store(task.output).remove(ERROR)  # of a job that was killed
        missing = sum(place[0] == number for place in places)
        there = (len(task.groups) - missing) * task.settings.evaluations
        board.write.remote(f"{number} before", there, total, STARTING)


def _tuner(
    tasks: Sequence[SearchTask],
    places: Sequence[tuple[int, int]],
    handout: HandOut,
    steps: _Steps,
    board: Any,
    folder: str,
) -> tune.Tuner:
    requests = handout.requests()
    trainable = tune.with_parameters(_GroupTrial, tasks=list(tasks), places=places, board=board)
    return tune.Tuner(
        tune.with_resources(trainable, lambda config: requests[config["place"]]),
        param_space={"place": tune.grid_search(list(range(len(places))))},
        tune_config=tune.TuneConfig(
            reuse_actors=True, scheduler=handout.scheduler, search_alg=handout.generator
        ),
        run_config=tune.RunConfig(
            name=f"search-{uuid.uuid4().hex}",
            storage_path=folder,
            verbose=0,
            callbacks=[steps],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            failure_config=tune.FailureConfig(
                max_failures=max(task.source.config.max_failures for task in tasks)
            ),
        ),
    )


def ended(task: SearchTask, lost: Sequence[Exception]) -> ClipqError | None:
    """What ended the search of `task`, if it did not end well; `lost`: what Ray says of groups that it gave up."""
    error = told(Store(task.output))
    if error is None and lost:
        return RunError(
            f"the search of {len(lost)} layers or groups failed: {reason(lost[0])}; run again to continue"
        )
    if error is None and (missing := len(task.open_groups())):
        return RunError(
            f"the search ended before {missing} layers or groups were done; run again to continue"
        )
    return error


def in_order(tasks: Sequence[SearchTask]) -> list[tuple[int, int]]:
    """Number of the task and of the group of all open groups, in the order in which they start: by priority, then network by network, so that the first
    can be fine-tuned while others are searched; those on the same images together, since an actor holds one set of images; the longest networks
    first, and the longest groups of each."""
    found = [(number, index) for number, task in enumerate(tasks) for index in task.open_groups()]

    def work(place: tuple[int, int]) -> int:
        task = tasks[place[0]]
        return task.work[place[1]] * task.images * task.settings.evaluations if task.work else 0

    whole: dict[Any, int] = {}
    for place in found:
        source = tasks[place[0]].source
        for key in ((source.priority, source.data_options), place[0]):
            whole[key] = whole.get(key, 0) + work(place)

    def rank(place: tuple[int, int]) -> tuple[Any, ...]:
        source = tasks[place[0]].source
        key = (source.priority, source.data_options)
        return -source.priority, -whole[key], source.data_options, -whole[place[0]], place[0], -work(place)

    return sorted(found, key=rank)


def evaluations(tasks: Sequence[SearchTask]) -> int:
    """Evaluations of all groups of all tasks, were none to end early."""
    return sum(len(task.groups) * task.settings.evaluations for task in tasks)
