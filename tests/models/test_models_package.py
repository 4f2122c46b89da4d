"""Networks by name, and weights that fit exactly or are refused in one line."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from clipq_ray import models
from clipq_ray.errors import ModelError, StorageError, UserError
from clipq_ray.models import Architecture, apply_weights, read_weights

ROOT = Path(__file__).resolve().parents[2]


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def lenet() -> nn.Module:
    torch.manual_seed(0)
    return models.build(Architecture("lenet5"))


def own_function(width: int) -> nn.Module:
    return nn.Linear(width, 2)


def not_a_network() -> int:
    return 3


def broken() -> nn.Module:
    raise KeyError("first line\nsecond line")


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
    model = models.build(models.architecture(name, None, {}))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.zeros(2, *models.default_input(name))).shape == (2, 10)


def test_names_hold_the_built_in_and_all_of_torchvisions_classification_networks() -> None:
    names = models.names()
    assert len(names) == len(set(names))
    for name in (
        "lenet5",
        "resnet110",
        "resnet50",
        "alexnet",
        "googlenet",
        "vgg16",
        "mobilenet_v2",
        "swin_v2_t",
    ):
        assert name in names
    assert "deeplabv3_resnet50" not in names


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("lenet_300_100", (1, 28, 28)),
        ("resnet32", (3, 32, 32)),
        ("resnet50", (3, 224, 224)),
        ("inception_v3", (3, 299, 299)),
        ("efficientnet_b1", (3, 240, 240)),
        ("vit_h_14", (3, 518, 518)),
        ("some.package:function", (3, 224, 224)),
    ],
)
def test_the_default_input_is_what_the_published_weights_were_made_for(
    name: str, shape: tuple[int, int, int]
) -> None:
    assert models.default_input(name) == shape


def test_every_registered_network_has_defaults_that_build_knows() -> None:
    for name in models.names():
        arch = models.architecture(name, 7, {})
        assert arch.kwargs["num_classes"] == 7
        assert Architecture.from_json(json.loads(json.dumps(arch.to_json()))) == arch
        assert models.default_input(name)[1] >= 28
        assert models.default_weights(name) in ("train", "torchvision")


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_not_built_and_inputs_are_as_published_weights_expect(name: str) -> None:
    model = models.build(models.architecture(name, 5, {}))
    assert not any("aux" in key.lower() for key in model.state_dict())
    assert model.transform_input is True
    assert models.build(models.architecture(name, 5, {"transform_input": False})).transform_input is False


def test_arguments_come_over_the_number_of_classes_over_the_defaults() -> None:
    assert models.architecture("resnet18", None, {}).kwargs == {"num_classes": 1000}
    assert models.architecture("resnet18", 10, {}).kwargs == {"num_classes": 10}
    assert models.architecture("resnet18", 10, {"num_classes": 3}).kwargs == {"num_classes": 3}


def test_an_unknown_network_is_refused_with_the_nearest_names() -> None:
    for call in (
        lambda: models.architecture("ResNet-50", None, {}),
        lambda: models.build(Architecture("ResNet-50")),
        lambda: models.default_input("ResNet-50"),
        lambda: models.default_weights("ResNet-50"),
    ):
        with pytest.raises(ModelError, match=r"'ResNet-50'.*nearest names.*resnet50") as caught:
            call()
        one_line(caught)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("lenet5", {"colour": 1}),
        ("resnet20", {"blocks": 4}),
        ("resnet18", {"num_classes": -1}),
        ("resnet18", {"num_classes": "ten"}),
        ("resnet18", {"weights": "DEFAULT"}),
        ("vgg16", {"no_such": True}),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_one_line(name: str, kwargs: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=f"{name} cannot be built with.*--model-args") as caught:
        models.build(Architecture(name, kwargs))
    one_line(caught)


@pytest.mark.parametrize("value", [None, 3, [], {}, {"name": 3}, {"name": "lenet5", "kwargs": [1]}])
def test_a_damaged_architecture_is_refused(value: Any) -> None:
    with pytest.raises(ModelError, match="expected an architecture"):
        Architecture.from_json(value)


def test_a_function_is_imported_only_where_the_caller_allows_it() -> None:
    name = f"{__name__}:own_function"
    arch = models.architecture(name, 10, {"width": 4}, allow_import=True)
    assert arch.kwargs == {"width": 4}
    assert isinstance(models.build(arch, allow_import=True), nn.Linear)
    for call in (lambda: models.architecture(name, 10, {"width": 4}), lambda: models.build(arch)):
        with pytest.raises(ModelError, match=r"registered network|known network"):
            call()


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("missing_one", "importable"),
        ("not_a_network", "return a torch.nn.Module, got int"),
        ("broken", "first line.*second line"),
    ],
)
def test_a_function_that_gives_no_network_is_refused_in_one_line(function: str, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        models.build(Architecture(f"{__name__}:{function}"), allow_import=True)
    one_line(caught)
    with pytest.raises(ModelError, match="importable"):
        models.build(Architecture("no.such.package:function"), allow_import=True)


def test_built_in_networks_need_no_torchvision(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "from clipq_ray import models, errors\n"
        "assert models.build(models.Architecture('resnet20')) is not None\n"
        "try: models.build(models.Architecture('resnet50'))\n"
        "except errors.ModelError as error: print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    assert "install the pair together" in done.stdout


def test_the_same_seed_builds_the_same_network() -> None:
    def digest(seed: int) -> str:
        torch.manual_seed(seed)
        return models.weights_sha256(models.build(Architecture("resnet20")).state_dict())

    assert digest(1) == digest(1) != digest(2)


# Reading


def written(path: Path, content: object) -> str:
    torch.save(content, path)
    return str(path)


WRAPPED: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "plain": lambda state: state,
    "ordered": OrderedDict,
    "state_dict": lambda state: {
        "epoch": 3,
        "state_dict": state,
        "optimizer": {"state": {}, "param_groups": []},
    },
    "model": lambda state: {"model": state, "args": {"lr": 0.1}},
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
    assert list(read) == list(state)
    assert models.weights_sha256(read) == models.weights_sha256(state)
    assert not any(value.requires_grad for value in read.values())


def test_safetensors_are_read_from_any_uri_and_known_by_their_content(
    lenet: nn.Module, tmp_path: Path
) -> None:
    import fsspec

    state = dict(lenet.state_dict())
    save_file(state, tmp_path / "w.safetensors")
    save_file(state, tmp_path / "w.bin")
    with fsspec.open("memory://weights-test/w.safetensors", "wb") as stream:
        stream.write((tmp_path / "w.safetensors").read_bytes())
    uris = [
        str(tmp_path / "w.safetensors"), str(tmp_path / "w.bin"), f"file://{tmp_path}/w.safetensors",
        "memory://weights-test/w.safetensors",
    ]  # fmt: skip
    digests = {models.weights_sha256(read_weights(uri, None)) for uri in uris}
    assert digests == {models.weights_sha256(state)}


def test_a_missing_file_and_an_empty_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"missing\.pth") as missing:
        read_weights(str(tmp_path / "missing.pth"), None)
    one_line(missing)
    (tmp_path / "empty.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"empty\.safetensors, got an empty file"):
        read_weights(str(tmp_path / "empty.safetensors"), None)


class Trap:
    """What a hostile checkpoint does when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_compressed_network_is_no_start_for_training_and_is_refused() -> None:
    record = Path(__file__).parents[2] / "bench" / "records" / "lenet5_caffe-mnist-small.clq"
    with pytest.raises(
        ModelError, match=r"got a compressed network \(\.clq\).*weights that it was made"
    ) as caught:
        read_weights(str(record), None)
    one_line(caught)


