"""Promises of a training's pruning rates: they end at the plan's, or where the file has the size that was asked for."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from torch import Tensor

from clipq_ray.plan import LayerPlan, Plan, Share, Theta
from clipq_ray.rates import LEAST, MOST, STEP, Held, Ramp, Rates

PLAN = Plan((LayerPlan("a", Theta(0.5, 2), Share(1, 2)), LayerPlan("b", Theta(0.9, 3), Share(4, 3))))
RAMP = Ramp((0.1, 0.9), 0.5)


def nonzeros(weights: Mapping[str, Tensor], plan: Plan) -> int:
    """A file of one byte per weight that is kept, of 1,000 per layer."""
    return round(sum(1000 * (1 - layer.theta.p) for layer in plan.layers))


def settled(asked: int, epochs: int = 40) -> Rates:
    """Rates that followed a size over a schedule."""
    rates = Rates(PLAN, None, Held(asked, nonzeros))
    for epoch in range(1, epochs + 1):
        if rates.follows(epoch / epochs):
            rates.scale = rates.scale_for({})
        rates.move(epoch / epochs)
    return rates


def test_rates_rise_from_the_first_to_the_plans_and_stay() -> None:
    assert RAMP.rates(PLAN, 0.0) == [0.1, 0.9]
    assert RAMP.rates(PLAN, 0.25) == pytest.approx([0.5 - 0.4 / 8, 0.9])
    assert RAMP.rates(PLAN, 0.5) == RAMP.rates(PLAN, 1.0) == [0.5, 0.9]


def test_without_a_ramp_and_a_size_they_are_the_plans_to_the_bit() -> None:
    rates = Rates(PLAN)
    assert rates.now == [0.5, 0.9]
    assert not rates.move(0.7)
    assert not rates.follows(0.7)
    assert rates.scale_for({}) == 1.0
    assert rates.plan == PLAN


@pytest.mark.parametrize("asked", [450, 570, 600, 640, 750])
def test_a_size_is_met_by_all_layers_alike(asked: int) -> None:
    rates = settled(asked)
    assert nonzeros({}, rates.plan) == pytest.approx(asked, rel=0.002)
    first, second = rates.now
    assert (1 - first) / (1 - second) == pytest.approx(5.0)
    assert [layer.theta.b for layer in rates.plan.layers] == [2, 3]


@pytest.mark.parametrize(("asked", "scale"), [(10, LEAST), (100_000, MOST)])
def test_a_size_that_is_out_of_reach_is_left_to_another_plan(asked: int, scale: float) -> None:
    rates = settled(asked)
    assert rates.scale == pytest.approx(scale)
    assert all(0.0 <= p < 1.0 for p in rates.now)


def test_weights_are_scaled_no_further_than_to_all_of_every_layer() -> None:
    mild = Plan((LayerPlan("a", Theta(0.2, 2), Share(1, 2)), LayerPlan("b", Theta(0.4, 3), Share(4, 3))))
    rates = Rates(mild, None, Held(100_000, nonzeros))
    for _ in range(30):
        rates.scale = rates.scale_for({})
    rates.move(1.0)
    assert (rates.scale, rates.now) == (pytest.approx(1 / 0.6), pytest.approx([0.0, 0.0]))


def test_no_epoch_changes_more_than_training_can_follow() -> None:
    assert Rates(PLAN, None, Held(10, nonzeros)).scale_for({}) == pytest.approx(1 / STEP)
    assert Rates(PLAN, None, Held(10_000, nonzeros)).scale_for({}) == pytest.approx(STEP)


def test_a_size_is_followed_behind_the_ramp_and_not_to_the_very_end() -> None:
    held = Held(600, nonzeros)
    assert [done for done in (0.2, 0.5, 0.7, 0.9, 1.0) if Rates(PLAN, RAMP, held).follows(done)] == [
        0.5,
        0.7,
        0.9,
    ]
    late = Rates(PLAN, Ramp((0.1, 0.9), 0.8), held)
    assert [done for done in (0.2, 0.5, 0.7, 0.9, 1.0) if late.follows(done)] == [0.9]


def test_a_training_that_is_cut_off_on_the_way_up_has_the_rates_that_were_planned() -> None:
    rates = Rates(PLAN, RAMP, Held(600, nonzeros), done=0.1)
    assert rates.now != [layer.theta.p for layer in PLAN.layers]
    assert rates.plan == PLAN


def test_rates_of_a_checkpoint_are_those_that_it_was_written_with() -> None:
    rates = settled(640)
    assert Rates(PLAN, None, Held(640, nonzeros), done=1.0, scale=rates.scale).now == rates.now
