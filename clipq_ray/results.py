"""What a run says about itself: the manifest's content, the rows of the tables, the report.

Sizes are those of the file, accuracies those of the decoded file. Not covered: writing (`manifest`), the schemas (`tables`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from clipq_ray import codec, report, search, tables
from clipq_ray.choice import Choice
from clipq_ray.evaluate import Evaluation
from clipq_ray.groups import Group, by_layer
from clipq_ray.network import Inventory
from clipq_ray.packing import PackedNetwork
from clipq_ray.plan import Plan
from clipq_ray.searching import Searched
from clipq_ray.storage import LAYERS, MODEL, PREDICTIONS, REPORT, TRIALS

_ELSEWHERE = ("architecture", "class_names", "config")
"""What decides a run and has a field of its own."""


@dataclass(frozen=True)
class Scores:
    """Evaluations by split ("validation", "test"); the decoded file's under `compressed`."""

    original: dict[str, Evaluation | None]
    control: dict[str, Evaluation | None]
    compressed: dict[str, Evaluation | None]


def _score(found: Evaluation | None) -> dict[str, float | None] | None:
    if found is None:
        return None
    low, high = found.interval()
    return {
        "top1_percent": 100 * found.top1,
        "top1_low_percent": 100 * low,
        "top1_high_percent": 100 * high,
        "top5_percent": 100 * found.top5,
        "loss": found.loss if math.isfinite(found.loss) else None,  # JSON has no other
    }


def _metrics(scores: Scores) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for split in ("validation", "test"):
        compressed = scores.compressed[split]
        result[split] = None if compressed is None else {
            "n": compressed.n,
            "original": _score(scores.original[split]),
            "control": _score(scores.control[split]),
            "compressed": _score(compressed),
        }  # fmt: skip
    reference = "control" if scores.control["validation"] else "original"
    counted = result["test"] or result["validation"]
    drop = counted[reference]["top1_percent"] - counted["compressed"]["top1_percent"]
    against_original = counted["original"]["top1_percent"] - counted["compressed"]["top1_percent"]
    return {
        **result,
        "reference": reference,
        "drop_points": drop,
        "drop_from_original_points": against_original,
    }


