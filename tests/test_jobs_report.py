"""`jobs/report.py` makes a run's page again and leaves what is committed alone."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pytest

from clipq_ray import console, tables
from clipq_ray.manifest import commit
from clipq_ray.report import render
from clipq_ray.storage import LAYERS, PREDICTIONS, TRIALS, Store

ROOT = Path(__file__).resolve().parents[1]


def load(path: Path) -> ModuleType:
    """A file outside of the package as a module."""
    spec = importlib.util.spec_from_file_location(f"_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = load(ROOT / "tests/report/example_run.py")
job = load(ROOT / "jobs/report.py")


def content() -> tuple[dict[str, Any], pa.Table, pa.Table, pa.Table]:
    layers = example.layers(3)
    return example.manifest(layers), layers, example.trials(layers, 3), example.predictions(200)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A committed run; the working directory is an empty folder beside it."""
    manifest, layers, trials, predictions = content()
    folder = tmp_path / "runs" / "model=resnet20" / "run=r-0123456789ab"
    files = {
        LAYERS: tables.to_bytes(layers.to_pylist(), tables.LAYERS),
        TRIALS: tables.to_bytes(trials.to_pylist(), tables.TRIALS),
        PREDICTIONS: tables.to_bytes(predictions.to_pylist(), tables.PREDICTIONS),
    }
    commit(Store(str(folder)), files, {key: value for key, value in manifest.items() if key != "files"})
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


def state(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_page_goes_to_the_working_directory_by_default(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = state(run)
    assert job.main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == "report-resnet20-r-0123456789ab.html"
    page = Path("report-resnet20-r-0123456789ab.html").read_text(encoding="utf-8")
    manifest = job.read_manifest(Store(str(run)))
    assert page == render(manifest, *content()[1:])
    assert state(run) == before
    assert [path.name for path in Path.cwd().iterdir()] == ["report-resnet20-r-0123456789ab.html"]


def test_the_page_goes_where_output_says(run: Path, tmp_path: Path) -> None:
    assert job.main([str(run), "--output", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_a_run_without_search_and_predictions_has_a_page(tmp_path: Path) -> None:
    manifest, layers, _, _ = content()
    files = {LAYERS: tables.to_bytes(layers.to_pylist(), tables.LAYERS)}
    commit(
        Store(str(tmp_path / "run")), files, {key: value for key, value in manifest.items() if key != "files"}
    )
    page = job.make(str(tmp_path / "run"), tmp_path / "page.html").read_text(encoding="utf-8")
    assert "No search" in page
    assert "No predictions" in page


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert console.run("report", job.main, arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


def test_a_committed_run_is_never_written_to(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = state(run)
    assert "outside of a committed run" in refused([str(run), "--output", str(run / "report.html")], capsys)
    assert state(run) == before


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert str(tmp_path) in refused([str(tmp_path)], capsys)


def test_a_changed_table_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / LAYERS).write_bytes((run / TRIALS).read_bytes())
    assert LAYERS in refused([str(run)], capsys)
    assert list(Path.cwd().iterdir()) == []


def test_an_output_in_a_missing_folder_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "make the folder first" in refused([str(run), "--output", "missing/page.html"], capsys)
    assert "make the folder first" in refused([str(run), "--output", "s3://bucket/page.html"], capsys)
    assert list(Path.cwd().iterdir()) == []


def test_an_output_that_cannot_be_written_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("page.html").mkdir()
    assert "a file or nothing yet, got a directory" in refused([str(run), "--output", "page.html"], capsys)
    assert [path.name for path in Path.cwd().iterdir()] == ["page.html"]


@pytest.mark.parametrize("text", ['{"name": "extension"}', '["format", "files"]', "{", "[" * 100_000])
def test_a_folder_with_another_programs_manifest_is_written_to(run: Path, text: str) -> None:
    Path("manifest.json").write_text(text, encoding="utf-8")
    Path("page").mkdir()
    assert job.main([str(run), "--output", "page/page.html"]) == 0
    assert Path("page/page.html").is_file()


def test_an_output_in_a_loop_of_links_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    said = refused([str(run), "--output", str(tmp_path / "loop" / "x.html")], capsys)
    # from Python 3.13 on a loop is a path
    assert "expected a path as --output" in said or "make the folder first" in said


def test_help_names_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        job.main(["--help"])
    assert caught.value.code == 0
    assert "--output" in capsys.readouterr().out
    assert "jobs" not in sys.modules
