"""Networks by name: the built-in small ones, torchvision's classification networks, and `package.module:function` where allowed.

An `Architecture` is a name and keyword arguments in JSON, so a file can carry it; building one never runs foreign code unless the caller
allows an import. torchvision is imported where one of its networks is asked for, so built-in networks load without it. Not covered:
keyword arguments that are no JSON (a norm layer's class): write a function and name it as `package.module:function`.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from clipq_ray import problems
from clipq_ray.errors import ClipqError, ModelError, brief, from_signal
from clipq_ray.models.small import CifarResNet, LeNet5, LeNet5Caffe, LeNet300100


@dataclass(frozen=True)
class Architecture:
    """A registered network and its keyword arguments (JSON values)."""

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {"name": self.name, "kwargs": self.kwargs}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Architecture:
        """The mirror of `to_json`; `ModelError` if `value` describes no architecture."""
        try:
            name, kwargs = value["name"], value.get("kwargs", {})
        except (KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"expected an architecture with name and kwargs, got {value!r:.80}") from error
        if not isinstance(name, str) or not isinstance(kwargs, Mapping):
            raise ModelError(f"expected an architecture with name and kwargs, got {value!r:.80}")
        return cls(name, dict(kwargs))


@dataclass(frozen=True)
class PublishedInput:
    """How torchvision prepares images for its published weights of a network: the shorter side is scaled to `resize` [pixels] by `interpolation`, the
    middle is cut out to `size` x `size` [pixels]; `mean`, `std`: one number per channel, for pixel values in 0..1."""

    size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["bilinear", "bicubic"]


_BUILT_IN: dict[str, tuple[type[nn.Module], dict[str, Any], tuple[int, int, int]]] = {
    "lenet5": (LeNet5, {}, (1, 28, 28)),
    "lenet5_caffe": (LeNet5Caffe, {}, (1, 28, 28)),
    "lenet_300_100": (LeNet300100, {}, (1, 28, 28)),
    **{f"resnet{6 * n + 2}": (CifarResNet, {"blocks": n}, (3, 32, 32)) for n in (3, 5, 7, 9, 18)},
}
# transform_input: torchvision's published weights of these two expect inputs in (x - 0.5) / 0.5; the network converts from ImageNet's
# mean and standard deviation itself. Without it they run and are silently worse.
_WITH_HEADS = {"aux_logits": False, "init_weights": False, "transform_input": True}
_EXTRA: dict[str, dict[str, Any]] = {
    "googlenet": _WITH_HEADS,
    "inception_v3": _WITH_HEADS,
    "vit_h_14": {"image_size": 518},  # the size of its published weights' position embedding
}


def zoo() -> Any:
    """The module `torchvision.models`; `ModelError` where torchvision is missing or does not match torch."""
    try:
        return importlib.import_module("torchvision.models")
    except (ImportError, RuntimeError) as error:
        raise ModelError(
            f"torchvision's networks need a torchvision that matches torch, got {brief(error)}; install the pair together"
        ) from error


@functools.cache
def zoo_names() -> tuple[str, ...]:
    """torchvision's classification networks, sorted."""
    return tuple(zoo().list_models(module=zoo()))


def names() -> list[str]:
    """All registered networks, built-in ones first."""
    return [*_BUILT_IN, *zoo_names()]


def _refuse_unknown(name: str) -> None:
    if name in _BUILT_IN or name in zoo_names():
        return
    raise ModelError(
        f"expected a known network or package.module:function, got {name!r:.100}; {problems.nearest(name, names())}"
    )


def default_input(name: str) -> tuple[int, int, int]:
    """Channels, height and width [pixels] that the network was made for: those of its published weights."""
    if name in _BUILT_IN:
        return _BUILT_IN[name][2]
    if ":" in name:
        return (3, 224, 224)
    published = published_input(name)
    return (3, published.size, published.size) if published else (3, 224, 224)


