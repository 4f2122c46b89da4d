"""What is changed where no output may see it: if one does, or none can be compared, all is as it was."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from torch import nn

from clipq_ray.chains import changed

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
