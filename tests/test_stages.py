"""What several networks of a job have of the time before a deadline, and where a training keeps its checkpoints."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, ClassVar

import pytest

from clipq_ray.cluster.engine import LocalEngine
from clipq_ray.config import make
from clipq_ray.optimizers import Schedule
from clipq_ray.progress import Reporter
from clipq_ray.stages import Run, trained
from clipq_ray.storage import Store
from clipq_ray.training import TrainTask
from clipq_ray.work import CURVE, Source


def test_a_training_goes_on_from_its_own_checkpoints_only(tmp_path: Path) -> None:
    class Noting(LocalEngine):
        places: ClassVar[list[str]] = []

        def train(self, task: TrainTask, progress: Any) -> float:
            self.places.append(task.checkpoints)
            Store(task.output).write(CURVE, b'{"curve": [], "notes": []}')
            return 0.0

    source = Source(make(limit_images=20, storage=str(tmp_path), engine="local"))
    run = Run(source, Noting(), Reporter(quiet=True), Store(tmp_path), threading.Lock())
    with run.turn:
        for rate in (0.1, 0.2):
            schedule = Schedule(1, 4, rate, 0.0, 0.9, 0.0, 0.0)
            trained(run, "finetune", schedule, None, None, Store(tmp_path / "kept"))
    one, other = Noting.places
    assert one != other
    assert one.startswith(f"{Store(tmp_path).uri}/kept/finetune/")


def test_each_network_takes_its_share_of_what_is_left(tmp_path: Path) -> None:
    def run(**options: float) -> Run:
        source = Source(make(**options))
        return Run(source, LocalEngine(), Reporter(quiet=True), Store(tmp_path), threading.Lock())

    def left(others: int, at_once: int) -> float:
        one = run(deadline_hours=1.0)
        one.share_time(others, at_once)
        assert one.seconds_left is not None
        return one.seconds_left

    assert left(0, 1) == pytest.approx(3540, rel=0.01)
    assert left(3, 1) == pytest.approx(3540 / 4, rel=0.01)
    assert left(3, 2) == pytest.approx(3540 / 2, rel=0.01)
    assert left(1, 8) == pytest.approx(3540, rel=0.01)
    behind = run(deadline_hours=1.0)
    behind.late = 1800.0  # of a job that had gone on for half an hour
    behind.share_time(2, 1)
    assert behind.seconds_left == pytest.approx(1740 / 3, rel=0.01)
    none = run()
    none.share_time(3, 1)
    assert none.seconds_left is None
