"""What a constructor makes is counted as it is made, in memory or without."""

from __future__ import annotations

import threading

import pytest
import torch
from refusals import refused
from torch import nn

from clipq_ray import models
from clipq_ray.errors import ModelError


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_made_is_counted_and_what_is_drawn_into_it_is_not(device: str) -> None:
    with torch.device(device), models.Limit(4, 5 * 4 + 4 + 4 * 2 + 2) as limit:
        nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))
    assert not limit.exceeded
    for tensors, elements in ((3, 1000), (4, 33)):
        limit = models.Limit(tensors, elements)
        words = f"at most {tensors} tensors and {elements:,} elements"
        with refused(ModelError, match=words), torch.device(device), limit:
            nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))
        assert limit.exceeded


def test_a_constructor_is_stopped_before_it_draws() -> None:
    state = torch.get_rng_state()
    with refused(ModelError, match="elements"), models.Limit(10, 1000):
        nn.Linear(1000, 1000)
    assert torch.equal(torch.get_rng_state(), state)


def test_other_threads_may_make_what_they_like() -> None:
    made: list[nn.Module] = []
    with models.Limit(1, 1):
        other = threading.Thread(target=lambda: made.append(nn.Linear(30, 30)))
        other.start()
        other.join()
    assert len(made) == 1


@pytest.mark.parametrize(
    "name", ["lenet5", "resnet20", "mobilenet_v3_small", "googlenet", "squeezenet1_1", "swin_t"]
)
def test_little_more_is_made_than_what_is_in_the_state(name: str) -> None:
    def build() -> nn.Module:
        return models.build(models.architecture(name, 10, {}))

    with torch.device("meta"):
        state = build().state_dict().values()
        elements = sum(value.numel() for value in state)
        with models.Limit(len(state) * 5 // 4, elements * 11 // 10):
            build()
        with refused(ModelError, match="got a larger one"), models.Limit(10**6, elements // 2):
            build()
        with refused(ModelError, match="got a larger one"), models.Limit(len(state) // 2, 10**9):
            build()
