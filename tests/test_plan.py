"""Plans are values: checked when made, JSON in and out."""

from __future__ import annotations

import dataclasses

import pytest
from refusals import refused

from clipq_ray.errors import ConfigError, FormatError
from clipq_ray.plan import LayerPlan, Plan, Share, Theta

PLAN = Plan(
    (
        LayerPlan("conv1.weight", Theta(0.6, 2), Share(1, 2)),
        LayerPlan("fc.weight", Theta(0.123456789, 8), Share(0, 255)),
    )
)


def test_a_plan_comes_back_from_its_json() -> None:
    assert Plan.from_json(PLAN.to_json()) == PLAN
    assert Plan.from_json(PLAN.to_json().encode()) == PLAN


def test_the_same_plan_is_the_same_json() -> None:
    assert Plan.from_json(PLAN.to_json()).to_json() == PLAN.to_json()


def test_the_order_of_layers_is_kept() -> None:
    turned = Plan(PLAN.layers[::-1])
    assert [layer.layer for layer in Plan.from_json(turned.to_json()).layers] == ["fc.weight", "conv1.weight"]


def test_a_plan_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAN.layers = ()  # type: ignore[misc]


@pytest.mark.parametrize("p", [-0.01, 1.0, 1.5, float("nan"), float("inf")])
def test_a_pruning_rate_outside_0_to_1_is_refused(p: float) -> None:
    with pytest.raises(ConfigError, match=r"pruning rate p in \[0, 1\)"):
        Theta(p, 4)


@pytest.mark.parametrize("b", [1, 9, 0, -2, 2.5, True])
def test_a_bit_width_outside_2_to_8_is_refused(b: int) -> None:
    with pytest.raises(ConfigError, match=r"bit width b in 2\.\.8"):
        Theta(0.5, b)


def test_the_limits_of_p_and_b_are_taken() -> None:
    assert [Theta(0.0, 2).intervals, Theta(0.999, 8).intervals] == [3, 255]


def test_a_negative_share_is_refused() -> None:
    with pytest.raises(ConfigError, match="shares of at least 0"):
        Share(-1, 4)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"layers": 3}',
        '{"layers": [1]}',
        '{"layers": [{"layer": "a"}]}',
        '{"layers": [{"layer": "a", "theta": {"p": 0.5}, "share": {"negative": 1, "positive": 2}}]}',
        '{"layers": [{"layer": "a", "theta": {"p": "x", "b": 2}, "share": {"negative": 1, "positive": 2}}]}',
    ],
)
def test_what_is_no_plan_is_a_format_error_of_one_line(text: str) -> None:
    with refused(FormatError, match="expected a plan"):
        Plan.from_json(text)


def test_a_stored_plan_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="bit width"):
        Plan.from_json(PLAN.to_json().replace('"b": 8', '"b": 9'))
