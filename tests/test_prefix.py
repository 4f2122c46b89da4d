"""Evaluations of one layer on kept values give what evaluations of the whole network give, whatever the network looks like."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clipq_ray import models, prefix
from clipq_ray.data import Preprocessing
from clipq_ray.data.tensors import TensorSplit
from clipq_ray.evaluate import evaluate
from clipq_ray.prefix import LayerScores

PLENTY = 1 << 30
CPU = torch.device("cpu")


def images(side: int, n: int = 40, channels: int = 3) -> TensorSplit:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (n, channels, side, side), dtype=np.uint8)
    way = Preprocessing((channels, side, side), None, (0.5,) * channels, (0.3,) * channels)
    return TensorSplit(pixels, random.integers(0, 5, n), way)


class Branches(nn.Module):
    """Two branches that join, a shortcut, and ReLUs in place, as in Inception and ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = (
            nn.Conv2d(3, 6, 3, padding=1),
            nn.Conv2d(6, 6, 1),
            nn.Conv2d(6, 6, 3, padding=1),
        )
        self.norm, self.relu, self.end = nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Linear(12, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        seen = self.relu(self.norm(self.stem(pixels)))
        joined = torch.cat([self.relu(self.left(seen)), self.right(seen) + seen], dim=1)
        scores: Tensor = self.end(joined.mean(dim=(2, 3)))
        return scores


class Twice(nn.Module):
    """One convolution that is used in two places, and a linear layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.end = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1), nn.Linear(3, 5)
        self.same = self.end

    def forward(self, pixels: Tensor) -> Tensor:
        seen = self.first(torch.relu(self.again(self.first(pixels)))).mean(dim=(2, 3))
        scores: Tensor = self.end(seen) + self.same(seen * seen)
        return scores


class Looks(nn.Module):
    """Looks at its values, which no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.end = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        seen = self.first(pixels).mean(dim=(2, 3))
        if float(seen.sum()) > 0:
            seen = -seen
        scores: Tensor = self.end(seen)
        return scores


class Overwrites(nn.Module):
    """Adds into a value that does not depend on the second convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.end = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Linear(4, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        kept = self.first(pixels)
        kept.add_(self.second(pixels))
        scores: Tensor = self.end(kept.mean(dim=(2, 3)))
        return scores


def weights_of(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.dim() > 1]


def assert_equal(model: nn.Module, split: TensorSplit, limit: int = PLENTY, every: int = 1) -> LayerScores:
    """For some values of each layer, kept and whole evaluations are the same."""
    scores = LayerScores(model, split, 16, CPU, limit)
    for name in weights_of(model)[::every]:
        parameter = model.get_parameter(name)
        before = parameter.detach().clone()
        for factor in (0.5, -1.0):
            with torch.no_grad():
                parameter.mul_(factor)
            found, expected = scores.evaluate((name,)), evaluate(model, split, batch_size=16)
            np.testing.assert_array_equal(found.predictions, expected.predictions)
            assert found.loss == pytest.approx(expected.loss, abs=1e-5)
            assert (found.n, found.top1, found.top5) == (expected.n, expected.top1, expected.top5)
        with torch.no_grad():
            parameter.copy_(before)
    return scores


@pytest.mark.parametrize("make", [Branches, Twice, Looks, Overwrites])
def test_kept_values_change_no_evaluation(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    assert_equal(make().eval(), images(12))


@pytest.mark.parametrize(
    ("name", "side", "every"),
    [
        ("resnet20", 32, 4),
        ("lenet5", 28, 1),
        ("googlenet", 64, 20),
        ("mobilenet_v2", 64, 20),
        pytest.param("vit_b_16", 224, 25, marks=pytest.mark.models),
    ],
)
def test_registered_networks_are_cut_and_agree(name: str, side: int, every: int) -> None:
    torch.manual_seed(0)
    model = models.build(models.architecture(name, 5, {})).eval()
    split = images(side, 8 if side > 64 else 20, 1 if name == "lenet5" else 3)
    names = [one for one in weights_of(model) if "aux" not in one]
    graph = prefix.traced(model)
    assert graph is not None
    sample = split.batch(torch.arange(2), None)[0]
    for layer in names[::every]:
        found = prefix.cut(graph, model, (layer,), sample)
        assert found is not None
        with torch.inference_mode():
            expected = model(sample)
            assert torch.allclose(found.behind(found.before(sample)), expected, rtol=0, atol=1e-5)
    assert_equal(model, split, every=3 * every)


def test_a_cut_holds_only_what_is_behind_the_layer() -> None:
    model = Branches().eval()
    graph = prefix.traced(model)
    assert graph is not None
    sample = images(12).batch(torch.arange(4), None)[0]
    last = prefix.cut(graph, model, ("end.weight",), sample)
    assert last is not None
    with torch.inference_mode():
        assert [tuple(value.shape) for value in last.before(sample)] == [(4, 12)]


@pytest.mark.parametrize("limit", [0, 1, 12 * 4 * 20])
def test_batches_beyond_the_limit_are_evaluated_whole(limit: int) -> None:
    scores = assert_equal(Branches().eval(), images(12), limit)
    assert len(scores._kept) < 3


def test_networks_that_no_graph_holds_keep_nothing() -> None:
    assert prefix.traced(Looks()) is None
    model = Overwrites().eval()
    graph = prefix.traced(model)
    assert graph is not None
    sample = images(12).batch(torch.arange(4), None)[0]
    assert prefix.cut(graph, model, ("second.weight",), sample) is None


class Narrow(nn.Conv2d):
    """A convolution that has memory for 16 images and no more."""

    def forward(self, input: Tensor) -> Tensor:
        if len(input) > 16:
            raise torch.OutOfMemoryError("pretended")
        return super().forward(input)


@pytest.mark.parametrize("layer", ["first.weight", "end.weight"])
def test_a_batch_that_does_not_fit_is_evaluated_whole_and_in_parts(layer: str) -> None:
    model = Looks().eval()
    model.forward = lambda pixels: model.end(model.first(pixels).mean(dim=(2, 3)))  # type: ignore[method-assign]
    model.first = Narrow(3, 4, 3)
    split = images(12)
    found = LayerScores(model, split, 40, CPU, PLENTY).evaluate((layer,))
    np.testing.assert_array_equal(found.predictions, evaluate(model, split, batch_size=16).predictions)


def test_parameters_that_are_views_of_one_memory_change_together() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1),
        nn.ReLU(),
        nn.Conv2d(3, 3, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 5),
    )
    model[2].weight = nn.Parameter(model[0].weight.data)  # type: ignore[union-attr]
    assert_equal(model.eval(), images(12))


def test_kept_bytes_are_those_of_the_memory_behind_the_values() -> None:
    whole = torch.zeros(8, 4)
    assert (
        prefix.size((whole, whole[0], (whole.t(), [torch.zeros(2)]), {"x": torch.zeros(1)}, 3)) == 128 + 8 + 4
    )


def test_tracing_leaves_modes_as_they_were() -> None:
    model = Branches().train()
    model.norm.eval()
    assert prefix.traced(model) is not None
    assert model.training
    assert not model.norm.training
