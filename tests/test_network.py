"""Every tensor of a network is in exactly one group, nothing is left out silently, and the network is left as it was."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from inventories import assert_complete, images, kinds
from refusals import refused
from torch import Tensor, nn

from clipq_ray import models
from clipq_ray.errors import ConfigError, ModelError
from clipq_ray.network import inventory

# What inference never reads


class WithBranch(nn.Module):
    """A branch that only training reads: normalised without parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3)
        self.branch = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4))
        self.never = nn.Linear(7, 7)
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x - self.mean
        y = self.body(x).mean((2, 3))
        return y + self.branch(x).mean((2, 3)) if self.training else y


def test_what_inference_never_reads_is_dropped_with_the_buffers_beside_it() -> None:
    model = WithBranch()
    found = inventory(model, images(2, 3, 8, 8))
    assert kinds(found) == {"body.weight": "conv"}
    assert "mean" in found.kept
    assert set(found.dropped) == {
        "branch.0.weight", "branch.0.bias", "branch.1.running_mean", "branch.1.running_var",
        "branch.2.weight", "branch.2.bias", "branch.2.running_mean", "branch.2.running_var",
        "never.weight", "never.bias",
    }  # fmt: skip
    assert set(found.counters) == {"branch.1.num_batches_tracked", "branch.2.num_batches_tracked"}
    assert all(name in found.notes[0] for name in found.dropped)
    assert found.bytes_before == 4 * (4 * 3 * 9 + 4 + 3)
    assert_complete(model, found)


class Frozen(nn.Module):
    """A backbone that runs without gradients is read all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.unused = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.backbone(x)
        return self.head(x.mean((2, 3)))


def test_a_backbone_without_gradients_is_compressed_not_dropped() -> None:
    found = inventory(Frozen(), images(2, 3, 8, 8))
    assert kinds(found) == {"backbone.0.weight": "conv", "head.weight": "linear"}
    assert {"backbone.1.running_mean", "backbone.1.weight"} <= set(found.kept)
    assert set(found.dropped) == {"unused.weight", "unused.bias"}
    assert any("without a gradient" in note and "backbone.0.weight" in note for note in found.notes)


def test_a_parameter_that_its_owner_has_frozen_is_compressed_and_noted() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 2))
    assert not any("without a gradient" in note for note in inventory(model, images(2, 4, 1, 1)).notes)
    model[1].weight.requires_grad_(False)
    found = inventory(model, images(2, 4, 1, 1))
    assert kinds(found) == {"1.weight": "linear", "2.weight": "linear"}
    (note,) = [note for note in found.notes if "without a gradient" in note]
    assert "1.weight" in note
    assert "2.weight" not in note


# One tensor under several names


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
    model = Tied()
    found = inventory(model, images(2, 1, 4, 4))
    assert kinds(found) == {"a.weight": "linear", "out.weight": "linear"}
    assert found.ties == {
        "b.weight": "a.weight",
        "again.weight": "norm.weight",
        "again.bias": "norm.bias",
        "again.running_mean": "norm.running_mean",
        "again.running_var": "norm.running_var",
    }
    assert any("b.weight is tied to a.weight" in note for note in found.notes)
    assert found.parameters == 256 + 2 * 16 + 2 * 16 + 2 * 16 + 2
    assert found.bytes_before == 4 * (found.parameters + 2 * 16)
    assert_complete(model, found)


def test_a_layer_used_twice_is_one_layer_with_its_second_name_as_an_alias() -> None:
    layer = nn.Linear(4, 4)
    found = inventory(nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer), images(1, 4, 1, 1))
    assert kinds(found) == {"1.weight": "linear"}
    assert found.ties == {"3.weight": "1.weight", "3.bias": "1.bias"}


class EmbeddingFirst(nn.Module):
    """The tensor's first name is an embedding's, its second a linear layer's."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 8)
        self.head = nn.Linear(8, 6, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x.flatten(1).argmax(1)))


@pytest.mark.parametrize("how", ["the same", "transposed", "a buffer"])
def test_a_parameter_on_the_memory_of_another_tensor_is_refused(how: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    first, second = model[1], model[3]
    if how == "the same":
        second.weight.data = first.weight.data
    elif how == "transposed":
        second.weight = nn.Parameter(first.weight.data.t())
    else:
        second.register_buffer("seen", first.weight.data[2:])
    with refused(ModelError, match=r"got 1\.weight and 3\.\w+ on the same; tie them by assigning"):
        inventory(model, torch.randn(2, 1, 4, 4))


@pytest.mark.parametrize("rows", [True, False])
def test_parameters_that_lie_side_by_side_in_one_memory_are_two(rows: bool) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    whole = torch.randn(32, 16) if rows else torch.randn(16, 32)
    model[1].weight.data, model[3].weight.data = whole.chunk(2, dim=0 if rows else 1)
    assert [one.name for one in inventory(model, torch.randn(2, 1, 4, 4)).layers] == ["1.weight", "3.weight"]


def test_an_embedding_tied_to_a_linear_layer_is_compressed_and_one_alone_is_kept() -> None:
    tied = inventory(EmbeddingFirst(True), images(2, 6, 1, 1))
    assert kinds(tied) == {"table.weight": "linear"}
    alone = inventory(EmbeddingFirst(False), images(2, 6, 1, 1))
    assert kinds(alone) == {"head.weight": "linear"}
    assert alone.kept == ("table.weight",)
    assert any("table.weight (6x8)" in note for note in alone.notes)


# Weights outside of layers


class Bare(nn.Module):
    """A parameter that enters a product by itself."""

    def __init__(
        self, use: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...], first: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.first = first or nn.Linear(6, 6)
        self.bare = nn.Parameter(torch.randn(shape))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.first(x.flatten(1)), self.bare)


