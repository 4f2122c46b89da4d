"""The front of the whole network and the sum of single errors against all layers at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_choice import TRIALS
from test_search import BASE, images
from torch import nn

from clipq_ray import together
from clipq_ray.choice import choose
from clipq_ray.operator import make_plan
from clipq_ray.plan import Theta


def test_no_point_of_the_front_is_beaten_and_every_choice_of_a_lambda_is_matched() -> None:
    points = together.front(TRIALS, 0.01)
    assert len(points) > 5
    sizes, errors = [p.bytes for p in points], [p.added_error_points for p in points]
    assert sizes == sorted(set(sizes))
    assert errors == sorted(set(errors), reverse=True)
    for tradeoff in (0.1, 0.5, 2.0, 10.0):
        choice = choose(TRIALS, tradeoff)
        error = 100 * together.added(choice, 0.01)
        assert any(p.bytes <= choice.bytes and p.added_error_points <= error + 1e-9 for p in points)


def test_what_the_layers_add_is_their_errors_less_the_originals() -> None:
    points = {
        name: [replace(BASE, layer=name, error=error)] for name, error in {"a": 0.25, "b": 0.125}.items()
    }
    assert together.added(choose(points, 1.0), 0.0625) == pytest.approx(0.25)


def test_all_layers_at_once_are_the_networks_own_error_with_the_plan() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    plan = make_plan(model, {"0.weight": Theta(0.9, 2), "3.weight": Theta(0.9, 2)})
    points = {layer: [replace(BASE, layer=layer)] for layer in ("0.weight", "3.weight")}
    found = together.interaction(
        model, plan, choose(points, 1.0), images(), 0.5, batch_size=16, device=torch.device("cpu")
    )
    split = images()
    pixels, labels = split.batch(torch.arange(60), None)
    with torch.no_grad():  # the model holds the quantized weights now
        wrong = (model(pixels).argmax(dim=1) != labels).double().mean()
    assert found.together_percent == pytest.approx(100 * float(wrong))
    assert found.together_points == pytest.approx(100 * float(wrong) - 50)
    assert (found.images, found.sum_points) == (60, pytest.approx(100 * (0.25 - 0.5) * 2))
