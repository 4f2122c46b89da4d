"""The interface between the pipeline and whatever runs its work, and the in-process engine.

Both engines call the same functions of `work`, so both give the same result (byte for byte at one worker). Not covered: Ray, which is
`cluster.on_ray`.
"""

from __future__ import annotations

from typing import Protocol, Self

from clipq_ray.finetune import Progress, Rank
from clipq_ray.work import Searcher, SearchTask, TrainTask, train


class Engine(Protocol):
    """Runs tasks to their end; what they make lies in their stores afterwards."""

    def search(self, task: SearchTask, progress: Progress) -> None:
        """Search all layers of `task` that are not there yet."""

    def train(self, task: TrainTask, progress: Progress) -> None:
        """Run one training from its last checkpoint to its end."""

    def __enter__(self) -> Self:
        """Start what the engine needs."""

    def __exit__(self, *error: object) -> None:
        """End what the engine started."""


class LocalEngine:
    """Everything in this process, one worker, no Ray: breakpoints, fast tests, laptops."""

    def search(self, task: SearchTask, progress: Progress) -> None:
        """Layer by layer."""
        open_layers = task.open_layers()
        each = task.settings.evaluations
        done = (len(task.layers) - len(open_layers)) * each
        if not open_layers:
            return
        searcher = Searcher(task, task.source.device())
        for index, layer in open_layers:
            trials = searcher.begin(index)
            finished = False
            while not finished:
                finished = searcher.step(index, trials)
                # a layer that ends early counts as whole
                progress(done + (each if finished else len(trials)), len(task.layers) * each, layer)
            done += each

    def train(self, task: TrainTask, progress: Progress) -> None:
        """One rank of one."""
        train(task, Rank(0, 1, task.source.device()), progress, lambda row: None)

    def __enter__(self) -> Self:
        """Nothing to start."""
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to end."""
