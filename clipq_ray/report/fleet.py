"""What the page of a fleet says: totals, a row per network, ensembles with their shares. Not covered: single runs (`page`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clipq_ray.report import words
from clipq_ray.report.page import filled
from clipq_ray.summary import ensemble_line

_HEAD = (
    "network", "bytes before", "bytes", "ratio", "top-1 before", "top-1", "images", "promise", "kept", "time", "run",
)  # fmt: skip


def page(manifest: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The whole page as HTML, from the fleet's manifest and the rows of its table."""
    done = [row for row in rows if row["status"] == "committed"]
    return filled(
        "fleet.html",
        {
            "fleet": words.printable(manifest["fleet"]),
            "created": manifest["created_utc"],
            "headline": _headline(manifest["totals"]),
            "networks": {"head": _HEAD, "rows": [_row(row) for row in done]},
            "failed": [
                [words.printable(row["model"]), words.printable(row["error"])] for row in rows if row["error"]
            ],
            "ensembles": [_ensemble(one) for one in manifest["ensembles"]],
            "versions": [list(row) for row in words.flat(manifest["versions"])],
        },
    )


def _headline(totals: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "label": "networks committed",
            "value": f"{words.count(totals['committed'])} of {words.count(totals['networks'])}",
            "more": f"{words.count(totals['promises_kept'])} of {words.count(totals['promises'])} promises kept",
        },
        {
            "label": "size of all files",
            "value": words.size(totals["bytes"]),
            "more": f"before {words.size(totals['bytes_before'])} ({words.count(totals['bytes_before'])} bytes)",
        },
        {"label": "ratio", "value": words.ratio(totals["ratio"]), "more": "of the committed ones together"},
    ]


def _row(row: Mapping[str, Any]) -> list[str]:
    kept = {True: "yes", False: "no", None: "-"}[row["kept"]]
    return [
        words.printable(row["model"]), words.count(row["bytes_before"]), words.count(row["bytes"]), words.ratio(row["ratio"]),
        words.percent(row["top1_before_percent"]), words.percent(row["top1_percent"]), f"{words.count(row['images'])} {row['split']}",
        words.printable(row["promise"] or "none"), kept, words.duration(row["seconds"]), words.printable(row["run"]),
    ]  # fmt: skip


def _ensemble(found: Mapping[str, Any]) -> dict[str, Any]:
    promise = found.get("promise")
    shares = promise["rounds"][promise["round"] - 1]["shares"] if promise else {}
    return {
        "name": words.printable(found["name"]),
        "lines": [words.printable(line.strip()) for line in ensemble_line(found).splitlines()],
        "shares": [
            [
                words.printable(name), words.count(share["requested_bytes"]), words.count(share["bytes"]),
                words.number(share["added_error_points"]),
            ]
            for name, share in shares.items()
        ],
    }  # fmt: skip
