"""Several networks in one job: what one of them leaves to other jobs when it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clipq_ray import claims
from clipq_ray.batch import compress_all
from clipq_ray.cluster.engine import Done, LocalEngine
from clipq_ray.config import make
from clipq_ray.errors import RunError
from clipq_ray.pipeline import Result
from clipq_ray.progress import Reporter
from clipq_ray.source import Source
from clipq_ray.storage import WORK, Store
from clipq_ray.training import TrainTask

OPTIONS: dict[str, Any] = {
    "engine": "local", "epochs": 1, "baseline_epochs": 1, "batch_size": 32, "search_evaluations": 4, "search_start": 3, "search_images": 60,
    "target_ratio": 15, "rounds": 1,
}  # fmt: skip


class Failing(LocalEngine):
    """Fails with the network `first` in `stage`; knows who is claimed when the other one is fine-tuned."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage, self.claimed = stage, list[bool]()

    def search(self, tasks: Any, progress: Any, done: Done) -> None:
        if self.stage == "search" and tasks[0].source.name == "first":
            done(0, RunError("no search"))
            return
        super().search(tasks, progress, done)

    def train(self, task: TrainTask, progress: Any) -> float:
        if task.source.name == "first" and task.stage == self.stage:
            raise RunError("no training")
        if task.source.name == "second" and task.stage == "finetune":
            (work,) = (
                Store(path) for path in Path(task.source.config.storage).glob(f"model=first/run=*/{WORK}")
            )
            self.claimed.append(claims.holder(work) is not None)
        return super().train(task, progress)


class Joint(LocalEngine):
    """Has all searches at once, as on a cluster, of which it knows the seconds until each should end; none succeeds."""

    parallel = True

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def search(self, tasks: Any, progress: Any, done: Done) -> None:
        for number, task in enumerate(tasks):
            self.seconds.append(task.deadline - Store(task.output).now())
            done(number, RunError("no search"))


def test_networks_that_are_searched_at_once_have_the_whole_time_of_searches_before_a_deadline(
    tmp_path: Path,
) -> None:
    options = {**OPTIONS, "weights": "random", "deadline_hours": 10.0, "storage": str(tmp_path)}
    sources = [Source(make(**options, name=f"number{seed}", seed=seed)) for seed in range(5)]
    engine = Joint()
    compress_all(sources, engine, Reporter(quiet=True))
    # four tenths of ten hours; groups of all networks share them (`Searcher.begin`)
    assert engine.seconds == pytest.approx([4 * 3600] * 5, rel=0.03)


@pytest.mark.parametrize("stage", ["baseline", "search", "finetune"])
def test_a_network_that_failed_is_not_kept_from_other_jobs_until_the_others_are_made(
    tmp_path: Path, stage: str
) -> None:
    sources = [
        Source(make(**OPTIONS, storage=str(tmp_path), name=name, seed=seed))
        for seed, name in enumerate(("first", "second"))
    ]
    engine = Failing(stage)
    first, second = compress_all(sources, engine, Reporter(quiet=True))
    assert isinstance(first, RunError)
    assert isinstance(second, Result)
    assert engine.claimed == [False]
