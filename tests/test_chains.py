"""What is changed where no output may see it: if one does, or none can be compared, all is as it was."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from torch import nn

from clipq_ray.chains import BY_CHANNEL, FLAT, MAX_POOL, RELU, chains, changed

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def raised(model: nn.Module, name: str, by: float) -> bool:
    """Whether a change of one bias stands; without it the network is as it was."""
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def change() -> bool:
        model.get_parameter(name).add_(by)
        return True

    stands = changed(model, IMAGES, change)
    now = model.state_dict()
    assert stands or all(torch.allclose(now[key], before[key], 0, 0, equal_nan=True) for key in before)
    return stands


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_where_outputs_are_no_numbers_nothing_is_changed(score: float) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
    assert raised(model, "1.bias", 1e-9)
    with torch.no_grad():
        model.get_parameter("1.bias")[0] = score
    assert not raised(model, "1.bias", 1e-9)


def test_a_network_whose_state_has_versions_is_as_it_was_too() -> None:
    torch.manual_seed(0)
    model = torchvision.models.mnasnet0_5(weights=None, num_classes=5)
    assert not raised(model, "classifier.1.bias", 5.0)


def between(first: nn.Module, *more: nn.Module) -> int:
    """How many pairs of layers follow each other in a straight line."""
    model = nn.Sequential(first, *more)
    return len(chains(model, (*RELU, *MAX_POOL, *FLAT, *BY_CHANNEL), list(dict(model.named_parameters()))))


def test_units_are_followed_where_they_lie_in_the_dimension_that_the_next_layer_reads() -> None:
    conv, flat = nn.Conv2d(3, 4, 3), nn.Flatten()
    assert between(conv, nn.ReLU(), nn.MaxPool2d(2), flat, nn.Linear(4 * 9, 5)) == 1
    assert between(conv, nn.ReLU(), nn.Conv2d(4, 5, 3)) == 1
    assert between(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 5)) == 1


def test_units_of_a_linear_layer_on_the_last_of_several_dimensions_are_no_channels() -> None:
    assert (
        between(nn.Linear(4, 8), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)) == 0
    )  # (n, 2, 4): features of tokens
    assert between(nn.Linear(4, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)) == 1  # (n, 4): flat already
    assert between(nn.Linear(4, 8), nn.MaxPool1d(3, 1, 1), nn.Linear(8, 3)) == 0
    assert between(nn.Linear(4, 8), nn.Conv1d(8, 3, 1)) == 0
    assert between(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Linear(8, 3)) == 0  # over the width
