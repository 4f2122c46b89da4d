"""Packing: grids are as coarse as validation images allow, and the file is what was judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from clipq_ray import codec, folding, loading, network, packing
from clipq_ray.config import make
from clipq_ray.data import Data, open_data
from clipq_ray.evaluate import evaluate
from clipq_ray.operator import make_plan
from clipq_ray.plan import Theta
from clipq_ray.quantizer import decide_share, quantize
from clipq_ray.source import Source
from clipq_ray.states import WEIGHTS, write_state
from clipq_ray.storage import Store

DIGITS = open_data("digits", input_shape=(1, 28, 28))


class Sharp(nn.Module):
    """A network with a batch norm whose large shifts are taken off again: whatever a grid does to them reaches the scores."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.norm = nn.BatchNorm1d(10)
        self.register_buffer("offset", torch.arange(10.0) * 97 % 10 * 200)
        with torch.no_grad():
            self.norm.bias.copy_(self.offset)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.norm(self.inner(images)) - self.offset
        return scores


def packed(tmp_path: Path, model: nn.Module, data: Data = DIGITS, **options: Any) -> packing.PackedNetwork:
    source = Source(make(storage=str(tmp_path), engine="local", **options), model, data)
    store = Store(tmp_path / "tuned")
    write_state(store, WEIGHTS, model.state_dict())
    sample = data.train.batch(torch.arange(2), None)[0]
    inventory = network.inventory(model, sample, source.config.keep)
    plan = make_plan(model, {layer.name: Theta(0.5, 3) for layer in inventory.layers})
    return packing.pack(source, store, plan, inventory, data, "0" * 64)


def lenet(weights: dict[str, torch.Tensor]) -> nn.Module:
    from clipq_ray import models

    model = models.build(models.architecture("lenet5", 10, {}))
    model.load_state_dict(weights)
    return model


def score(file: bytes, model: nn.Module) -> float:
    return evaluate(loading.from_bytes(file, factory=lambda: model), DIGITS.validation, batch_size=250).top1


@pytest.mark.parametrize("profile", ["fast", "small"])
def test_grids_make_the_file_smaller_and_no_validation_image_worse(
    tmp_path: Path, digits_weights: dict[str, torch.Tensor], profile: str
) -> None:
    auto = packed(tmp_path, lenet(digits_weights), profile=profile)
    exact = packed(tmp_path, lenet(digits_weights), profile=profile, vectors="exact")
    assert exact.vectors == "as they are"
    assert auto.vectors in map(str, folding.LADDER)
    assert len(auto.file) < len(exact.file) - 200
    assert score(auto.file, lenet(digits_weights)) >= score(exact.file, lenet(digits_weights))


def test_exact_vectors_are_the_networks_own(tmp_path: Path, digits_weights: dict[str, torch.Tensor]) -> None:
    made = packed(tmp_path, lenet(digits_weights), vectors="exact", unit_order="given")
    after = codec.arrays(made.file)
    for name, value in digits_weights.items():
        if value.dim() == 1:
            np.testing.assert_array_equal(after[name], codec.stored(value.numpy()))


@pytest.mark.parametrize("profile", ["fast", "small"])
def test_what_a_file_holds_besides_layers_is_known_before_to_a_byte_for_each_layer(
    tmp_path: Path, digits_weights: dict[str, torch.Tensor], profile: str
) -> None:
    model = lenet(digits_weights)
    made = packed(tmp_path, model, profile=profile, vectors="exact", unit_order="given")
    source = Source(make(engine="local", profile=profile, vectors="exact"), model, DIGITS)
    inventory = network.inventory(model, DIGITS.train.batch(torch.arange(2), None)[0], ())
    predicted = packing.other_bytes(source, model, inventory, DIGITS)
    assert abs(predicted - packing.other_bytes_of(made.file, made.clips)) <= len(inventory.layers)


@pytest.mark.parametrize("spare", [0, 1])
def test_a_size_that_leaves_nothing_for_weights_is_noted(
    digits_weights: dict[str, torch.Tensor], spare: int
) -> None:
    def source(**options: Any) -> Source:
        return Source(make(engine="local", vectors="exact", **options), model, DIGITS)

    model = lenet(digits_weights)
    inventory = network.inventory(model, DIGITS.train.batch(torch.arange(2), None)[0], ())
    other = packing.other_bytes(source(), model, inventory, DIGITS)
    found = packing.size_notes(source(target_bytes=other + spare), model, inventory, DIGITS)
    words = f"at most {other:,} bytes are asked for, and header, biases and batch norm alone take {other:,}"
    assert [note.startswith(words) for note in found] == [True] * (1 - spare)


def test_what_the_user_names_is_on_no_grid(tmp_path: Path, digits_weights: dict[str, torch.Tensor]) -> None:
    names = [name for name, value in digits_weights.items() if value.dim() == 1]
    made = packed(tmp_path, lenet(digits_weights), keep=names[:1], unit_order="given")
    assert made.vectors in map(str, folding.LADDER)
    after = codec.arrays(made.file)
    same = [bool((after[name] == codec.stored(digits_weights[name].numpy())).all()) for name in names]
    assert same == [True, *[False] * (len(names) - 1)]


def test_levels_are_float16_and_the_layers_are_those_of_the_quantizer(
    tmp_path: Path, digits_weights: dict[str, torch.Tensor]
) -> None:
    made = packed(tmp_path, lenet(digits_weights), unit_order="given")
    layers = [one for one in codec.entries(made.file) if one.name in made.clips]
    assert len(layers) == len(made.clips)
    assert all(one.coder.endswith("h") for one in layers)
    for name in made.clips:
        weight = digits_weights[name]
        expected = quantize(weight, Theta(0.5, 3), decide_share(weight, Theta(0.5, 3))).values
        np.testing.assert_allclose(codec.arrays(made.file)[name], expected.numpy(), rtol=2**-10)


def test_a_network_that_no_grid_serves_keeps_its_batch_norm_as_it_is(
    tmp_path: Path, digits_weights: dict[str, torch.Tensor]
) -> None:
    model = Sharp(lenet(digits_weights)).eval()
    made = packed(tmp_path, model)
    assert made.vectors == "as they are"
    assert codec.decode(made.file).norms == ()
    assert "norm.running_var" in codec.arrays(made.file)
    assert score(made.file, Sharp(lenet(digits_weights))) > 0.8


class Scaled(nn.Module):
    """A network with a parameter of no dimension, and numbers of a type that no file has."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.tensor(0.7))
        values = torch.randn(60, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-30, 30)
        self.register_buffer("table", values.bfloat16())
        self.short = nn.Parameter(values.flip(0).bfloat16())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.inner(images) * self.scale + 0 * (self.table + self.short).float().mean()
        return scores


@pytest.mark.parametrize("vectors", ["auto", "exact"])
def test_a_parameter_of_no_dimension_and_bfloat16_come_back(
    tmp_path: Path, digits_weights: dict[str, torch.Tensor], vectors: str
) -> None:
    model = Scaled(lenet(digits_weights))
    made = packed(tmp_path, model, vectors=vectors, keep=["short"])
    loaded = loading.from_bytes(made.file, factory=lambda: Scaled(lenet(digits_weights)))
    assert (made.vectors == "as they are") == (vectors == "exact")
    assert loaded.get_parameter("scale").shape == ()
    assert loaded.get_parameter("scale").item() == pytest.approx(
        0.7, rel=2**-10 if vectors == "exact" else 0.25
    )
    for name in ("table", "short"):
        found, expected = loaded.state_dict()[name], model.state_dict()[name]
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, expected)
