"""Units are sorted so that the file is smaller, and the network says the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_dead_units import Branched, layers_of
from torch import nn

from clipq_ray import codec, unit_order


def chain(*middle: nn.Module, groups: int = 1) -> nn.Module:
    """Six units between two convolutions, and as many times four between the second and a linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, groups=groups),
        *middle,
        nn.Conv2d(6, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(5),
    )


IMAGES = torch.randn(8, 2, 10, 10, generator=torch.Generator().manual_seed(1))


def ready(model: nn.Module) -> nn.Module:
    """With weights of which later units have more, and norms that differ by unit."""
    model(IMAGES)
    with torch.no_grad():
        first = model.get_parameter("0.weight")
        for unit in range(len(first)):
            first[unit].view(-1)[unit + 1 :] = 0
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for number, value in enumerate(
                    (module.weight, module.bias, module.running_mean, module.running_var)
                ):
                    if value is not None:
                        value.copy_(torch.arange(1.0, len(value) + 1) / (number + 3))
    return model.eval()


def checked(model: nn.Module) -> tuple[dict[str, codec.CodedLayer], dict[str, codec.CodedLayer]]:
    """Sort, and hold outputs and layers against the network's; the layers before and after."""
    layers = layers_of(model)
    before = model(IMAGES)
    found = unit_order.sort(model, layers, IMAGES)
    assert torch.allclose(model(IMAGES), before, atol=1e-5)
    for name, layer in found.items():
        assert torch.equal(torch.from_numpy(layer.values()), model.get_parameter(name).detach())
    return layers, found


def counts(layer: codec.CodedLayer) -> list[int]:
    return [int(np.count_nonzero(row)) for row in layer.codes]


@pytest.mark.parametrize(
    "middle",
    [
        (nn.ReLU(),),
        (nn.BatchNorm2d(6), nn.ReLU6()),
        (nn.ReLU(), nn.BatchNorm2d(6, affine=False), nn.AvgPool2d(2)),
        (nn.MaxPool2d(2), nn.SiLU(), nn.Dropout2d()),
    ],
)
def test_units_with_most_weights_come_first(middle: tuple[nn.Module, ...]) -> None:
    before, after = checked(ready(chain(*middle)))
    assert counts(before["0.weight"]) == [1, 2, 3, 4, 5, 6]
    assert counts(after["0.weight"]) == [6, 5, 4, 3, 2, 1]


def test_units_that_are_flattened_keep_what_belongs_to_them_together() -> None:
    model = ready(chain(nn.ReLU()))
    with torch.no_grad():
        model.get_parameter("2.weight")[0] = 0
    name = f"{len(list(model.children())) - 1}.weight"
    before, after = checked(model)
    assert counts(after["2.weight"])[-1] == 0
    parts = before[name].codes.reshape(5, 4, -1)
    np.testing.assert_array_equal(after[name].codes.reshape(5, 4, -1)[:, 3], parts[:, 0])


def test_equal_units_stay_where_they_are_and_nothing_moves_twice() -> None:
    model = ready(chain(nn.ReLU()))
    _, once = checked(model)
    again = unit_order.sort(model, once, IMAGES)
    assert all(again[name] is once[name] for name in once)


@pytest.mark.parametrize("model", [chain(nn.ReLU(), groups=2), chain(nn.Softmax(1)), Branched()])
def test_units_in_groups_in_branches_and_behind_unknown_modules_stay(model: nn.Module) -> None:
    images = IMAGES if isinstance(model, nn.Sequential) else IMAGES[:, :1]
    model(images)
    layers = layers_of(model.eval())
    first = next(iter(layers))
    assert unit_order.sort(model, layers, images)[first] is layers[first]


def test_where_outputs_would_change_all_is_as_it_was() -> None:
    """A linear layer along the width of a map: its inputs are as many as there are units, and are none of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Linear(8, 5), nn.Flatten(), nn.LazyLinear(3))
    model(IMAGES)
    with torch.no_grad():
        model.get_parameter("0.weight")[:4, 1] = 0
    layers = layers_of(model.eval())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = unit_order.sort(model, layers, IMAGES)
    assert all(found[name] is layers[name] for name in layers)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
