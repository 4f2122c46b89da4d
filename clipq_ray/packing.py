"""From a fine-tuned network to the bytes of its file.

Weights are quantized for good, what units leave behind that feed nothing goes (`dead_units`), units are brought into the order that takes the fewest bytes (`unit_order`), batch-norm statistics re-estimated with them (kept only where validation images say that it is better),
batch norm folded and put on the coarsest grids that change nothing measured on validation images, and all is encoded. What a choice costs is measured on
the decoded file. Not covered: the format (`codec`), which file of a round is taken (`fitting`), the report.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from clipq_ray import codec, dead_units, folding, levels, loading, unit_order
from clipq_ray.data import Data
from clipq_ray.data.finding import in_number_order
from clipq_ray.evaluate import Evaluation, evaluate, reestimate_batch_norm
from clipq_ray.intent import Drop, Intent
from clipq_ray.network import Inventory
from clipq_ray.operator import bake
from clipq_ray.plan import Plan
from clipq_ray.quantizer import Quantized
from clipq_ray.source import Source
from clipq_ray.states import put_state, read_state
from clipq_ray.storage import Store

_DROP_POINTS, _LOSS_NATS = 0.05, 0.005
"""Grids change nothing that was measured where top-1 on validation images is lower by at most the first [points] and one standard error, and the
loss is higher by at most the second [nats]. Even the finest grid turns a few images, by chance for the worse: without the error, two images of 2,500
refused it, and the file took 5 of 42 KB more (bench/LOG.md)."""


_NAMED_MOST = 100
_SAMPLE = 16  # images whose outputs must be the same without dead units


@dataclass(frozen=True)
class PackedNetwork:
    """The file, its score on validation images, and what the statistics need of each layer: where it was clipped, how far quantizing moved it, and the norm
    of the full-precision weights. No tensors: a job keeps one of these for every round."""

    file: bytes
    clips: dict[str, tuple[float, float]]
    full_norms: dict[str, tuple[float, float]]
    levels: str
    batch_norm: str
    precision: folding.Precision | None
    dead_units: int
    validation: Evaluation

    @property
    def vectors(self) -> str:
        """What the grids of vectors are."""
        return "as they are" if self.precision is None else str(self.precision)


def pack(
    source: Source,
    tuned: Store,
    plan: Plan,
    inventory: Inventory,
    data: Data,
    source_sha256: str,
    fitted: Store | None = None,
) -> PackedNetwork:
    """The packed form of the network whose full-precision weights lie in `tuned`; with `fitted` the one with levels and codes that were trained behind them."""
    model = source.network()
    put_state(model, read_state(tuned))
    full = {layer.layer: model.get_parameter(layer.layer).detach().double().clone() for layer in plan.layers}
    quantized = bake(model, plan)
    if fitted is not None:
        weights, model = read_state(fitted), source.network()
        quantized = {
            name: replace(one, clips=quantized[name].clips)
            for name, one in levels.read(weights, plan).items()
        }
        put_state(model, weights)
    words = "means" if fitted is None else "fitted"
    return _made(source, model, full, plan, quantized, inventory, data, source_sha256, words)


def best(made: Sequence[PackedNetwork], most_bytes: int | None) -> int:
    """Which one to take: of those that are not larger than `most_bytes` the one that validation images like best, of equals the first; where there is none the smallest."""
    taken = 0
    for number in range(1, len(made)):
        if _is_better(made[number], made[taken], most_bytes):
            taken = number
    return taken


def _is_better(one: PackedNetwork, other: PackedNetwork, most_bytes: int | None) -> bool:
    """By top-1, or by the loss where top-1 differs by less than one standard error: of a few thousand images a handful turn by chance. A size that neither
    keeps goes before both."""
    if not (keeps(one, most_bytes) and keeps(other, most_bytes)):
        return len(one.file) < len(other.file)
    drop = Drop.between(other.validation.predictions, one.validation.predictions, one.validation.labels)
    if abs(drop.points) > drop.error:
        return drop.points < 0
    return one.validation.loss < other.validation.loss


def keeps(one: PackedNetwork, most_bytes: int | None) -> bool:
    """Whether a file is as small as promised."""
    return most_bytes is None or len(one.file) <= most_bytes


def _made(
    source: Source, model: nn.Module, full: dict[str, torch.Tensor], plan: Plan, quantized: dict[str, Quantized], inventory: Inventory, data: Data,
    source_sha256: str, levels_words: str,
) -> PackedNetwork:  # fmt: skip
    """The packed form of `model`, whose planned weights are those of `quantized` and were those of `full`."""
    norms = {
        name: (float((weight - quantized[name].values.double()).norm()), float(weight.norm()))
        for name, weight in full.items()
    }
    layers, gone = _coded(source, model, plan, quantized, data, inventory.kept)
    model.to(source.device())
    words, exact = _batch_norm(model, source, data)
    packed = codec.Packed(
        _metadata(source, inventory, data, source_sha256), _tensors(model, inventory, layers)
    )
    blobs = {name: codec.smallest(layer, source.config.profile) for name, layer in layers.items()}
    file, precision, found = _smallest(source, model, inventory, data, packed, blobs, exact)
    clips = {name: one.clips for name, one in quantized.items()}
    return PackedNetwork(file, clips, norms, levels_words, words, precision, gone, found)


def _coded(
    source: Source,
    model: nn.Module,
    plan: Plan,
    quantized: Mapping[str, Quantized],
    data: Data,
    kept: Sequence[str],
) -> tuple[dict[str, codec.CodedLayer], int]:
    """The layers as the file has them, `model` with them; how many units went because they feed nothing."""
    config, shares = source.config, {layer.layer: layer.share for layer in plan.layers}
    layers = {name: codec.coded(one, shares[name]) for name, one in quantized.items()}
    if config.vectors == "auto":
        layers = {name: layer.halved() for name, layer in layers.items()}
        for name, layer in layers.items():
            model.get_parameter(name).data.copy_(torch.from_numpy(layer.values()))
    sample = data.validation.batch(torch.arange(min(_SAMPLE, len(data.validation))), None)[0]
    gone = 0
    if config.dead_units == "drop":
        layers, gone = dead_units.drop(model, layers, sample, kept)
    if config.unit_order == "sorted":
        layers = unit_order.sort(model, layers, sample, kept)
    return layers, gone


def usual(source: Source) -> folding.Precision | None:
    """The grids that most networks take."""
    return folding.USUAL if source.config.vectors == "auto" else None


def file_bytes(
    source: Source, weights: Mapping[str, torch.Tensor], plan: Plan, inventory: Inventory, data: Data,
    precision: folding.Precision | None,
) -> int:  # fmt: skip
    """Bytes of the file that a network of these full-precision weights would make by now, with grids of `precision`: nothing is evaluated."""
    model = source.network()
    put_state(model, weights)
    layers, _ = _coded(source, model, plan, bake(model, plan), data, inventory.kept)
    return _bytes(source, model, inventory, data, layers, precision)


def _score(source: Source, model: nn.Module, data: Data) -> Evaluation:
    batch = source.config.evaluation_batch_size
    return evaluate(model, data.validation, batch_size=batch, device=source.device())


def _batch_norm(model: nn.Module, source: Source, data: Data) -> tuple[str, Evaluation]:
    """Statistics anew where validation images like that better; what was done, and the score."""
    config = source.config
    kept = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    before = _score(source, model, data)
    there = reestimate_batch_norm(
        model, data.train, images=config.batch_norm_images, batch_size=config.evaluation_batch_size, seed=config.seed,
        device=source.device(),
    )  # fmt: skip
    if not there:
        return "none", before
    if any(bool((value.cpu() != kept[name]).any()) for name, value in model.state_dict().items()):
        after = _score(source, model, data)
        if (after.top1, -after.loss) > (before.top1, -before.loss):
            return "re-estimated", after
        put_state(model, kept)
    return "kept", before


def _smallest(
    source: Source,
    model: nn.Module,
    inventory: Inventory,
    data: Data,
    packed: codec.Packed,
    blobs: Mapping[str, tuple[str, bytes]],
    exact: Evaluation,
) -> tuple[bytes, folding.Precision | None, Evaluation]:
    """The file with the coarsest grids that change nothing measured, what they are, and the decoded file's score; `blobs` are those of the layers, which no
    grid changes."""
    profile = source.config.profile
    for precision in folding.LADDER if source.config.vectors == "auto" else ():
        file = codec.encode(_on_grids(model, inventory, packed, precision), profile, blobs)
        found = _decoded(source, file, data)
        drop = Drop.between(exact.predictions, found.predictions, found.labels)
        if drop.points <= _DROP_POINTS + drop.error and found.loss <= exact.loss + _LOSS_NATS:
            return file, precision, found
    file = codec.encode(packed, profile, blobs)
    return file, None, _decoded(source, file, data)


def _decoded(source: Source, file: bytes, data: Data) -> Evaluation:
    return _score(source, loading.from_bytes(file, factory=source.network).to(source.device()), data)


def _on_grids(
    model: nn.Module, inventory: Inventory, packed: codec.Packed, precision: folding.Precision
) -> codec.Packed:
    """`packed` with folded batch norms and with vectors on grids."""
    grids, norms = folding.on_grids(
        model, set(inventory.kept) - set(inventory.named), precision, set(inventory.ties.values())
    )
    gone = {name for module in norms for name in codec.norm_names(module)}
    tensors = {name: value for name, value in packed.tensors.items() if name not in gone} | grids
    return replace(packed, tensors=tensors, norms=norms)


def other_bytes_of(file: bytes, layers: Collection[str]) -> int:
    """Bytes of a file besides the blobs of `layers`: header, checksums, biases, batch norm, buffers."""
    return len(file) - sum(entry.bytes for entry in codec.entries(file) if entry.name in layers)


def other_bytes(source: Source, model: nn.Module, inventory: Inventory, data: Data) -> int:
    """Bytes of the file besides the layers' blobs: header, biases, batch norm, buffers."""
    return _beside(source, model, inventory, data, usual(source))


