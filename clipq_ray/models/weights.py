"""Weights by URI: reading state dicts, and putting them into a network exactly or not at all.

Read are safetensors, PyTorch checkpoints (tensors only: `weights_only=True`, so no foreign code runs) and torchvision's published
weights. Names are brought into plain form (prefixes of DDP and `torch.compile`, torchvision's old spellings); what still does not fit is
refused in one line that lists both sides. Not covered: checkpoints in several files, and formats of other libraries.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from clipq_ray.codec.header import MAGIC
from clipq_ray.errors import ModelError, brief
from clipq_ray.models.registry import Architecture, zoo, zoo_names
from clipq_ray.storage import Store

_WRAPPERS = ("module.", "_orig_mod.")  # DataParallel and DDP; torch.compile
_CHECKPOINT_KEYS = ("state_dict", "model", "model_state_dict")
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # GoogLeNet's and Inception's heads in torchvision
_COUNTER = "num_batches_tracked"
# Spellings in torchvision's published files; its own loaders rename them in the same way (densenet.py, vision_transformer.py).
_OLD_SPELLINGS = (
    (re.compile(r"(.*denselayer\d+\.(?:norm|conv))\.([12]\..*)"), r"\1\2"),
    (re.compile(r"(.*encoder_layer_\d+\.mlp)\.linear_1\.(.*)"), r"\1.0.\2"),
    (re.compile(r"(.*encoder_layer_\d+\.mlp)\.linear_2\.(.*)"), r"\1.3.\2"),
)
_EXPORT = "export the tensors with safetensors.torch.save_file(model.state_dict(), FILE)"


def read_weights(uri: str, architecture: Architecture | None) -> dict[str, Tensor]:
    """The state dict at `uri`, on the CPU, under the names that stand there; "torchvision" are the published weights of `architecture`.

    A checkpoint's `state_dict`, `model` or `model_state_dict` is taken out of it. `StorageError` if the file cannot be read,
    `ModelError` if it holds something else than tensors.
    """
    if uri == "torchvision":
        return _published(architecture)
    store, name = Store.of_file(uri)
    data = store.read(name)
    if not data:
        raise ModelError(f"expected weights at {uri}, got an empty file; write or fetch it again")
    if data.startswith(MAGIC):
        raise ModelError(
            f"expected trained weights at {uri}, got a compressed network (.clq): its batch norm is folded and its weights are quantized, so it is no start for training; "
            "give the weights that it was made from"
        )
    safe = (
        name.endswith(".safetensors") or data[8:9] == b"{"
    )  # its header is JSON behind eight bytes of length
    try:
        content = load_safetensors(data) if safe else _load_checkpoint(data)
    except Exception as error:  # damaged bytes raise whatever the format's reader meets
        raise ModelError(
            _unreadable(uri, "safetensors" if safe else "a state dict of tensors", error)
        ) from error
    return _state_of(content, uri)


def _load_checkpoint(data: bytes) -> Any:
    with warnings.catch_warnings(action="ignore"):  # what is wrong is one line
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _unreadable(uri: str, expected: str, error: Exception) -> str:
    text = brief(error, None)
    if found := re.search(r"GLOBAL ([\w.]+)", text):
        return f"expected {expected} at {uri}, got a pickled {found[1]}, which could run code; {_EXPORT}"
    if "WeightsUnpickler" in text or "Weights only" in text:
        text = "something that torch.load(weights_only=True) does not take"
    return f"expected {expected} at {uri}, got bytes that cannot be read as such ({text[:120]}); fetch the file again or {_EXPORT}"


def _state_of(content: Any, uri: str) -> dict[str, Tensor]:
    """The tensors in a checkpoint, wherever training code puts them."""
    if isinstance(content, Mapping):
        content = next((content[k] for k in _CHECKPOINT_KEYS if isinstance(content.get(k), Mapping)), content)
    if not isinstance(content, Mapping):
        raise ModelError(
            f"expected a state dict of tensors at {uri}, got {type(content).__name__}; {_EXPORT}"
        )
    other = [
        f"{key} ({type(value).__name__})" for key, value in content.items() if not isinstance(value, Tensor)
    ]
    if other:
        raise ModelError(f"expected a state dict of tensors at {uri}, got also {_some(other)}; {_EXPORT}")
    return {str(name): value.detach() for name, value in content.items()}


def _published(architecture: Architecture | None) -> dict[str, Tensor]:
    if architecture is None or architecture.name not in zoo_names():
        raise ModelError(
            "expected a torchvision network with --weights torchvision; give the URI of the weights"
        )
    weights = zoo().get_model_weights(architecture.name)
    if not len(weights):
        raise ModelError(f"torchvision publishes no weights of {architecture.name}; give --weights URI")
    try:
        return dict(weights.DEFAULT.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:
        raise ModelError(
            f"torchvision's weights of {architecture.name} cannot be fetched ({brief(error, 200)}); "
            "fetch them elsewhere and give --weights URI"
        ) from error


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` under the names that the network itself uses."""
    names = list(state)
    while wrapper := next((w for w in _WRAPPERS if names and all(n.startswith(w) for n in names)), None):
        names = [name.removeprefix(wrapper) for name in names]
    return {_new_spelling(name): value for name, value in zip(names, state.values(), strict=True)}