def test_pickled_objects_are_refused_unread_and_the_user_learns_how_to_export(
    lenet: nn.Module, tmp_path: Path
) -> None:
    whole = written(tmp_path / "whole.pt", lenet)
    with pytest.raises(ModelError, match=r"pickled clipq_ray\.models\.small\.LeNet5.*safetensors") as caught:
        read_weights(whole, None)
    one_line(caught)
    trap = tmp_path / "sprung"
    for name, data in {
        "trap.pth": pickle.dumps(Trap(trap)),
        "trap.pt": Path(written(tmp_path / "trap.pt", {"state_dict": Trap(trap)})).read_bytes(),
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ModelError, match="safetensors") as caught:
            read_weights(str(tmp_path / name), None)
        one_line(caught)
    assert not trap.exists()


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_every_truncated_or_garbled_file_is_refused_in_one_line(
    suffix: str, lenet: nn.Module, tmp_path: Path
) -> None:
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
        with pytest.raises(ModelError) as caught:
            read_weights(str(path), None)
        one_line(caught)


def test_something_else_than_tensors_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"also epoch \(int\), name \(str\); export"):
        read_weights(written(tmp_path / "a.pth", {"epoch": 1, "name": "x", "w": torch.ones(1)}), None)
    with pytest.raises(ModelError, match="got list"):
        read_weights(written(tmp_path / "b.pth", [torch.ones(1)]), None)


