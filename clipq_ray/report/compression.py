"""The report's sections on layers: where the bytes are, what was done to each layer, and how the search got there.

Rows are those of the tables `layers` and `trials` (`clipq_ray.tables`). Not covered: accuracy, fine-tuning, predictions (`page`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clipq_ray.report import charts, words

Row = dict[str, Any]

# A spread of sizes above this is drawn on a logarithmic axis: the smallest bar would be under 4 px.
_LINEAR_SPREAD = 100
# Small multiples beyond this number are no longer looked at.
_SEARCHES_DRAWN = 24

LAYER_HEAD = [
    "layer",
    "shape",
    "weights",
    "p",
    "b",
    "bytes before",
    "bytes",
    "ratio",
    "bits per weight",
    "non-zero",
    "levels",
    "quantization error",
    "search error",
    "entropy, bits per weight",
    "intervals −/+",
    "clip −",
    "clip +",
    "kind",
    "coder",
]


def layer_section(layers: Sequence[Row], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Bars, totals and the table of all layers."""
    if not layers:
        return {
            "missing": "No layer was compressed.",
            "chart": None,
            "head": LAYER_HEAD,
            "rows": [],
            "totals": [],
        }
    sizes = [max(1, row["bytes"]) for row in layers]
    logarithmic = max(sizes) > _LINEAR_SPREAD * min(sizes)
    scale = (
        "The axis is logarithmic: bars compare by ratio." if logarithmic else "The axis is linear, from zero."
    )
    return {
        "missing": None,
        "chart": charts.layer_bars(layers, logarithmic),
        "caption": "Bytes of each layer in the file, in the network's order; p is the pruning rate, b the bit width, the ratio is float32 bytes "
        f"over bytes in the file. {scale}",
        "head": LAYER_HEAD,
        "rows": [_layer_row(row) for row in layers],
        "totals": _totals(layers, metrics),
    }


def _layer_row(row: Row) -> list[str]:
    """The cells under `LAYER_HEAD`."""
    searched = row["search_error_percent"]
    return [
        words.printable(row["layer"]),
        " × ".join(map(str, row["shape"] or ())),
        words.count(row["weights"]),
        words.number(row["p"], 4),
        str(row["bits"]),
        words.count(row["bytes_before"]),
        words.count(row["bytes"]),
        words.ratio(row["ratio"]),
        words.number(row["bits_per_weight"], 3),
        words.percent(row["nonzero_percent"]),
        words.count(row["levels"]),
        words.percent(row["quantization_error_percent"]),
        "not searched" if searched is None else words.percent(searched),
        words.number(row["entropy_bits_per_weight"], 3),
        f"{row['share_negative']}/{row['share_positive']}",
        words.number(row["clip_negative"], 5),
        words.number(row["clip_positive"], 5),
        words.printable(row["kind"]),
        words.printable(row["coder"]),
    ]


def _totals(layers: Sequence[Row], metrics: Mapping[str, Any]) -> list[list[str]]:
    """Where the bytes are: layers, the rest of the file, the file."""
    before, after = (sum(row[key] for row in layers) for key in ("bytes_before", "bytes"))
    all_before, all_after = metrics["bytes_before"], metrics["bytes_after"]
    parts = [
        (f"{words.count(len(layers))} compressed layers", before, after),
        ("all else: biases, batch norm, header", all_before - before, all_after - after),
        ("the whole file", all_before, all_after),
    ]
    return [
        [
            name,
            words.count(was),
            words.count(now),
            words.ratio(was / now) if now > 0 else "none",
            words.percent(100 * now / all_after, 1),
        ]
        for name, was, now in parts
    ]


