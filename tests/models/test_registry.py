"""Networks by name: what each is built with, and what is said where none can be built."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from torch import nn

from clipq_ray import models
from clipq_ray.errors import ModelError
from clipq_ray.models import Architecture, architecture, build

ROOT = Path(__file__).resolve().parents[2]


def own_function(width: int) -> nn.Module:
    return nn.Linear(width, 2)


def not_a_network() -> int:
    return 3


def interrupted() -> nn.Module:
    signal.raise_signal(signal.SIGTERM)
    return nn.Identity()


def leaving() -> nn.Module:
    sys.exit(3)


def broken() -> nn.Module:
    raise RuntimeError("first line\nsecond line")


def test_names_hold_the_built_in_and_all_of_torchvisions_classification_networks() -> None:
    names = models.names()
    assert len(names) == len(set(names))
    assert set(names) >= {
        "lenet5", "resnet110", "resnet50", "alexnet", "googlenet", "vgg16", "mobilenet_v2", "swin_v2_t"
    }  # fmt: skip
    assert "deeplabv3_resnet50" not in names


# Defaults


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("lenet_300_100", (1, 28, 28)),
        ("resnet32", (3, 32, 32)),
        ("resnet50", (3, 224, 224)),
        ("inception_v3", (3, 299, 299)),
        ("efficientnet_b1", (3, 240, 240)),
        ("efficientnet_b4", (3, 380, 380)),
        ("vit_b_16", (3, 224, 224)),
        ("vit_h_14", (3, 518, 518)),
        ("some.package:function", (3, 224, 224)),
    ],
)
def test_the_default_input_is_what_the_published_weights_were_made_for(
    name: str, shape: tuple[int, int, int]
) -> None:
    assert models.default_input(name) == shape


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", (224, 256, "bilinear")),
        ("resnet50", (224, 232, "bilinear")),
        ("inception_v3", (299, 342, "bilinear")),
        ("efficientnet_b5", (456, 456, "bicubic")),
        ("efficientnet_b7", (600, 600, "bicubic")),
        ("maxvit_t", (224, 224, "bicubic")),
        ("vit_h_14", (518, 518, "bicubic")),
    ],
)
def test_images_are_prepared_as_the_published_weights_want_them(
    name: str, expected: tuple[int, int, str]
) -> None:
    found = models.published_input(name)
    assert found is not None
    assert (found.size, found.resize, found.interpolation) == expected
    # GoogLeNet and Inception convert from ImageNet's themselves
    assert (found.mean, found.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_one_network_was_trained_on_other_values() -> None:
    found = models.published_input("efficientnet_v2_l")
    assert found is not None
    assert (found.mean, found.std, found.resize) == ((0.5,) * 3, (0.5,) * 3, 480)


@pytest.mark.parametrize("name", ["lenet5", "resnet20", "some.package:function"])
def test_networks_without_published_weights_state_no_input(name: str) -> None:
    assert models.published_input(name) is None


def test_every_registered_network_has_defaults_and_comes_back_from_json() -> None:
    for name in models.names():
        arch = architecture(name, 7, {})
        assert arch.kwargs["num_classes"] == 7
        assert Architecture.from_json(json.loads(json.dumps(arch.to_json()))) == arch
        assert models.default_input(name)[1] >= 28
        assert models.default_weights(name) in ("train", "torchvision")


@pytest.mark.parametrize(
    ("name", "classes", "given", "expected"),
    [
        ("resnet18", None, {}, {"num_classes": 1000}),
        ("resnet18", 10, {}, {"num_classes": 10}),
        ("resnet18", 10, {"num_classes": 3}, {"num_classes": 3}),
        (
            "googlenet",
            12,
            {"transform_input": True},
            {"num_classes": 12, "aux_logits": False, "init_weights": False, "transform_input": True},
        ),
    ],
)
def test_arguments_come_over_the_number_of_classes_over_the_defaults(
    name: str, classes: int | None, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert architecture(name, classes, given).kwargs == expected


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_not_built_and_inputs_are_as_published_weights_expect(name: str) -> None:
    model = build(architecture(name, 5, {}))
    assert not any("aux" in key.lower() for key in model.state_dict())
    assert model.transform_input is True
    assert build(architecture(name, 5, {"transform_input": False})).transform_input is False


# What is refused


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("resnet21", "resnet20"),
        ("lenet", "lenet5"),
        ("mobilenetv2", "mobilenet_v2"),
        ("ResNet-50", "resnet50"),
    ],
)
def test_an_unknown_network_is_answered_with_the_nearest_names(wrong: str, near: str) -> None:
    for call in (
        lambda: architecture(wrong, None, {}),
        lambda: build(Architecture(wrong)),
        lambda: models.default_input(wrong),
        lambda: models.default_weights(wrong),
    ):
        with refused(ModelError, match=f"expected a known network.*'{wrong}'.*nearest names:.*{near}"):
            call()


def test_a_name_like_no_other_is_answered_with_examples() -> None:
    with refused(ModelError, match=r"e\.g\. lenet5"):
        architecture("zzzzzz", None, {})


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("lenet5", {"wings": 2}),
        ("resnet18", {"wings": 2}),
        ("vgg16", {"no_such": True}),
        ("resnet20", {"blocks": 4}),
        ("resnet18", {"num_classes": -1}),
        ("resnet18", {"num_classes": "ten"}),
        ("resnet18", {"weights": "DEFAULT"}),
    ],
)
def test_arguments_that_a_network_does_not_take_are_named(name: str, kwargs: dict[str, Any]) -> None:
    (argument,) = kwargs
    for arch in (Architecture(name, kwargs), architecture(name, None, kwargs)):
        with refused(ModelError, match=f"{name} cannot be built with.*{argument}.*--model-args"):
            build(arch)


@pytest.mark.parametrize("value", [None, 3, [], {}, {"name": 3}, {"name": "lenet5", "kwargs": [1]}])
def test_a_damaged_architecture_is_refused(value: Any) -> None:
    with refused(ModelError, match="expected an architecture"):
        Architecture.from_json(value)


# A user's own function


@pytest.mark.parametrize(
    ("name", "kwargs", "kind"),
    [(f"{__name__}:own_function", {"width": 4}, nn.Linear), ("torch.nn:Identity", {}, nn.Identity)],
    ids=["function", "class"],
)
def test_a_function_is_imported_only_where_the_caller_allows_it(
    name: str, kwargs: dict[str, Any], kind: type[nn.Module]
) -> None:
    arch = architecture(name, 10, kwargs, allow_import=True)
    assert arch.kwargs == kwargs
    assert isinstance(build(arch, allow_import=True), kind)
    with refused(ModelError, match="known network"):
        architecture(name, 10, kwargs)
    with refused(ModelError, match="registered network"):
        build(arch)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_package:net", "importable"),
        ("no.such.package:function", "importable"),
        ("torch.nn:NoSuchThing", "importable"),
        (f"{__name__}:missing_one", "importable"),
        ("builtins:dict", "return a torch.nn.Module, got dict"),
        (f"{__name__}:not_a_network", "return a torch.nn.Module, got int"),
        ("torch.nn:Linear", "cannot be built with"),
        (f"{__name__}:broken", "first line.*second line"),
        (f"{__name__}:leaving", "it ended the process with 3; put what it runs below if __name__"),
        ("antigravity_of_ours:net", "it ended the process with 0; put what it runs below if __name__"),
    ],
)
def test_a_function_that_gives_no_network_is_refused_by_name(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "antigravity_of_ours.py").write_text("import sys\nsys.exit(0)\n")  # a script's last line
    monkeypatch.syspath_prepend(str(tmp_path))
    with refused(ModelError, match=words) as caught:
        build(Architecture(name), allow_import=True)
    assert name in str(caught.value)


def test_a_signal_while_a_network_is_built_is_no_mistake_of_the_network() -> None:
    """As Ray's workers have it: the process ends, and the work is another's."""

    def leave(number: int, frame: Any) -> None:
        sys.exit(1)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        with pytest.raises(SystemExit):
            build(Architecture(f"{__name__}:interrupted"), allow_import=True)
    finally:
        signal.signal(signal.SIGTERM, before)


# Building


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
        return models.weights_sha256(build(Architecture("resnet20")).state_dict())

    assert digest(1) == digest(1) != digest(2)
