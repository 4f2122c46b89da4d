"""Units that no output needs leave the file, and the network says the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from clipq_ray import codec, dead_units, models
from clipq_ray.chains import RELU, chains
from clipq_ray.operator import bake, make_plan
from clipq_ray.plan import Share, Theta


def small(*middle: nn.Module, padding: int = 0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        *middle,
        nn.Conv2d(4, 3, 3, padding=padding),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(5),
    )


def made(model: nn.Module) -> tuple[nn.Module, dict[str, codec.CodedLayer], torch.Tensor]:
    """`model` with quantized weights, its layers, and images."""
    images = torch.randn(8, 1, 10, 10, generator=torch.Generator().manual_seed(1))
    model(images)
    return model, layers_of(model), images


def layers_of(model: nn.Module) -> dict[str, codec.CodedLayer]:
    names = [name for name, value in model.named_parameters() if value.dim() > 1]
    plan = make_plan(model, dict.fromkeys(names, Theta(0.0, 8)))
    shares: dict[str, Share] = {layer.layer: layer.share for layer in plan.layers}
    return {name: codec.coded(one, shares[name]) for name, one in bake(model, plan).items()}


def silence(model: nn.Module, layer: str, *, outgoing: str = "", unit: int = 2) -> None:
    """Make a unit of `layer` say nothing, or with `outgoing`, the next layer's name, be heard by nobody."""
    with torch.no_grad():
        if outgoing:
            model.get_submodule(outgoing).weight[:, unit] = 0  # type: ignore[index]
        else:
            model.get_submodule(layer).weight[unit] = 0  # type: ignore[index]


def checked(model: nn.Module, images: torch.Tensor) -> tuple[int, dict[str, codec.CodedLayer]]:
    """Drop dead units, and hold outputs and layers against the network's."""
    layers = layers_of(model)
    before = model(images)
    found, gone = dead_units.drop(model, layers, images)
    assert torch.allclose(model(images), before, atol=1e-5)
    for name, layer in found.items():
        assert torch.equal(torch.from_numpy(layer.values()), model.get_parameter(name).detach())
    return gone, found


@pytest.mark.parametrize(
    "middle", [(nn.ReLU(),), (nn.MaxPool2d(2),), (nn.MaxPool2d(2), nn.ReLU(), nn.Dropout())]
)
def test_a_unit_that_feeds_nothing_loses_its_weights_and_its_bias(middle: tuple[nn.Module, ...]) -> None:
    model, _, images = made(small(*middle))
    silence(model, "0", outgoing=str(1 + len(middle)))
    gone, found = checked(model.eval(), images)
    assert gone == 1
    assert (found["0.weight"].codes[2] == 0).all()
    assert model.get_parameter("0.bias")[2] == 0
    assert (model.get_parameter("0.bias") != 0).sum() == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_units_of_weights_of_half_the_bits_go_too(dtype: torch.dtype) -> None:
    model, _, images = made(small(nn.ReLU()))
    silence(model.to(dtype), "0", outgoing="2")
    found, gone = dead_units.drop(model.eval(), layers_of(model), images.to(dtype))
    assert gone == 1
    assert (found["0.weight"].codes[2] == 0).all()


@pytest.mark.parametrize("bias", [0.7, -0.7])
@pytest.mark.parametrize("middle", [(nn.ReLU(),), (nn.MaxPool2d(2),)])
def test_a_unit_that_says_the_same_for_every_image_goes_into_the_next_bias(
    middle: tuple[nn.Module, ...], bias: float
) -> None:
    model, _, images = made(small(*middle))
    silence(model, "0")
    with torch.no_grad():
        model.get_parameter("0.bias")[2] = bias
    next_bias = model.get_parameter("2.bias").clone()
    gone, found = checked(model.eval(), images)
    assert gone == 1
    assert (found["2.weight"].codes[:, 2] == 0).all()
    assert model.get_parameter("0.bias")[2] == 0
    silent = bias < 0 and isinstance(middle[0], nn.ReLU)
    assert torch.equal(model.get_parameter("2.bias"), next_bias) is silent


