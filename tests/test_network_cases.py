"""The inventory: what is compressed, kept, tied or dropped, and that the network is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipq_ray import models, network
from clipq_ray.errors import ConfigError, ModelError
from clipq_ray.network import Inventory, inventory


def grouped(found: Inventory) -> list[str]:
    return [
        *(layer.name for layer in found.layers),
        *found.kept,
        *found.integers,
        *found.counters,
        *found.ties,
        *found.dropped,
    ]


def kinds(found: Inventory) -> dict[str, str]:
    return {layer.name: layer.kind for layer in found.layers}


def expected_layers(model: nn.Module) -> set[str]:
    """Counted another way: by module."""
    result = set()
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            result.add(f"{prefix}.weight")
        if isinstance(module, nn.MultiheadAttention):
            result.add(f"{prefix}.in_proj_weight")
    return result


# name, image side, keyword arguments, what is kept and said
FAMILIES = [
    ("lenet5", 28, {}, []),
    ("lenet5_caffe", 28, {}, []),
    ("lenet_300_100", 28, {}, []),
    ("resnet20", 32, {}, []),
    ("resnet18", 32, {}, []),
    ("googlenet", 32, {}, []),
    ("mobilenet_v2", 32, {}, []),
    ("mobilenet_v3_small", 32, {}, []),
    ("efficientnet_b0", 32, {}, []),
    ("inception_v3", 80, {}, []),
    ("densenet121", 32, {}, []),
    ("squeezenet1_1", 32, {}, []),
    ("shufflenet_v2_x0_5", 32, {}, []),
    ("mnasnet0_5", 32, {}, []),
    ("regnet_y_400mf", 32, {}, []),
]
LARGE = [
    ("resnet50", 32, {}, []),
    ("resnext50_32x4d", 32, {}, []),
    ("alexnet", 64, {}, []),
    ("vgg16", 32, {}, []),
    ("vit_b_16", 32, {"image_size": 32}, ["class_token", "pos_embedding"]),
    ("swin_t", 32, {}, ["relative_position_bias_table"]),
    ("swin_v2_t", 32, {}, ["logit_scale"]),
    ("convnext_tiny", 32, {}, ["layer_scale"]),
    ("maxvit_t", 224, {}, ["relative_position_bias_table"]),
]


def check_family(name: str, side: int, kwargs: dict[str, object], said: list[str]) -> None:
    model = models.build(models.architecture(name, None, kwargs))
    found = inventory(model, torch.randn(1, models.default_input(name)[0], side, side))
    assert {layer.name for layer in found.layers} == expected_layers(model)
    assert sorted(grouped(found)) == sorted(model.state_dict())
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert not found.dropped
    assert len(found.notes) == len(said)
    assert all(word in note for word, note in zip(said, found.notes, strict=True))


@pytest.mark.parametrize(("name", "side", "kwargs", "said"), FAMILIES, ids=[f[0] for f in FAMILIES])
def test_every_small_family_has_all_its_convolutions_and_linear_layers(
    name: str, side: int, kwargs: dict[str, object], said: list[str]
) -> None:
    check_family(name, side, kwargs, said)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side", "kwargs", "said"), LARGE, ids=[f[0] for f in LARGE])
def test_every_large_family_has_all_its_layers_and_says_what_it_keeps(
    name: str, side: int, kwargs: dict[str, object], said: list[str]
) -> None:
    check_family(name, side, kwargs, said)


def test_layers_follow_the_state_dict_and_bytes_count_stored_tensors_as_float32() -> None:
    model = models.build(models.Architecture("resnet20"))
    found = inventory(model, torch.randn(2, 3, 32, 32))
    state = model.state_dict()
    assert [layer.name for layer in found.layers] == [n for n in state if n in kinds(found)]
    assert len(found.layers) == 20
    assert found.layers[0] == network.Layer("conv1.weight", "conv", (16, 3, 3, 3), 432)
    assert found.parameters == 269_722
    buffers = sum(t.numel() for n, t in state.items() if "running" in n)
    assert found.bytes_before == 4 * (269_722 + buffers)
    assert len(found.counters) == 19


def test_auxiliary_heads_of_a_users_googlenet_are_dropped_and_named() -> None:
    model = models.build(models.architecture("googlenet", 10, {"aux_logits": True}))
    found = inventory(model, torch.randn(1, 3, 64, 64))
    heads = {n for n in model.state_dict() if n.startswith(("aux1.", "aux2."))}
    assert set(found.dropped) == {n for n in heads if not n.endswith("num_batches_tracked")}
    assert not any(layer.name in heads for layer in found.layers)
    assert "aux1.fc1.weight" in found.notes[0]
    without = inventory(models.build(models.architecture("googlenet", 10, {})), torch.randn(1, 3, 64, 64))
    assert found.bytes_before == without.bytes_before


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8)
        self.two = nn.Linear(8, 8)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.one(x.flatten(1))))


def test_tied_weights_are_one_layer_and_the_alias_is_listed() -> None:
    found = inventory(Tied(), torch.randn(2, 8, 1, 1))
    assert kinds(found) == {"one.weight": "linear"}
    assert found.ties == {"two.weight": "one.weight"}
    assert found.parameters == 64 + 16
    assert any("two.weight is tied to one.weight" in note for note in found.notes)


def test_a_module_used_twice_is_one_layer_with_its_second_name_as_an_alias() -> None:
    layer = nn.Linear(4, 4)
    found = inventory(nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer), torch.randn(1, 4, 1, 1))
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


def test_an_embedding_tied_to_a_linear_layer_is_compressed_and_one_alone_is_kept() -> None:
    tied = inventory(EmbeddingFirst(True), torch.randn(2, 6, 1, 1))
    assert kinds(tied) == {"table.weight": "linear"}
    alone = inventory(EmbeddingFirst(False), torch.randn(2, 6, 1, 1))
    assert kinds(alone) == {"head.weight": "linear"}
    assert alone.kept == ("table.weight",)
    assert any("table.weight (6x8)" in note for note in alone.notes)


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
    found = inventory(WithBranch(), torch.randn(2, 3, 8, 8))
    assert kinds(found) == {"body.weight": "conv"}
    assert "mean" in found.kept
    assert set(found.dropped) == {
        "branch.0.weight", "branch.0.bias", "branch.1.running_mean", "branch.1.running_var",
        "branch.2.weight", "branch.2.bias", "branch.2.running_mean", "branch.2.running_var",
        "never.weight", "never.bias",
    }  # fmt: skip
    assert set(found.counters) == {"branch.1.num_batches_tracked", "branch.2.num_batches_tracked"}
    assert all(name in found.notes[0] for name in found.dropped)


def test_what_is_named_in_keep_is_stored_even_if_the_sample_does_not_reach_it() -> None:
    found = inventory(WithBranch(), torch.randn(2, 3, 8, 8), keep=["never.*"])
    assert {"never.weight", "never.bias"} <= set(found.kept)
    assert "branch.0.weight" in found.dropped


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
    found = inventory(Frozen(), torch.randn(2, 3, 8, 8))
    assert kinds(found) == {"backbone.0.weight": "conv", "head.weight": "linear"}
    assert {"backbone.1.running_mean", "backbone.1.weight"} <= set(found.kept)
    assert set(found.dropped) == {"unused.weight", "unused.bias"}
    assert any("without a gradient" in note and "backbone.0.weight" in note for note in found.notes)


class Bare(nn.Module):
    """A parameter that enters a product by itself."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.bare = nn.Parameter(torch.randn(shape))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.first(x.flatten(1)), self.bare)