def _beside(
    source: Source, model: nn.Module, inventory: Inventory, data: Data, precision: folding.Precision | None
) -> int:
    """The same with grids of `precision`, measured by encoding them beside layers of zeros."""
    state = model.state_dict()
    zeros = {
        layer.name: codec.CodedLayer(
            np.zeros(tuple(state[layer.name].shape), np.int16), np.zeros(1, np.float32), 0
        )
        for layer in inventory.layers
    }
    layers = sum(codec.layer_bytes(one, source.config.profile) for one in zeros.values())
    # the size of a real layer takes a byte more in the header
    return _bytes(source, model, inventory, data, zeros, precision) - layers + len(zeros)


def size_notes(source: Source, model: nn.Module, inventory: Inventory, data: Data) -> list[str]:
    """A note where the size that is asked for leaves nothing for the layers' weights: only units that die can make it smaller."""
    intent = Intent.of(source.config, inventory.bytes_before)
    coarsest = folding.LADDER[0] if source.config.vectors == "auto" else None
    if intent.kind != "bytes" or (other := _beside(source, model, inventory, data, coarsest)) < intent.value:
        return []
    unless = ", unless units die" if source.config.dead_units == "drop" else ""
    return [
        f"{intent.words()} are asked for, and header, biases and batch norm alone take {other:,} at least{unless}: no plan for the weights can keep that; ask for more"
    ]