PRODUCTS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "@": (lambda x, w: x @ w, (6, 4)),
    "left of @": (lambda x, w: (w @ x.t()).t(), (4, 6)),
    "@ of .t()": (lambda x, w: x @ w.t(), (4, 6)),
    "mm as a method": (lambda x, w: x.mm(w), (6, 4)),
    "matmul": (torch.matmul, (6, 4)),
    "matmul of .t()": (lambda x, w: torch.matmul(x, w.t()), (4, 6)),
    "einsum": (lambda x, w: torch.einsum("ni,oi->no", x, w), (4, 6)),
    "einsum of a list": (lambda x, w: torch.einsum("ni,oi->no", [x, w]), (4, 6)),
    "bmm of a view": (
        lambda x, w: torch.bmm(x[:, None], w.view(1, 6, 4).expand(len(x), 6, 4))[:, 0],
        (24, 1),
    ),
    "linear": (F.linear, (4, 6)),
    "linear of transpose": (lambda x, w: F.linear(x, w.transpose(0, 1)), (6, 4)),
    "view": (lambda x, w: x @ w.view(6, 4), (8, 3)),
    "reshape": (lambda x, w: x @ w.reshape(6, 4), (2, 3, 4)),
    "a slice": (lambda x, w: x @ w[:, 1:], (6, 5)),
    "unflatten and flatten": (lambda x, w: x @ w.flatten(0, 1), (2, 3, 4)),
    "addmm": (lambda x, w: torch.addmm(torch.zeros(4), x, w), (6, 4)),
    "tensordot": (lambda x, w: torch.tensordot(x, w, dims=1), (6, 4)),
    "multi_dot": (lambda x, w: torch.linalg.multi_dot([x, w]), (6, 4)),
    "conv1d": (lambda x, w: F.conv1d(x[:, :, None], w)[:, :, 0], (4, 6, 1)),
    "data": (lambda x, w: x @ w.data, (6, 4)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_bare_parameter_in_a_product_is_a_layer(name: str) -> None:
    found = inventory(Bare(*PRODUCTS[name]), images(2, 6, 1, 1))
    assert kinds(found) == {"bare": "matmul", "first.weight": "linear"}


def test_a_bare_parameter_may_be_the_only_layer() -> None:
    found = inventory(Bare(torch.matmul, (6, 4), nn.Identity()), images(2, 6, 1, 1))
    assert kinds(found) == {"bare": "matmul"}


OTHER_USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a sum": lambda x, w: x + w.sum(0),
    "a factor": lambda x, w: x * w.sum(0),
    "a computed weight": lambda x, w: x @ (w / w.norm()),
    "a copy": lambda x, w: x @ w.t().contiguous(),
}


@pytest.mark.parametrize("name", OTHER_USES)
def test_a_large_parameter_of_unknown_use_is_refused_by_name_unless_kept(name: str) -> None:
    model = Bare(OTHER_USES[name], (6, 6))
    with refused(ModelError, match=r"bare \(6x6\).*--keep bare"):
        inventory(model, images(2, 6, 1, 1))
    for pattern in ("bare", "ba*"):
        found = inventory(model, images(2, 6, 1, 1), keep=[pattern])
        assert found.kept == ("bare", "first.bias")
        assert any("bare (6x6)" in note and "--keep" in note for note in found.notes)


def test_a_small_parameter_of_unknown_use_is_kept_and_noted() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.zeros(2, 10))
            self.first = nn.Linear(20, 200)

        def forward(self, x: Tensor) -> Tensor:
            return self.first((x.flatten(1).view(-1, 2, 10) + self.position).flatten(1))

    found = inventory(Positions(), images(2, 20, 1, 1))
    assert found.kept == ("position", "first.bias")
    assert any("position (2x10)" in note for note in found.notes)


def test_weight_norm_is_refused_by_name() -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 2)
    )
    with refused(ModelError, match=r"parametrizations\.weight\.original1"):
        inventory(model, images(1, 8, 1, 1))


class Attention(nn.Module):
    def __init__(self, **kwargs: object) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **kwargs)  # type: ignore[arg-type]
        self.memory = nn.Linear(8, int(str(kwargs.get("kdim", 8))))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        other = self.memory(x)
        return self.attention(x, other, other)[0].mean(1)


