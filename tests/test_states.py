"""The tensors of a network: into a network that asks for versions of its state, to a store and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from clipq_ray.errors import FormatError
from clipq_ray.states import WEIGHTS, put_state, read_state, write_state
from clipq_ray.storage import Store


def test_a_network_whose_state_has_versions_takes_what_was_stored(tmp_path: Path) -> None:
    store = Store(tmp_path)
    trained = torchvision.models.mnasnet0_5(weights=None)
    write_state(store, WEIGHTS, trained.state_dict())
    other = torchvision.models.mnasnet0_5(weights=None)
    put_state(other, read_state(store))
    for name, value in trained.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@pytest.mark.parametrize(
    "state", [{}, {"weight": torch.zeros(2, 3)}, {"weight": torch.zeros(3, 3), "bias": torch.zeros(3)}]
)
def test_tensors_of_another_network_are_refused(state: dict[str, torch.Tensor]) -> None:
    with pytest.raises(RuntimeError):
        put_state(nn.Linear(3, 2), state)


def test_a_damaged_object_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(WEIGHTS, b"none")
    with pytest.raises(FormatError, match=f"{WEIGHTS}, got .*; remove {store.uri} and run again"):
        read_state(store)


def test_where_an_object_is_lost_its_stage_is_to_be_removed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(FormatError, match=f"{WEIGHTS}, got no object; remove {store.uri} and run again"):
        read_state(store)
