"""The table of `make bench-records` as Markdown: every row of every target with n, the median and all, and what made it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Units = Sequence[Mapping[str, Any]]
WORDS = {
    "ours": "the recipe",
    "paper": "`--paper`",
    "two-stage": "pruned first, quantized then",
    "uniform": "one (p, b) for all layers",
}
HEAD = "| | n | bytes | besides weights | test error, % | validation error, % | epochs | seconds | made by |\n|---|---|---|---|---|---|---|---|---|"
INTRODUCTION = """# Records
Written by `make bench-records` from `records-units/`, which hold every setting, plan, seed, time, version and machine. Bytes of whole files, and what of them is not weights: header, checksums, biases and batch norm; errors of the decoded file on test and on validation images, of which the latter chose between files; the median of n seeds, and
the least and the most of them. Epochs of all rounds that led to the file, with the levels behind them; seconds of the recipes, `--paper` and what lacks one lever are sums of epochs and evaluations, those of the other two are of the attempt that ended them. How each was made, and what it says: [docs/records.md](../../docs/records.md)."""


def spread(values: Sequence[float], form: str) -> str:
    """The median of `values` in the format `form` and, where they differ, the least and the most: `4,825 (4,797 to 4,834)`."""
    least, median, most = (format(one, form) for one in (min(values), statistics.median(values), max(values)))
    return median if least == most else f"{median} ({least} to {most})"


def bytes_of(units: Units) -> str:
    """Of the files."""
    return spread([one["bytes"] for one in units], ",.0f")


def besides_weights(units: Units) -> str:
    """Bytes of the files that are not a layer's weights."""
    return spread([one["besides_weights"] for one in units], ",.0f")


def errors_of(units: Units) -> str:
    """Of test images, in percent."""
    return spread([one["test_error_percent"] for one in units], ".2f")


def validation_errors_of(units: Units) -> str:
    """Of validation images, in percent."""
    return spread([100 - one["validation_top1_percent"] for one in units], ".2f")


def line(variant: str, units: Units) -> str:
    """One row of the table."""
    words = WORDS.get(variant) or f"the recipe without `--{variant.removeprefix('without-')}`"
    made = dict.fromkeys(
        f"{one['commit']} on {one['machine']['gpu'] or one['machine']['cpu']}" for one in units
    )
    cells = [
        words, str(len(units)), bytes_of(units), besides_weights(units), errors_of(units), validation_errors_of(units), spread([one["epochs"] for one in units], ".0f"),
        spread([one["seconds"] for one in units], ",.0f"), "; ".join(made),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def beside(sections: Mapping[str, Mapping[str, Units]]) -> str:
    """The overview that the README has too: test errors of the recipes and of what stands beside them, and the median size of their files, of the seeds that all of
    them have."""
    rows = [
        f"| test error, %, in bytes | n | epochs | {' | '.join(WORDS.values())} |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, variants in sections.items():
        seeds = [{one["seed"] for one in variants.get(variant, ())} for variant in WORDS]
        if common := set.intersection(*seeds):
            found = [[one for one in variants[variant] if one["seed"] in common] for variant in WORDS]
            cells = [
                f"{errors_of(units)} in {statistics.median(one['bytes'] for one in units):,.0f}"
                for units in found
            ]
            epochs = spread([one["epochs"] for one in found[0]], ".0f")
            rows.append(f"| `{title.partition(':')[0]}` | {len(common)} | {epochs} | {' | '.join(cells)} |")
    return "\n".join(rows)


def document(sections: Mapping[str, Mapping[str, Units]]) -> str:
    """The whole text; `sections` are the units of every variant by the title of what they were asked for."""
    parts = [INTRODUCTION, beside(sections)]
    for title, variants in sections.items():
        lines = [line(variant, units) for variant, units in variants.items()]
        parts.append("\n".join([f"## {title}", HEAD, *lines]))
    return "\n\n".join(parts) + "\n"