def _new_spelling(name: str) -> str:
    for old, new in _OLD_SPELLINGS:
        name = old.sub(new, name)
    return name


def apply_weights(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> list[str]:
    """Put `state` into `model`, exactly; the notes name what was left out on purpose.

    Batch norm's counters may be missing, and a tied tensor may be given under one of its names. `ModelError` if names, shapes or types
    do not fit, or a value is NaN or infinite; the network is then unchanged.
    """
    wanted = model.state_dict(keep_vars=True)
    if not set(state) <= set(wanted):  # a caller's own wrapper, e.g. DDP, may rightly use such names
        state = plain_names(state)
    auxiliary = [name for name in state if name.startswith(_AUXILIARY) and name not in wanted]
    given = {name: value for name, value in state.items() if name not in set(auxiliary)}
    given.update(_implied(wanted, given, origin))
    _refuse_misfits(wanted, given, origin)
    for name in wanted:
        _refuse_values(name, wanted[name], given[name], origin)
    # the network's own dict keeps its version numbers, without which torchvision's MNASNet refuses to load
    complete = model.state_dict()
    complete.update(given)
    model.load_state_dict(complete)
    return _notes(auxiliary)


def _implied(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """What `given` need not name: counters, and further names of tied tensors; `ModelError` where tied names differ in value."""
    result: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    for name, tensor in wanted.items():
        if name not in given:
            if name.endswith(_COUNTER):
                result[name] = tensor
            continue
        tied = first.setdefault(id(tensor), name)
        if tied != name and not torch.equal(given[tied], given[name]):
            raise ModelError(
                f"weights {origin} do not fit the network: {tied} and {name} are one tensor in it, got different values; "
                "check --model and --model-args"
            )
    absent = (name for name in wanted if name not in given and id(wanted[name]) in first)
    return {**result, **{name: given[first[id(wanted[name])]] for name in absent}}


def _refuse_misfits(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], origin: str) -> None:
    missing, unexpected = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    other = {
        name: given[name] for name in wanted if name in given and wanted[name].shape != given[name].shape
    }
    shapes = [
        f"{name} expected {tuple(wanted[name].shape)} got {tuple(one.shape)}" for name, one in other.items()
    ]
    if missing or unexpected or shapes:
        raise ModelError(
            f"weights {origin} do not fit the network: missing {_some(missing)}; unexpected {_some(unexpected)}; "
            f"other shapes {_some(shapes)}; {'check --model and --model-args' if missing or unexpected else _other_classes(wanted, other)}"
        )


def _other_classes(wanted: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str:
    """What to do about tensors of other shapes: where all have the same other number of outputs, those are most likely other classes."""
    alike = all(one.shape[1:] == wanted[name].shape[1:] for name, one in other.items())
    outputs = {one.shape[0] if one.dim() else 0 for one in other.values()}
    if alike and len(outputs) == 1:
        count = outputs.pop()
        return f"for {count} classes say --model-args '{{\"num_classes\": {count}}}'"
    return "check --model and --model-args"


def _refuse_values(name: str, wanted: Tensor, given: Tensor, origin: str) -> None:
    if wanted.is_floating_point() != given.is_floating_point():
        raise ModelError(
            f"weights {origin} do not fit the network: {name} expected {wanted.dtype} got {given.dtype}; "
            "export them unquantized"
        )
    # in the network's type: what is finite as float64 may not be as float32
    if given.is_floating_point() and not bool(torch.isfinite(given.to(wanted.dtype)).all()):
        raise ModelError(
            f"expected finite weights in {origin}, got NaN or infinity in {name}; use another checkpoint"
        )


def _notes(auxiliary: list[str]) -> list[str]:
    if not auxiliary:
        return []
    heads = sorted({name.split(".")[0] for name in auxiliary})
    return [
        f"auxiliary heads {', '.join(heads)} ({len(auxiliary)} tensors) serve training only and are left out"
    ]


def _some(items: list[str]) -> str:
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return (", ".join(items[:3]) + more) if items else "none"


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 in hex over names, types, shapes and bytes in sorted order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
