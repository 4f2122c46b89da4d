"""From a fine-tuned network to the bytes of its file.

Weights are quantized for good, batch-norm statistics re-estimated with them (kept only where validation images say that it is better), and
all is encoded. Not covered: the format (`codec`) and the report.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from clipq_ray import codec
from clipq_ray.data import Data
from clipq_ray.evaluate import evaluate, reestimate_batch_norm
from clipq_ray.network import Inventory
from clipq_ray.operator import bake
from clipq_ray.plan import Plan
from clipq_ray.quantizer import Quantized
from clipq_ray.storage import Store
from clipq_ray.work import Source, read_state


@dataclass(frozen=True)
class PackedNetwork:
    """The file, and what the statistics need: the quantized layers and the full-precision weights behind them."""

    file: bytes
    quantized: dict[str, Quantized]
    full_norms: dict[str, tuple[float, float]]
    batch_norm: str
    notes: list[str]


def pack(
    source: Source, tuned: Store, plan: Plan, inventory: Inventory, data: Data, source_sha256: str
) -> PackedNetwork:
    """The packed form of the network whose full-precision weights lie in `tuned`."""
    config, device = source.config, source.device()
    model = source.network()
    model.load_state_dict(read_state(tuned))
    full = {layer.layer: model.get_parameter(layer.layer).detach().double().clone() for layer in plan.layers}
    quantized = bake(model, plan)
    norms = {
        name: (float((weight - quantized[name].values.double()).norm()), float(weight.norm()))
        for name, weight in full.items()
    }
    model.to(device)
    kept = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}

    def score() -> tuple[float, float]:
        found = evaluate(model, data.validation, batch_size=config.evaluation_batch_size, device=device)
        return found.top1, -found.loss

    before = score()
    reestimate_batch_norm(
        model, data.train, images=config.batch_norm_images, batch_size=config.evaluation_batch_size, seed=config.seed,
        device=device,
    )  # fmt: skip
    changed = any(bool((value.cpu() != kept[name]).any()) for name, value in model.state_dict().items())
    better = changed and score() > before
    if not better:
        model.load_state_dict(kept)
    words = "re-estimated" if better else "kept"
    packed = codec.Packed(
        _metadata(source, inventory, data, source_sha256), _tensors(model, inventory, plan, quantized)
    )
    return PackedNetwork(codec.encode(packed), quantized, norms, words, [])


def other_bytes(source: Source, model: nn.Module, inventory: Inventory, data: Data) -> int:
    """Bytes of the file besides the layers' blobs: header, biases, batch norm, buffers; measured by encoding them."""
    state = model.state_dict()
    plain: dict[str, Any] = {
        name: state[name].detach().cpu().numpy() for name in (*inventory.kept, *inventory.integers)
    }
    empty = codec.CodedLayer(np.zeros(0, np.int16), np.zeros(1, np.float32), 0)
    blobs = {layer.name: empty for layer in inventory.layers}
    file = codec.encode(codec.Packed(_metadata(source, inventory, data, "0" * 64), {**blobs, **plain}))
    # an empty layer still has two bytes and its checksum, and its shape in the header is shorter than a real one
    return len(file) - 6 * len(blobs) + 6 * len(blobs) // 2


def _tensors(
    model: nn.Module, inventory: Inventory, plan: Plan, quantized: dict[str, Quantized]
) -> dict[str, Any]:
    """All stored tensors in the order of the state dict."""
    shares = {layer.layer: layer.share for layer in plan.layers}
    wanted = {layer.name for layer in inventory.layers} | set(inventory.kept) | set(inventory.integers)
    return {
        name: codec.coded(quantized[name], shares[name])
        if name in quantized
        else value.detach().cpu().numpy()
        for name, value in model.state_dict().items()
        if name in wanted
    }


def _metadata(source: Source, inventory: Inventory, data: Data, source_sha256: str) -> dict[str, Any]:
    """What the file says of itself: enough for `jobs/evaluate.py`."""
    architecture = source.architecture()
    numbered = tuple(str(index) for index in range(data.classes))
    result: dict[str, Any] = {
        "architecture": architecture.to_json() if architecture and ":" not in architecture.name else None,
        "classes": data.classes,
        "input": data.preprocessing.to_json(),
        "source": source_sha256,
    }
    extra: dict[str, Any] = {
        "ties": inventory.ties,
        "dropped": list(inventory.dropped),
        "class_names": list(data.class_names)
        if tuple(data.class_names) != numbered and data.classes <= 100
        else [],
    }
    return {**result, **{key: value for key, value in extra.items() if value}}
