"""Which tensors of a network CLIP-Q compresses, which are stored beside them, and which inference never reads.

What is reached is found by a backward pass through one evaluation; what enters a matrix product or a convolution by watching torch's
functions while it runs, so attention projections and bare parameters count as much as `nn.Linear`. Nothing is left out silently: what
is dropped, tied or kept is listed in `notes`. Not covered: weights that a forward pass transforms first (weight norm) other than by views.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clipq_ray.errors import ConfigError, ModelError
from clipq_ray.evaluate import logits

_PRODUCTS = {
    F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum, torch.tensordot,
    Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.bmm, Tensor.addmm,
    F.multi_head_attention_forward,
}  # fmt: skip
_COUNTER = "num_batches_tracked"
_LARGE = 0.01  # part of all parameters from which on an unknown use is refused


@dataclass(frozen=True)
class Layer:
    """One weight that is compressed; `name` in the state dict, `kind` is conv, linear, attention or matmul."""

    name: str
    kind: str
    shape: tuple[int, ...]
    weights: int


@dataclass(frozen=True)
class Inventory:
    """Every entry of a state dict, in exactly one group; see the module's docstring. `bytes_before` counts float32."""

    layers: tuple[Layer, ...]
    kept: tuple[str, ...]
    integers: tuple[str, ...]
    counters: tuple[str, ...]
    ties: dict[str, str]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    bytes_before: int
    parameters: int


def inventory(model: nn.Module, sample: Tensor, keep: Sequence[str] = ()) -> Inventory:
    """Sort the tensors of `model`; `sample`: float32 (n, c, h, w), images as the network takes them.

    `keep`: names or patterns stored as they are. `ModelError` for a network without layers, or with a large weight whose use is
    unknown; `ConfigError` for a pattern that matches nothing.
    """
    state = model.state_dict(keep_vars=True)
    parameters = {name: t for name, t in state.items() if isinstance(t, nn.Parameter)}
    ties = _ties(state)
    unique = {name: parameter for name, parameter in parameters.items() if name not in ties}
    reached, products = _trace(model, unique, sample)
    kept_by_user = _matching(keep, unique)
    dropped = [name for name in unique if name not in reached]
    buffers = _buffers(state, ties, set(dropped))
    dropped += buffers["dropped"]
    dropped += [alias for alias, name in ties.items() if name in dropped]
    layers: list[Layer] = []
    kept: list[str] = []
    notes: list[str] = []
    kinds = _module_kinds(model)
    everything = sum(unique[name].numel() for name in reached)
    for name in unique:
        if name not in reached:
            continue
        parameter = unique[name]
        kind = kinds.get(name) or ("matmul" if name in products else None)
        if name not in kept_by_user and parameter.dim() >= 2 and kind and parameter.is_floating_point():
            layers.append(Layer(name, kind, tuple(parameter.shape), parameter.numel()))
            continue
        kept.append(name)
        if sum(side > 1 for side in parameter.shape) >= 2:
            _note_kept(name, parameter, everything, name in kept_by_user, notes)
    if not layers:
        raise ModelError(
            "expected a network with convolutions or linear layers that inference reads, got none to compress; "
            "check --model and --keep, and that the forward pass is not under no_grad"
        )
    if dropped:
        notes.insert(
            0, f"{len(dropped)} tensors that inference never reads are left out: {', '.join(dropped)}"
        )
    notes += [
        f"{alias} is tied to {name} and stored once" for alias, name in ties.items() if name not in dropped
    ]
    names = [layer.name for layer in layers]
    inside = [*names, *kept, *buffers["kept"], *buffers["integers"]]
    return Inventory(
        layers=tuple(layers),
        kept=(*kept, *buffers["kept"]),
        integers=tuple(buffers["integers"]),
        counters=tuple(buffers["counters"]),
        ties={alias: name for alias, name in ties.items() if name not in dropped},
        dropped=tuple(dropped),
        notes=tuple(notes),
        bytes_before=4 * sum(state[name].numel() for name in inside),
        parameters=sum(unique[name].numel() for name in [*names, *kept]),
    )


