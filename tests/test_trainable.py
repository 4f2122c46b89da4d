"""A network as it is trained: in channels last where it takes that, and with the batch norms that a user froze as they were."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from test_finetune import PLAN, Killed, network, run, same, schedule, trainer
from torch import Tensor, nn

from clipq_ray.checkpoints import Checkpoints
from clipq_ray.operator import make_plan
from clipq_ray.plan import Theta
from clipq_ray.storage import Store
from clipq_ray.trainable import FAST, PLAIN, takes_fast, training_mode


class Viewing(nn.Module):
    """Flattens by `view`, which activations in channels last do not take."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 6, 3, padding=1), nn.Linear(6 * 64, 4)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.conv(images)).view(-1, 6 * 64))
        return out


class Deep(nn.Module):
    """A 3-D convolution, whose weights have no such layout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv3d(1, 4, (1, 3, 3), padding=(0, 1, 1)), nn.Linear(4 * 64, 4)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.conv(images[:, :, None])).flatten(1))
        return out


class Drawing(nn.Module):
    """Drops a layer by Python's random numbers and adds noise by numpy's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 6, 3, padding=1), nn.Linear(6 * 64, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images)
        if self.training and random.random() < 0.5:
            x = x * np.random.rand()
        out: Tensor = self.head(torch.relu(x).flatten(1))
        return out


@pytest.mark.parametrize("kind", [Viewing, Deep])
def test_a_network_that_takes_no_channels_last_is_trained_all_the_same(
    kind: type[nn.Module], tmp_path: Path
) -> None:
    model = network(kind)
    plan = make_plan(model, {"conv.weight": Theta(0.4, 3), "head.weight": Theta(0.5, 2)})
    made = trainer(tmp_path, model, plan)
    assert made.layout == PLAIN
    losses = [row["loss"] for row in run(made)]
    assert losses[-1] < losses[0]


def test_others_are_trained_in_channels_last_and_looking_leaves_them_as_they_were(tmp_path: Path) -> None:
    before = network()
    made = trainer(tmp_path, model := network())
    assert made.layout == FAST
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr, operator]
    assert same(model, before)
    assert all(one.grad is None for one in model.parameters())


def test_an_error_of_the_networks_own_comes_again_from_training(tmp_path: Path) -> None:
    model = network()
    model.head = nn.Linear(5, 4)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trainer(tmp_path, model)


def test_what_does_not_fit_in_memory_says_nothing_of_the_layout() -> None:
    def loss() -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert takes_fast(network(), loss)


def test_a_training_goes_on_in_the_layout_that_it_began_in(tmp_path: Path) -> None:
    trainer(tmp_path / "whole")._save()
    tensors, state = Checkpoints(Store(tmp_path / "whole")).latest() or ({}, {})
    assert state["channels_last"]
    Checkpoints(Store(tmp_path / "plain")).save(0, tensors, {**state, "channels_last": False})
    assert trainer(tmp_path / "plain").layout == PLAIN


def test_what_a_network_draws_by_itself_is_the_same_in_a_training_that_was_killed(tmp_path: Path) -> None:
    whole, resumed = network(Drawing), network(Drawing)
    run(trainer(tmp_path / "whole", whole))
    random.seed(1)
    with pytest.raises(Killed):
        run(trainer(tmp_path / "killed", resumed), killed_after=2)
    random.seed(2)
    np.random.seed(2)
    resumed = network(Drawing)
    run(trainer(tmp_path / "killed", resumed))
    assert same(whole, resumed)


def test_batch_norms_that_are_frozen_keep_their_statistics(tmp_path: Path) -> None:
    model = network()
    model.norm.requires_grad_(False)  # type: ignore[union-attr, operator]
    before = {name: value.clone() for name, value in model.norm.state_dict().items()}  # type: ignore[union-attr, operator]
    run(trainer(tmp_path, model, make_plan(model, PLAN), schedule=schedule(epochs=1)))
    for name, value in model.norm.state_dict().items():  # type: ignore[union-attr, operator]
        assert torch.equal(value, before[name]), name
    training_mode(free := network())
    assert free.norm.training
