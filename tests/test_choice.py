"""The choice of one measured point per layer: by lambda, and by a budget of bytes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from test_search import BASE, trial

from clipq_ray.choice import choose, choose_for_bytes
from clipq_ray.plan import Theta
from clipq_ray.search import Trial


def grid(layer: str) -> list[Trial]:
    points = [Theta(p / 20, b) for p in range(20) for b in (2, 3, 4, 6)]
    return [trial(layer, step, theta) for step, theta in enumerate(points)]


TRIALS = {"a": grid("a"), "b": [replace(t, error=t.error * 5) for t in grid("b")]}


@pytest.mark.parametrize("tradeoff", [0.0, 0.3, 2.0, 1e6])
def test_the_choice_is_the_best_measured_point_of_every_layer(tradeoff: float) -> None:
    chosen = choose(TRIALS, tradeoff)
    assert chosen.tradeoff == tradeoff
    for layer, points in TRIALS.items():
        best = min(point.error - tradeoff * point.saved for point in points)
        assert chosen.trials[layer] in points
        assert chosen.trials[layer].objective(tradeoff) == best
    assert chosen.bytes == sum(t.bytes for t in chosen.trials.values())


def test_of_equal_points_the_smaller_then_the_earlier_is_chosen() -> None:
    points = [replace(BASE, step=step, bytes=size) for step, size in enumerate((9, 7, 7))]
    assert choose({"a": points}, 0.0).trials["a"] is points[1]


@pytest.mark.parametrize("budget", [1_000, 2_000, 4_000, 8_000])
def test_a_budget_is_met_with_the_smallest_lambda(budget: int) -> None:
    choice = choose_for_bytes(TRIALS, budget)
    assert choice.bytes <= budget
    assert (
        choose(TRIALS, choice.tradeoff).bytes <= choice.bytes
    )  # what a jump between lambdas leaves is spent
    assert choose(TRIALS, choice.tradeoff * 0.999).bytes > budget


@pytest.mark.parametrize(
    ("budget", "taken"), [(1000, 1000), (1001, 1000), (1400, 1000), (1415, 2000), (1999, 2000)]
)
def test_where_points_leave_a_gap_the_nearer_side_by_ratio_is_taken_if_that_is_asked_for(
    budget: int, taken: int
) -> None:
    gap = {"a": [replace(BASE, step=0, error=0.5, bytes=1000, saved=0.9), replace(BASE, step=1, error=0.1, bytes=2000, saved=0.8)]}  # fmt: skip
    assert choose_for_bytes(gap, budget, nearest=True).bytes == taken
    assert choose_for_bytes(gap, budget).bytes == 1000


@pytest.mark.parametrize("budget", [1, 10**6])
def test_outside_of_all_points_there_is_no_nearer_side(budget: int) -> None:
    assert choose_for_bytes(TRIALS, budget, nearest=True) == choose_for_bytes(TRIALS, budget)


def test_a_budget_above_all_takes_next_to_no_tradeoff() -> None:
    assert choose_for_bytes(TRIALS, 10**9).tradeoff == pytest.approx(1e-4, rel=1e-3)


def test_a_budget_below_all_gives_the_smallest_choice() -> None:
    smallest = sum(min(point.bytes for point in points) for points in TRIALS.values())
    assert choose_for_bytes(TRIALS, smallest - 1).bytes == smallest


def test_a_bound_is_chosen_at_no_lambda_and_fills_no_budget() -> None:
    bound = replace(TRIALS["a"][0], error=0.0, bytes=1, saved=0.5, bound=True)
    trials = {"a": [*TRIALS["a"], bound], "b": TRIALS["b"]}
    for tradeoff in (0.0, 1.0, 100.0):
        assert choose(trials, tradeoff) == choose(TRIALS, tradeoff)
    assert choose_for_bytes(trials, 900) == choose_for_bytes(TRIALS, 900)


def test_a_budget_that_no_lambda_spends_goes_to_the_losses_where_errors_tie() -> None:
    """Of a mild size few of the images that are scored tell points apart."""
    points = [
        replace(BASE, step=step, error=0.01, loss=loss, bytes=size, saved=1 - size / 10_000)
        for step, (size, loss) in enumerate(((1000, math.nan), (2000, 0.1), (3000, 0.05), (4000, math.nan)))
    ]
    assert [choose_for_bytes({"a": points}, budget).bytes for budget in (1500, 2500, 10**6)] == [
        1000,
        2000,
        3000,
    ]
    # where a lambda decides, losses do not
    better = replace(points[0], step=9, error=0.001, bytes=5000, saved=0.5)
    assert choose_for_bytes({"a": [*points, better]}, 4999).bytes == 1000