def _ties(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Second and further names of one tensor (a weight or a module used twice), each with the first; counters aside."""
    first: dict[int, str] = {}
    ties = {}
    for name, value in state.items():
        if name.endswith(_COUNTER):
            continue
        if id(value) in first:
            ties[name] = first[id(value)]
        else:
            first[id(value)] = name
    return ties


def _matching(keep: Sequence[str], names: Mapping[str, Any]) -> set[str]:
    result: set[str] = set()
    for pattern in keep:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise ConfigError(
                f"--keep: expected names of weights, got {pattern!r}, which matches none; e.g. {next(iter(names))}"
            )
        result.update(found)
    return result


def _note_kept(name: str, parameter: Tensor, everything: int, wanted: bool, notes: list[str]) -> None:
    shape = "x".join(str(side) for side in parameter.shape)
    if wanted:
        notes.append(f"{name} ({shape}) is stored as it is, by --keep")
    elif parameter.numel() >= _LARGE * everything:
        raise ModelError(
            f"expected every large weight in a convolution or a matrix product, got {name} ({shape}) with an unknown use; "
            f"add --keep {name} to store it as it is"
        )
    else:
        notes.append(f"{name} ({shape}) enters no matrix product and is stored as it is")


def _module_kinds(model: nn.Module) -> dict[str, str]:
    kinds = {}
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        if isinstance(module, nn.MultiheadAttention):
            for name in (
                "in_proj_weight",
                "q_proj_weight",
                "k_proj_weight",
                "v_proj_weight",
                "out_proj.weight",
            ):
                kinds[dot + name] = "attention"
        elif isinstance(module, nn.modules.conv._ConvNd):
            kinds[dot + "weight"] = "conv"
        elif isinstance(module, nn.Linear):
            kinds.setdefault(dot + "weight", "linear")
    return kinds


class _Products(TorchFunctionMode):
    """Notes which storages enter matrix products and convolutions; views share their parameter's storage."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _PRODUCTS:
            for value in _tensors((*args, *(kwargs or {}).values())):
                self.storages.add(value.untyped_storage().data_ptr())
        return func(*args, **(kwargs or {}))


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _trace(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], sample: Tensor
) -> tuple[list[str], set[str]]:
    """Names that one evaluation reaches, and those that enter products in it."""
    with _evaluating(model, parameters), torch.enable_grad(), _Products() as products:
        output = logits(model(sample))
        if not parameters or not output.requires_grad:
            return [], set()
        gradients = torch.autograd.grad(
            output.float().square().sum(), list(parameters.values()), allow_unused=True
        )
    reached = [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None]
    used = {n for n, p in parameters.items() if p.untyped_storage().data_ptr() in products.storages}
    return reached, used


@contextmanager
def _evaluating(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    grads = {name: parameter.requires_grad for name, parameter in parameters.items()}
    model.eval()
    for parameter in parameters.values():
        parameter.requires_grad_(parameter.is_floating_point())
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for name, parameter in parameters.items():
            parameter.requires_grad_(grads[name])


def _buffers(state: Mapping[str, Tensor], ties: Mapping[str, str], dropped: set[str]) -> dict[str, list[str]]:
    """Buffers by group; those of a module whose parameters are all dropped go with it."""
    result: dict[str, list[str]] = {"kept": [], "integers": [], "counters": [], "dropped": []}
    for name, value in state.items():
        if isinstance(value, nn.Parameter) or name in ties:
            continue
        owner = name.rpartition(".")[0]
        own = [n for n in state if n.rpartition(".")[0] == owner and isinstance(state[n], nn.Parameter)]
        if name.endswith(_COUNTER):
            result["counters"].append(name)
        elif own and all(n in dropped for n in own):
            result["dropped"].append(name)
        elif value.is_floating_point():
            result["kept"].append(name)
        else:
            result["integers"].append(name)
    return result
