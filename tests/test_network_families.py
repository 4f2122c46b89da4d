"""Inventories of whole networks: every family has all its convolutions, linear layers and attention projections."""

from __future__ import annotations

from collections import Counter

import pytest
from inventories import assert_complete, images, kinds
from torch import nn

from clipq_ray import models
from clipq_ray.network import Layer, inventory


def kinds_by_module(model: nn.Module) -> dict[str, str]:
    """Counted another way: by module."""
    result = {}
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            result[f"{prefix}.weight"] = "conv"
        if isinstance(module, nn.Linear):
            result[f"{prefix}.weight"] = "attention" if prefix.endswith("attention.out_proj") else "linear"
        if isinstance(module, nn.MultiheadAttention):
            result[f"{prefix}.in_proj_weight"] = "attention"
    return result


# name, image side, keyword arguments, layers of each kind, what is kept and said
Family = tuple[str, int, dict[str, object], dict[str, int], list[str]]
FAMILIES: list[Family] = [
    ("lenet5", 28, {}, {"conv": 2, "linear": 3}, []),
    ("lenet5_caffe", 28, {}, {"conv": 2, "linear": 2}, []),
    ("lenet_300_100", 28, {}, {"linear": 3}, []),
    ("resnet20", 32, {}, {"conv": 19, "linear": 1}, []),
    ("resnet18", 32, {}, {"conv": 20, "linear": 1}, []),
    ("googlenet", 32, {}, {"conv": 57, "linear": 1}, []),
    ("mobilenet_v2", 32, {}, {"conv": 52, "linear": 1}, []),
    ("mobilenet_v3_small", 32, {}, {"conv": 52, "linear": 2}, []),
    ("efficientnet_b0", 32, {}, {"conv": 81, "linear": 1}, []),
    ("inception_v3", 80, {}, {"conv": 94, "linear": 1}, []),
    ("densenet121", 32, {}, {"conv": 120, "linear": 1}, []),
    ("squeezenet1_1", 32, {}, {"conv": 26}, []),
    ("shufflenet_v2_x0_5", 32, {}, {"conv": 56, "linear": 1}, []),
    ("mnasnet0_5", 32, {}, {"conv": 52, "linear": 1}, []),
    ("regnet_y_400mf", 32, {}, {"conv": 85, "linear": 1}, []),
]
VIT = {"conv": 1, "attention": 24, "linear": 25}
LARGE: list[Family] = [
    ("resnet50", 32, {}, {"conv": 53, "linear": 1}, []),
    ("resnext50_32x4d", 32, {}, {"conv": 53, "linear": 1}, []),
    ("alexnet", 64, {}, {"conv": 5, "linear": 3}, []),
    ("vgg16", 32, {}, {"conv": 13, "linear": 3}, []),
    ("vit_b_16", 32, {"image_size": 32}, VIT, ["class_token", "pos_embedding"]),
    ("swin_t", 32, {}, {"conv": 1, "linear": 52}, ["relative_position_bias_table"]),
    ("swin_v2_t", 32, {}, {"conv": 1, "linear": 76}, ["logit_scale"]),
    ("convnext_tiny", 32, {}, {"conv": 22, "linear": 37}, ["layer_scale"]),
    ("maxvit_t", 224, {}, {"conv": 61, "linear": 90}, ["relative_position_bias_table"]),
]


@pytest.mark.parametrize(
    "family",
    [
        *(pytest.param(family, id=family[0]) for family in FAMILIES),
        *(pytest.param(family, id=family[0], marks=pytest.mark.slow) for family in LARGE),
    ],
)
def test_every_family_has_all_its_layers_and_says_what_it_keeps(family: Family) -> None:
    name, side, kwargs, counts, said = family
    model = models.build(models.architecture(name, None, kwargs))
    found = inventory(model, images(1, models.default_input(name)[0], side, side))
    assert kinds(found) == kinds_by_module(model)
    assert Counter(kinds(found).values()) == counts
    assert_complete(model, found)
    assert not found.dropped
    assert not found.ties
    assert found.parameters == sum(p.numel() for p in model.parameters())
    stored = [tensor for name, tensor in model.state_dict().items() if name not in found.counters]
    assert found.bytes_before == 4 * sum(tensor.numel() for tensor in stored)
    assert len(found.notes) == len(said)
    assert all(word in note for word, note in zip(said, found.notes, strict=True))


def test_layers_follow_the_state_dict_and_bytes_count_stored_tensors_as_float32() -> None:
    model = models.build(models.Architecture("resnet20"))
    found = inventory(model, images(2, 3, 32, 32))
    state = model.state_dict()
    assert [layer.name for layer in found.layers] == [n for n in state if n in kinds(found)]
    assert len(found.layers) == 20
    assert found.layers[0] == Layer("conv1.weight", "conv", (16, 3, 3, 3), 432)
    assert found.parameters == 269_722
    buffers = sum(t.numel() for n, t in state.items() if "running" in n)
    assert found.bytes_before == 4 * (269_722 + buffers)
    assert len(found.counters) == 19


def test_relative_position_tables_of_a_swin_are_kept_and_noted() -> None:
    found = inventory(models.build(models.architecture("swin_t", 10, {})), images(1, 3, 64, 64))
    tables = [name for name in found.kept if name.endswith("relative_position_bias_table")]
    assert len(tables) == 12
    assert all(any(name in note for note in found.notes) for name in tables)
    assert len(found.integers) == 12


def test_auxiliary_heads_of_a_users_googlenet_are_dropped_and_named() -> None:
    model, plain = (
        models.build(models.architecture("googlenet", 10, {"aux_logits": on})) for on in (True, False)
    )
    found, without = inventory(model, images(1, 3, 64, 64)), inventory(plain, images(1, 3, 64, 64))
    heads = {n for n in model.state_dict() if n.startswith("aux") and not n.endswith("num_batches_tracked")}
    assert set(found.dropped) == heads
    assert kinds(found) == kinds(without)
    assert found.bytes_before == without.bytes_before
    assert "never reads" in found.notes[0]
    assert "aux1.fc1.weight" in found.notes[0]
    assert_complete(model, found)
