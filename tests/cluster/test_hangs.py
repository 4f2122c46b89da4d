"""What counts as hanging: no step for too long, or an attempt that takes too long; the error says which, how often and what to do."""

from __future__ import annotations

import pytest

from clipq_ray.cluster.hangs import Limits, Signs
from clipq_ray.config import make


def signs(since_step: float, since_begin: float) -> Signs:
    return Signs("finetune", "finetune", [], since_step, since_begin)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (signs(59, 3000), None),
        (signs(61, 61), "made no step for 1 minutes (--stall-minutes)"),
        (signs(0, 3601), "took more than 1 hours (--attempt-hours)"),
    ],
)
def test_limits_of_a_step_and_of_an_attempt(given: Signs, reason: str | None) -> None:
    assert Limits.of([make(stall_minutes=1, attempt_hours=1)]).broken(given) == reason


def test_networks_that_are_searched_together_have_the_most_generous_limits() -> None:
    found = Limits.of([make(stall_minutes=5, attempt_hours=2), make(stall_minutes=1, attempt_hours=3)])
    assert found == Limits(300, 3 * 3600)
    assert Limits.of([make(attempt_hours=2), make()]).attempt_seconds is None
