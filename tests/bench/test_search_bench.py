"""The search's benches count what they say: evaluations until a target, what a stop rule leaves, what early ends cost."""

from __future__ import annotations

import numpy as np
import pytest

from bench import search as bench
from bench.search_engine import Found, early_rows, tune_rows
from clipq_ray.acquisition import Candidates
from clipq_ray.aim import LADDER
from clipq_ray.plan import Theta
from clipq_ray.search import Trial


def trial(step: int, error: float, *, seconds: float = 1.0, images: int = 2000, bound: bool = False) -> Trial:
    return Trial(
        "a", step, "start", step / 100, 3, images, error, 1.0, 100, 0.5, 8.0, seconds, "here", bound=bound
    )


TRIALS = [trial(0, 0.5), trial(1, 0.2), trial(2, 0.3), trial(3, 0.1)]


@pytest.mark.parametrize(("error", "count"), [(0.5, 1), (0.45, 2), (0.2, 2), (0.15, 4), (0.1, 4)])
def test_evaluations_are_counted_until_the_target_is_reached(error: float, count: int) -> None:
    assert bench.needed(TRIALS, 2.0, error - 2.0 * 0.5) == count / bench.EVALUATIONS


def test_what_is_not_reached_counts_as_twice_all() -> None:
    assert bench.needed(TRIALS, 2.0, -10.0) == bench.NEVER == 2.0


def test_random_search_draws_every_point_at_most_once_and_the_same_for_a_seed() -> None:
    points = {Theta(p / 100, 3): trial(p, 0.1) for p in range(90)}
    table = bench.Table("a", 400, points, Candidates(tuple(points), np.zeros(90), np.zeros(90)))
    drawn = bench.drawn(table, 1)
    assert len({one.theta for one in drawn}) == bench.EVALUATIONS
    assert drawn == bench.drawn(table, 1) != bench.drawn(table, 2)


def test_the_stop_rule_keeps_what_comes_before_it_and_loses_what_comes_behind() -> None:
    points = {one.theta: one for one in TRIALS}
    table = bench.Table("a", 400, points, Candidates(tuple(points), np.zeros(4), np.zeros(4)))
    gains = [None, None, 0.3, 0.05, *[0.0] * (bench.EVALUATIONS - 4)]
    rows = {row.name: row.value for row in bench.stopped([table], [(TRIALS, gains)], 0.1, "x")}
    assert rows["x/stop0.1/evaluations"] == 3 / bench.EVALUATIONS
    assert rows["x/stop0.1/objective_lost"] == pytest.approx(400 * (0.2 - 0.1))
    assert len(LADDER) == 3


def test_overhead_is_what_ray_takes_longer_over_the_evaluations_own_time() -> None:
    local, on_ray = Found({"a": TRIALS}, 5.0), Found({"a": TRIALS}, 5.2)
    rows = {row.name.rpartition("/")[2]: row.value for row in tune_rows([(local, on_ray)])}
    assert rows["tune_overhead"] == pytest.approx(100 * 0.2 / 4.0)
    assert rows["evaluations"] == 4


def test_early_ends_are_scored_by_images_and_by_the_objective_that_is_reached() -> None:
    ended = [TRIALS[0], trial(1, 0.15, images=500, bound=True), TRIALS[2], trial(3, 0.12)]
    rows = {
        row.name.rpartition("/")[2]: row.value
        for row in early_rows(Found({"a": TRIALS}, 4.0), Found({"a": ended}, 3.0))
    }
    assert rows["images_over_whole"] == 6500 / 8000
    assert rows["bounds"] == 1
    assert rows["objective_lost"] == pytest.approx(2000 * 0.02)
