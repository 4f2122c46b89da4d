"""Which tensors of a network CLIP-Q compresses, which are stored beside them, and which inference never reads.

What is read is found by a backward pass through one evaluation; what has no gradient is then filled with NaN, and only what leaves the
output as it was is dropped. So a backbone under `no_grad` is kept, and an auxiliary head is not. What enters a matrix product or a
convolution is found by watching torch's functions in that evaluation, by storage, so views (`.t()`, `.view()`) count as their parameter,
and attention projections and bare parameters as much as `nn.Linear`. Nothing happens silently: what is dropped, tied or kept is listed
in `notes`.

Not covered: weights computed from other parameters (weight norm; refused by name), recurrent layers (refused by name), and routing
that depends on the image (experts that the sample does not reach look dropped: name them in `keep`).
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.overrides import TorchFunctionMode

from clipq_ray.errors import ConfigError, ModelError
from clipq_ray.evaluate import evaluating, scores
from clipq_ray.ties import names_of_one, refuse_overlaid

_PRODUCTS = {
    F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    torch.matmul, torch.mm, torch.bmm, torch.mv, torch.inner, torch.addmm, torch.addbmm, torch.addmv, torch.baddbmm,
    torch.einsum, torch.tensordot, torch.chain_matmul, torch.linalg.matmul, torch.linalg.multi_dot,
    Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.bmm, Tensor.mv, Tensor.inner,
    Tensor.addmm, Tensor.addbmm, Tensor.addmv, Tensor.baddbmm,
}  # fmt: skip
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
_STORED = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool,
)  # fmt: skip
_LARGE = 0.01  # part of all parameters from which on an unknown use is refused
_CLOSE = 1e-3  # of the largest output: two evaluations agree that differ by the order of additions on a GPU
_UNFIT = "check --input-size and --model"
_COUNTER = "num_batches_tracked"
_NOTHING = (
    "expected a network with convolutions or linear layers that inference reads, got none to compress; "
    "check --model and --keep"
)


@dataclass(frozen=True)
class Layer:
    """One weight that is compressed; `name` in the state dict, `kind` is conv, linear, attention or matmul."""

    name: str
    kind: str
    shape: tuple[int, ...]
    weights: int


@dataclass(frozen=True)
class Inventory:
    """Every entry of a state dict, in exactly one of the first six groups, each in the order of the state dict.

    `layers` are compressed; `kept` are stored at a stated precision, `integers` exactly; `counters` (of batch norm) are not stored and
    zero on loading; `ties` maps a further name of a tensor to its first; `dropped` is never read at inference and not stored. `notes`
    has a line for everything special. `bytes_before` counts layers, kept and integers as float32; `parameters` no buffers. `named`: those of `kept` that
    the user named, which are on no grid.
    """

    layers: tuple[Layer, ...]
    kept: tuple[str, ...]
    integers: tuple[str, ...]
    counters: tuple[str, ...]
    ties: dict[str, str]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    bytes_before: int
    parameters: int
    named: tuple[str, ...] = ()


def inventory(model: nn.Module, sample: Tensor, keep: Sequence[str] = ()) -> Inventory:
    """Sort the tensors of `model`; `sample`: float32 (n, c, h, w), images as the network takes them.

    `keep`: names or patterns (`fnmatch`) of weights that are stored as they are. `ModelError` for a network that cannot take the sample,
    has no layer, or has a large weight whose use is unknown; `ConfigError` for a pattern that matches nothing. Modes, gradients and
    values of the network are as before.
    """
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    refuse_unstorable(state)
    refuse_overlaid(state)
    ties = names_of_one(state, but=_COUNTER)
    groups = _Groups(state, _kinds(model, ties), _matching(keep, state, ties))
    parameters = _parameters(state, ties)
    with evaluating(model), _differentiable(parameters):
        trace = _trace(model, parameters, sample)
        dropped = _unread(model, state, ties, trace.unreached, sample, groups.wanted)
    for name, tensor in state.items():
        if name not in ties:
            groups.put(name, tensor, name in dropped, name in trace.products)
    if not groups.layers:
        raise ModelError(_NOTHING)
    groups.refuse_large()
    frozen = [name for name, one in parameters.items() if name in trace.unreached or not one.requires_grad]
    return groups.result(ties, [name for name in frozen if name not in dropped])


def refuse_unstorable(state: Mapping[str, Any]) -> None:
    """`ModelError` for what no file can hold in a state dict with its parameters."""
    for name, value in state.items():
        if isinstance(value, UninitializedParameter | UninitializedBuffer):
            raise ModelError(
                f"expected weights, got {name} without a shape (lazy); run the network once before"
            )
        if not isinstance(value, Tensor) or value.is_quantized or value.dtype not in _STORED:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            known = ", ".join(str(one).removeprefix("torch.") for one in _STORED)
            raise ModelError(
                f"expected tensors of {known}, got {name} of {got}; convert it, or use another network"
            )


def _parameters(state: Mapping[str, Tensor], ties: Mapping[str, str]) -> dict[str, Tensor]:
    """Each parameter that can have a gradient, once."""
    return {
        name: tensor
        for name, tensor in state.items()
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and name not in ties
    }


def _kinds(model: nn.Module, ties: Mapping[str, str]) -> dict[str, str]:
    """What the owning module says about a weight, by the weight's first name; of several owners a layer counts most."""
    found: dict[str, str] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, kind in _kinds_of(module):
            full = f"{prefix}.{name}" if prefix else name
            full = ties.get(full, full)
            if found.get(full, "embedding") == "embedding":
                found[full] = kind
    return found


