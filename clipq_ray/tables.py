"""The schemas of a run's tables, and Parquet in and out.

`LAYERS` has one row per compressed layer, `TRIALS` one per evaluation of the search, `PREDICTIONS` one per test image, `MODELS` one per network of a fleet. Every column
carries its description and unit in the field's metadata, which Parquet keeps; TABLES.md beside this file lists them for readers, and
a test holds the two equal. The partition keys `model` and `run` stand in the path of a run, not in its files. Not covered: where the
files lie (`storage`) and reading many runs at once (`datasets.open_layers`).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipq_ray.errors import FormatError, brief


def _column(name: str, kind: Any, unit: str, description: str, *, null: bool = False) -> Any:
    return pa.field(name, kind, nullable=null, metadata={"unit": unit, "description": description})


_WEIGHT_NAME = "name of the layer's weight in the network's state dict"
_RATE = "pruning rate: the fraction of the weights of each sign that is clipped to zero"
_BITS = "bit width b: at most 2^b levels, zero included"

LAYERS: pa.Schema = pa.schema(
    [
        _column("index", pa.int32(), "", "position of the layer in the network, from 0"),
        _column("layer", pa.string(), "", _WEIGHT_NAME),
        _column(
            "group", pa.string(), "",
            "group of layers that share one p and one b (--groups); the layer's own name where it has its own; null in runs before groups", null=True,
        ),
        _column("kind", pa.string(), "", "conv, linear, attention or matmul"),
        _column("shape", pa.list_(pa.int64()), "", "shape of the weight"),
        _column("weights", pa.int64(), "weights", "number of weights"),
        _column("p", pa.float64(), "fraction", _RATE),
        _column("bits", pa.int32(), "bits", _BITS),
        _column("share_negative", pa.int32(), "intervals", "intervals on the negative side"),
        _column("share_positive", pa.int32(), "intervals", "intervals on the positive side"),
        _column("clip_negative", pa.float64(), "weight units", "magnitude up to which negative weights are zero"),
        _column("clip_positive", pa.float64(), "weight units", "magnitude up to which positive weights are zero"),
        _column("levels", pa.int32(), "levels", "values that weights of the packed layer may have, zero included"),
        _column("level_values", pa.list_(pa.float32()), "weight units", "those values, ascending"),
        _column("nonzeros", pa.int64(), "weights", "weights that are not zero"),
        _column("nonzero_percent", pa.float64(), "%", "non-zeros among the weights"),
        _column("bytes_before", pa.int64(), "bytes", "4 bytes x weights"),
        _column("bytes", pa.int64(), "bytes", "what the layer takes in model.clq: codes, model and levels, without the header"),
        _column("bits_per_weight", pa.float64(), "bits/weight", "8 x bytes / weights"),
        _column("entropy_bits_per_weight", pa.float64(), "bits/weight", "entropy of the codes without context, levels not counted"),
        _column("ratio", pa.float64(), "", "bytes_before / bytes"),
        _column("quantization_error_percent", pa.float64(), "%", "100 x |w - q| / |w| (Euclidean norms) after fine-tuning, before dead units are dropped and levels are stored"),
        _column("clipped_first", pa.int64(), "weights", "weights that were zero when the committed round of fine-tuning started"),
        _column("recovered", pa.int64(), "weights", "those of them that are not zero after it"),
        _column("state_changes", pa.int64(), "changes", "how often a weight went between zero and non-zero during it"),
        _column(
            "search_error_percent", pa.float64(), "%",
            "top-1 error on the search's images with this layer or its group compressed, untrained, and all else as it was searched (uncompressed, in a later search as in the round before), at the `p` that the search chose, which `--hold-size` moves; null if not searched", null=True,
        ),
        _column(
            "search_reference_error_percent", pa.float64(), "%",
            "top-1 error of the network that was searched (uncompressed, in a later search as in the round before) on the same images; null if not searched", null=True,
        ),
        _column("coder", pa.string(), "", "entropy model of the layer in model.clq"),
    ]
)  # fmt: skip
"""One row per compressed layer, in the order of the network."""

TRIALS: pa.Schema = pa.schema(
    [
        _column("layer", pa.string(), "", "what was compressed: a layer, or a group of them (column group of layers.parquet)"),
        _column(
            "round", pa.int32(), "",
            "round of fine-tuning, from 1, before which it was measured (--search-again; a second search of the given weights counts with the first); null in runs before that", null=True,
        ),
        _column("step", pa.int32(), "", "number of the evaluation within the layer or group, from 0"),
        _column(
            "origin", pa.string(), "", "start (fixed first points) or bayes (suggested by the optimiser)"
        ),
        _column("p", pa.float64(), "fraction", _RATE),
        _column("bits", pa.int32(), "bits", _BITS),
        _column("images", pa.int32(), "images", "training images that were evaluated"),
        _column(
            "bound", pa.bool_(), "",
            "whether the evaluation ended early because it could not win at this lambda: error and objective are then the least that they can be; null in runs before early ends", null=True,
        ),
        _column("error_percent", pa.float64(), "%", "top-1 error without training; before the first round with nothing else compressed, later with all else as in the round before"),
        _column("loss", pa.float64(), "nats", "mean cross-entropy of the same evaluation"),
        _column("bytes", pa.int64(), "bytes", "what the encoder writes for the layer or group"),
        _column(
            "saved_fraction", pa.float64(), "fraction", "bits saved on the layer or group over the bits of the network"
        ),
        _column(
            "tradeoff",
            pa.float64(),
            "",
            "lambda, with which the objective weighs saved_fraction against error",
        ),
        _column(
            "objective",
            pa.float64(),
            "",
            "error_percent / 100 - lambda x saved_fraction; the search minimises it",
        ),
        _column(
            "predicted_mean", pa.float64(), "",
            "objective that the model expected before the evaluation; null for start points", null=True,
        ),
        _column(
            "predicted_deviation", pa.float64(), "",
            "standard deviation of that expectation, without the noise of the images; null for start points", null=True,
        ),
        _column("chosen", pa.bool_(), "", "whether the plan took this point"),
        _column("seconds", pa.float64(), "s", "wall time of the evaluation"),
        _column("node", pa.string(), "", "host that evaluated it"),
    ]
)  # fmt: skip
"""One row per evaluation of the search."""

PREDICTIONS: pa.Schema = pa.schema(
    [
        _column(
            "index",
            pa.int64(),
            "",
            "position of the image among the test images, without those that could not be read, from 0",
        ),
        _column("label", pa.int32(), "", "true class"),
        _column(
            "original", pa.int32(), "", "class predicted by the given network, -1 where scores are no numbers"
        ),
        _column(
            "control",
            pa.int32(),
            "",
            "class predicted by the dense control; null if there is none",
            null=True,
        ),
        _column("compressed", pa.int32(), "", "class predicted by the decoded file"),
    ]
)
"""One row per test image."""

MODELS: pa.Schema = pa.schema(
    [
        _column("model", pa.string(), "", "name of the result in the storage, unique in the fleet"),
        _column("network", pa.string(), "", "the network's name: built-in, torchvision's, or package.module:function"),
        _column("status", pa.string(), "", "committed or failed"),
        _column("error", pa.string(), "", "why there is no run; null where there is one", null=True),
        _column("run", pa.string(), "", "id of the committed run: it lies in model={model}/run={run}", null=True),
        _column("reused", pa.bool_(), "", "whether it was committed before this submission", null=True),
        _column("promise", pa.string(), "", "what was promised, in words", null=True),
        _column("kept", pa.bool_(), "", "whether the file keeps it", null=True),
        _column("parameters", pa.int64(), "parameters", "parameters of the network, buffers not counted", null=True),
        _column("bytes_before", pa.int64(), "bytes", "4 bytes x all elements that inference reads", null=True),
        _column("bytes", pa.int64(), "bytes", "the whole packed file", null=True),
        _column("ratio", pa.float64(), "", "bytes_before / bytes", null=True),
        _column("split", pa.string(), "", "images that the next columns are measured on: test or validation", null=True),
        _column("images", pa.int64(), "images", "their number", null=True),
        _column("top1_before_percent", pa.float64(), "%", "top-1 of the given network", null=True),
        _column("top1_percent", pa.float64(), "%", "top-1 of the decoded file", null=True),
        _column(
            "drop_points", pa.float64(), "points", "top-1 lost against the reference on validation images, which the promise is about",
            null=True,
        ),
        _column("seconds", pa.float64(), "s", "the network's own stages together, without waiting for its turn", null=True),
    ]
)  # fmt: skip
"""One row per network of a fleet."""

SCHEMAS: dict[str, pa.Schema] = {
    "models": MODELS,
    "layers": LAYERS,
    "trials": TRIALS,
    "predictions": PREDICTIONS,
}


PARTITIONS: pa.Schema = pa.schema(
    [
        pa.field(
            "model", pa.string(), metadata={"unit": "", "description": "the run's model, from its path"}
        ),
        pa.field("run", pa.string(), metadata={"unit": "", "description": "the run's id, from its path"}),
    ]
)
"""The columns that come from a run's path and stand behind a table's own."""


def completed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table of an earlier version with the columns that it lacks and that may be null, as nulls."""
    for field in schema:
        if field.nullable and field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table