def search_section(
    layers: Sequence[Row], trials: Sequence[Row], together: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Small multiples, a layer each: what the search measured and what was chosen; and what the layers do together. Of several searches, one between two
    rounds of fine-tuning each, the one that the plan is from is shown."""
    every, trials = trials, _of_the_plan(trials)
    by_layer: dict[str, list[Row]] = {}
    for row in trials:
        by_layer.setdefault(row["layer"], []).append(row)
    if not by_layer:
        missing = "No search: the run has no trials, p and b were not searched."
        return {"missing": missing, "charts": [], "together": None}
    known: dict[str, tuple[int, Row]] = {}
    weights: dict[str, int] = {}
    for place, row in enumerate(layers):
        name = row["group"] or row["layer"]
        known.setdefault(name, (place, row))
        weights[name] = weights.get(name, 0) + row["weights"]
    order = sorted(by_layer, key=lambda name: (known[name][0] if name in known else len(known), name))
    alone = all(row["group"] in (None, row["layer"]) for row in layers)
    what = "layers" if alone else f"group{'s' if len(order) != 1 else ''} of layers"
    shown, note = order, None
    if len(order) > _SEARCHES_DRAWN:
        largest = sorted(order, key=lambda name: weights.get(name, 0), reverse=True)
        kept = set(largest[:_SEARCHES_DRAWN])
        shown = [name for name in order if name in kept]
        note = f"Shown are the {_SEARCHES_DRAWN} {what} with the most weights, of {len(order)}; trials.parquet has all."
    images = sorted({row["images"] for row in trials if not row["bound"]})
    ended = sum(bool(row["bound"]) for row in trials)
    spent = sum(row["seconds"] or 0.0 for row in trials)
    early = (
        f" {words.count(ended)} of them ended early because they could not win; their errors are the least possible."
        if ended
        else ""
    )
    again = _others(every, trials)
    return {
        "missing": None,
        "told": f"{words.count(len(trials))} evaluations of {len(order)} {what} on {' or '.join(words.count(n) for n in images)} training images "
        f"each, {words.duration(spent)} of work in all.{early} One is compressed at a time, in one shot, without training.{again}",
        "note": note,
        "charts": [
            _search_chart(place, name, by_layer[name], known[name][1] if name in known else None)
            for place, name in enumerate(shown)
        ],
        "together": _together(together, trials) if together else None,
    }


def _of_the_plan(trials: Sequence[Row]) -> Sequence[Row]:
    """The trials of the search that the plan is from; all where there was one."""
    chosen = {row["round"] for row in trials if row["chosen"]}
    return [row for row in trials if row["round"] in chosen] if len(chosen) == 1 else trials


def _others(every: Sequence[Row], shown: Sequence[Row]) -> str:
    """What is to be said where there were further searches."""
    searches = sorted({row["round"] for row in every} - {None})
    if len(searches) < 2:
        return ""
    return (
        f" This is the search before round {shown[0]['round']} of fine-tuning, {'with nothing else compressed' if shown[0]['round'] == 1 else 'with all else as in the round before'}; "
        f"{words.count(len(every))} evaluations were made in all, before rounds {', '.join(map(str, searches))}."
    )


def _together(together: Mapping[str, Any], trials: Sequence[Row]) -> dict[str, Any]:
    """The front of the whole network, and how far single errors add up."""
    found, points = together["interaction"], together["front"]
    size = sum(row["bytes"] for row in trials if row["chosen"])
    chosen = {"bytes": size, "added_error_points": found["sum_points"]} if size else None
    return {
        "told": f"One by one, what was searched adds, as the chosen plan has it, {words.number(found['sum_points'], 2, 'points')} of error in sum; all at once, "
        f"without training, {words.number(found['together_points'], 2, 'points')} (from {words.percent(found['original_error_percent'])} to "
        f"{words.percent(found['together_error_percent'])} on {words.count(found['images'])} training images).",
        "chart": charts.front(points, chosen),
        "caption": "What lambda offers for the whole network before fine-tuning: errors that the layers add one by one, summed, over the "
        "bytes of all layers; the chosen plan marked. Linear up to one point, then logarithmic.",
    }


def _search_chart(place: int, layer: str, trials: Sequence[Row], row: Row | None) -> dict[str, Any]:
    chosen = [trial for trial in trials if trial["chosen"]]
    told = "; ".join(
        f"chosen p {words.number(trial['p'], 3)}, b {trial['bits']}: {words.size(trial['bytes'])}, error {words.percent(trial['error_percent'])}"
        for trial in chosen
    )
    reference = row["search_reference_error_percent"] if row else None
    return {
        "name": words.printable(layer.removesuffix(".weight")),
        "told": told or "no point was chosen",
        "svg": charts.search(f"search-{place}", layer, trials, reference if words.known(reference) else None),
    }
