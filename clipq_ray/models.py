"""Networks by name and weights by URI.

Names: the small networks built in here, torchvision's classification networks, and `package.module:function` where the caller allows an
import. Weights: safetensors, PyTorch checkpoints read with `weights_only=True`, torchvision's published ones. What does not fit is
refused in one line that lists both sides. Not covered: networks of other libraries, except through `package.module:function`.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import io
import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from clipq_ray.errors import ModelError
from clipq_ray.storage import Store


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
        """The mirror of `to_json`."""
        return cls(str(value["name"]), dict(value.get("kwargs", {})))


class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al. 1998) for images (n, 1, 28, 28), with ReLU and max pooling; 61,706 parameters at 10 classes."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores (n, num_classes)."""
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))  # type: ignore[no-any-return]


class LeNet5Caffe(nn.Module):
    """Caffe's LeNet-5 for images (n, 1, 28, 28); 431,080 parameters at 10 classes."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores (n, num_classes)."""
        x = F.max_pool2d(self.conv1(images), 2)
        x = F.max_pool2d(self.conv2(x), 2).flatten(1)
        return self.fc2(F.relu(self.fc1(x)))  # type: ignore[no-any-return]


class LeNet300100(nn.Module):
    """LeNet-300-100 for images (n, 1, 28, 28); 266,610 parameters at 10 classes."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores (n, num_classes)."""
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(images.flatten(1))))))  # type: ignore[no-any-return]


class _Block(nn.Module):
    """Two 3x3 convolutions and the parameter-free shortcut of option A."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.pad = stride, (channels - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """The CIFAR ResNets of He et al. 2016, section 4.2, with 6 `blocks` + 2 layers, for images (n, 3, 32, 32)."""

    def __init__(self, blocks: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(before: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = _Block(before, channels, stride)
        return nn.Sequential(first, *(_Block(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, images: Tensor) -> Tensor:
        """Class scores (n, num_classes)."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


_BUILT_IN: dict[str, tuple[type[nn.Module], dict[str, Any], tuple[int, int, int]]] = {
    "lenet5": (LeNet5, {}, (1, 28, 28)),
    "lenet5_caffe": (LeNet5Caffe, {}, (1, 28, 28)),
    "lenet_300_100": (LeNet300100, {}, (1, 28, 28)),
    **{f"resnet{6 * n + 2}": (CifarResNet, {"blocks": n}, (3, 32, 32)) for n in (3, 5, 7, 9, 18)},
}
# what torch.load raises on bytes that are no checkpoint depends on the bytes
_UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError, AssertionError,
    OverflowError, struct.error, ImportError,
)  # fmt: skip
_AUXILIARY = ("googlenet", "inception_v3")
_AUXILIARY_PREFIXES = ("aux1.", "aux2.", "AuxLogits.")


def _torchvision_names() -> list[str]:
    return list(torchvision.models.list_models(module=torchvision.models))


def names() -> list[str]:
    """All registered networks, built-in ones first."""
    return [*_BUILT_IN, *_torchvision_names()]


def _refuse_unknown(name: str) -> None:
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.4)
        hint = f"nearest names: {', '.join(near)}" if near else f"e.g. {', '.join(names()[:6])}"
        raise ModelError(f"expected a known network or package.module:function, got {name!r}; {hint}")


def default_input(name: str) -> tuple[int, int, int]:
    """Channels, height and width [pixels] that the network was made for."""
    if name in _BUILT_IN:
        return _BUILT_IN[name][2]
    if ":" in name:
        return (3, 224, 224)
    _refuse_unknown(name)
    weights = torchvision.models.get_model_weights(name)
    size = weights.DEFAULT.transforms().crop_size[0] if len(weights) else 224
    return (3, size, size)


def default_weights(name: str) -> str:
    """Where weights come from unless the user says: "train" for built-in networks, "torchvision" for torchvision's."""
    if name in _BUILT_IN or ":" in name:
        return "train"
    _refuse_unknown(name)
    return "torchvision"


def default_kwargs(name: str) -> dict[str, Any]:
    """Keyword arguments a network is built with; auxiliary heads serve training from nothing only and are left out."""
    if name in _AUXILIARY:
        return {"num_classes": 1000, "aux_logits": False, "init_weights": False, "transform_input": False}
    return {"num_classes": 10 if name in _BUILT_IN else 1000}


def architecture(
    name: str, classes: int | None, kwargs: Mapping[str, Any], *, allow_import: bool = False
) -> Architecture:
    """The architecture `name` with `kwargs` over its defaults; `classes` None keeps the default number."""
    if allow_import and ":" in name:
        return Architecture(name, dict(kwargs))
    _refuse_unknown(name)
    base = default_kwargs(name)
    if classes is not None:
        base["num_classes"] = classes
    return Architecture(name, {**base, **kwargs})


