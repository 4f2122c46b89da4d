"""Folded batch norm and grids: the network gives the same, and what does not fit is left as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clipq_ray import codec, folding, loading

FINE = folding.Precision(128, 64)


def trained(seed: int = 0) -> nn.Sequential:
    """Two convolutions with batch norms that have seen images, and a linear layer."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16, eps=0.5),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    for norm in (model[1], model[4]):
        nn.init.uniform_(norm.weight, 0.5, 1.5)  # type: ignore[arg-type]
        nn.init.normal_(norm.bias)  # type: ignore[arg-type]
    for _ in range(30):
        model(torch.randn(16, 3, 12, 12) + 0.5)
    return model.eval()


def kept_of(model: nn.Module) -> list[str]:
    return [n for n, t in model.state_dict().items() if t.is_floating_point() and t.dim() < 2]


def through_a_file(model: nn.Module, precision: folding.Precision) -> tuple[nn.Module, codec.Packed]:
    """The network as it comes back, and what was packed."""
    grids, norms = folding.on_grids(model, kept_of(model), precision)
    gone = {name for module in norms for name in codec.norm_names(module)}
    plain = {n: t.numpy() for n, t in model.state_dict().items() if n not in gone and t.is_floating_point()}
    tensors: dict[str, Any] = {**plain, **grids}
    packed = codec.Packed({}, tensors, norms)
    return loading.from_bytes(codec.encode(packed), factory=lambda: trained(1)), packed


def distance(model: nn.Module, other: nn.Module, images: Tensor) -> float:
    with torch.inference_mode():
        expected, found = model(images), other(images)
    return float((found - expected).norm() / expected.norm())


def test_finer_grids_come_closer_to_the_same_outputs() -> None:
    model, images = trained(), torch.randn(64, 3, 12, 12) + 0.5
    far = [distance(model, through_a_file(model, one)[0], images) for one in folding.LADDER[::2]]
    far.append(distance(model, through_a_file(model, folding.LADDER[-1])[0], images))
    assert far == sorted(far, reverse=True)
    assert far[0] < 0.6
    assert far[1] < 0.15
    assert far[-1] < 0.02


def test_a_folded_norm_has_no_statistics_and_takes_two_numbers_per_channel() -> None:
    model = trained()
    back, packed = through_a_file(model, FINE)
    assert packed.norms == ("1", "4")
    state = back.state_dict()
    assert state["1.running_mean"].tolist() == [0.0] * 8
    assert state["4.running_var"].tolist() == [1.0] * 16
    (entry,) = [one for one in codec.entries(codec.encode(packed)) if one.members]
    assert entry.bytes < 2.5 * (8 + 16 + 14 + 12)


@pytest.mark.parametrize("variance", [0.0, 5.6e-45])
def test_a_dead_channel_keeps_its_constant_and_spoils_no_grid(variance: float) -> None:
    """A running variance ends at the smallest float32, not at zero."""
    model = trained()
    conv, norm = model[0], model[1]
    with torch.no_grad():
        conv.weight[3], conv.bias[3] = 0.0, 0.25  # type: ignore[index]
        norm.running_mean[3], norm.running_var[3] = 0.25, variance  # type: ignore[index]
    images = torch.randn(16, 3, 12, 12)
    assert "1" in through_a_file(model, FINE)[1].norms
    assert distance(model, through_a_file(model, FINE)[0], images) < 0.02


@pytest.mark.parametrize("value", [float("inf"), 1e6])
def test_a_norm_that_fits_no_grid_is_stored_as_it_is(value: float) -> None:
    model = trained()
    with torch.no_grad():
        model[1].weight[0] = value  # type: ignore[index]
    grids, norms = folding.on_grids(model, kept_of(model), FINE)
    assert norms == ("4",)
    assert not {"1.weight", "1.bias"} & set(grids)


def test_norms_that_share_a_tensor_are_not_folded_and_one_under_two_names_is() -> None:
    model = trained()
    shared = nn.Sequential(model[1], nn.BatchNorm2d(8))
    shared[1].weight = shared[0].weight
    kept = [
        "0.weight",
        "0.bias",
        "0.running_mean",
        "0.running_var",
        "1.bias",
        "1.running_mean",
        "1.running_var",
    ]
    assert folding.on_grids(shared, kept, FINE, shared=["0.weight"])[1] == ()
    twice = nn.Sequential(model[1], model[1])
    names = [f"0.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
    assert folding.on_grids(twice, names, FINE, shared=names)[1] == ("0",)


def test_norms_without_weights_or_statistics_are_left_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.BatchNorm1d(4, track_running_stats=False))
    grids, norms = folding.on_grids(model, kept_of(model), FINE)
    assert norms == ()
    assert set(grids) == {"1.weight", "1.bias"}


def test_only_parameters_of_one_long_side_go_on_grids() -> None:
    model = nn.Module()
    model.register_parameter("gamma", nn.Parameter(torch.randn(4, 1, 1)))
    model.register_parameter("table", nn.Parameter(torch.randn(4, 2)))
    model.register_buffer("buffer", torch.randn(4))
    assert set(folding.on_grids(model, ["gamma", "table", "buffer"], FINE)[0]) == {"gamma"}
    assert folding.on_grids(model, [], FINE) == ({}, ())


def test_a_vector_of_zeros_comes_back_as_zeros() -> None:
    model = nn.Linear(3, 5)
    nn.init.zeros_(model.bias)
    (vector,) = folding.on_grids(model, ["bias"], FINE)[0].values()
    np.testing.assert_array_equal(vector.values(), np.zeros(5, np.float32))


def test_a_large_scale_takes_a_coarser_grid_as_long_as_the_others_keep_theirs() -> None:
    model = trained()
    with torch.no_grad():
        model[4].weight[0] *= 6  # type: ignore[index]
    grids, norms = folding.on_grids(model, kept_of(model), FINE)
    assert norms == ("1", "4")
    scale = grids["4.weight"]
    assert np.abs(scale.codes - np.median(scale.codes)).max() <= 255
    assert distance(model, through_a_file(model, FINE)[0], torch.randn(32, 3, 12, 12)) < 0.03
