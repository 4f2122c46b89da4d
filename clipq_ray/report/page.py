"""What the page says: the run's manifest and tables become headline, sections, tables and captions, and the template sets them.

Every function takes a part of the run and returns plain values for `template.html`, numbers already with their units. A part that is missing
becomes a sentence. Not covered: how charts look (`charts`), the layers and their search (`compression`), rounds and epochs (`training`), markup and style (template).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa

from clipq_ray import tables
from clipq_ray.errors import FormatError
from clipq_ray.report import charts, compression, svg, training, words
from clipq_ray.report.agreement import Agreement, Ints, compare, per_class
from clipq_ray.summary import promise_line

Json = Mapping[str, Any]

_REFERENCES = {
    "original": "the original network",
    "control": "the dense control (same network and images, trained without compression for the epochs of the first round and of those on the way to it)",
}
# All classes are drawn up to here; above, those that lost most and those that gained most.
_CLASSES_DRAWN, _LOST_DRAWN, _GAINED_DRAWN = 40, 25, 10


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def page(manifest: Json, layers: pa.Table, trials: pa.Table, predictions: pa.Table | None) -> str:
    """The whole page as HTML; arguments and errors as in `clipq_ray.report.render`."""
    layers, trials = tables.completed(layers, tables.LAYERS), tables.completed(trials, tables.TRIALS)
    _check(manifest, layers, trials, predictions)
    metrics = manifest["metrics"]
    rows = layers.sort_by("index").to_pylist()
    context = {
        "run": words.printable(manifest["run"]),
        "model": words.printable(manifest["model"]),
        "created": manifest.get("created_utc"),
        "headline": _headline(metrics),
        "verdict": _verdict(metrics, predictions),
        "promise": _sentence(promise_line(manifest["promise"])) if manifest.get("promise") else None,
        "accuracy": [
            _set(name, metrics.get(name), manifest.get("data") or {}) for name in ("test", "validation")
        ],
        "layers": compression.layer_section(rows, metrics),
        "search": compression.search_section(rows, trials.to_pylist(), manifest.get("search")),
        "finetune": training.section(manifest.get("curves") or {}, manifest.get("promise") or {}),
        "predictions": _predictions(manifest, predictions),
        "record": _record(manifest),
        "notes": [words.printable(note) for note in manifest.get("notes") or ()],
        "files": _files(manifest.get("files") or {}),
    }
    return filled("template.html", context)


def filled(template: str, context: Json) -> str:
    """A template of this package with these values."""
    folder = resources.files("clipq_ray.report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
    )  # fmt: skip
    return environment.get_template(template).render(context)


def _check(manifest: Json, layers: pa.Table, trials: pa.Table, predictions: pa.Table | None) -> None:
    """`FormatError` if something that the page cannot do without is missing."""
    metrics = manifest.get("metrics")
    sizes = ("parameters", "bytes_before", "bytes_after", "ratio")
    lacking = [key for key in ("run", "model", "metrics") if key not in manifest]
    lacking += [f"metrics.{key}" for key in sizes if isinstance(metrics, Mapping) and key not in metrics]
    for name, table, schema in (
        ("layers", layers, tables.LAYERS),
        ("trials", trials, tables.TRIALS),
        ("predictions", predictions, tables.PREDICTIONS),
    ):
        if table is not None:
            lacking += [f"{name}.{column}" for column in schema.names if column not in table.column_names]
    if lacking:
        raise FormatError(
            f"expected a run's manifest and tables, missing: {', '.join(lacking)}; run the job again"
        )


def _headline(metrics: Json) -> list[dict[str, str]]:
    """The four numbers on top of the page."""
    name, values = _measured(metrics)
    numbers = [
        {
            "label": "size of the file",
            "value": words.size(metrics["bytes_after"]),
            "more": f"{words.count(metrics['bytes_after'])} bytes; before {words.size(metrics['bytes_before'])} "
            f"({words.count(metrics['bytes_before'])} bytes, {words.count(metrics['parameters'])} parameters)",
        },
        {
            "label": "ratio",
            "value": words.ratio(metrics["ratio"]),
            "more": "float32 bytes of all that inference reads, over all bytes of the file",
        },
    ]
    if values is None:
        top1 = {"label": "top-1 accuracy", "value": words.NONE, "more": "neither test nor validation images"}
        return [*numbers, top1]
    compressed, reference = values["compressed"], _reference(metrics)
    against = values.get(reference) or {}
    return [
        *numbers,
        {
            "label": f"top-1 accuracy, compressed ({name})",
            "value": words.percent(compressed["top1_percent"]),
            "more": f"{_interval(compressed)}, 95 % interval; n{words.SPACE}={words.SPACE}{words.count(values['n'])}",
        },
        {
            "label": f"drop against the {reference}",
            "value": words.number(metrics.get("drop_points"), 2, "points"),
            "more": f"{reference} {words.percent(against.get('top1_percent'))} ({_interval(against)})",
        },
    ]


def _reference(metrics: Json) -> str:
    """`original` or `control`: what the drop is counted against."""
    return "control" if metrics.get("reference") == "control" else "original"


def _measured(metrics: Json) -> tuple[str, Json | None]:
    """The set that the headline rests on: test if there is one, else validation."""
    for name in ("test", "validation"):
        if metrics.get(name):
            return name, metrics[name]
    return "none", None


def _interval(scores: Json) -> str:
    return words.interval(scores.get("top1_low_percent"), scores.get("top1_high_percent"))


def _verdict(metrics: Json, predictions: pa.Table | None) -> list[str]:
    """Sentences: how much was lost, against what, and how sure that is."""
    name, values = _measured(metrics)
    if values is None:
        return ["Accuracy was not measured: the run has neither test nor validation images."]
    reference = _reference(metrics)
    drop = metrics.get("drop_points")
    told = []
    if words.known(drop):
        amount = words.number(abs(drop), 2, "percentage points")
        verb = "gains" if drop < 0 else "loses"
        told.append(
            f"On the {name} images the compressed network {verb} {amount} against {_REFERENCES[reference]}."
        )
    else:
        told.append("The drop was not measured.")
    told.append(_overlap(reference, values.get(reference) or {}, values["compressed"]))
    columns = {} if predictions is None or predictions.num_rows != values["n"] else _columns(predictions)
    if reference in columns:
        paired = compare(columns["label"], columns[reference], columns["compressed"])
        told.append(
            f"Image by image, {words.count(paired.lost)} were lost and {words.count(paired.won)} won; the paired 95 % interval of the "
            f"drop is {words.interval(*paired.drop_interval(), unit='points')}."
        )
    if metrics.get("batch_norm", "none") != "none":
        told.append(f"Batch-norm statistics: {words.printable(metrics['batch_norm'])}.")
    return told


def _overlap(reference: str, against: Json, compressed: Json) -> str:
    """Whether the intervals of the reference and of the compressed network share a point."""
    low, high = (against.get(f"top1_{end}_percent") for end in ("low", "high"))
    lowest, highest = (compressed.get(f"top1_{end}_percent") for end in ("low", "high"))
    if not (words.known(low) and words.known(high) and words.known(lowest) and words.known(highest)):
        return f"There are no intervals of the {reference} and the compressed network to compare."
    apart = low > highest or lowest > high
    return f"The two 95 % intervals {'do not overlap' if apart else 'overlap'}."


def _set(name: str, values: Json | None, data: Json) -> dict[str, Any]:
    """One table and figure: original, control and compressed on one set."""
    if not values:
        return {
            "name": name,
            "missing": f"No {name} images: the data has none, so nothing was measured on them.",
        }
    networks = [key for key in ("original", "control", "compressed") if values.get(key)]
    n = words.count(values["n"])
    drawn = [
        charts.Top1(
            key,
            svg.COLOURS[key],
            *(values[key][f"top1_{part}"] for part in ("percent", "low_percent", "high_percent")),
        )
        for key in networks
        if all(
            words.known(values[key].get(f"top1_{part}"))
            for part in ("percent", "low_percent", "high_percent")
        )
    ]
    remarks = [] if "control" in networks else ["No dense control was trained."]
    if name == "validation" and data.get("validation_held_out"):
        remarks.append(
            "These images were taken out of the training images: a network that was trained on all of them has seen them, so its own "
            "number here is no measure of it."
        )
    return {
        "name": name,
        "missing": None,
        "chart": charts.accuracy(f"accuracy-{name}", drawn) if drawn else None,
        "caption": f"Top-1 accuracy on the {name} images, n = {n}, with 95 % intervals. The axis does not start at zero.",
        "head": ["network", "top-1", "95 % interval", "top-5", "loss", "n"],
        "rows": [
            [
                key,
                words.percent(values[key].get("top1_percent")),
                _interval(values[key]),
                words.percent(values[key].get("top5_percent")),
                words.number(values[key].get("loss"), 4),
                n,
            ]
            for key in networks
        ],
        "remarks": remarks,
    }


def _columns(predictions: pa.Table) -> dict[str, Ints]:
    """The columns that are there as int64 (n,)."""
    return {
        name: predictions[name].to_numpy().astype(np.int64)
        for name in ("label", "original", "control", "compressed")
        if predictions[name].null_count == 0
    }


def _predictions(manifest: Json, predictions: pa.Table | None) -> dict[str, Any]:
    """Agreement with the original (and the control), and the classes by their drop."""
    if predictions is None or not predictions.num_rows:
        return {"missing": "No predictions: the run kept none, so classes and agreement cannot be told."}
    columns, n = _columns(predictions), predictions.num_rows
    name, values = _measured(manifest["metrics"])
    images = (
        f"{words.count(n)} {name} images"
        if values is not None and values["n"] == n
        else f"{words.count(n)} images"
    )
    agreements = {
        name: compare(columns["label"], columns[name], columns["compressed"])
        for name in ("original", "control")
        if name in columns
    }
    return {
        "missing": None,
        "images": images,
        "head": ["compared with", "same prediction", "both right", "lost", "won", "both wrong"],
        "rows": [_agreement_row(name, agreement) for name, agreement in agreements.items()],
        "classes": _classes(manifest, columns),
    }


def _agreement_row(name: str, agreement: Agreement) -> list[str]:
    counts = (agreement.both_right, agreement.lost, agreement.won, agreement.both_wrong)
    return [name, words.percent(agreement.same_percent), *map(words.count, counts)]


def _classes(manifest: Json, columns: dict[str, Ints]) -> dict[str, Any]:
    """Top-1 accuracy per class, original against compressed, the largest drop first."""
    names = (manifest.get("data") or {}).get("class_names") or ()
    rows = [
        (words.printable(names[index], 60) if index < len(names) else f"class {index}", agreement)
        for index, agreement in per_class(columns["label"], columns["original"], columns["compressed"])
    ]
    note = None
    shown = rows
    if len(rows) > _CLASSES_DRAWN:
        shown = rows[:_LOST_DRAWN] + rows[-_GAINED_DRAWN:]
        note = (
            f"Shown are the {_LOST_DRAWN} classes with the largest drop and the {_GAINED_DRAWN} with the smallest, of {len(rows)}; "
            "predictions.parquet has all. The ends of so long a list are partly chance: the table gives intervals."
        )
    smallest, largest = (pick(agreement.n for _, agreement in rows) for pick in (min, max))
    images = (
        words.count(smallest) if smallest == largest else f"{words.count(smallest)} to {words.count(largest)}"
    )
    return {
        "chart": charts.classes(
            [(name, row.reference_percent, row.compressed_percent) for name, row in shown]
        ),
        "note": note,
        "step": f"A class has {images} images; in the smallest, one image is {words.number(100 / smallest, 2, 'points')}.",
        "head": [
            "class",
            "n",
            "original",
            "compressed",
            "drop, points",
            "95 % interval (paired)",
            "lost",
            "won",
        ],
        "rows": [
            [
                name,
                words.count(row.n),
                words.percent(row.reference_percent),
                words.percent(row.compressed_percent),
                words.number(row.drop_points),
                words.interval(*row.drop_interval(), unit=""),
                words.count(row.lost),
                words.count(row.won),
            ]
            for name, row in shown
        ],
    }


def _record(manifest: Json) -> list[dict[str, Any]]:
    """How it was made: two-column tables of configuration, versions, network, data, and the stages."""
    parts = [
        ("Configuration", "config"),
        ("Versions", "versions"),
        ("Network", "architecture"),
        ("Data", "data"),
    ]
    record: list[dict[str, Any]] = []
    for title, key in parts:
        content = manifest.get(key) or {}
        rows = [list(row) for row in words.flat(content)] if content else []
        record.append({"title": title, "head": ["name", "value"], "rows": rows, "plain": True})
    stages = [
        [
            words.printable(stage.get("stage")),
            words.duration(stage.get("seconds")),
            "was there already" if stage.get("reused") else "run",
            words.printable(stage.get("key")),
        ]
        for stage in manifest.get("stages") or ()
    ]
    record.append({"title": "Stages", "head": ["stage", "time", "how", "key"], "rows": stages, "plain": True})
    return record


def _files(files: Mapping[str, Json]) -> list[list[str]]:
    """Name, bytes and SHA-256 of every file but this page, whose hash cannot stand in itself."""
    return [
        [words.printable(name), words.count(entry.get("bytes")), words.printable(entry.get("sha256"))]
        for name, entry in sorted(files.items())
        if name != "report.html"
    ]