def image_channels(network: nn.Module) -> int | None:
    """Channels of the images that a network takes, 1 or 3, by its convolutions; None where none takes so many, or some take one and others three."""
    convolutions = (one for one in network.modules() if isinstance(one, nn.Conv2d) and one.groups == 1)
    found = {one.in_channels for one in convolutions} & {1, 3}
    return found.pop() if len(found) == 1 else None


@functools.cache
def published_input(name: str) -> PublishedInput | None:
    """What the published weights of a network want, those that `read_weights` takes; None where torchvision has none. Nothing is downloaded."""
    if name in _BUILT_IN or ":" in name:
        return None
    _refuse_unknown(name)
    weights = zoo().get_model_weights(name)
    if not len(weights):
        return None
    way = weights.DEFAULT.transforms()
    return PublishedInput(
        way.crop_size[0], way.resize_size[0], tuple(way.mean), tuple(way.std), way.interpolation.value
    )


def default_weights(name: str) -> str:
    """Where weights come from unless the user says: "train" for built-in networks, "torchvision" for torchvision's."""
    if name in _BUILT_IN or ":" in name:
        return "train"
    _refuse_unknown(name)
    return "torchvision"


def default_kwargs(name: str) -> dict[str, Any]:
    """Keyword arguments that make the network fit its published weights; auxiliary heads, which only training reads, are left out."""
    if ":" in name:
        return {}
    return {"num_classes": 10 if name in _BUILT_IN else 1000, **_EXTRA.get(name, {})}


def architecture(
    name: str, classes: int | None, kwargs: Mapping[str, Any], *, allow_import: bool = False
) -> Architecture:
    """The architecture `name` with `kwargs` over its defaults; `classes` None keeps the default number.

    A function `package.module:function` gets `kwargs` only: what it calls its number of classes is its own.
    """
    if ":" in name and allow_import:
        return Architecture(name, dict(kwargs))
    _refuse_unknown(name)
    given = {} if classes is None else {"num_classes": classes}
    return Architecture(name, {**default_kwargs(name), **given, **kwargs})


def build(architecture: Architecture, *, allow_import: bool = False) -> nn.Module:
    """The network with new weights, drawn from torch's global generator.

    `ModelError` for arguments that do not fit, and for a name that is not registered, unless it is `package.module:function` and
    `allow_import` is set.
    """
    name, kwargs = architecture.name, architecture.kwargs
    if ":" in name and not allow_import:
        raise ModelError(
            f"expected a registered network, got {name!r:.100}; pass factory= to build it yourself"
        )
    if ":" not in name:
        _refuse_unknown(name)
    try:
        with warnings.catch_warnings(action="ignore"):  # what is wrong is one line
            made = _made(name, kwargs)
    except ClipqError:
        raise
    except (Exception, SystemExit) as error:  # constructors raise whatever they like
        if from_signal(error):
            raise
        raise ModelError(
            f"{name} cannot be built with {kwargs!r:.500}: {brief(error)}; check --model-args"
        ) from error
    if not isinstance(made, nn.Module):
        raise ModelError(
            f"expected {name} to return a torch.nn.Module, got {type(made).__name__}; name another function"
        )
    return made


def _made(name: str, kwargs: Mapping[str, Any]) -> Any:
    if ":" in name:
        return imported(name)(**kwargs)
    if name in _BUILT_IN:
        kind, fixed, _ = _BUILT_IN[name]
        return kind(**fixed, **kwargs)
    return zoo().get_model(name, weights=None, **kwargs)


def imported(name: str) -> Any:
    """What `package.module:function` names; `ModelError` where that cannot be imported."""
    module_name, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module_name), function)
    except (Exception, SystemExit) as error:  # importing runs the user's module, which does whatever it likes
        if from_signal(error):
            raise
        raise ModelError(
            f"expected an importable package.module:function, got {name!r} ({brief(error)}); is its folder on PYTHONPATH?"
        ) from error
