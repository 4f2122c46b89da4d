"""Every tensor of a network is in exactly one group, and nothing is left out silently."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipq_ray import models
from clipq_ray.errors import ConfigError, ModelError
from clipq_ray.network import Inventory, inventory

IMAGES = torch.zeros(1, 3, 64, 64)
SMALL = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def kinds(found: Inventory) -> dict[str, int]:
    counted: dict[str, int] = {}
    for layer in found.layers:
        counted[layer.kind] = counted.get(layer.kind, 0) + 1
    return counted


def assert_complete(model: nn.Module, found: Inventory) -> None:
    names = [
        *(layer.name for layer in found.layers),
        *found.kept,
        *found.integers,
        *found.counters,
        *found.ties,
        *found.dropped,
    ]
    assert len(names) == len(set(names))
    assert set(names) == set(model.state_dict())


@pytest.mark.parametrize(
    ("name", "side", "expected"),
    [
        ("resnet18", 64, {"conv": 20, "linear": 1}),
        ("mobilenet_v2", 64, {"conv": 52, "linear": 1}),
        ("googlenet", 64, {"conv": 57, "linear": 1}),
        ("convnext_tiny", 64, {"conv": 22, "linear": 37}),
        ("swin_t", 64, {"conv": 1, "linear": 52}),
        ("vit_b_16", 224, {"conv": 1, "attention": 24, "linear": 25}),
    ],
)
def test_torchvision_networks_are_taken_whole(name: str, side: int, expected: dict[str, int]) -> None:
    model = models.build(models.architecture(name, 10, {}))
    found = inventory(model, torch.zeros(1, 3, side, side))
    assert kinds(found) == expected
    assert found.dropped == ()
    assert found.ties == {}
    assert_complete(model, found)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    read = {n: t for n, t in model.state_dict().items() if n not in {*found.counters, *found.dropped}}
    assert found.bytes_before == 4 * sum(t.numel() for t in read.values())


def test_relative_position_tables_of_a_swin_are_kept_and_noted() -> None:
    found = inventory(models.build(models.architecture("swin_t", 10, {})), IMAGES)
    tables = [name for name in found.kept if name.endswith("relative_position_bias_table")]
    assert len(tables) == 12
    assert all(any(name in note for note in found.notes) for name in tables)
    assert len(found.integers) == 12


def test_auxiliary_heads_are_dropped_with_their_buffers_and_noted() -> None:
    model = models.build(models.architecture("googlenet", 10, {"aux_logits": True}))
    found = inventory(model, IMAGES)
    heads = {n for n in model.state_dict() if n.startswith("aux") and not n.endswith("num_batches_tracked")}
    assert set(found.dropped) == heads
    assert kinds(found) == {"conv": 57, "linear": 1}
    assert any("never reads" in note and "aux1.fc1.weight" in note for note in found.notes)
    assert_complete(model, found)


class Unreached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(16, 3)
        self.head = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8))
        self.never = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = x.flatten(1)
        return (self.used(x), self.head(x)) if self.training else self.used(x)


def test_layers_that_inference_never_reaches_are_dropped_by_name() -> None:
    found = inventory(Unreached(), SMALL)
    assert [layer.name for layer in found.layers] == ["used.weight"]
    assert {"head.0.weight", "head.1.weight", "head.1.running_mean", "never.bias"} <= set(found.dropped)
    assert found.bytes_before == 4 * (16 * 3 + 3)
    assert_complete(Unreached(), found)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.b = nn.Linear(16, 16)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(16)
        self.again = self.norm
        self.out = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x.flatten(1)))
        return self.out(self.again(self.b(x)))


def test_tied_weights_and_modules_used_twice_are_counted_once() -> None:
    found = inventory(Tied(), SMALL)
    assert [layer.name for layer in found.layers] == ["a.weight", "out.weight"]
    assert found.ties == {
        "b.weight": "a.weight",
        "again.weight": "norm.weight",
        "again.bias": "norm.bias",
        "again.running_mean": "norm.running_mean",
        "again.running_var": "norm.running_var",
    }
    assert any("b.weight is tied to a.weight" in note for note in found.notes)
    assert found.bytes_before == 4 * (256 + 2 * 16 + 4 * 16 + 2 * 16 + 2)
    assert_complete(Tied(), found)


class Custom(nn.Module):
    def __init__(self, use: str) -> None:
        super().__init__()
        self.use = use
        shapes = {"t": (5, 16), "linear": (5, 16), "view": (8, 10)}
        self.w = nn.Parameter(torch.randn(*shapes.get(use, (16, 5))))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        match self.use:
            case "matmul":
                return torch.matmul(x, self.w)
            case "operator":
                return x @ self.w
            case "method":
                return x.mm(self.w)
            case "einsum":
                return torch.einsum("ni,io->no", x, self.w)
            case "tensordot":
                return torch.tensordot(x, self.w, dims=1)
            case "t":
                return x @ self.w.t()
            case "view":
                return x @ self.w.view(16, 5)
            case "bmm":
                return torch.bmm(x[:, None], self.w.expand(len(x), 16, 5))[:, 0]
            case "addmm":
                return torch.addmm(x.new_zeros(5), x, self.w)
            case _:
                return F.linear(x, self.w)


@pytest.mark.parametrize(
    "use",
    ["matmul", "operator", "method", "einsum", "tensordot", "t", "view", "bmm", "addmm", "linear"],
)
def test_a_bare_parameter_in_a_matrix_product_is_a_layer(use: str) -> None:
    found = inventory(Custom(use), SMALL)
    assert [(layer.name, layer.kind) for layer in found.layers] == [("w", "matmul")]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Parameter(torch.ones(2, 16))
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1) * self.gates.sum(0))


def test_a_large_weight_of_unknown_use_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"gates \(2x16\).*--keep gates") as caught:
        inventory(Scaled(), SMALL)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["gates", "ga*"])
def test_a_weight_of_unknown_use_is_stored_as_it_is_on_request(pattern: str) -> None:
    found = inventory(Scaled(), SMALL, [pattern])
    assert "gates" in found.kept
    assert any("gates" in note and "--keep" in note for note in found.notes)


def test_keep_takes_layers_too() -> None:
    found = inventory(Tied(), SMALL, ["out.*"])
    assert [layer.name for layer in found.layers] == ["a.weight"]
    assert "out.weight" in found.kept


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'gate\?\?'.*matches none") as caught:
        inventory(Scaled(), SMALL, ["gates", "gate??"])
    assert "\n" not in str(caught.value)


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 3)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [Fixed, Frozen])
def test_a_network_with_nothing_to_compress_is_refused_in_one_line(kind: type[nn.Module]) -> None:
    with pytest.raises(ModelError, match="none to compress") as caught:
        inventory(kind(), SMALL)
    assert "\n" not in str(caught.value)


def test_flags_modes_gradients_and_statistics_are_as_before() -> None:
    model = Tied().train()
    model.norm.eval()
    model.a.weight.requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    inventory(model, SMALL)
    assert [model.training, model.a.training, model.norm.training] == [True, True, False]
    assert [model.a.weight.requires_grad, model.out.weight.requires_grad] == [False, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_flags_are_as_before_where_the_network_fails() -> None:
    model = Tied().train()
    model.a.weight.requires_grad_(False)
    with pytest.raises(ModelError, match="cannot evaluate images of shape"):
        inventory(model, torch.zeros(1, 1, 3, 3))
    assert model.training
    assert not model.a.weight.requires_grad


def test_an_inventory_works_under_no_grad() -> None:
    with torch.no_grad():
        assert len(inventory(Tied(), SMALL).layers) == 2