PRODUCTS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "@": (lambda x, w: x @ w, (6, 4)),
    "left of @": (lambda x, w: (w @ x.t()).t(), (4, 6)),
    "matmul of .t()": (lambda x, w: torch.matmul(x, w.t()), (4, 6)),
    "einsum": (lambda x, w: torch.einsum("ni,oi->no", x, w), (4, 6)),
    "einsum of a list": (lambda x, w: torch.einsum("ni,oi->no", [x, w]), (4, 6)),
    "bmm of a view": (
        lambda x, w: torch.bmm(x[:, None], w.view(1, 6, 4).expand(len(x), 6, 4))[:, 0],
        (24, 1),
    ),
    "linear of transpose": (lambda x, w: F.linear(x, w.transpose(0, 1)), (6, 4)),
    "reshape": (lambda x, w: x @ w.reshape(6, 4), (2, 3, 4)),
    "a slice": (lambda x, w: x @ w[:, :4], (6, 5)),
    "unflatten and flatten": (lambda x, w: x @ w.flatten(0, 1), (2, 3, 4)),
    "addmm": (lambda x, w: torch.addmm(torch.zeros(4), x, w), (6, 4)),
    "tensordot": (lambda x, w: torch.tensordot(x, w, dims=1), (6, 4)),
    "multi_dot": (lambda x, w: torch.linalg.multi_dot([x, w]), (6, 4)),
    "conv1d": (lambda x, w: F.conv1d(x[:, :, None], w)[:, :, 0], (4, 6, 1)),
    "data": (lambda x, w: x @ w.data, (6, 4)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_bare_parameter_in_a_product_is_a_layer(name: str) -> None:
    found = inventory(Bare(*PRODUCTS[name]), torch.randn(2, 6, 1, 1))
    assert kinds(found) == {"bare": "matmul", "first.weight": "linear"}


OTHER_USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a sum": lambda x, w: x + w.sum(0),
    "a computed weight": lambda x, w: x @ (w / w.norm()),
    "a copy": lambda x, w: x @ w.t().contiguous(),
}


