"""A source: how its images are prepared, what of network and data does not fit, and what may have been seen."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

from clipq_ray.config import make
from clipq_ray.errors import ConfigError, DataError, ModelError
from clipq_ray.source import Source


@pytest.mark.parametrize("option", ["cutout_pixels", "shift_pixels"])
def test_what_may_leave_nothing_of_an_image_is_refused(option: str) -> None:
    def source(pixels: int) -> Source:
        given: dict[str, Any] = {option: pixels}
        return Source(make(model="lenet5", data="digits", weights="random", engine="local", **given))

    source(27).check_fit()
    words = f"expected --{option.replace('_', '-')} below the 28 pixels of the images, got 28"
    with refused(ConfigError, match=words):
        source(28).check_fit()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (480, 0.5, 0.5, "bicubic")),
        ({"weights": "torchvision"}, (480, 0.5, 0.5, "bicubic")),
        ({"weights": "random"}, (549, 0.485, 0.229, "bilinear")),
        ({"weights": "train"}, (549, 0.485, 0.229, "bilinear")),
        ({"weights": "own.safetensors"}, (549, 0.485, 0.229, "bilinear")),
        ({"mean": (0.1,) * 3, "std": (0.2,) * 3}, (480, 0.1, 0.2, "bicubic")),
        ({"resize": 500}, (500, 0.5, 0.5, "bicubic")),
        ({"interpolation": "bilinear"}, (480, 0.5, 0.5, "bilinear")),
        ({"weights": "own.safetensors", "interpolation": "bicubic"}, (549, 0.485, 0.229, "bicubic")),
        ({"input_size": 96}, (96, 0.5, 0.5, "bicubic")),
        ({"model": "resnet50"}, (232, 0.485, 0.229, "bilinear")),
        ({"model": "resnet50", "input_size": 448}, (464, 0.485, 0.229, "bilinear")),
        ({"model": "resnet20", "weights": "train"}, (37, 0.485, 0.229, "bilinear")),
    ],
)
def test_images_are_prepared_as_torchvisions_weights_want_unless_the_user_says_otherwise(
    given: dict[str, Any], expected: tuple[int, float, float, str]
) -> None:
    found = Source(make(**{"model": "efficientnet_v2_l", "engine": "local", **given})).data().preprocessing
    assert (found.resize, found.mean[0], found.std[0], found.interpolation) == expected


class Leaving(nn.Module):
    """Ends the process instead of an answer."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        sys.exit(5)


def test_a_network_that_ends_the_process_is_refused() -> None:
    config = make(limit_images=20, engine="local")
    with refused(ModelError, match="got: it ended the process with 5"):
        Source(config, Leaving()).check_fit()


def test_layers_and_groups_that_nothing_is_called_by_are_refused_before_anything_is_made() -> None:
    for option in ("keep", "groups"):
        given: dict[str, Any] = {option: ("nope",)}
        with refused(ConfigError, match=f"--{option}"):
            Source(make(model="lenet5", data="digits", weights="random", engine="local", **given)).check_fit()