def test_attention_projections_are_layers_and_its_biases_are_not() -> None:
    found = inventory(Attention(add_bias_kv=True), images(2, 8, 3, 3))
    assert kinds(found) == {
        "attention.in_proj_weight": "attention",
        "attention.out_proj.weight": "attention",
        "memory.weight": "linear",
    }
    assert {"attention.bias_k", "attention.bias_v", "attention.in_proj_bias"} <= set(found.kept)


def test_separate_projections_of_attention_are_layers() -> None:
    found = inventory(Attention(kdim=6, vdim=6), images(2, 8, 3, 3))
    assert {n for n, kind in kinds(found).items() if kind == "attention"} == {
        f"attention.{name}" for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
    }


def test_a_transformer_encoder_in_eval_mode_is_traced_through_its_fast_path() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
            )

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.encoder(x.flatten(2).transpose(1, 2)).mean(1)
            return out

    found = inventory(Encoder(), images(2, 8, 3, 3))
    assert len(found.layers) == 2 * 4
    assert not found.dropped


def test_integer_buffers_and_integer_parameters_are_stored_exactly() -> None:
    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("order", torch.arange(6).flip(0))
            self.index = nn.Parameter(torch.arange(6), requires_grad=False)
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.flatten(1)[:, self.order][:, self.index])

    found = inventory(Indexed(), images(2, 6, 1, 1))
    assert set(found.integers) == {"order", "index"}
    assert found.bytes_before == 4 * (6 + 6 + 12 + 2)


# What the user keeps


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [("out.*", {"a.weight"}), ("a.weight", {"out.weight"}), ("b.weight", {"out.weight"})],
)
def test_keep_takes_patterns_and_further_names_of_layers(pattern: str, layers: set[str]) -> None:
    found = inventory(Tied(), images(2, 1, 4, 4), keep=[pattern])
    assert set(kinds(found)) == layers
    assert {"a.weight", "out.weight"} - layers <= set(found.kept)


def test_what_is_named_in_keep_is_stored_even_if_the_sample_does_not_reach_it() -> None:
    found = inventory(WithBranch(), images(2, 3, 8, 8), keep=["never.*"])
    assert {"never.weight", "never.bias"} <= set(found.kept)
    assert "branch.0.weight" in found.dropped


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_names() -> None:
    model = models.build(models.Architecture("lenet5"))
    for wrong in ("fc9.weight", "fc??.weight"):
        with refused(
            ConfigError, match=rf"'{re.escape(wrong)}', which matches none; nearest names: .*fc1\.weight"
        ):
            inventory(model, images(1, 1, 28, 28), keep=["fc*.weight", wrong])


# What cannot be compressed


def test_images_that_the_network_cannot_take_are_refused_by_their_shape() -> None:
    model = models.build(models.Architecture("lenet5"))
    with refused(ModelError, match=r"takes images of \(3, 32, 32\), got: "):
        inventory(model, images(1, 3, 32, 32))


class WithoutGradients(nn.Linear):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize(
    "last",
    [nn.Identity(), nn.BatchNorm1d(4), WithoutGradients(4, 3)],
    ids=["no parameter", "no layer", "no gradient"],
)
def test_a_network_with_nothing_to_compress_is_refused(last: nn.Module) -> None:
    with refused(ModelError, match="got none to compress"):
        inventory(nn.Sequential(nn.Flatten(), last), images(2, 4, 1, 1))


@pytest.mark.parametrize(
    ("module", "word"),
    [
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), "lazy"),
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 2, dtype=torch.complex64)), "complex64"),
    ],
)
def test_tensors_that_a_file_cannot_hold_are_refused_by_name(module: nn.Module, word: str) -> None:
    with refused(ModelError, match=rf"1\.weight.*{word}"):
        inventory(module, images(1, 4, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16], ids=str)
def test_a_buffer_of_a_type_that_no_file_has_is_refused_by_name(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    model.register_buffer("table", torch.zeros(3).to(dtype))
    with refused(ModelError, match=rf"bfloat16, .*, got table of {dtype}; convert it"):
        inventory(model, images(1, 4, 1, 1))


# What a network is left like


def partly_frozen(model: nn.Module) -> nn.Module:
    """In training, but for the first module and its first parameter."""
    first = next(model.train().children()).eval()
    next(first.parameters()).requires_grad_(False)
    return model


def modes_and_flags(model: nn.Module) -> tuple[list[bool], list[bool]]:
    return [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize(
    ("make", "shape"), [(Tied, (2, 1, 4, 4)), (WithBranch, (2, 3, 8, 8)), (Frozen, (2, 3, 8, 8))]
)
def test_the_network_is_left_as_it_was(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model = partly_frozen(make())
    before, state = modes_and_flags(model), copy.deepcopy(model.state_dict())
    inventory(model, images(*shape))
    assert modes_and_flags(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_network_is_left_as_it_was_when_the_sample_does_not_fit() -> None:
    model = partly_frozen(WithBranch())
    before = modes_and_flags(model)
    with refused(ModelError, match="that takes images of"):
        inventory(model, images(2, 5, 8, 8))
    assert modes_and_flags(model) == before


def test_an_inventory_works_under_no_grad() -> None:
    with torch.no_grad():
        assert len(inventory(Tied(), images(2, 1, 4, 4)).layers) == 2