def build(architecture: Architecture, *, allow_import: bool = False) -> nn.Module:
    """The network with new weights, drawn from torch's global generator.

    `ModelError` for a name that is not registered, unless it is `package.module:function` and `allow_import` is set.
    """
    name = architecture.name
    try:
        if ":" in name:
            if not allow_import:
                raise ModelError(
                    f"expected a registered network, got {name!r}; pass factory= to build it yourself"
                )
            return _imported(name, architecture.kwargs)
        _refuse_unknown(name)
        if name in _BUILT_IN:
            kind, fixed, _ = _BUILT_IN[name]
            return kind(**fixed, **architecture.kwargs)
        model: nn.Module = torchvision.models.get_model(name, weights=None, **architecture.kwargs)
        return model
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"{name} cannot be built with {architecture.kwargs}: {' '.join(str(error).split())}; check --model-args"
        ) from error


def _imported(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    module_name, _, function = name.partition(":")
    try:
        made = getattr(importlib.import_module(module_name), function)(**kwargs)
    except (ImportError, AttributeError) as error:
        raise ModelError(f"expected an importable package.module:function, got {name!r} ({error})") from error
    if not isinstance(made, nn.Module):
        raise ModelError(f"expected {name} to return a torch.nn.Module, got {type(made).__name__}")
    return made


def read_weights(uri: str, architecture: Architecture | None) -> dict[str, Tensor]:
    """The state dict at `uri`; "torchvision" are the published weights of the architecture. `ModelError` if unreadable."""
    if uri == "torchvision":
        return _published(architecture)
    store, name = Store.of_file(uri)
    data = store.read(name)
    if not data:
        raise ModelError(f"expected weights at {uri}, got an empty file")
    try:
        if name.endswith(".safetensors"):
            return dict(load_safetensors(data))
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ModelError(f"expected safetensors at {uri}, got {error}") from error
    except _UNREADABLE as error:
        reason = " ".join(str(error).split())[:120]
        raise ModelError(
            f"expected a state dict of tensors at {uri}, got {reason}; export it with safetensors.torch.save_file"
        ) from error
    return _state_of(state, uri)


def _state_of(state: Any, uri: str) -> dict[str, Tensor]:
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
            break
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(
            f"expected a state dict of tensors at {uri}, got {type(state).__name__} with other values"
        )
    return dict(state)


def _published(architecture: Architecture | None) -> dict[str, Tensor]:
    if architecture is None or architecture.name not in _torchvision_names():
        raise ModelError(
            "expected a torchvision network with --weights torchvision; give the URI of the weights"
        )
    weights = torchvision.models.get_model_weights(architecture.name)
    if not len(weights):
        raise ModelError(f"torchvision publishes no weights of {architecture.name}; give --weights URI")
    try:
        return dict(weights.DEFAULT.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:
        raise ModelError(
            f"torchvision's weights of {architecture.name} cannot be fetched ({' '.join(str(error).split())}); "
            "fetch them elsewhere and give --weights URI"
        ) from error


def apply_weights(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> list[str]:
    """Put `state` into `model`, exactly; the notes name what was left out on purpose. `ModelError` lists what does not fit."""
    notes = []
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    wanted = model.state_dict()
    auxiliary = [n for n in state if n.startswith(_AUXILIARY_PREFIXES) and n not in wanted]
    if auxiliary:
        state = {name: value for name, value in state.items() if name not in set(auxiliary)}
        heads = sorted({name.split(".")[0] for name in auxiliary})
        notes.append(
            f"auxiliary heads {', '.join(heads)} ({len(auxiliary)} tensors) serve training only and are left out"
        )
    complete = {**{n: t for n, t in wanted.items() if n.endswith("num_batches_tracked")}, **state}
    missing, unexpected = sorted(set(wanted) - set(complete)), sorted(set(complete) - set(wanted))
    shapes = [
        f"{n} expected {tuple(wanted[n].shape)} got {tuple(complete[n].shape)}"
        for n in wanted
        if n in complete and wanted[n].shape != complete[n].shape
    ]
    if missing or unexpected or shapes:
        raise ModelError(
            f"weights {origin} do not fit the network: missing {_some(missing)}; unexpected {_some(unexpected)}; "
            f"other shapes {_some(shapes)}; check --model and --model-args"
        )
    for name, value in complete.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ModelError(
                f"expected finite weights in {origin}, got NaN or infinity in {name}; use another checkpoint"
            )
    model.load_state_dict(complete)
    return notes


def _some(items: list[str]) -> str:
    return (
        (", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else ""))
        if items
        else "none"
    )


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes in sorted order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
