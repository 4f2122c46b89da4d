"""The search as trials of Ray Tune: one Tuner for all networks of a job, one trial per (network, group of layers), the longest first.

A trial's actor loads network and images once and is reused for further groups; every step is one suggestion and its measurement, and what was measured
lies in the store as JSON. Not covered: Ray itself and what a trial may take of it (`on_ray`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from ray import tune

from clipq_ray.cluster.hangs import Limits, Worker
from clipq_ray.cluster.talk import ERROR, Watch, last_line, tell, told, visible_device
from clipq_ray.errors import ClipqError, RunError, StorageError
from clipq_ray.finetune import Progress
from clipq_ray.search import Trial
from clipq_ray.storage import Store
from clipq_ray.work import Searcher, SearchTask

log = logging.getLogger(__name__)
_RAY = "_ray"  # what Tune keeps of a search, for as long as that goes on
Resources = dict[str, float]


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
        self._tasks, self._places, self._board = tasks, places, board
        self._searchers: dict[int, Searcher] = {}
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._number, self._index = self._places[new_config["place"]]
        self._trials: list[Trial] | None = None
        return True

    def step(self) -> dict[str, Any]:
        task = self._tasks[self._number]
        if self._trials is None:
            words = f"search: {task.source.name}, {task.groups[self._index].name}"
            self._board.begin.remote(self._item(), words, Worker.here())
        try:
            searcher = self._searcher()
            if self._trials is None:
                self._trials = searcher.begin(self._index)
            finished = searcher.step(self._index, self._trials)
        except StorageError:
            raise  # may pass: Ray tries again
        except ClipqError as error:
            tell(Store(task.output), error)
            return {"done": True}
        done = (
            task.settings.evaluations if finished else len(self._trials)
        )  # one that ends early counts as whole
        words = task.groups[self._index].name
        if len(self._tasks) > 1:
            words = f"{task.source.name}: {words}"
        self._board.write.remote(self._item(), done, evaluations(self._tasks), words)
        if finished:
            self._board.leave.remote([self._item()])
        return {"done": finished}

    def _item(self) -> str:
        return _item((self._number, self._index))

    def _searcher(self) -> Searcher:
        task = self._tasks[self._number]
        for number, searcher in self._searchers.items():
            if number != self._number:
                searcher.release()
        if self._number not in self._searchers:
            # those on other images go first: two sets of images may not fit into memory
            same = task.source.data_options
            self._searchers = {
                number: searcher
                for number, searcher in self._searchers.items()
                if searcher.task.source.data_options == same
            }
            self._searchers[self._number] = Searcher(task, visible_device(task.source.config.device))
        return self._searchers[self._number]


def _item(place: tuple[int, int]) -> str:
    """What the board calls a group of a task."""
    return f"{place[0]} {place[1]}"


class _Losses(tune.Callback):  # type: ignore[misc]
    """Says in one line what Tune says in a page: a trial was lost and is started again."""

    def __init__(self, tasks: Sequence[SearchTask], places: Sequence[tuple[int, int]]) -> None:
        self._tasks, self._places = tasks, places
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number, index = self._places[trial.config["place"]]
        task = self._tasks[number]
        log.warning(
            "search: the worker of %s, %s, was lost; it goes on behind its last evaluation",
            task.source.name,
            task.groups[index].name,
        )


def search(
    tasks: Sequence[SearchTask],
    resources: Sequence[Resources],
    storage: Callable[[Store], dict[str, Any]],
    progress: Progress,
) -> list[ClipqError | None]:
    """All open groups of all tasks as trials of one Tuner, at most the smallest `search_parallel` of the tasks at a time; for each task the error
    that ended it, if one did. `resources`: of a trial of each task; `storage`: where Tune keeps what it wants to keep, near a store."""
    places = in_order(tasks)
    if not places:
        return [None for _ in tasks]
    with Watch(progress, Limits.of([task.source.config for task in tasks]), lease="search") as watch:
        _begin(tasks, places, watch.board)
        results = _tuner(tasks, places, resources, watch.board, storage(Store(tasks[0].output))).fit()
        Store(tasks[0].output).child(_RAY).remove_tree()
    lost: dict[int, list[Exception]] = {number: [] for number in range(len(tasks))}
    for result in results:
        if result.error is not None:
            place = places[result.config["place"]]
            lost[place[0]].append(watch.hangs.error(_item(place)) or result.error)
    return [ended(task, lost[number]) for number, task in enumerate(tasks)]


def _begin(tasks: Sequence[SearchTask], places: Sequence[tuple[int, int]], board: Any) -> None:
    """Say what is there already."""
    total = evaluations(tasks)
    for number, task in enumerate(tasks):
        Store(task.output).remove(ERROR)  # of a job that was killed
        missing = sum(place[0] == number for place in places)
        there = (len(task.groups) - missing) * task.settings.evaluations
        board.write.remote(f"{number} before", there, total, task.source.name)


def _tuner(
    tasks: Sequence[SearchTask],
    places: Sequence[tuple[int, int]],
    resources: Sequence[Resources],
    board: Any,
    storage: dict[str, Any],
) -> tune.Tuner:
    caps = [task.source.config.search_parallel for task in tasks]
    trainable = tune.with_parameters(_GroupTrial, tasks=list(tasks), places=places, board=board)
    return tune.Tuner(
        tune.with_resources(
            trainable, lambda config: tune.PlacementGroupFactory([resources[places[config["place"]][0]]])
        ),
        param_space={"place": tune.grid_search(list(range(len(places))))},
        tune_config=tune.TuneConfig(
            reuse_actors=True, max_concurrent_trials=min((cap for cap in caps if cap), default=None)
        ),
        run_config=tune.RunConfig(
            name=_RAY,
            verbose=0,
            callbacks=[_Losses(tasks, places)],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            failure_config=tune.FailureConfig(
                max_failures=max(task.source.config.max_failures for task in tasks)
            ),
            **storage,
        ),
    )


def ended(task: SearchTask, lost: Sequence[Exception]) -> ClipqError | None:
    """What ended the search of `task`, if it did not end well; `lost`: what Ray says of groups that it gave up."""
    error = told(Store(task.output))
    if error is None and lost:
        return RunError(
            f"the search of {len(lost)} layers or groups failed: {last_line(lost[0])}; run again to continue"
        )
    if error is None and (missing := len(task.open_groups())):
        return RunError(
            f"the search ended before {missing} layers or groups were done; run again to continue"
        )
    return error


def in_order(tasks: Sequence[SearchTask]) -> list[tuple[int, int]]:
    """Number of the task and of the group of all open groups, in the order in which they start: those on the same images together, since an actor
    holds one set of images, and the longest first."""
    found = [(number, index) for number, task in enumerate(tasks) for index in task.open_groups()]

    def work(place: tuple[int, int]) -> int:
        task = tasks[place[0]]
        return task.work[place[1]] * task.images * task.settings.evaluations if task.work else 0

    whole: dict[str, int] = {}
    for place in found:
        images = tasks[place[0]].source.data_options
        whole[images] = whole.get(images, 0) + work(place)

    def rank(place: tuple[int, int]) -> tuple[int, str, int]:
        images = tasks[place[0]].source.data_options
        return -whole[images], images, -work(place)

    return sorted(found, key=rank)


def evaluations(tasks: Sequence[SearchTask]) -> int:
    """Evaluations of all groups of all tasks, were none to end early."""
    return sum(len(task.groups) * task.settings.evaluations for task in tasks)
