"""Weights by URI, which fit exactly or are refused in one line."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torchvision
from refusals import refused
from safetensors.torch import save_file
from torch import Tensor, nn

from clipq_ray import models
from clipq_ray.errors import ModelError, StorageError
from clipq_ray.models import Architecture, apply_weights, read_weights, weights_sha256

RECORDS = Path(__file__).resolve().parents[2] / "bench" / "records"
State = dict[str, Tensor]


@pytest.fixture
def lenet() -> nn.Module:
    torch.manual_seed(0)
    return models.build(Architecture("lenet5"))


def googlenet(heads: bool) -> nn.Module:
    return models.build(models.architecture("googlenet", 10, {"aux_logits": heads}))


def moved(model: nn.Module) -> State:
    """Weights that fit `model` and differ from its own everywhere."""
    return {name: tensor + 1 for name, tensor in model.state_dict().items()}


def written(path: Path, content: object) -> str:
    torch.save(content, path)
    return str(path)


# Reading


WRAPPED: dict[str, Callable[[State], object]] = {
    "plain": lambda state: state,
    "ordered": OrderedDict,
    "state_dict": lambda state: {
        "epoch": 3,
        "best": 0.5,
        "state_dict": state,
        "optimizer": {"state": {}, "param_groups": []},
    },
    "model": lambda state: {"model": state, "args": {"lr": 0.1}},
    "model_state_dict": lambda state: {"model_state_dict": state, "epoch": 3},
    "DDP": lambda state: {f"module.{name}": value for name, value in state.items()},
    "DDP in a checkpoint": lambda state: {"state_dict": {f"module.{n}": v for n, v in state.items()}},
    "compiled in DDP": lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
    "parameters": lambda state: {name: nn.Parameter(value) for name, value in state.items()},
}


@pytest.mark.parametrize("form", WRAPPED)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_gives_the_same_tensors_in_whatever_form(
    form: str, zipped: bool, lenet: nn.Module, tmp_path: Path
) -> None:
    state = dict(lenet.state_dict())
    torch.save(WRAPPED[form](state), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    read = read_weights(str(tmp_path / "w.pth"), None)
    assert [name.removeprefix("module.").removeprefix("_orig_mod.") for name in read] == list(state)
    assert not any(value.requires_grad for value in read.values())
    other = models.build(Architecture("lenet5"))
    assert apply_weights(other, read, "w.pth") == []
    assert weights_sha256(other.state_dict()) == weights_sha256(state)


def test_weights_are_read_from_any_uri_and_safetensors_known_by_their_content(
    lenet: nn.Module, tmp_path: Path
) -> None:
    state = dict(lenet.state_dict())
    save_file(state, tmp_path / "w.safetensors")
    save_file(state, tmp_path / "w.bin")
    written(tmp_path / "w.pt", state)
    with fsspec.open("memory://weights-test/w.safetensors", "wb") as stream:
        stream.write((tmp_path / "w.safetensors").read_bytes())
    uris = [
        str(tmp_path / "w.safetensors"), str(tmp_path / "w.bin"), f"file://{tmp_path}/w.safetensors",
        (tmp_path / "w.pt").as_uri(), "memory://weights-test/w.safetensors",
    ]  # fmt: skip
    for uri in uris:
        assert weights_sha256(read_weights(uri, Architecture("lenet5"))) == weights_sha256(state), uri


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_missing_file_and_an_empty_file_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with refused(StorageError, match=name):
        read_weights(str(path), None)
    path.write_bytes(b"")
    with refused(ModelError, match=f"{name}, got an empty file"):
        read_weights(str(path), None)


def test_a_compressed_network_is_no_start_for_training_and_is_refused() -> None:
    with refused(ModelError, match=r"got a compressed network \(\.clq\).*weights that it was made"):
        read_weights(str(RECORDS / "lenet5_caffe-mnist-small.clq"), None)


class Trap:
    """What a hostile checkpoint does when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickled_objects_are_refused_unread_and_the_user_learns_how_to_export(
    lenet: nn.Module, tmp_path: Path
) -> None:
    with refused(ModelError, match=r"state dict .*pickled clipq_ray\.models\.small\.LeNet5.*safetensors"):
        read_weights(written(tmp_path / "whole.pt", lenet), None)
    sprung = tmp_path / "sprung"
    (tmp_path / "trap.pth").write_bytes(pickle.dumps(Trap(sprung)))
    for uri in (
        str(tmp_path / "trap.pth"),
        written(tmp_path / "trap.pt", {"state_dict": Trap(sprung)}),
    ):
        with refused(ModelError, match=r"expected a state dict of tensors.*safetensors"):
            read_weights(uri, None)
    assert not sprung.exists()


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_every_truncated_or_garbled_file_is_refused_by_name(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w.{suffix}"
    state = {"w": torch.arange(4.0)}
    if suffix == "pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    whole = path.read_bytes()
    garbage = [
        b"\0",
        b"hello",
        b"{" * 40,
        b"PK\x03\x04" + bytes(90),
        bytes(range(256)),
        b"\x80\x02}q\x00.",
        b"<html>",
    ]
    for data in [*garbage, *(whole[:cut] for cut in range(1, len(whole), max(1, len(whole) // 40)))]:
        path.write_bytes(data)
        with refused(ModelError, match=path.name):
            read_weights(str(path), None)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_bytes_that_are_no_checkpoint_are_refused_whatever_they_start_with(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    for first in range(256):
        path.write_bytes(bytes([first]) + b"\x8a\x02q\x00(K\x01.")
        with refused(ModelError, match=path.name):
            read_weights(str(path), None)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "got list"),
        ([torch.ones(1)], "got list"),
        (torch.zeros(3), "got Tensor"),
        ({"a": 1}, r"also a \(int\); export"),
        ({"epoch": 1, "name": "x", "w": torch.ones(1)}, r"also epoch \(int\), name \(str\); export"),
    ],
)
def test_something_else_than_tensors_is_named(content: object, words: str, tmp_path: Path) -> None:
    with refused(ModelError, match=f"state dict of tensors.*{words}"):
        read_weights(written(tmp_path / "w.pth", content), None)


# Published weights


@pytest.mark.parametrize("arch", [None, Architecture("lenet5")])
def test_published_weights_need_one_of_torchvisions_networks(arch: Architecture | None) -> None:
    with refused(ModelError, match="expected a torchvision network"):
        read_weights("torchvision", arch)


def test_weights_that_cannot_be_fetched_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(self: object, *args: object, **kwargs: object) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", offline)
    with refused(ModelError, match=r"resnet18 cannot be fetched.*give --weights URI"):
        read_weights("torchvision", Architecture("resnet18"))


def old_densenet(name: str) -> str:
    for part in ("norm", "conv"):
        for number in "12":
            name = name.replace(f".{part}{number}.", f".{part}.{number}.") if "denselayer" in name else name
    return name


def old_vit(name: str) -> str:
    return name.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2.")


@pytest.mark.parametrize(
    ("name", "kwargs", "old"),
    [("densenet121", {}, old_densenet), ("vit_b_16", {"image_size": 32}, old_vit), ("mnasnet0_5", {}, str)],
)
def test_weights_in_torchvisions_published_spelling_fit_its_networks(
    name: str, kwargs: dict[str, Any], old: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = models.architecture(name, None, kwargs)
    model = models.build(arch)
    published = {old(key): value for key, value in moved(model).items()}
    if old is not str:
        assert set(published) != set(model.state_dict())
    weights = torchvision.models.get_model_weights(name)
    monkeypatch.setattr(weights, "get_state_dict", lambda self, *args, **kwargs: published)
    expected = weights_sha256(moved(model))
    assert apply_weights(model, read_weights("torchvision", arch), "torchvision") == []
    assert weights_sha256(model.state_dict()) == expected


@pytest.mark.parametrize("name", ["module", "_orig_mod"])
def test_a_network_whose_own_names_look_wrapped_takes_its_weights(name: str, tmp_path: Path) -> None:
    model = nn.Sequential(OrderedDict([(name, nn.Linear(3, 2))]))
    expected = moved(model)
    assert apply_weights(model, read_weights(written(tmp_path / "w.pt", expected), None), "w.pt") == []
    assert weights_sha256(model.state_dict()) == weights_sha256(expected)


# Applying


@pytest.mark.parametrize("prefix", ["", "module."])
def test_what_is_applied_is_what_the_network_then_holds(prefix: str, lenet: nn.Module) -> None:
    state = moved(lenet)
    assert apply_weights(lenet, {f"{prefix}{name}": value for name, value in state.items()}, "x") == []
    assert weights_sha256(lenet.state_dict()) == weights_sha256(state)


def small(name: str, classes: int = 10) -> State:
    return dict(models.build(models.architecture(name, classes, {})).state_dict())


def renamed(state: State, names: dict[str, str]) -> State:
    return {names.get(name, name): value for name, value in state.items()}


MISFITS: dict[str, tuple[Callable[[], State], tuple[str, ...]]] = {
    "another network": (
        lambda: small("resnet20"),
        (
            "missing conv1.bias, conv2.bias, conv2.weight and 6 more",
            "unexpected bn1.bias",
            "other shapes conv1.weight expected (6, 1, 5, 5) got (16, 3, 3, 3)",
        ),
    ),
    "another name": (
        lambda: renamed(small("lenet5"), {"conv1.weight": "convolution.weight"}),
        ("missing conv1.weight; unexpected convolution.weight; other shapes none",),
    ),
    "one more": (
        lambda: {**small("lenet5"), "extra.weight": torch.ones(1)},
        ("missing none; unexpected extra.weight; other shapes none",),
    ),
    "nothing": (
        dict,
        ("missing conv1.bias, conv1.weight, conv2.bias and 7 more; unexpected none; other shapes none",),
    ),
    "more classes": (
        lambda: small("lenet5", classes=100),
        (
            "missing none; unexpected none",
            "fc3.weight expected (10, 84) got (100, 84)",
            "fc3.bias expected (10,) got (100,)",
            "; for 100 classes say --model-args '{\"num_classes\": 100}'",
        ),
    ),
    "another width": (
        lambda: {**small("lenet5"), "fc2.bias": torch.zeros(3), "fc3.bias": torch.zeros(4)},
        ("fc2.bias expected (84,) got (3,)", "; check --model and --model-args"),
    ),
    "another name and another shape": (
        lambda: {**renamed(small("lenet5"), {"fc1.bias": "extra"}), "fc2.bias": torch.zeros(3)},
        ("missing fc1.bias; unexpected extra; other shapes fc2.bias expected (84,) got (3,)",),
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_names_and_shapes_that_do_not_fit_are_listed_on_both_sides(misfit: str, lenet: nn.Module) -> None:
    make, words = MISFITS[misfit]
    with refused(ModelError, match="weights s3://bucket/w.pth do not fit") as caught:
        apply_weights(lenet, make(), "s3://bucket/w.pth")
    assert all(part in str(caught.value) for part in words)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fc2.weight", torch.nan),
        ("fc2.weight", torch.inf),
        ("fc2.weight", -torch.inf),
        ("fc3.bias", torch.nan),
    ],
)
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_applied(
    name: str, value: float, lenet: nn.Module
) -> None:
    before = weights_sha256(lenet.state_dict())
    state = moved(lenet)
    state[name].view(-1)[-1] = value
    with refused(ModelError, match=rf"NaN or infinity in {name}"):
        apply_weights(lenet, state, "x")
    assert weights_sha256(lenet.state_dict()) == before


def test_values_that_overflow_the_networks_type_are_refused(lenet: nn.Module) -> None:
    state = {name: tensor.double() for name, tensor in lenet.state_dict().items()}
    apply_weights(lenet, state, "x")
    state["fc1.bias"][0] = 1e300
    with refused(ModelError, match=r"infinity in fc1\.bias"):
        apply_weights(lenet, state, "x")


def test_integers_in_place_of_floats_are_refused(lenet: nn.Module) -> None:
    state = {**lenet.state_dict(), "fc1.bias": torch.zeros(120, dtype=torch.int8)}
    with refused(ModelError, match=r"fc1\.bias expected torch\.float32 got torch\.int8"):
        apply_weights(lenet, state, "x")


def test_half_precision_weights_are_taken(lenet: nn.Module) -> None:
    state = {name: tensor.half() for name, tensor in lenet.state_dict().items()}
    apply_weights(lenet, state, "x")
    assert all(
        value.dtype == torch.float32 and torch.equal(value, state[name].float())
        for name, value in lenet.state_dict().items()
    )


def test_batch_norms_counters_may_be_missing_but_nothing_else() -> None:
    model = models.build(Architecture("resnet20"))
    state = {name: value for name, value in moved(model).items() if not name.endswith("num_batches_tracked")}
    assert apply_weights(model, state, "x") == []
    assert torch.equal(model.state_dict()["bn1.running_mean"], state["bn1.running_mean"])
    del state["bn1.running_mean"]
    with refused(ModelError, match=r"missing bn1\.running_mean; unexpected none"):
        apply_weights(model, state, "x")


def test_auxiliary_heads_that_the_network_lacks_are_left_out_with_a_note() -> None:
    state, model = moved(googlenet(heads=True)), googlenet(heads=False)
    heads = [name for name in state if name.startswith("aux")]
    (note,) = apply_weights(model, state, "x")
    assert f"auxiliary heads aux1, aux2 ({len(heads)} tensors)" in note
    assert "left out" in note
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "make",
    [
        lambda: googlenet(heads=True),
        lambda: nn.Sequential(OrderedDict(aux1=nn.Linear(2, 2), head=nn.Linear(2, 2))),
    ],
    ids=["googlenet", "a user's own"],
)
def test_auxiliary_heads_that_the_network_has_are_applied(make: Callable[[], nn.Module]) -> None:
    model = make()
    state = moved(model)
    assert apply_weights(model, state, "x") == []
    assert weights_sha256(model.state_dict()) == weights_sha256(state)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(("given", "absent"), [("0.weight", "1.weight"), ("1.weight", "0.weight")])
def test_a_tied_tensor_may_be_given_under_one_of_its_names(given: str, absent: str) -> None:
    model = tied()
    state = moved(model)
    del state[absent]
    apply_weights(model, state, "x")
    assert torch.equal(model[0].weight, state[given])


def test_tied_names_with_different_values_are_refused() -> None:
    model = tied()
    state = {**model.state_dict(), "1.weight": torch.zeros(3, 3)}
    with refused(ModelError, match=r"0\.weight and 1\.weight are one tensor"):
        apply_weights(model, state, "x")


# Hashing


def test_the_hash_sees_names_types_shapes_and_bytes_but_not_order_or_layout() -> None:
    base = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}
    digest = weights_sha256(base)
    assert digest == weights_sha256({"b": base["b"], "a": base["a"].T.contiguous().T})
    changed: list[State] = [
        {**base, "a": base["a"] + 1},
        {**base, "a": base["a"].reshape(6)},
        {**base, "a": base["a"].view(torch.int32)},
        {"A": base["a"], "b": base["b"]},
        {"a": base["a"]},
    ]
    assert len({digest, *(weights_sha256(state) for state in changed)}) == 6
    assert weights_sha256({"a": torch.zeros(0), "b": torch.ones(2, dtype=torch.bfloat16)})
