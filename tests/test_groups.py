"""Layers that share one theta: blocks of real networks, patterns, and what groups cost."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

from clipq_ray import models, network
from clipq_ray.errors import ConfigError
from clipq_ray.groups import Group, by_layer, grouped, work


def found(name: str, side: int, *wanted: str) -> tuple[Group, ...]:
    torch.manual_seed(0)
    model = models.build(models.architecture(name, 10, {})).eval()
    inventory = network.inventory(model, torch.zeros(2, 3, side, side), ())
    return grouped(model, [layer.name for layer in inventory.layers], wanted)


def test_every_layer_stands_alone_unless_asked_otherwise() -> None:
    groups = found("resnet20", 32)
    assert len(groups) == 20
    assert all(group.layers == (group.name,) for group in groups)


def test_residual_blocks_with_their_shortcuts_share() -> None:
    groups = {group.name: group.layers for group in found("resnet18", 64, "blocks")}
    assert list(groups)[:2] == ["conv1.weight", "layer1.0"]
    assert groups["layer2.0"] == (
        "layer2.0.conv1.weight",
        "layer2.0.conv2.weight",
        "layer2.0.downsample.0.weight",
    )
    assert (groups["conv1.weight"], groups["fc.weight"]) == (("conv1.weight",), ("fc.weight",))
    assert len(groups) == 2 + 8


def test_inception_modules_share() -> None:
    groups = {group.name: group.layers for group in found("googlenet", 64, "blocks")}
    assert len(groups["inception3a"]) == 6
    assert [name for name in groups if name.startswith("inception")] == [
        f"inception{name}" for name in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")
    ]


def test_containers_are_no_blocks() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4))
    layers = ["0.0.weight", "0.1.weight", "1.weight"]
    assert [group.name for group in grouped(model, layers, ["blocks"])] == layers


def test_all_layers_share_as_a_network() -> None:
    (group,) = found("resnet20", 32, "network")
    assert (group.name, len(group.layers)) == ("network", 20)


def test_patterns_make_groups_and_leave_the_rest_alone() -> None:
    groups = found("resnet20", 32, "layer1.*", "layer3.?.conv2*")
    assert [group.name for group in groups][:2] == ["conv1.weight", "layer1.*"]
    sizes = {group.name: len(group.layers) for group in groups}
    assert (sizes["layer1.*"], sizes["layer3.?.conv2*"], sum(sizes.values())) == (6, 3, 20)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (
            ("block",),
            "--groups: expected blocks, network or patterns of layers, got 'block', which matches none",
        ),
        (("layer1.*", "*.conv1.*"), "got layer1.0.conv1.weight in 'layer1.\\*' and '\\*.conv1.\\*'"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_refused(wanted: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        found("resnet20", 32, *wanted)


def test_what_was_found_for_a_group_holds_for_its_layers() -> None:
    groups = (Group("a", ("a.x", "a.y")), Group("b", ("b",)))
    assert by_layer(groups, {"a": 1, "b": 2}) == {"a.x": 1, "a.y": 1, "b": 2}


def test_work_is_the_products_from_a_group_on() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    groups = (Group("1.weight", ("1.weight",)), Group("3.weight", ("3.weight",)))
    assert work(model, groups, torch.zeros(1, 1, 4, 4)) == {
        "1.weight": 2 * (16 * 8 + 8 * 4),
        "3.weight": 2 * 8 * 4,
    }
    (whole,) = grouped(model, ["1.weight", "3.weight"], ["network"])
    assert work(model, [whole], torch.zeros(1, 1, 4, 4)) == {"network": 2 * (16 * 8 + 8 * 4)}


def test_what_a_block_holds_inside_belongs_to_it() -> None:
    """RegNet's blocks hold squeeze and excitation in a part of their own; ViT's hold attention."""
    groups = {group.name: group.layers for group in found("regnet_y_400mf", 64, "blocks")}
    first = groups["trunk_output.block1.block1-0"]
    assert {name.split("block1-0.")[1] for name in first} == {
        "proj.0.weight", "f.a.0.weight", "f.b.0.weight", "f.se.fc1.weight", "f.se.fc2.weight", "f.c.0.weight",
    }  # fmt: skip
    groups = {group.name: group.layers for group in found("vit_b_16", 224, "blocks")}
    assert len(groups["encoder.layers.encoder_layer_0"]) == 4
    assert len(groups) == 2 + 12


def test_a_network_around_the_network_is_no_block() -> None:
    inner = models.build(models.architecture("resnet20", 10, {}))
    model = nn.Sequential()
    model.model = inner
    layers = [name for name, weight in model.named_parameters() if weight.dim() > 1]
    wrapped = [group.name for group in grouped(model, layers, ["blocks"])]
    plain = [name.removeprefix("model.") for name in layers]
    assert wrapped == [f"model.{group.name}" for group in grouped(inner, plain, ["blocks"])]


def test_a_network_whose_products_cannot_be_counted_is_ordered_by_weights() -> None:
    model = nn.Sequential(OrderedDict(first=nn.Conv2d(1, 4, 3), flat=nn.Flatten(), end=nn.Linear(16, 3)))

    def broken(module: nn.Module, inputs: object) -> None:
        raise KeyError("watched")

    model.get_submodule("end").register_forward_pre_hook(broken)
    groups = grouped(model, ["first.weight", "end.weight"], ())
    assert work(model, groups, torch.zeros(2, 1, 4, 4)) == {"first.weight": 36 + 48, "end.weight": 48}


@pytest.mark.parametrize("wanted", [("blocks", "layer1.*"), ("network", "blocks")])
def test_words_stand_alone(wanted: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="by itself, got"):
        found("resnet20", 32, *wanted)
