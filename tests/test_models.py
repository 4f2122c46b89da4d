"""Networks by name, weights by URI, and what is said when they do not fit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from clipq_ray import models
from clipq_ray.data import open_data
from clipq_ray.errors import ModelError, StorageError
from clipq_ray.evaluate import evaluate
from clipq_ray.models import Architecture, apply_weights, architecture, build, read_weights

LENET = architecture("lenet5", None, {})


def line(caught: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("lenet5", 61_706),
        ("lenet5_caffe", 431_080),
        ("lenet_300_100", 266_610),
        ("resnet20", 269_722),
        ("resnet56", 853_018),
    ],
)
def test_built_in_networks_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    assert sum(p.numel() for p in build(architecture(name, None, {})).parameters()) == parameters


@pytest.mark.parametrize("name", ["lenet5", "lenet5_caffe", "lenet_300_100", "resnet20", "resnet110"])
def test_built_in_networks_take_their_default_input_and_any_number_of_classes(name: str) -> None:
    model = build(architecture(name, 7, {})).eval()
    assert model(torch.zeros(2, *models.default_input(name))).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "size"), [("resnet50", 224), ("inception_v3", 299), ("efficientnet_b4", 380), ("vit_b_16", 224)]
)
def test_torchvision_networks_have_the_input_of_their_published_weights(name: str, size: int) -> None:
    assert models.default_input(name) == (3, size, size)


@pytest.mark.parametrize(
    ("wrong", "near"), [("resnet21", "resnet20"), ("lenet", "lenet5"), ("mobilenetv2", "mobilenet_v2")]
)
def test_an_unknown_network_is_answered_with_the_nearest_names(wrong: str, near: str) -> None:
    for call in (
        lambda: architecture(wrong, None, {}),
        lambda: build(Architecture(wrong)),
        lambda: models.default_input(wrong),
        lambda: models.default_weights(wrong),
    ):
        with pytest.raises(ModelError, match="expected a known network") as caught:
            call()
        assert repr(wrong) in line(caught)
        assert near in line(caught).partition("nearest names:")[2]


def test_a_name_like_no_other_is_answered_with_examples() -> None:
    with pytest.raises(ModelError, match=r"e\.g\. lenet5") as caught:
        architecture("zzzzzz", None, {})
    line(caught)


def test_arguments_that_a_network_does_not_take_are_named() -> None:
    for name in ("lenet5", "resnet18"):
        with pytest.raises(ModelError, match="wings") as caught:
            build(architecture(name, None, {"wings": 2}))
        assert "--model-args" in line(caught)


def test_an_import_needs_permission() -> None:
    name = "torch.nn:Identity"
    with pytest.raises(ModelError, match="registered network"):
        build(Architecture(name))
    with pytest.raises(ModelError, match="known network"):
        architecture(name, None, {})
    allowed = architecture(name, None, {}, allow_import=True)
    assert isinstance(build(allowed, allow_import=True), nn.Identity)


@pytest.mark.parametrize(
    "name", ["no_such_package:net", "torch.nn:NoSuchThing", "builtins:dict", "torch.nn:Linear"]
)
def test_an_import_that_gives_no_network_is_one_line(name: str) -> None:
    with pytest.raises(ModelError, match=name.partition(":")[0]) as caught:
        build(Architecture(name), allow_import=True)
    line(caught)


def test_an_architecture_comes_back_from_json() -> None:
    made = architecture("googlenet", 12, {"transform_input": True})
    assert Architecture.from_json(made.to_json()) == made
    assert made.kwargs["num_classes"] == 12
    assert made.kwargs["transform_input"] is True
    assert made.kwargs["aux_logits"] is False


# Reading


def written(path: Path, value: object) -> str:
    torch.save(value, path)
    return str(path)


def lenet_state() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return dict(build(LENET).state_dict())


def test_every_form_of_weights_gives_the_same_network(tmp_path: Path) -> None:
    state = lenet_state()
    save_file(state, tmp_path / "a.safetensors")
    distributed = {f"module.{name}": value for name, value in state.items()}
    uris = [
        str(tmp_path / "a.safetensors"),
        written(tmp_path / "a.pt", state),
        written(tmp_path / "b.pth", {"epoch": 3, "best": 0.5, "state_dict": state}),
        written(tmp_path / "c.pth", {"model": state, "optimizer": {"lr": 0.1}}),
        written(tmp_path / "d.pth", {"state_dict": distributed}),
        (tmp_path / "a.pt").as_uri(),
    ]
    for uri in uris:
        model = build(LENET)
        assert apply_weights(model, read_weights(uri, LENET), uri) == []
        assert models.weights_sha256(model.state_dict()) == models.weights_sha256(state), uri


def test_counters_may_be_missing_from_weights() -> None:
    model = build(architecture("resnet20", None, {}))
    state = {n: t for n, t in model.state_dict().items() if "num_batches" not in n}
    assert apply_weights(model, state, "w") == []


class Mischief:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_a_pickled_object_is_refused_and_not_run(tmp_path: Path) -> None:
    uri = written(tmp_path / "evil.pt", {"state_dict": Mischief(tmp_path / "ran")})
    with pytest.raises(ModelError, match="expected a state dict of tensors") as caught:
        read_weights(uri, LENET)
    assert "safetensors" in line(caught)
    assert not (tmp_path / "ran").exists()


def test_a_whole_pickled_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="state dict of tensors") as caught:
        read_weights(written(tmp_path / "net.pt", build(LENET)), LENET)
    line(caught)


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, torch.zeros(3)])
def test_a_checkpoint_of_other_things_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(ModelError, match="state dict of tensors") as caught:
        read_weights(written(tmp_path / "x.pt", value), LENET)
    line(caught)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_missing_empty_and_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(StorageError, match=name) as missing:
        read_weights(str(path), LENET)
    line(missing)
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="empty file") as caught:
        read_weights(str(path), LENET)
    assert name in line(caught)
    save_file(lenet_state(), path) if name.endswith("safetensors") else written(path, lenet_state())
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=name) as damaged:
        read_weights(str(path), LENET)
    line(damaged)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_bytes_that_are_no_checkpoint_are_refused_whatever_they_start_with(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    for first in range(256):
        path.write_bytes(bytes([first]) + b"\x8a\x02q\x00(K\x01.")
        with pytest.raises(ModelError) as caught:
            read_weights(str(path), LENET)
        line(caught)


def test_published_weights_are_for_torchvision_networks_that_have_some() -> None:
    with pytest.raises(ModelError, match="expected a torchvision network"):
        read_weights("torchvision", LENET)


# Fitting


def test_wrong_names_are_listed_on_both_sides() -> None:
    state = lenet_state()
    state["convolution.weight"] = state.pop("conv1.weight")
    with pytest.raises(ModelError, match=r"missing conv1\.weight; unexpected convolution\.weight") as caught:
        apply_weights(build(LENET), state, "here.pt")
    assert "here.pt" in line(caught)


def test_wrong_shapes_are_listed_with_both_shapes() -> None:
    model = build(architecture("lenet5", 12, {}))
    with pytest.raises(ModelError, match=r"fc3\.weight expected \(12, 84\) got \(10, 84\)") as caught:
        apply_weights(model, lenet_state(), "here.pt")
    assert "fc3.bias expected (12,) got (10,)" in line(caught)


def test_wrong_names_and_wrong_shapes_stand_in_one_line() -> None:
    state = lenet_state()
    state["extra"] = state.pop("fc1.bias")
    state["fc2.bias"] = torch.zeros(3)
    with pytest.raises(ModelError) as caught:
        apply_weights(build(LENET), state, "here.pt")
    for part in ("missing fc1.bias", "unexpected extra", "fc2.bias expected (84,) got (3,)"):
        assert part in line(caught)


def test_long_lists_are_cut_and_counted() -> None:
    with pytest.raises(ModelError, match=r"missing [^;]* and 7 more; unexpected none"):
        apply_weights(build(LENET), {}, "here.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_applied(value: float) -> None:
    model = build(LENET)
    before = models.weights_sha256(model.state_dict())
    state = lenet_state()
    state["fc2.weight"][3, 4] = value
    with pytest.raises(ModelError, match=r"NaN or infinity in fc2\.weight") as caught:
        apply_weights(model, state, "here.pt")
    line(caught)
    assert models.weights_sha256(model.state_dict()) == before


def test_auxiliary_heads_of_a_googlenet_are_left_out_with_a_note() -> None:
    whole = build(architecture("googlenet", 10, {"aux_logits": True}))
    model = build(architecture("googlenet", 10, {}))
    (note,) = apply_weights(model, whole.state_dict(), "g.pt")
    assert "aux1, aux2" in note
    assert "left out" in note
    assert torch.equal(model.fc.weight, whole.fc.weight)  # type: ignore[union-attr, arg-type]


def test_auxiliary_heads_that_the_network_has_are_applied() -> None:
    whole = build(architecture("googlenet", 10, {"aux_logits": True}))
    assert apply_weights(whole, whole.state_dict(), "g.pt") == []


def test_a_hash_of_weights_sees_names_types_shapes_and_values() -> None:
    state = {"a": torch.arange(6.0), "b": torch.zeros(2)}
    others = [
        {"a": state["a"], "c": state["b"]},
        {"a": state["a"].reshape(2, 3), "b": state["b"]},
        {"a": state["a"].int().view(torch.float32), "b": state["b"]},
        {"a": state["a"].view(torch.int32), "b": state["b"]},
    ]
    hashes = {models.weights_sha256(other) for other in [state, *others]}
    assert len(hashes) == 5
    assert models.weights_sha256(dict(reversed(state.items()))) in hashes


@pytest.mark.slow
def test_the_given_resnet20_scores_at_least_90_percent_on_cifar10(shared: Path) -> None:
    named = architecture("resnet20", None, {})
    model = build(named)
    uri = str(shared / "weights" / "resnet20-cifar10.safetensors")
    assert apply_weights(model, read_weights(uri, named), uri) == []
    data = open_data(str(shared / "data" / "cifar10"), input_shape=(3, 32, 32), limit_images=1000)
    assert data.test is not None
    result = evaluate(model, data.test.subset(torch.arange(2000)), batch_size=250)
    assert result.top1 >= 0.90
