"""What a stage's key follows: a fixed number of workers makes the same bytes, a number that may change does not."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from clipq_ray import precision
from clipq_ray.config import make
from clipq_ray.data import Data, from_loaders, open_data
from clipq_ray.identity import of_data, of_network, of_run, of_start, stage_key, versions
from clipq_ray.source import Source

DATA = from_loaders(DataLoader(TensorDataset(torch.rand(20, 1, 2, 2), torch.arange(20) % 2)))


def key(**options: Any) -> str:
    return stage_key("finetune", make(workers=4, **options), {})


def net(seed: int = 0, frozen: str = "") -> nn.Module:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 2))
    for name, one in made.named_parameters():
        one.requires_grad_(name != frozen)
    return made


def decided(module: nn.Module | None, data: Data = DATA, **options: Any) -> dict[str, Any]:
    """What decides a run of a module with its own weights, or of a network that is trained first."""
    source = Source(make(**options), module, data)
    first = source.weights_origin() == "train"
    return of_run(source, data, None if first else source.network().state_dict())


def differing(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}


def test_how_faults_are_met_decides_nothing() -> None:
    assert key() == key(max_failures=0, stall_minutes=1, attempt_hours=1, min_workers=4)


def test_a_number_of_workers_that_may_shrink_is_another_stage() -> None:
    assert len({key(), key(min_workers=1), key(min_workers=2)}) == 3


def test_how_many_train_says_nothing_of_a_search() -> None:
    searches = {stage_key("search", make(workers=count), {}) for count in (1, 4)}
    assert len(searches) == 1
    assert len({stage_key("finetune", make(workers=count), {}) for count in (1, 4)}) == 2


def test_what_auto_means_here_and_which_libraries_compute_are_in_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = key(precision="auto")
    monkeypatch.setattr(precision, "_computes_in_bfloat16", lambda device: device is None)
    without = key(precision="auto")
    monkeypatch.setattr(precision, "_computes_in_bfloat16", lambda device: True)
    assert len({without, key(precision="auto")}) == 2
    assert before in {without, key(precision="auto")}
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: real(name) + "1" * (name == "scipy"))
    assert key(precision="auto") not in {without, before}


def test_another_release_of_what_decodes_images_is_another_stage_and_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, real = key(), importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: real(name) + "1" * (name == "pillow"))
    assert key() != before
    assert versions()["pillow"] == real("pillow") + "1"


def test_a_callers_module_that_computes_something_else_is_another_one() -> None:
    class Net(nn.Linear):
        pass

    class Other(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).tanh()

    Other.__name__, Other.__qualname__ = Net.__name__, Net.__qualname__
    named = [of_network(Source(make(), one)) for one in (Net(3, 2), Net(3, 2), Other(3, 2), Net(3, 4))]
    assert named[0] == named[1]
    assert named[0] not in named[2:]


def test_what_a_callers_module_leaves_untrained_decides_its_run() -> None:
    plain, frozen = decided(net()), decided(net(frozen="1.bias"))
    assert differing(plain, frozen) == {"frozen"}
    assert frozen["frozen"] == ["1.bias"]
    named = decided(None, model="test_identity:half_frozen", weights="random")
    assert named["frozen"] == ["1.weight"]


def half_frozen() -> nn.Module:
    return net(frozen="1.weight")


def test_the_values_that_a_callers_module_is_trained_from_decide_its_run() -> None:
    one, again, other = (decided(net(seed), weights="train") for seed in (0, 0, 1))
    assert one == again
    assert differing(one, other) == {"weights"}


def test_a_network_of_this_package_begins_where_the_seed_says() -> None:
    assert of_start(Source(make(model="lenet5"), None, DATA)) is None
    first, other = (decided(None, model="lenet5", seed=seed) for seed in (0, 1))
    assert differing(first, other) == {"config"}


def test_what_classes_are_called_decides_a_run() -> None:
    renamed = replace(DATA, class_names=("cat", "dog"))
    assert differing(decided(net()), decided(net(), renamed)) == {"class_names"}


def test_gray_images_for_three_channels_are_other_data_than_when_they_were_mirrored() -> None:
    gray, colours = (open_data("digits", input_shape=(channels, 28, 28)) for channels in (1, 3))
    assert of_data(colours)[3:] == ["not mirrored"]
    assert of_data(gray)[3:] == []  # as before
