"""The built-in networks are those of the literature and of the published weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from refusals import refused

from clipq_ray import models
from clipq_ray.data import open_data
from clipq_ray.errors import ModelError
from clipq_ray.evaluate import evaluate
from clipq_ray.models import Architecture, apply_weights, read_weights


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("lenet5", 61_706),
        ("lenet5_caffe", 431_080),
        ("lenet_300_100", 266_610),
        ("resnet20", 269_722),
        ("resnet56", 853_018),
        ("resnet110", 1_727_962),
    ],
)
def test_built_in_networks_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    model = models.build(models.architecture(name, None, {}))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("classes", [None, 7])
@pytest.mark.parametrize(
    "name", ["lenet5", "lenet5_caffe", "lenet_300_100", "resnet20", "resnet56", "resnet110"]
)
def test_built_in_networks_take_their_default_input_and_any_number_of_classes(
    name: str, classes: int | None
) -> None:
    model = models.build(models.architecture(name, classes, {})).eval()
    assert model(torch.zeros(2, *models.default_input(name))).shape == (2, classes or 10)


def test_given_weights_fit_their_networks_alone_and_keep_their_bytes(shared: Path) -> None:
    for name in ("resnet20", "resnet56"):
        arch = models.architecture(name, None, {})
        model = models.build(arch)
        state = read_weights(str(shared / "weights" / f"{name}-cifar10.safetensors"), arch)
        assert apply_weights(model, state, name) == []
        assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    with refused(ModelError, match=r"missing none; unexpected layer1\.3"):
        apply_weights(models.build(Architecture("resnet20")), state, "resnet56")


@pytest.mark.slow
def test_the_given_resnet20_scores_at_least_90_percent_on_cifar10(shared: Path) -> None:
    arch = models.architecture("resnet20", None, {})
    model = models.build(arch)
    uri = str(shared / "weights" / "resnet20-cifar10.safetensors")
    assert apply_weights(model, read_weights(uri, arch), uri) == []
    data = open_data(str(shared / "data" / "cifar10"), input_shape=(3, 32, 32), limit_images=1000)
    assert data.test is not None
    result = evaluate(model, data.test.subset(torch.arange(2000)), batch_size=250)
    assert result.top1 >= 0.90
