"""Small committed runs, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np

from clipq_ray import codec, manifest, tables
from clipq_ray.storage import LAYERS, MODEL, REPORT, TRIALS, Store, run_store, stage_store


def layer(index: int, size: int, weights: int) -> dict[str, Any]:
    return {
        "index": index, "layer": f"conv{index}.weight", "group": f"conv{index}.weight", "kind": "conv", "shape": [weights], "weights": weights, "p": 0.5, "bits": 2,
        "share_negative": 2, "share_positive": 1, "clip_negative": 0.1, "clip_positive": 0.2, "levels": 3, "level_values": [-1.0, 0.0, 1.0],
        "nonzeros": 5, "nonzero_percent": 50.0, "bytes_before": 4 * weights, "bytes": size, "bits_per_weight": 8 * size / weights,
        "entropy_bits_per_weight": 1.5, "ratio": 4 * weights / size, "quantization_error_percent": 30.0, "clipped_first": 5, "recovered": 1, "state_changes": 9,
        "search_error_percent": None, "search_reference_error_percent": None, "coder": "static",
    }  # fmt: skip


def trial(name: str, chosen: bool) -> dict[str, Any]:
    return {
        "layer": name, "round": 1, "step": int(chosen), "origin": "start", "p": 0.5, "bits": 2, "images": 10, "bound": False, "error_percent": 5.0, "loss": 0.1,
        "bytes": 10, "saved_fraction": 0.1, "tradeoff": 1.0, "objective": 4.9, "predicted_mean": None, "predicted_deviation": None, "chosen": chosen, "seconds": 0.1, "node": "n",
    }  # fmt: skip


def run_files(first_bytes: int = 100, *, trials: bool = True) -> dict[str, bytes]:
    """The files of a small run of two layers of 400 weights, which its packed network, of one vector, knows nothing of (`test_cli` has another)."""
    files = {
        MODEL: codec.encode(codec.Packed({}, {"bias": np.ones(3, np.float32)})),
        LAYERS: tables.to_bytes([layer(0, first_bytes, 400), layer(1, 50, 400)], tables.LAYERS),
        REPORT: b"<html></html>",
    }
    if trials:
        rows = [trial("conv0.weight", False), trial("conv0.weight", True)]
        files[TRIALS] = tables.to_bytes(rows, tables.TRIALS)
    return files


def content(model: str, run: str, **changes: Any) -> dict[str, Any]:
    return {
        "format": 1,
        "model": model,
        "run": run,
        "metrics": {"ratio": 15.5},
        "notes": ["größer"],
        **changes,
    }


def commit(storage: Store, model: str, run: str, files: dict[str, bytes] | None = None) -> Store:
    store = run_store(storage, model, run)
    manifest.commit(store, files or run_files(), content(model, run))
    return store


def many_runs(storage: Store) -> None:
    """Two committed runs, one of them without a search, and everything that is not one."""
    commit(storage, "lenet5", "r-1", run_files(150))
    commit(storage, "2024", "r-2", run_files(50, trials=False))
    for name, data in run_files(9999).items():
        run_store(storage, "lenet5", "r-unfinished").write(name, data)
    stage_store(storage, "search", "ab").write(LAYERS, run_files(9999)[LAYERS])
    storage.write("fleet=all/manifest.json", b"{}")