def test_torchvisions_weights_need_one_of_its_networks() -> None:
    for arch in (None, Architecture("lenet5")):
        with pytest.raises(ModelError, match="expected a torchvision network"):
            read_weights("torchvision", arch)


def test_weights_that_cannot_be_fetched_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(self: object, *args: object, **kwargs: object) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", offline)
    with pytest.raises(ModelError, match=r"resnet18 cannot be fetched.*give --weights URI") as caught:
        read_weights("torchvision", Architecture("resnet18"))
    one_line(caught)


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
    published = {old(key): value + 1 for key, value in model.state_dict().items()}
    if old is not str:
        assert set(published) != set(model.state_dict())
    weights = torchvision.models.get_model_weights(name)
    monkeypatch.setattr(weights, "get_state_dict", lambda self, *args, **kwargs: published)
    read = read_weights("torchvision", arch)
    assert apply_weights(model, read, "torchvision") == []
    assert models.weights_sha256(model.state_dict()) == models.weights_sha256(read)


# Applying


def test_what_is_applied_is_what_the_network_then_holds(lenet: nn.Module) -> None:
    other = models.build(Architecture("lenet5"))
    assert apply_weights(other, lenet.state_dict(), "x") == []
    assert models.weights_sha256(other.state_dict()) == models.weights_sha256(lenet.state_dict())
    assert apply_weights(other, {f"module.{n}": v for n, v in lenet.state_dict().items()}, "x") == []


def test_wrong_names_are_refused_with_both_sides_and_counts(lenet: nn.Module) -> None:
    state = models.build(Architecture("resnet20")).state_dict()
    with pytest.raises(ModelError) as caught:
        apply_weights(lenet, state, "s3://bucket/w.pth")
    message = one_line(caught)
    assert "s3://bucket/w.pth" in message
    assert "missing conv1.bias, conv2.bias, conv2.weight and 6 more" in message
    assert "unexpected bn1.bias" in message
    assert "other shapes conv1.weight expected (6, 1, 5, 5) got (16, 3, 3, 3)" in message
    with pytest.raises(ModelError, match=r"missing none; unexpected extra\.weight"):
        apply_weights(lenet, {**lenet.state_dict(), "extra.weight": torch.ones(1)}, "x")
    with pytest.raises(
        ModelError, match=r"missing conv1\.bias, conv1\.weight, conv2\.bias and 7 more; unexpected none"
    ):
        apply_weights(lenet, {}, "x")


def test_wrong_shapes_are_refused_with_both_sides(lenet: nn.Module) -> None:
    state = models.build(models.architecture("lenet5", 100, {})).state_dict()
    with pytest.raises(ModelError) as caught:
        apply_weights(lenet, state, "x")
    assert "fc3.weight expected (10, 84) got (100, 84)" in one_line(caught)
    assert "fc3.bias expected (10,) got (100,)" in one_line(caught)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_by_name(value: float, lenet: nn.Module) -> None:
    state = {name: tensor.clone() for name, tensor in lenet.state_dict().items()}
    state["fc2.weight"][3, 5] = value
    with pytest.raises(ModelError, match=r"NaN or infinity in fc2\.weight"):
        apply_weights(lenet, state, "x")


def test_values_that_overflow_the_networks_type_are_refused(lenet: nn.Module) -> None:
    state = {name: tensor.double() for name, tensor in lenet.state_dict().items()}
    apply_weights(lenet, state, "x")
    state["fc1.bias"][0] = 1e300
    with pytest.raises(ModelError, match=r"infinity in fc1\.bias"):
        apply_weights(lenet, state, "x")


def test_integers_in_place_of_floats_are_refused(lenet: nn.Module) -> None:
    state = {**lenet.state_dict(), "fc1.bias": torch.zeros(120, dtype=torch.int8)}
    with pytest.raises(ModelError, match=r"fc1\.bias expected torch\.float32 got torch\.int8"):
        apply_weights(lenet, state, "x")