def to_bytes(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> bytes:
    """Rows as a Parquet file (zstd), the same bytes for the same rows and library.

    Every row has every column of the schema and no other; only columns said to be so may be None. Anything else is a `FormatError`,
    because pyarrow would drop or fill it in silence.
    """
    names = set(schema.names)
    required = [field.name for field in schema if not field.nullable]
    for number, row in enumerate(rows):
        if set(row) != names:
            raise FormatError(
                f"row {number}: expected the columns of the schema, {_difference(names, set(row))}"
            )
        if empty := [name for name in required if row[name] is None]:
            raise FormatError(f"row {number}: expected a value in {', '.join(empty)}, got none")
    try:
        table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise FormatError(f"expected values that fit the schema, got {brief(error, 200)}") from error
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def from_bytes(data: bytes, schema: pa.Schema | None = None) -> pa.Table:
    """The mirror of `to_bytes`; `FormatError` if the bytes are no Parquet file or have not the columns of `schema`, where it is given."""
    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise FormatError(
            f"expected a Parquet file, got {len(data)} bytes that cannot be read: {brief(error, 200)}"
        ) from error
    if schema is not None and not table.schema.equals(schema):
        have, want = set(table.schema.names), set(schema.names)
        what = _difference(want, have) if have != want else "got other types or another order"
        raise FormatError(
            f"expected the columns of the schema, {what}; was the table written by another version?"
        )
    return table


def _difference(expected: set[str], came: set[str]) -> str:
    parts = [("missing", expected - came), ("unknown", came - expected)]
    return "got " + " and ".join(f"{word} {', '.join(sorted(names))}" for word, names in parts if names)