def test_given_weights_of_more_classes_than_the_data_has_are_noted(tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    arguments: dict[str, Any] = {
        "model": "lenet5",
        "data": "digits",
        "engine": "local",
        "model_args": {"num_classes": 12},
    }
    save_file(Source(make(**arguments, weights="random")).network().state_dict(), weights)
    (note,) = Source(make(**arguments, weights=str(weights))).check_fit()
    assert note.startswith("the network tells 12 classes apart and the data 10: labels must be the network's")
    assert Source(make(**arguments, weights="random")).check_fit() == []


def test_an_interpolation_that_has_nothing_to_do_is_noted_and_changes_nothing() -> None:
    usual, given = (
        Source(make(model="lenet5", engine="local", **options)).data()
        for options in ({}, {"interpolation": "bicubic"})
    )
    assert given.preprocessing == usual.preprocessing
    assert [note for note in given.notes if note not in usual.notes] == [
        "--interpolation has nothing to do: images have the size of the network's input"
    ]


@pytest.mark.parametrize(("size", "notes"), [(27, 0), (28, 0), (29, 1)])
def test_images_that_are_enlarged_are_noted(size: int, notes: int) -> None:
    data = Source(make(model="lenet5", input_size=size, engine="local")).data()
    words = f"images are enlarged: the first one has 28 x 28 pixels, the network's input {size} x {size}; --input-size says otherwise"
    assert [note for note in data.notes if "enlarged" in note] == [words] * notes


class Asserting(nn.Module):
    """Says what it does not take as torchvision's transformers do."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        torch._assert(images.shape[2] == 32, "Wrong image height! Expected 32")
        return images


def test_a_network_that_asserts_its_input_is_refused_in_one_line() -> None:
    with refused(
        ModelError, match=r"takes images of \(1, 28, 28\), got: Wrong image height! Expected 32; check"
    ):
        Source(make(limit_images=20, engine="local"), Asserting()).check_fit()


def test_a_network_in_half_precision_is_refused_with_what_to_do() -> None:
    half = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).half()
    with pytest.raises(ModelError, match=r"got: .*; call \.float\(\) on the network first$"):
        Source(make(limit_images=20, engine="local"), half).check_fit()


class Learning(nn.Module):
    """Wants labels in training mode, as detection networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(784, 10)

    def forward(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        scores: torch.Tensor = self.linear(images.flatten(1))
        return nn.functional.cross_entropy(scores, labels) if self.training else scores  # type: ignore[arg-type]


class Split(Learning):
    """Takes batches of eight images and more in training mode, as batch norms do that split them."""

    def forward(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        if self.training and len(images) % 8:
            raise ValueError("no batch of eights")
        scores: torch.Tensor = self.linear(images.flatten(1))
        return scores


class Summing(Learning):
    """Returns a loss in training mode."""

    def forward(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        scores: torch.Tensor = self.linear(images.flatten(1))
        return scores.sum() if self.training else scores


class Locked(Learning):
    """Holds what nobody can copy."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class Stateful(nn.Module):
    """Holds something else than tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(784, 10)

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: Learning(), "got: cross_entropy.*; in training mode, in which it is fine-tuned, it must return class scores"),
        (lambda: Summing(), r"got shape \(\); .*; in training mode, in which it is fine-tuned, it must return class scores"),
        (lambda: Locked(), "that can be copied, got: .*; make pruning and .* hold locks, files and the like outside of it"),
        (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), r"got 1\.weight without a shape \(lazy\); run the network once before"),
        (lambda: Stateful(), "got _extra_state of dict; convert it"),
        (lambda: prune.l1_unstructured(linear()[2], "weight", 0.5), r"that can be copied, got: .*; make pruning and weight norm permanent"),
    ],
)  # fmt: skip
def test_what_would_fail_behind_the_search_is_said_before_it(
    model: Callable[[], nn.Module], words: str
) -> None:
    with refused(ModelError, match=words):
        Source(make(limit_images=20, engine="local"), model()).check_fit()


@pytest.mark.parametrize(
    ("size", "workers", "taken"), [(16, 1, True), (16, 2, True), (12, 1, False), (16, 4, False)]
)
def test_a_network_may_want_the_batches_that_it_will_get(size: int, workers: int, taken: bool) -> None:
    source = Source(make(limit_images=20, batch_size=size, workers=workers), Split())
    with nullcontext() if taken else refused(ModelError, match="got: no batch of eights; in training mode"):
        source.check_fit()


def test_one_set_of_images_is_held_at_a_time() -> None:
    first, second = (Source(make(model="lenet5", validation_images=count)) for count in (100, 200))
    data = first.data()
    assert first.data() is data
    assert second.data() is not data
    assert first.data() is not data


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_job_on_a_head_without_a_gpu_works_on_its_cpus_whatever_its_workers_have() -> None:
    assert Source(make(device="cuda", engine="ray")).device() == torch.device("cpu")
    with pytest.raises(ConfigError, match="--device"):
        Source(make(device="cuda", engine="local")).device()


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def linear(normed: bool = False) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784) if normed else nn.Identity(), nn.Linear(784, 10))


def test_a_network_with_nothing_to_train_is_refused() -> None:
    config = make(limit_images=20, engine="local")
    Source(config, linear()).check_fit()
    with refused(ModelError, match=r"network without any that has requires_grad; call \.requires_grad_"):
        Source(config, frozen(linear())).check_fit()