@pytest.mark.parametrize("name", OTHER_USES)
def test_a_large_parameter_of_unknown_use_is_refused_by_name_unless_kept(name: str) -> None:
    model = Bare(OTHER_USES[name], (6, 6))
    with pytest.raises(ModelError, match=r"bare \(6x6\).*--keep bare") as caught:
        inventory(model, torch.randn(2, 6, 1, 1))
    assert "\n" not in str(caught.value)
    found = inventory(model, torch.randn(2, 6, 1, 1), keep=["bare"])
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

    found = inventory(Positions(), torch.randn(2, 20, 1, 1))
    assert found.kept == ("position", "first.bias")
    assert any("position (2x10)" in note for note in found.notes)


def test_weight_norm_is_refused_by_name() -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 2)
    )
    with pytest.raises(ModelError, match=r"parametrizations\.weight\.original1"):
        inventory(model, torch.randn(1, 8, 1, 1))


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
    found = inventory(Attention(add_bias_kv=True), torch.randn(2, 8, 3, 3))
    assert kinds(found) == {
        "attention.in_proj_weight": "attention",
        "attention.out_proj.weight": "attention",
        "memory.weight": "linear",
    }
    assert {"attention.bias_k", "attention.bias_v", "attention.in_proj_bias"} <= set(found.kept)


def test_separate_projections_of_attention_are_layers() -> None:
    found = inventory(Attention(kdim=6, vdim=6), torch.randn(2, 8, 3, 3))
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

    found = inventory(Encoder(), torch.randn(2, 8, 3, 3))
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

    found = inventory(Indexed(), torch.randn(2, 6, 1, 1))
    assert set(found.integers) == {"order", "index"}
    assert found.bytes_before == 4 * (6 + 6 + 12 + 2)


def test_keep_takes_patterns_and_further_names_and_refuses_what_matches_nothing() -> None:
    model = models.build(models.Architecture("lenet5"))
    found = inventory(model, torch.randn(1, 1, 28, 28), keep=["fc*.weight"])
    assert set(kinds(found)) == {"conv1.weight", "conv2.weight"}
    tied = Tied()
    tied.three = nn.Linear(8, 8)
    tied.one.register_forward_hook(lambda module, args, output: tied.three(output))
    assert kinds(inventory(tied, torch.randn(1, 8, 1, 1), keep=["two.weight"])) == {"three.weight": "linear"}
    with pytest.raises(ConfigError, match=r"'fc9\.weight'.*fc1\.weight"):
        inventory(model, torch.randn(1, 1, 28, 28), keep=["fc9.weight"])


def test_a_network_with_nothing_to_compress_is_refused() -> None:
    with pytest.raises(ModelError, match="got none to compress"):
        inventory(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4)), torch.randn(2, 4, 1, 1))


def test_images_that_the_network_cannot_take_are_refused_in_one_line() -> None:
    model = models.build(models.Architecture("lenet5"))
    with pytest.raises(ModelError, match=r"cannot evaluate images of shape \(3, 32, 32\)") as caught:
        inventory(model, torch.randn(1, 3, 32, 32))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "word"),
    [
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), "lazy"),
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 2, dtype=torch.complex64)), "complex64"),
    ],
)
def test_tensors_that_a_file_cannot_hold_are_refused_by_name(module: nn.Module, word: str) -> None:
    with pytest.raises(ModelError, match=rf"1\.weight.*{word}"):
        inventory(module, torch.randn(1, 4, 1, 1))


@pytest.mark.parametrize("make", [WithBranch, Frozen], ids=["branch", "frozen"])
def test_the_network_is_left_as_it_was(make: Callable[[], nn.Module]) -> None:
    model = make().train()
    first = next(model.children())
    first.eval()
    next(first.parameters()).requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    inventory(model, torch.randn(2, 3, 8, 8))
    assert modes == [module.training for module in model.modules()]
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_network_is_left_as_it_was_when_the_sample_does_not_fit() -> None:
    model = WithBranch().train()
    with pytest.raises(ModelError):
        inventory(model, torch.randn(2, 5, 8, 8))
    assert all(module.training for module in model.modules())
