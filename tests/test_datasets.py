"""The tables of committed runs as datasets, and the queries of TABLES.md as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import pyarrow as pa
import pytest
from committed_runs import many_runs

from clipq_ray import datasets, tables
from clipq_ray.errors import StorageError
from clipq_ray.storage import Store

pytest_plugins = ["s3_server"]

EXPECTED = [("2024", "r-2", 100, 1.0), ("lenet5", "r-1", 200, 2.0)]


@pytest.fixture
def storage(storage_uri: str) -> Store:
    return Store(storage_uri)


def test_datasets_hold_the_rows_of_committed_runs_with_their_keys_as_text(storage: Store) -> None:
    many_runs(storage)
    layers = datasets.open_layers(storage.uri).to_table()
    assert layers.schema.names == [*tables.LAYERS.names, "model", "run"]
    assert layers.schema.field("model").type == pa.string()
    assert set(zip(layers["model"].to_pylist(), layers["run"].to_pylist(), strict=True)) == {
        ("2024", "r-2"),
        ("lenet5", "r-1"),
    }
    trials = datasets.open_trials(storage).to_table()
    assert trials["run"].to_pylist() == ["r-1", "r-1"]


def test_a_storage_without_runs_gives_no_rows_but_all_columns(tmp_path: Path) -> None:
    layers = datasets.open_layers(str(tmp_path)).to_table()
    assert layers.num_rows == 0
    assert layers.schema.names == [*tables.LAYERS.names, "model", "run"]


def test_a_storage_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no-such-place"):
        datasets.open_layers(str(tmp_path / "no-such-place"))


def blocks(language: str) -> list[str]:
    text = Path(tables.__file__).with_name("TABLES.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def rounded(rows: Any) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in rows]


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_the_documented_python_queries_give_the_committed_runs(
    storage: Store, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many_runs(storage)
    # The local storage is ./runs as in the document; elsewhere its URI takes the place of "runs".
    monkeypatch.chdir(tmp_path)
    code = (
        blocks("python")[number]
        if storage.local
        else blocks("python")[number].replace('"runs"', repr(storage.uri))
    )
    names: dict[str, Any] = {}
    exec(code, names)
    if "plan" in names:
        assert names["plan"] == [{"run": "r-1", "layer": "conv0.weight", "p": 0.5, "bits": 2}]
    else:
        assert rounded(names["result"]) == EXPECTED


def test_the_documented_sql_query_gives_the_committed_runs(
    storage: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many_runs(storage)
    monkeypatch.chdir(tmp_path)
    (query,) = blocks("sql")
    with duckdb.connect() as connection:
        if storage.local is None:
            connection.register_filesystem(fsspec.filesystem("s3", skip_instance_cache=True))
            query = query.replace("'runs/", f"'{storage.uri}/")
        assert rounded(connection.execute(query).fetchall()) == EXPECTED
