"""Speeds of trainings: said from the second step on, over the steps since the last one said."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from clipq_ray.cluster import metrics


def test_a_short_training_has_a_speed_and_a_step_that_is_told_twice_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, said = [10.0], list[tuple[Any, ...]]()
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now[0]))
    meter: Any = SimpleNamespace(speed=lambda *given: said.append(given))
    speed = metrics.TrainingSpeed(meter, "a", "finetune", 32)
    for at, done in ((10.0, 5), (10.125, 5), (10.25, 6), (10.5, 7), (10.75, 8), (10.75, 9)):
        now[0] = at
        speed.step(done)
    assert said == [("a", "finetune", 128.0), ("a", "finetune", 128.0)]
