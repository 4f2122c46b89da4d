"""The interface between the pipeline and whatever runs its work, and the in-process engine.

Both engines call the same functions (`work`, `training`), so both give the same result (byte for byte at one worker). Not covered: Ray, which is
`cluster.on_ray`.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Sequence
from typing import Protocol, Self

import torch

from clipq_ray import logs
from clipq_ray.config import Config
from clipq_ray.errors import ClipqError
from clipq_ray.finetune import Progress
from clipq_ray.memory import Attempts, OutOfMemory
from clipq_ray.ranks import Rank
from clipq_ray.storage import Store
from clipq_ray.training import TrainTask, train
from clipq_ray.work import Searcher, SearchTask

log = logs.logger(__name__)


Done = Callable[[int, ClipqError | None], None]
"""Told the number of a task as soon as it has ended, with the error that ended it, if one did."""


class Engine(Protocol):
    """Runs tasks to their end; what they make lies in their stores afterwards.

    `parallel`: whether `train` and `search` may be called from several threads, and trainings go on while a search does; `at_once`: from how many threads it
    will be, so that what is done beside trainings leaves room for all of them.
    """

    parallel: bool
    at_once: int

    def reaches(self, storage: Store) -> None:
        """`StorageError` where work would run that does not see what this process writes to `storage`."""

    def check(self, config: Config) -> None:
        """`ConfigError` where what `config` asks for can never run here; called before anything else."""

    def committed(self, network: str, bytes_before: int, bytes_after: int) -> None:
        """A run was committed: for whoever watches from outside."""

    def search(
        self,
        tasks: Sequence[SearchTask],
        progress: Progress,
        done: Done,
    ) -> None:
        """Search all groups of layers of all `tasks` that are not there yet; `done` is told the number of each task as soon as it has ended, with the
        error that ended it, if one did. `done` must be quick where the engine is `parallel`; then several threads may call, and take turns."""

    def train(self, task: TrainTask, progress: Progress) -> float:
        """Run one training from its last checkpoint to its end; gives the seconds that it waited for its turn."""

    def trainings(self, configs: Sequence[Config]) -> int:
        """How many trainings fit at a time, of networks with these configurations."""

    def __enter__(self) -> Self:
        """Start what the engine needs."""

    def __exit__(self, *error: object) -> None:
        """End what the engine started."""


def _behind(progress: Progress, before: int, total: int, done: int, words: str) -> None:
    progress(before + done, total, words)


class LocalEngine:
    """Everything in this process, one worker, no Ray: breakpoints, fast tests, laptops."""

    parallel = False
    at_once = 1

    def reaches(self, storage: Store) -> None:
        """Everything runs in this process."""

    def check(self, config: Config) -> None:
        """One process always runs; a device that is missing is found where it is used."""

    def committed(self, network: str, bytes_before: int, bytes_after: int) -> None:
        """Nobody watches."""

    def search(
        self,
        tasks: Sequence[SearchTask],
        progress: Progress,
        done: Done,
    ) -> None:
        """Group by group."""
        total = sum(len(task.groups) * task.settings.evaluations for task in tasks)
        before = 0
        for number, task in enumerate(tasks):
            error = None
            try:
                self._search(task, functools.partial(_behind, progress, before, total))
            except ClipqError as failed:
                error = failed
            done(number, error)
            before += len(task.groups) * task.settings.evaluations

    def _search(self, task: SearchTask, progress: Callable[[int, str], None]) -> None:
        missing, each = task.open_groups(), task.settings.evaluations
        done = (len(task.groups) - len(missing)) * each
        searcher = Searcher(task, task.source.device()) if missing else None
        for index in missing:
            assert searcher is not None
            trials = searcher.begin(index)
            finished = False
            while not finished:
                finished = searcher.step(index, trials)
                # a group that ends early counts as whole
                progress(
                    done + (each if finished else len(trials)),
                    f"{task.source.name}: {task.groups[index].name}",
                )
            done += each

    def train(self, task: TrainTask, progress: Progress) -> float:
        """One rank of one."""
        rank = Rank(0, 1, task.source.device())
        Attempts(Store(task.checkpoints), task.stage).afresh()
        try:
            train(task, rank, progress, lambda row: None)
            return 0.0
        except OutOfMemory as smaller:
            log.warning("%s", smaller)
        # behind the exception, whose frames hold the network and its activations
        gc.collect()
        torch.cuda.empty_cache()  # nothing where there is no GPU
        train(task, rank, progress, lambda row: None)
        return 0.0

    def trainings(self, configs: Sequence[Config]) -> int:
        """One."""
        return 1

    def __enter__(self) -> Self:
        """Nothing to start."""
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to end."""
