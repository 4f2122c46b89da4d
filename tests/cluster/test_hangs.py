"""What counts as hanging: no step for too long, or an attempt that takes too long; the error says which, how often and what to do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError

from clipq_ray.cluster import hangs
from clipq_ray.cluster.hangs import Hangs, Limits, Signs, Worker
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


def test_a_hang_is_the_reason_until_the_next_attempt_makes_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hangs, "_ended", lambda worker: True)  # no worker runs here that could be ended
    worker = Worker("node", [1, 2])
    still, goes_on = (Signs("finetune", "finetune", [worker], since, 900) for since in (61, 1))
    watched = Hangs(Limits(60, None))
    for _ in range(2):
        assert watched.look([still]) == ["finetune"]
    assert "made no step for 1 minutes (--stall-minutes), 2 times" in str(watched.error("finetune"))
    assert watched.look([goes_on]) == []
    assert watched.error("finetune") is None  # whatever it fails of now is another thing
    watched.look([still])
    assert "3 times" in str(watched.error("finetune"))


@pytest.mark.parametrize(
    ("error", "ended"), [(GetTimeoutError("busy"), True), (ActorDiedError(), False)], ids=["busy", "lost"]
)
def test_of_a_node_that_is_late_to_answer_a_worker_counts_as_ended_and_of_a_lost_one_not(
    monkeypatch: pytest.MonkeyPatch, error: RayError, ended: bool
) -> None:
    def get(*given: object, **options: object) -> None:
        raise error

    asked = SimpleNamespace(options=lambda **options: SimpleNamespace(remote=lambda process: None))
    monkeypatch.setattr(hangs, "_end", asked)
    monkeypatch.setattr(hangs.ray, "get", get)
    node = "ab" * 28  # as Ray writes one
    assert hangs._ended(Worker(node, [1, 2])) is ended
