"""What several networks of a job have of the time before a deadline."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from clipq_ray.cluster.engine import LocalEngine
from clipq_ray.config import make
from clipq_ray.progress import Reporter
from clipq_ray.stages import Run
from clipq_ray.storage import Store
from clipq_ray.work import Source


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
