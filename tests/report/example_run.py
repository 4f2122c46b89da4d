"""A made-up run for the report's tests: any number of layers and classes, deterministic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from clipq_ray import tables


def names(count: int) -> list[str]:
    """State-dict names in the manner of ResNet-20 and ResNet-50."""
    inner = [f"layer{1 + i * 4 // count}.{i // 3}.conv{1 + i % 3}.weight" for i in range(count - 2)]
    return ["conv1.weight", *inner, "fc.weight"]


def layers(count: int = 20, seed: int = 0) -> pa.Table:
    random = np.random.default_rng(seed)
    rows = []
    for index, name in enumerate(names(count)):
        shape = [16 * 2 ** (3 * index // count), 16, 3, 3] if name != "fc.weight" else [10, 64]
        weights = int(np.prod(shape)) * (1 + index * 12 // count)
        p, bits = float(random.uniform(0.3, 0.95)), int(random.integers(2, 5))
        size = int(weights * (1 - p) * bits / 6) + 20
        rows.append(
            {
                "index": index, "layer": name, "group": name, "kind": "linear" if name == "fc.weight" else "conv", "shape": shape,
                "weights": weights, "p": p, "bits": bits, "share_negative": 2**bits // 2, "share_positive": 2**bits // 2 - 1,
                "clip_negative": 0.0123, "clip_positive": 0.0217, "levels": 2**bits, "level_values": [-0.1, 0.0, 0.1],
                "nonzeros": int(weights * (1 - p)), "nonzero_percent": 100 * (1 - p), "bytes_before": 4 * weights, "bytes": size,
                "bits_per_weight": 8 * size / weights, "entropy_bits_per_weight": 7.9 * size / weights, "ratio": 4 * weights / size,
                "quantization_error_percent": 31.25, "clipped_first": 30, "recovered": 4, "state_changes": 55, "search_error_percent": 12.5, "search_reference_error_percent": 8.5,
                "coder": "ans-context",
            }
        )  # fmt: skip
    return pa.Table.from_pylist(rows, schema=tables.LAYERS)


def trials(of: pa.Table, steps: int = 14, seed: int = 1) -> pa.Table:
    random = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for layer in of.to_pylist():
        for step in range(steps):
            p, bits = float(random.uniform(0.0, 0.97)), int(random.integers(2, 9))
            size = int(layer["weights"] * (1 - 0.9 * p) * bits / 8) + 20
            error = 8.5 + 60 * p**6 + 30 / 4**bits + float(random.normal(0, 0.3))
            rows.append(
                {
                    "layer": layer["layer"], "step": step, "origin": "start" if step < 5 else "bayes", "p": p, "bits": bits,
                    "images": 2000, "bound": False, "error_percent": error, "loss": 0.3, "bytes": size, "saved_fraction": 0.01,
                    "tradeoff": 5.0, "objective": error - 5, "predicted_mean": None, "predicted_deviation": None, "chosen": step == steps - 1, "seconds": 1.5, "node": "127.0.0.1",
                }
            )  # fmt: skip
    return pa.Table.from_pylist(rows, schema=tables.TRIALS)


def predictions(n: int = 2000, classes: int = 10, control: bool = True, seed: int = 2) -> pa.Table:
    random = np.random.default_rng(seed)
    label = np.arange(n) % classes

    def network(accuracy: float) -> np.ndarray[Any, Any]:
        return np.where(random.random(n) < accuracy, label, (label + 1) % classes)

    return pa.Table.from_pydict(
        {
            "index": np.arange(n), "label": label.astype(np.int32), "original": network(0.915).astype(np.int32),
            "control": network(0.912).astype(np.int32) if control else pa.nulls(n, pa.int32()),
            "compressed": network(0.905).astype(np.int32),
        },
        schema=tables.PREDICTIONS,
    )  # fmt: skip


def scores(top1: float, half: float = 0.55) -> dict[str, float]:
    return {
        "top1_percent": top1, "top1_low_percent": top1 - half, "top1_high_percent": top1 + half, "top5_percent": 99.61, "loss": 0.3127,
    }  # fmt: skip


def manifest(of: pa.Table | None = None, **metrics: Any) -> dict[str, Any]:
    """A manifest with everything for the layers `of`; keyword arguments replace parts of `metrics`."""
    before, after = (
        sum((of or layers())[name].to_pylist()) + rest
        for name, rest in (("bytes_before", 7112), ("bytes", 3613))
    )
    epochs = [
        {"epoch": e, "loss": 0.9 / (e + 1) + 0.1, "validation_top1_percent": 85 + 6 * e / (e + 2), "seconds": 61.0} for e in range(8)
    ]  # fmt: skip
    control = [
        {**row, "loss": row["loss"] - 0.05, "validation_top1_percent": row["validation_top1_percent"] + 0.8}
        for row in epochs
    ]
    return {
        "format": 1, "run": "r-0123456789ab", "model": "resnet20", "created_utc": "2026-01-02T03:04:05Z",
        "versions": {"python": "3.11.9", "torch": "2.14.1"},
        "config": {"model": "resnet20", "seed": 7, "max_drop_points": 0.0, "search": {"steps": 14, "images": 2000}, "keep": []},
        "architecture": {"name": "resnet20", "kwargs": {"num_classes": 10}},
        "data": {"description": "CIFAR-10", "class_names": [f"kind {i}" for i in range(10)], "validation_held_out": True},
        "metrics": {
            "parameters": before // 4 - 32, "bytes_before": before, "bytes_after": after, "ratio": before / after,
            "test": {"n": 2000, "original": scores(91.67), "control": scores(91.42), "compressed": scores(91.16)},
            "validation": {"n": 5000, "original": scores(99.83, 0.1), "control": scores(92.1), "compressed": scores(91.9)},
            "reference": "control", "drop_points": 0.26, "batch_norm": "re-estimated", **metrics,
        },
        "curves": {"finetune": epochs, "control": control},
        "stages": [{"stage": "search", "key": "5e" * 8, "seconds": 312.4, "reused": False}],
        "search": {
            "front": [{"tradeoff": 9.0 / (i + 1), "bytes": 9000 * (i + 1), "added_error_points": 40.0 / 3**i} for i in range(6)],
            "interaction": {
                "images": 2000, "original_error_percent": 0.1, "together_error_percent": 9.35, "together_points": 9.25,
                "sum_points": 5.5,
            },
        },
        "notes": ["fc.bias is stored as float32"],
        "files": {name: {"bytes": 53613, "sha256": "ab" * 32} for name in ("model.clq", "layers.parquet", "report.html")},
    }  # fmt: skip