def document(
    *, name: str, run_id: str, run: Mapping[str, Any], identity: Mapping[str, Any], source_sha256: str, inventory: Inventory,
    choice: Choice, packed: PackedNetwork, scores: Scores, curves: Mapping[str, Any], promise: Mapping[str, Any], together: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The manifest without its list of files."""
    size = len(packed.file)
    return {
        "format": 1,
        "run": run_id,
        "model": name,
        **run,
        "architecture": identity["architecture"],
        "identity": {name: value for name, value in identity.items() if name not in _ELSEWHERE},
        "source_sha256": source_sha256,
        "tradeoff": choice.tradeoff,
        "metrics": {
            "parameters": inventory.parameters,
            "bytes_before": inventory.bytes_before,
            "bytes_after": size,
            "ratio": inventory.bytes_before / size,
            "levels": packed.levels,
            "batch_norm": packed.batch_norm,
            "vectors": packed.vectors,
            "dead_units": packed.dead_units,
            **_metrics(scores),
        },
        "promise": dict(promise),
        "search": dict(together),
        "curves": dict(curves),
    }


def files(
    document: dict[str, Any], packed: PackedNetwork, inventory: Inventory, plan: Plan, choice: Choice,
    groups: Sequence[Group], searches: Mapping[int, Searched], searched: Searched, scores: Scores,
    recovery: Mapping[str, Mapping[str, int]],
) -> dict[str, bytes]:  # fmt: skip
    """Every file of the run by name; the report only where `[report]` is installed, else a note says so. `searches`: all by the first round that each
    served; `searched`: the one that `choice` is from."""
    layers = tables.to_bytes(
        _layer_rows(packed, inventory, plan, by_layer(groups, choice.trials), searched.error, recovery),
        tables.LAYERS,
    )
    trial_rows = tables.to_bytes(_trial_rows(searches, searched, choice), tables.TRIALS)
    result = {MODEL: packed.file, LAYERS: layers, TRIALS: trial_rows}
    if scores.compressed["test"] is not None:
        result[PREDICTIONS] = tables.to_bytes(_prediction_rows(scores), tables.PREDICTIONS)
    missing = report.missing()
    if missing:
        document["notes"] = [
            *document["notes"],
            f"no report.html: {', '.join(missing)} missing; install clipq_ray[report]",
        ]
        return result
    predictions = tables.from_bytes(result[PREDICTIONS]) if PREDICTIONS in result else None
    page = report.render(document, tables.from_bytes(layers), tables.from_bytes(trial_rows), predictions)
    return {**result, REPORT: page.encode()}


def _entropy_bits(codes: npt.NDArray[np.int16]) -> float:
    counts = np.unique(codes, return_counts=True)[1]
    p = counts / max(counts.sum(), 1)
    return float(-(p * np.log2(p)).sum()) + 0.0


def _layer_rows(
    packed: PackedNetwork,
    inventory: Inventory,
    plan: Plan,
    trials: Mapping[str, search.Trial],
    reference_error: float,
    recovery: Mapping[str, Mapping[str, int]],
) -> list[dict[str, Any]]:
    entries = {entry.name: entry for entry in codec.entries(packed.file)}
    decoded = codec.decode(packed.file, [layer.name for layer in inventory.layers]).tensors
    # the plan is in another order where layers of a group are not neighbours
    plans = {one.layer: one for one in plan.layers}
    rows = []
    for index, layer in enumerate(inventory.layers):
        planned, coded = plans[layer.name], decoded[layer.name]
        assert isinstance(coded, codec.CodedLayer)
        entry, clips, trial = entries[layer.name], packed.clips[layer.name], trials[layer.name]
        nonzeros = int(np.count_nonzero(coded.codes))
        error, norm = packed.full_norms[layer.name]
        rows.append(
            {
                "index": index,
                "layer": layer.name,
                "group": trial.layer,
                "kind": layer.kind,
                "shape": list(layer.shape),
                "weights": layer.weights,
                "p": planned.theta.p,
                "bits": planned.theta.b,
                "share_negative": planned.share.negative,
                "share_positive": planned.share.positive,
                "clip_negative": clips[0],
                "clip_positive": clips[1],
                "levels": len(coded.levels),
                "level_values": [float(value) for value in coded.levels],
                "nonzeros": nonzeros,
                "nonzero_percent": 100 * nonzeros / layer.weights,
                "bytes_before": 4 * layer.weights,
                "bytes": entry.bytes,
                "bits_per_weight": 8 * entry.bytes / layer.weights,
                "entropy_bits_per_weight": _entropy_bits(coded.codes),
                "ratio": 4 * layer.weights / entry.bytes,
                "quantization_error_percent": 100 * error / norm if norm else 0.0,
                "clipped_first": recovery[layer.name]["clipped_first"],
                "recovered": recovery[layer.name]["recovered"],
                "state_changes": recovery[layer.name]["changes"],
                "search_error_percent": 100 * trial.error,
                "search_reference_error_percent": 100 * reference_error,
                "coder": entry.coder,
            }
        )
    return rows


def _trial_rows(searches: Mapping[int, Searched], searched: Searched, choice: Choice) -> list[dict[str, Any]]:
    return [
        {
            "layer": trial.layer,
            "round": number,
            "step": trial.step,
            "origin": trial.origin,
            "bound": trial.bound,
            "p": trial.p,
            "bits": trial.b,
            "images": trial.images,
            "error_percent": 100 * trial.error,
            "loss": trial.loss,
            "bytes": trial.bytes,
            "saved_fraction": trial.saved,
            "tradeoff": trial.tradeoff,
            "objective": trial.objective(trial.tradeoff),
            "predicted_mean": trial.predicted_mean,
            "predicted_deviation": trial.predicted_deviation,
            "chosen": one is searched and choice.trials[layer] == trial,
            "seconds": trial.seconds,
            "node": trial.node,
        }
        for number, one in searches.items()
        for layer, points in one.trials.items()
        for trial in points
    ]


def _prediction_rows(scores: Scores) -> list[dict[str, Any]]:
    original, control, compressed = (s["test"] for s in (scores.original, scores.control, scores.compressed))
    assert original is not None
    assert compressed is not None
    return [
        {
            "index": index,
            "label": int(label),
            "original": int(original.predictions[index]),
            "control": int(control.predictions[index]) if control else None,
            "compressed": int(compressed.predictions[index]),
        }
        for index, label in enumerate(compressed.labels)
    ]