def test_a_refused_state_leaves_the_network_unchanged(lenet: nn.Module) -> None:
    before = models.weights_sha256(lenet.state_dict())
    state = {name: tensor + 1 for name, tensor in lenet.state_dict().items()}
    state["fc3.bias"][0] = torch.nan
    with pytest.raises(ModelError):
        apply_weights(lenet, state, "x")
    assert models.weights_sha256(lenet.state_dict()) == before


def test_half_precision_weights_are_taken(lenet: nn.Module) -> None:
    state = {name: tensor.half() for name, tensor in lenet.state_dict().items()}
    apply_weights(lenet, state, "x")
    assert all(
        value.dtype == torch.float32 and torch.equal(value, state[name].float())
        for name, value in lenet.state_dict().items()
    )


def test_batch_norms_counters_may_be_missing_but_nothing_else() -> None:
    model = models.build(Architecture("resnet20"))
    state = {n: t + 1 for n, t in model.state_dict().items() if not n.endswith("num_batches_tracked")}
    assert apply_weights(model, state, "x") == []
    assert torch.equal(model.state_dict()["bn1.running_mean"], state["bn1.running_mean"])
    del state["bn1.running_mean"]
    with pytest.raises(ModelError, match=r"missing bn1\.running_mean; unexpected none"):
        apply_weights(model, state, "x")


def test_auxiliary_heads_in_the_weights_are_left_out_and_noted() -> None:
    model = models.build(models.architecture("googlenet", 3, {}))
    heads = {f"{head}.fc1.weight": torch.ones(2, 2) for head in ("aux1", "aux2")}
    (note,) = apply_weights(model, {**model.state_dict(), **heads}, "x")
    assert "auxiliary heads aux1, aux2 (2 tensors)" in note


def test_a_user_network_that_has_heads_gets_their_weights() -> None:
    model = nn.Sequential(OrderedDict(aux1=nn.Linear(2, 2), head=nn.Linear(2, 2)))
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    assert apply_weights(model, state, "x") == []
    assert torch.equal(model.aux1.weight, state["aux1.weight"])


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize("absent", ["0.weight", "1.weight"])
def test_a_tied_tensor_may_be_given_under_one_of_its_names(absent: str) -> None:
    model = tied()
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    del state[absent]
    apply_weights(model, state, "x")
    assert torch.equal(model[0].weight, next(state[n] for n in ("0.weight", "1.weight") if n in state))


def test_tied_names_with_different_values_are_refused() -> None:
    model = tied()
    state = {**model.state_dict(), "1.weight": torch.zeros(3, 3)}
    with pytest.raises(ModelError, match=r"0\.weight and 1\.weight are one tensor"):
        apply_weights(model, state, "x")


# Hashing


def test_the_hash_sees_names_types_shapes_and_bytes_but_not_order() -> None:
    base = {"a": torch.arange(6.0), "b": torch.tensor(3)}
    digest = models.weights_sha256(base)
    assert digest == models.weights_sha256({"b": base["b"], "a": base["a"].reshape(2, 3).T.T.reshape(6)})
    changed: list[dict[str, Tensor]] = [
        {**base, "a": base["a"] + 1},
        {**base, "a": base["a"].reshape(2, 3)},
        {**base, "a": base["a"].view(torch.int32)},
        {"A": base["a"], "b": base["b"]},
        {"a": base["a"]},
    ]
    assert len({digest, *(models.weights_sha256(state) for state in changed)}) == 6
    assert models.weights_sha256({"a": torch.zeros(0), "b": torch.ones(2, dtype=torch.bfloat16)})


def test_given_weights_fit_and_keep_their_bytes(shared: Path) -> None:
    for name in ("resnet20", "resnet56"):
        arch = models.architecture(name, None, {})
        model = models.build(arch)
        state = read_weights(str(shared / "weights" / f"{name}-cifar10.safetensors"), arch)
        assert apply_weights(model, state, name) == []
        assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    with pytest.raises(ModelError, match=r"missing none; unexpected layer1\.3"):
        apply_weights(models.build(Architecture("resnet20")), state, "resnet56")


def test_a_state_can_be_saved_and_read_back(lenet: nn.Module, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(lenet.state_dict(), buffer)
    (tmp_path / "w.pt").write_bytes(buffer.getvalue())
    assert apply_weights(lenet, read_weights(str(tmp_path / "w.pt"), None), "w.pt") == []