def _kinds_of(module: nn.Module) -> list[tuple[str, str]]:
    if isinstance(module, nn.MultiheadAttention):
        return [(name, "attention") for name in _ATTENTION]
    if isinstance(module, nn.modules.conv._ConvNd):
        return [("weight", "conv")]
    if isinstance(module, nn.Linear):
        return [("weight", "linear")]
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return [("weight", "embedding")]
    return []


def _matching(keep: Sequence[str], state: Mapping[str, Tensor], ties: Mapping[str, str]) -> set[str]:
    names = [name for name, tensor in state.items() if isinstance(tensor, nn.Parameter)]
    result: set[str] = set()
    for pattern in keep:
        found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise ConfigError(
                f"--keep: expected names of weights, got {pattern!r}, which matches none; nearest names: {', '.join(near)}"
            )
        result.update(ties.get(name, name) for name in found)
    return result


class _Products(TorchFunctionMode):
    """Notes which storages enter matrix products and convolutions; views share their parameter's storage."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            self._note((*args, *kwargs.values()))
        elif func is F.multi_head_attention_forward:
            # by position: its biases of k and v have three dimensions, but are no weights
            self._note((args[5:6], args[11:12], *(v for k, v in kwargs.items() if k.endswith("proj_weight"))))
        return func(*args, **kwargs)

    def _note(self, values: Any) -> None:
        for value in values:
            if isinstance(value, Tensor):
                self.storages.add(value.untyped_storage().data_ptr())
            elif isinstance(value, list | tuple):
                self._note(value)


@dataclass(frozen=True)
class _Trace:
    """`unreached`: parameters without a gradient; `products`: those that enter products."""

    unreached: list[str]
    products: set[str]


@contextmanager
def _differentiable(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(before[name])


def _trace(model: nn.Module, parameters: Mapping[str, Tensor], sample: Tensor) -> _Trace:
    with torch.enable_grad(), _Products() as products:
        output = scores(model, sample, _UNFIT)
        if not output.requires_grad:
            raise ModelError(f"{_NOTHING}, and that the forward pass is not under no_grad")
        score = output.float().square().sum()
        gradients = torch.autograd.grad(score, list(parameters.values()), allow_unused=True)
    unreached = [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]
    used = {
        n for n, p in parameters.items() if p.numel() and p.untyped_storage().data_ptr() in products.storages
    }
    return _Trace(unreached, used)


def _unread(
    model: nn.Module,
    state: Mapping[str, Tensor],
    ties: Mapping[str, str],
    unreached: Sequence[str],
    sample: Tensor,
    wanted: set[str],
) -> set[str]:
    """Names without influence on the output: `unreached` parameters and the buffers beside them, less those that NaN reveals."""
    suspects = [name for name in unreached if name not in wanted]
    suspects += _buffers_beside(state, {*suspects, *(a for a, n in ties.items() if n in suspects)})
    if not suspects:
        return set()
    with torch.no_grad():
        reference = scores(model, sample, _UNFIT)

        def revealed(names: list[str]) -> list[str]:
            """Those of `names` that the output depends on, found by halving."""
            if not names or not _changes(model, [state[name] for name in names], sample, reference):
                return []
            middle = len(names) // 2
            return names if len(names) == 1 else revealed(names[:middle]) + revealed(names[middle:])

        return set(suspects) - set(revealed(suspects))


def _changes(model: nn.Module, tensors: Sequence[Tensor], sample: Tensor, reference: Tensor) -> bool:
    """Whether the output is another with NaN (integers: zeros) in `tensors`; the values are put back."""
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
        output = scores(model, sample, _UNFIT)
    except ModelError:  # a network may check its values
        return True
    finally:
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
    close = _CLOSE * float(reference.abs().max()) if reference.numel() else 0.0
    return output.shape != reference.shape or not torch.allclose(output, reference, rtol=0, atol=close)


def _buffers_beside(state: Mapping[str, Tensor], unread: set[str]) -> list[str]:
    """Buffers of modules whose parameters, or those of the nearest module around it that has any, are all unread."""
    parameters = [name for name, tensor in state.items() if isinstance(tensor, nn.Parameter)]

    def beside(name: str) -> bool:
        owner = name.rpartition(".")[0]
        around = [n for n in parameters if n.rpartition(".")[0] == owner]
        while not around and owner:
            around = [n for n in parameters if n.startswith(f"{owner}.")]
            owner = owner.rpartition(".")[0]
        return bool(around) and all(n in unread for n in around)

    buffers = (n for n, t in state.items() if not isinstance(t, nn.Parameter) and not n.endswith(_COUNTER))
    return [name for name in buffers if unread and beside(name)]


@dataclass
class _Groups:
    """The groups of an inventory while they fill."""

    state: Mapping[str, Tensor]
    kinds: Mapping[str, str]
    wanted: set[str]  # named by the user to be kept
    layers: list[Layer] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    integers: list[str] = field(default_factory=list)
    counters: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)  # kept parameters of two dimensions or more

    def put(self, name: str, tensor: Tensor, dropped: bool, in_product: bool) -> None:
        """One tensor into its group."""
        kind = self.kinds.get(name)
        if in_product and kind in (None, "embedding"):
            kind = "matmul"
        parameter = isinstance(tensor, nn.Parameter)
        if name.endswith(_COUNTER) and not parameter:
            self.counters.append(name)
        elif dropped:
            self.dropped.append(name)
        elif not tensor.is_floating_point():
            self.integers.append(name)
        elif (
            parameter
            and tensor.dim() >= 2
            and kind not in (None, "embedding")
            and name not in self.wanted
            and tensor.numel()
        ):
            self.layers.append(Layer(name, str(kind), tuple(tensor.shape), tensor.numel()))
        else:
            self.kept.append(name)
            if parameter and tensor.dim() >= 2:
                self.unknown.append(name)

    def parameters(self) -> int:
        """Elements of all parameters that are stored."""
        kept = (self.state[name] for name in self.kept)
        return sum(layer.weights for layer in self.layers) + sum(
            tensor.numel() for tensor in kept if isinstance(tensor, nn.Parameter)
        )

    def refuse_large(self) -> None:
        """`ModelError` for a large parameter that nobody knows the use of."""
        for name in self.unknown:
            tensor = self.state[name]
            known = name in self.wanted or self.kinds.get(name) == "embedding"
            matrix = sum(side > 1 for side in tensor.shape) >= 2
            if matrix and not known and tensor.numel() >= _LARGE * self.parameters():
                raise ModelError(
                    f"expected every large weight in a convolution or a matrix product, got {self._described(name)} with an unknown "
                    f"use; add --keep {name} to store it as it is"
                )

    def result(self, ties: Mapping[str, str], frozen: Sequence[str]) -> Inventory:
        """The inventory; `frozen`: parameters that are read without a gradient, or are to have none."""
        gone = set(self.dropped)
        aliases = [alias for alias, name in ties.items() if name in gone]
        dropped = tuple(name for name in self.state if name in gone or name in aliases)
        stored = [*(layer.name for layer in self.layers), *self.kept, *self.integers]
        ties = {alias: name for alias, name in ties.items() if name not in gone}
        return Inventory(
            layers=tuple(self.layers),
            kept=tuple(self.kept),
            integers=tuple(self.integers),
            counters=tuple(self.counters),
            ties=ties,
            dropped=dropped,
            notes=(*_special(dropped, ties, frozen), *self._kept_notes()),
            bytes_before=4 * sum(self.state[name].numel() for name in stored),
            parameters=self.parameters(),
            named=tuple(name for name in self.kept if name in self.wanted),
        )

    def _kept_notes(self) -> list[str]:
        """A line for every kept parameter of two dimensions or more; equal names in many modules share one."""
        alike: dict[tuple[str, bool], list[str]] = {}
        for name in self.unknown:
            alike.setdefault((name.rpartition(".")[2], name in self.wanted), []).append(name)
        return [
            f"stored without compression because {'--keep says so' if wanted else 'no product reads it'}: "
            + ", ".join(map(self._described, names))
            for (_, wanted), names in alike.items()
        ]

    def _described(self, name: str) -> str:
        return f"{name} ({'x'.join(str(side) for side in self.state[name].shape)})"


def _special(dropped: Sequence[str], ties: Mapping[str, str], frozen: Sequence[str]) -> list[str]:
    notes = [f"{alias} is tied to {name} and stored once" for alias, name in ties.items()]
    if frozen:
        notes.insert(
            0, f"{_listed(frozen)}: read without a gradient, so compressed or kept but not fine-tuned"
        )
    if dropped:
        notes.insert(0, f"{_listed(dropped)}: inference never reads them, left out")
    return notes


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)} tensors ({', '.join(names)})"