def _bytes(
    source: Source, model: nn.Module, inventory: Inventory, data: Data, layers: Mapping[str, codec.CodedLayer],
    precision: folding.Precision | None,
) -> int:  # fmt: skip
    """Bytes of a file of these layers and the rest of `model`."""
    packed = codec.Packed(_metadata(source, inventory, data, "0" * 64), _tensors(model, inventory, layers))
    if precision is not None:
        packed = _on_grids(model, inventory, packed, precision)
    return len(codec.encode(packed, source.config.profile))


def _tensors(
    model: nn.Module, inventory: Inventory, layers: Mapping[str, codec.CodedLayer]
) -> dict[str, codec.Tensor]:
    """All stored tensors in the order of the state dict, those beside the layers as they are."""
    wanted = {layer.name for layer in inventory.layers} | set(inventory.kept) | set(inventory.integers)
    return {
        name: layers[name] if name in layers else _array(value)
        for name, value in model.state_dict().items()
        if name in wanted
    }


def _array(value: torch.Tensor) -> npt.NDArray[np.generic]:
    """A tensor for the file, which has no bfloat16: as float32, which is exact, and which a reader makes the network's type again."""
    array: npt.NDArray[np.generic] = (
        (value.float() if value.dtype == torch.bfloat16 else value).detach().cpu().numpy()
    )
    return array


def _metadata(source: Source, inventory: Inventory, data: Data, source_sha256: str) -> dict[str, Any]:
    """What the file says of itself: enough for `jobs/evaluate.py`."""
    architecture = source.architecture()
    result: dict[str, Any] = {
        "architecture": architecture.to_json() if architecture and ":" not in architecture.name else None,
        "classes": data.classes,
        "input": data.preprocessing.to_json(),
        "source": source_sha256,
    }
    extra: dict[str, Any] = {
        "ties": inventory.ties,
        "dropped": list(inventory.dropped),
        "class_names": list(data.class_names) if _holds_names(data.class_names) else [],
    }
    return {**result, **{key: value for key, value in extra.items() if value}}


def _holds_names(names: tuple[str, ...]) -> bool:
    """Whether a file holds the names of its classes: of 100 at most, where they are not their numbers; and of all that are numbers in another order, as of
    folders that are called so and sorted, since these would be taken for the numbers of classes."""
    if names == tuple(str(index) for index in range(len(names))):
        return False
    return len(names) <= _NAMED_MOST or (all(map(str.isdecimal, names)) and not in_number_order(names))
