"""A clock that jumps changes nothing: within a process time is counted, between processes it is the storage's."""

from __future__ import annotations

import itertools
import re
import time
from pathlib import Path
from typing import Any

import pytest

from clipq_ray.batch import compress
from clipq_ray.cluster.engine import LocalEngine
from clipq_ray.config import make
from clipq_ray.progress import Reporter
from clipq_ray.source import Source
from clipq_ray.storage import Store
from clipq_ray.work import here

DAY = 86_400.0


def test_no_module_asks_for_this_machines_clock() -> None:
    """Three say it to a person, and decide nothing by it."""
    package = Path(__file__).resolve().parents[1] / "clipq_ray"
    asks = re.compile(r"time\.time\(\)|datetime\.(now|utcnow|today)|time\.(localtime|gmtime|strftime)\(")
    assert {path.name for path in package.rglob("*.py") if asks.search(path.read_text(encoding="utf-8"))} == {
        "stages.py",
        "hosts.py",
        "results.py",
    }


@pytest.mark.parametrize("difference", [-DAY, DAY])
def test_a_deadline_is_the_storages_wherever_this_machines_clock_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, difference: float
) -> None:
    real = Store.now
    monkeypatch.setattr(Store, "now", lambda store: real(store) + difference)
    store = Store(tmp_path)
    deadline = store.now() + 100.0
    until = here(deadline, store)
    assert until is not None
    assert until - time.monotonic() == pytest.approx(100.0, abs=5.0)
    assert here(None, store) is None


def test_a_run_whose_clock_jumps_to_and_fro_keeps_its_deadline_and_its_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "engine": "local", "epochs": 2, "batch_size": 32, "search_evaluations": 4, "search_start": 3, "search_images": 60, "control": "never",
        "target_ratio": 15, "rounds": 1, "weights": "random", "deadline_hours": 1.0,
    }  # fmt: skip
    real, jumps = time.time, itertools.cycle([-DAY, 0.0, DAY])
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    began = time.monotonic()
    result = compress(Source(make(**options, storage=str(tmp_path))), LocalEngine(), Reporter(quiet=True))
    assert [row["epoch"] for row in result.manifest["curves"]["finetune"]] == [1, 2]
    assert not [note for note in result.manifest["notes"] if "--deadline-hours" in note]
    assert 0 <= result.manifest["seconds"] <= time.monotonic() - began + 1
    assert all(0 <= stage["seconds"] <= time.monotonic() - began + 1 for stage in result.manifest["stages"])