@pytest.mark.parametrize(("size", "workers"), [(1, 1), (2, 2), (3, 2)])
def test_a_batch_of_which_a_worker_has_one_image_is_refused_where_the_network_wants_two(
    size: int, workers: int
) -> None:
    def source(batch_size: int, model: nn.Module) -> Source:
        return Source(make(limit_images=20, batch_size=batch_size, workers=workers), model)

    with refused(ModelError, match=rf"raise --batch-size \({size}, shared by {workers} workers\)$"):
        source(size, linear(normed=True)).check_fit()
    source(2 * workers, linear(normed=True)).check_fit()
    source(size, linear()).check_fit()


def test_fewer_images_than_workers_are_refused_before_the_search() -> None:
    source = Source(make(limit_images=6, batch_size=32, workers=8))
    with refused(
        DataError, match="a training image for each of 8 workers in every step, got 4; lower --workers"
    ):
        source.check_fit()


def own(num_classes: int = 10) -> nn.Module:
    return linear()


@pytest.mark.parametrize(
    ("model", "weights", "control", "wanted"),
    [
        ("module", None, "auto", True),
        ("module", "random", "auto", True),
        ("module", "train", "auto", False),
        ("test_source:own", "random", "auto", True),
        ("test_source:own", "train", "auto", False),
        ("test_source:own", None, "auto", False),  # trained first
        ("lenet5", "random", "auto", False),
        ("lenet5", "train", "auto", False),
        ("lenet5", "some.safetensors", "auto", True),
        ("lenet5", "train", "always", True),
        ("module", None, "never", False),
    ],
)
def test_a_control_is_trained_where_weights_may_have_seen_the_images_that_are_held_out(
    model: str, weights: str | None, control: Any, wanted: bool
) -> None:
    module = linear() if model == "module" else None
    given = {} if module else {"model": model}
    config = make(limit_images=20, weights=weights, control=control, **given)
    data = Source(config, linear()).data()
    assert data.validation_held_out
    assert Source(config, module, data).wants_control() is wanted
    apart = Source(config, module, replace(data, validation_held_out=False))
    assert apart.wants_control() is (control == "always")


USERS = """
from torch import nn

class Network(nn.Module):
    def __init__(self, channels, mask=None):
        super().__init__()
        self.mask = nn.Conv2d(mask, 1, 3) if mask else None
        self.first, self.last = nn.Conv2d(channels, 4, 3), nn.Linear(4, 10)

    def forward(self, images):
        return self.last(self.first(images).mean((2, 3)))
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"model_args": {"channels": 1}}, (1, 224, 224)),
        ({"model_args": {"channels": 3}}, (3, 224, 224)),
        ({"model_args": {"channels": 64}}, (3, 224, 224)),  # no image; refused when one goes through
        ({"model_args": {"channels": 64}, "mean": (0.5,), "std": (0.5,)}, (1, 224, 224)),
        ({"model_args": {"channels": 3, "mask": 1}}, (3, 224, 224)),
        ({"model_args": {"channels": 1, "mask": 3}, "mean": (0.5,), "std": (0.5,)}, (1, 224, 224)),
        ({"model_args": {"channels": 1}, "input_size": 28}, (1, 28, 28)),
        (
            {"model_args": {"channels": 3}, "mean": (0.5,), "std": (0.5,)},
            (3, 224, 224),
        ),  # refused when data are opened
    ],
)
def test_a_network_of_the_users_own_gets_the_channels_of_its_convolutions_or_of_the_mean(
    given: dict[str, Any],
    expected: tuple[int, int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "users_channels.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)
    source = Source(make(model="users_channels:Network", data="digits", engine="local", **given))
    assert source.input_shape() == expected


def test_gray_images_go_through_a_network_of_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "users_channels.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)
    options: dict[str, Any] = {"model_args": {"channels": 1}, "input_size": 28, "weights": "train"}
    source = Source(make(model="users_channels:Network", data="digits", engine="local", **options))
    source.check_fit()
    assert source.data().preprocessing.input_shape == (1, 28, 28)
