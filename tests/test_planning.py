"""A dry run's time is that of the trials which the engine really makes at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from clipq_ray import planning
from clipq_ray.config import make
from clipq_ray.source import Source


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six CPUs and two GPUs, and no cluster to join."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize(
    ("options", "on_gpu", "trials"),
    [
        ({"engine": "local", "search_parallel": 8}, False, 1),
        ({}, False, 6),
        ({"search_parallel": 4}, False, 4),
        ({"search_parallel": 1000}, False, 6),
        ({"limit_cpus": 3}, False, 3),
        ({"threads_per_worker": 4}, False, 1),
        ({"threads_per_worker": 8}, False, 1),
        ({}, True, 2),
        ({"search_gpu_share": 0.5}, True, 4),
        ({"search_gpu_share": 0.1}, True, 6),
        ({"limit_gpus": 1}, True, 1),
    ],
)
def test_trials_at_a_time_are_those_that_the_machine_holds(
    options: dict[str, Any], on_gpu: bool, trials: int
) -> None:
    assert planning.at_a_time(make(**options), 20, on_gpu=on_gpu) == (trials, "about")


def test_a_layer_is_searched_by_one_trial() -> None:
    assert planning.at_a_time(make(search_parallel=4), 3, on_gpu=False) == (3, "about")


@pytest.mark.parametrize(("cap", "found"), [(8, (8, "at least")), (None, (1, "at most"))])
def test_for_a_cluster_of_unknown_size_the_time_is_a_bound(
    cap: int | None, found: tuple[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert planning.at_a_time(make(search_parallel=cap), 20, on_gpu=False) == found


def test_a_dry_run_says_how_its_search_is_timed(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """5 layers of 18 evaluations of 1,000 images of 10 ms: 900 s one after the other."""
    monkeypatch.setattr(planning, "_seconds", lambda *_: (0.01, 0.03))

    def search(**options: Any) -> str:
        config = make(data="digits", search_images=1000, storage=str(tmp_path / "s"), **options)
        (line,) = [
            one for one in planning.dry_run([Source(config)])[0].splitlines() if one.startswith("search ")
        ]
        return line.partition("images: ")[2]

    assert search(engine="local", search_parallel=5, target_ratio=20) == "about 15.0 min"
    assert search(search_parallel=3, target_ratio=20) == "about 5.0 min, 3 at a time"
    assert (
        search(engine="local", max_drop=1) == "about 30.0 min"  # a drop may need a second one
    )


def test_steps_on_images_of_any_size_are_timed_as_batch_norm_takes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planning, "_VALUES", 1)  # an image is larger than all that is timed at a time
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 10)
    )
    source = Source(make(data="digits", device="cpu"), model)
    assert min(planning._seconds(source, model, ["0.weight", "4.weight"])) > 0
