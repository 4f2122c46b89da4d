"""The tables: schema, documentation and Parquet agree."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from refusals import refused

from clipq_ray import tables
from clipq_ray.errors import FormatError

DOCUMENT = Path(tables.__file__).with_name("TABLES.md")


def prediction(**changes: Any) -> dict[str, Any]:
    return {"index": 0, "label": 3, "original": 3, "control": None, "compressed": 2, **changes}


def documented() -> dict[str, list[tuple[str, ...]]]:
    """TABLES.md's tables by name, rows as (column, type, null, unit, meaning)."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for name, body in re.findall(r"^## (\w+)\.parquet\n(.*?)(?=^## |\Z)", DOCUMENT.read_text(), re.M | re.S):
        rows = [
            line for line in body.splitlines() if line.startswith("| ") and not line.startswith("| column |")
        ]
        cells = [re.split(r"(?<!\\)\|", row)[1:-1] for row in rows]
        found[name] = [tuple(cell.strip().replace("\\|", "|") for cell in row) for row in cells]
    return found


def test_the_document_lists_every_column_with_type_unit_and_meaning() -> None:
    def row(field: Any) -> tuple[str, ...]:
        kind = re.sub(r"(item|element): ", "", str(field.type))
        unit, meaning = field.metadata[b"unit"].decode(), field.metadata[b"description"].decode()
        return (field.name, kind, "yes" if field.nullable else "", unit, meaning)

    assert documented() == {name: [row(field) for field in schema] for name, schema in tables.SCHEMAS.items()}


def test_every_column_has_a_meaning_and_every_unit_in_a_name_is_its_unit() -> None:
    for schema in tables.SCHEMAS.values():
        for field in schema:
            unit = field.metadata[b"unit"].decode()
            assert field.metadata[b"description"]
            assert not field.name.endswith("_percent") or unit == "%"
            assert not field.name.endswith("fraction") or unit == "fraction"
            assert not field.name.startswith("bytes") or unit == "bytes"


def test_rows_come_back_with_types_and_descriptions() -> None:
    rows = [prediction(), prediction(index=1, control=7)]
    table = tables.from_bytes(tables.to_bytes(rows, tables.PREDICTIONS), tables.PREDICTIONS)
    assert table.to_pylist() == rows
    assert table.schema.equals(tables.PREDICTIONS, check_metadata=True)


def test_numpy_values_and_no_rows_at_all_are_fine() -> None:
    rows = [prediction(index=np.int64(5), label=np.int32(1))]
    assert tables.from_bytes(tables.to_bytes(rows, tables.PREDICTIONS)).to_pylist()[0]["index"] == 5
    empty = tables.from_bytes(tables.to_bytes([], tables.TRIALS), tables.TRIALS)
    assert empty.num_rows == 0


def test_the_same_rows_give_the_same_bytes() -> None:
    rows = [prediction(index=one) for one in range(100)]
    assert tables.to_bytes(rows, tables.PREDICTIONS) == tables.to_bytes(rows, tables.PREDICTIONS)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (prediction(extra=1), "unknown extra"),
        ({"index": 0}, "missing compressed, control, label, original"),
        (prediction(label=None), "expected a value in label"),
        (prediction(label="seven"), "values that fit the schema"),
        (prediction(label=2**40), "values that fit the schema"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_by_name(row: dict[str, Any], says: str) -> None:
    with refused(FormatError, match=says):
        tables.to_bytes([row], tables.PREDICTIONS)


def test_every_truncation_is_a_named_error() -> None:
    data = tables.to_bytes([prediction()], tables.PREDICTIONS)
    for length in range(len(data)):
        with pytest.raises(FormatError):
            tables.from_bytes(data[:length])


def test_a_table_of_another_schema_is_refused_with_the_columns_that_differ() -> None:
    data = tables.to_bytes([prediction()], tables.PREDICTIONS)
    with pytest.raises(FormatError, match=r"missing .*layer.* and unknown compressed"):
        tables.from_bytes(data, tables.TRIALS)
    sink = io.BytesIO()
    other = pa.table({name: pa.array(["x"]) for name in tables.PREDICTIONS.names})
    pq.write_table(other, sink)
    with pytest.raises(FormatError, match="other types"):
        tables.from_bytes(sink.getvalue(), tables.PREDICTIONS)
