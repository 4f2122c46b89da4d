"""What a stage's key follows: a fixed number of workers makes the same bytes, a number that may change does not."""

from __future__ import annotations

from typing import Any

from clipq_ray.config import make
from clipq_ray.identity import stage_key


def key(**options: Any) -> str:
    return stage_key("finetune", make(workers=4, **options), {})


def test_how_faults_are_met_decides_nothing() -> None:
    assert key() == key(max_failures=0, stall_minutes=1, attempt_hours=1, min_workers=4)


def test_a_number_of_workers_that_may_shrink_is_another_stage() -> None:
    assert len({key(), key(min_workers=1), key(min_workers=2)}) == 3