def test_one_dead_unit_makes_others_dead_and_all_go() -> None:
    model, _, images = made(small(nn.ReLU()))
    with torch.no_grad():
        model.get_parameter("2.weight")[1] = 0  # says its bias, to the flattened map's part of the last layer
        kept = model.get_parameter("2.weight").clone()
        kept[[0, 2], 3] = 0  # and was the only one that heard unit 3 of the first
        model.get_parameter("2.weight").copy_(kept)
    gone, _ = checked(model.eval(), images)
    assert gone == 2
    assert model.get_parameter("0.bias")[3] == 0


def test_where_zeros_are_padded_a_constant_stays_and_silence_goes() -> None:
    model, _, images = made(small(nn.ReLU(), padding=1))
    silence(model, "0")
    with torch.no_grad():
        model.get_parameter("0.bias")[2] = 0.5
    assert checked(model.eval(), images)[0] == 0
    with torch.no_grad():
        model.get_parameter("0.bias")[2] = -0.5
    assert checked(model, images)[0] == 1


class Branched(nn.Module):
    """The first layer's output is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(100, 6), nn.Linear(6, 6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.first(images.flatten(1)).relu()
        return self.second(x) + x


class Twice(Branched):
    """The second layer is used twice."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.second(self.second(self.first(images.flatten(1))))


class Untraceable(Branched):
    """Control flow on values."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.first(images.flatten(1))
        return self.second(x if x.sum() > 0 else -x)


class Auxiliary(Branched):
    """The first layer's output is used twice in training, once in use."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(6, 6)

    def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        x = self.first(images.flatten(1)).relu()
        return (self.second(x), self.aux(x)) if self.training else self.second(x)


class Shortcut(Branched):
    """The first layer's output is used once in training, twice in use."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.first(images.flatten(1)).relu()
        return self.second(x) if self.training else self.second(x) + x


@pytest.mark.parametrize(("kind", "units"), [(Auxiliary, 1), (Shortcut, 0)])
@pytest.mark.parametrize("training", [True, False])
def test_a_network_is_followed_as_it_is_used(
    kind: Callable[[], nn.Module], units: int, training: bool
) -> None:
    model, layers, images = made(kind())
    silence(model, "first", outgoing="second")
    layers, before = layers_of(model), model.eval()(images)
    assert len(chains(model.train(training), RELU, layers)) == units
    found, gone = dead_units.drop(model, layers, images)
    assert model.training is training
    assert gone == units
    assert torch.allclose(model.eval()(images), before, atol=1e-5)
    assert not found["first.weight"].codes[2].any() or not units


@pytest.mark.parametrize("kind", [Branched, Twice, Untraceable])
def test_where_something_else_may_hear_it_a_unit_stays(kind: Callable[[], nn.Module]) -> None:
    model, _, images = made(kind())
    silence(model, "first", outgoing="second")
    assert checked(model, images)[0] == 0


@pytest.mark.parametrize(("name", "first", "second"), [("lenet5_caffe", "fc1", "fc2"), ("lenet5_caffe", "conv2", "fc1"), ("lenet_300_100", "fc2", "fc3"), ("lenet5", "conv1", "conv2")])  # fmt: skip
def test_the_lenets_are_followed(name: str, first: str, second: str) -> None:
    torch.manual_seed(0)
    model = models.build(models.architecture(name, 10, {})).eval()
    images = torch.randn(4, 1, 28, 28)
    weight = model.get_submodule(second).weight
    with torch.no_grad():
        weight.view(len(weight), len(model.get_submodule(first).weight), -1)[:, 5] = 0  # type: ignore[arg-type, operator]
    gone, found = checked(model, images)
    assert gone == 1
    assert (found[f"{first}.weight"].codes[5] == 0).all()


def test_units_that_a_kept_head_reads_in_training_stay() -> None:
    model, layers, images = made(Auxiliary())
    silence(model, "first", outgoing="second")
    before = dict(model.state_dict())
    layers = layers_of(model)
    kept = ["first.bias", "second.bias", "aux.weight", "aux.bias"]
    assert len(chains(model, RELU, layers, kept[:2])) == 1
    assert chains(model, RELU, layers, kept) == []
    assert dead_units.drop(model, layers, images, kept) == (layers, 0)
    assert model.training
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
