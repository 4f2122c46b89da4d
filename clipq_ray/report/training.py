"""The report's section on training: the rounds that led to the file, and loss and accuracy by epoch.

Not covered: accuracy of the file (`page`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipq_ray.report import charts, svg, words

Json = Mapping[str, Any]
_CURVES = {"compressed": "finetune", "its levels": "levels", "control": "control"}
"""The lines of a curve, and what the manifest calls them."""
ROUNDS_HEAD = [
    "round",
    "asked for, bytes",
    "bytes",
    "validation drop, points",
    "95 % interval",
    "epochs by then",
    "the file",
]


def section(curves: Json, promise: Json) -> dict[str, Any]:
    """The rounds where there are several; loss and validation accuracy per epoch of the one that is the file, behind it that of levels and codes trained while clips
    stay, and the control's, where there are such."""
    runs = {name: curves.get(key) or [] for name, key in _CURVES.items()}
    remarks = []
    if not runs["compressed"]:
        remarks.append("No fine-tuning: the run has no epochs.")
    if not runs["control"]:
        remarks.append("No dense control was trained.")
    told = [
        f"{name}: {_epochs(rows)}, {words.duration(sum(row.get('seconds') or 0.0 for row in rows))}"
        for name, rows in runs.items()
        if rows
    ]
    drawn = []
    for key, label in (("loss", "training loss"), ("validation_top1_percent", "validation top-1, %")):
        if series := _series(runs, key):
            drawn.append(charts.curve(f"curve-{key.replace('_', '-')}", label, series))
        elif any(runs.values()):
            remarks.append(f"The {label.removesuffix(', %')} per epoch was not measured.")
    rounds = _rounds(promise)
    if rounds:
        remarks.append(
            f"The file is that of round {promise.get('round')}: each round went on from the weights of the one before, and the curves show that round alone."
        )
    return {
        "charts": drawn,
        "told": "; ".join(told),
        "remarks": remarks,
        "head": ROUNDS_HEAD,
        "rounds": rounds,
    }


def _epochs(rows: list[Any]) -> str:
    return "1 epoch" if len(rows) == 1 else f"{len(rows)} epochs"


def _series(runs: Mapping[str, list[Json]], key: str) -> list[charts.Series]:
    """A line for each training in which `key` was measured."""
    behind = len(runs["compressed"])
    return [
        charts.Series(
            name,
            svg.COLOURS.get(name, svg.MUTED),
            name == "control",
            [(behind if name == "its levels" else 0) + epoch for epoch in range(1, len(rows) + 1)],
            [row.get(key) for row in rows],
        )
        for name, rows in runs.items()
        if any(words.known(row.get(key)) for row in rows)
    ]


def _rounds(promise: Json) -> list[list[str]]:
    """A row for each round, where there are several."""
    rounds = promise.get("rounds") or []
    if len(rounds) < 2:
        return []
    return [
        [
            str(number),
            words.count(one.get("requested_bytes")),
            words.count(one.get("bytes")),
            words.signed(one.get("drop_points")),
            words.interval(one.get("drop_low_points"), one.get("drop_high_points"), unit=""),
            words.count(one.get("epochs")),
            "yes" if number == promise.get("round") else "",
        ]
        for number, one in enumerate(rounds, 1)
    ]
