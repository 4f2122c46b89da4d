"""A whole run in one process, on the digits: what it leaves, what it repeats, what it refuses."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from manifest_fields import assert_described

import clipq_ray
from clipq_ray import codec, manifest, tables
from clipq_ray.batch import compress
from clipq_ray.cluster.engine import LocalEngine
from clipq_ray.config import make
from clipq_ray.data import open_data
from clipq_ray.errors import FormatError, UserError
from clipq_ray.evaluate import evaluate
from clipq_ray.pipeline import Result
from clipq_ray.plan import Theta
from clipq_ray.progress import Reporter
from clipq_ray.quantizer.reference import quantize
from clipq_ray.source import Source
from clipq_ray.states import read_state
from clipq_ray.storage import Store

ROOT = Path(__file__).parents[1]
QUICK: dict[str, Any] = {
    "engine": "local", "epochs": 2, "baseline_epochs": 2, "batch_size": 32, "search_evaluations": 4, "search_start": 3,
    "search_images": 100, "target_ratio": 15,
}  # fmt: skip


def run(storage: Path, **changes: Any) -> Result:
    return compress(
        Source(make(**{**QUICK, "storage": str(storage), **changes})), LocalEngine(), Reporter(quiet=True)
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    storage = tmp_path_factory.mktemp("storage")
    return storage, run(storage)


def test_a_run_is_committed_whole_and_verifies(finished: tuple[Path, Result]) -> None:
    _, result = finished
    assert set(result.manifest["files"]) >= {"model.clq", "layers.parquet", "trials.parquet", "report.html"}
    assert manifest.verify(Store(result.uri)) == []
    assert result.manifest["metrics"]["ratio"] > 10


def test_every_field_of_the_manifest_is_described(finished: tuple[Path, Result]) -> None:
    assert_described(finished[1].manifest, "A run")


def test_manifest_and_file_name_the_same_weights_where_the_job_trained_them(
    finished: tuple[Path, Result],
) -> None:
    file = Store(finished[1].uri).read("model.clq")
    named = finished[1].manifest["source_sha256"]
    assert re.fullmatch("[0-9a-f]{64}", named)
    assert named == codec.metadata(file)["source"]


def test_every_row_of_a_layer_is_that_layers_where_a_group_has_no_neighbours(
    finished: tuple[Path, Result],
) -> None:
    made = Store(run(finished[0], groups=("*1.weight",)).uri)
    layers, trials = (
        tables.from_bytes(made.read(name)).to_pylist() for name in ("layers.parquet", "trials.parquet")
    )
    chosen = {row["layer"]: (row["p"], row["bits"]) for row in trials if row["chosen"]}
    assert [row["layer"] for row in layers if row["group"] == "*1.weight"] == ["conv1.weight", "fc1.weight"]
    assert {row["layer"]: (row["p"], row["bits"]) for row in layers} == {row["layer"]: chosen[row["group"]] for row in layers}  # fmt: skip
    assert len(set(chosen.values())) > 1


def test_the_loaded_network_scores_what_the_job_reported(finished: tuple[Path, Result]) -> None:
    _, result = finished
    test = open_data("digits", input_shape=(1, 28, 28)).test
    assert test is not None
    scored = evaluate(clipq_ray.load(result.uri), test, batch_size=250)
    assert 100 * scored.top1 == result.manifest["metrics"]["test"]["compressed"]["top1_percent"]


def test_the_published_method_writes_its_operator_on_the_trained_weights_and_all_else_on_no_grid(
    tmp_path: Path,
) -> None:
    result = run(tmp_path, paper=True)
    metrics, stages = result.manifest["metrics"], result.manifest["stages"]
    assert [one["stage"] for one in stages] == ["baseline", "search", "finetune"]
    assert metrics["dead_units"] == 0
    trained = read_state(Store(tmp_path / "_stages" / f"finetune-{stages[-1]['key']}"))
    found = clipq_ray.load(result.uri).state_dict()
    assert found.keys() == trained.keys()
    layers = {
        one["layer"]: Theta(one["p"], one["bits"])
        for one in tables.from_bytes(Store(result.uri).read("layers.parquet")).to_pylist()
    }
    assert any(theta.p > 0 for theta in layers.values())
    for name, weight in trained.items():
        if name in layers:
            assert torch.equal(found[name], quantize(weight, layers[name]).values)
        else:  # float16 at the coarsest
            torch.testing.assert_close(found[name], weight, rtol=2**-11, atol=0)


def test_the_same_job_again_does_nothing(finished: tuple[Path, Result]) -> None:
    storage, result = finished
    again = run(storage)
    assert again.reused
    assert again.uri == result.uri


@pytest.mark.parametrize("damage", ["removed", "altered"])
def test_a_committed_run_that_is_damaged_is_refused_not_shown(
    damage: str, finished: tuple[Path, Result], tmp_path: Path
) -> None:
    storage, result = finished
    shutil.copytree(storage, tmp_path, dirs_exist_ok=True)
    place = tmp_path / Path(result.uri.removeprefix("file://")).relative_to(storage)
    if damage == "removed":
        (place / "model.clq").unlink()
    else:
        (place / "layers.parquet").write_bytes((place / "trials.parquet").read_bytes())
    with pytest.raises(
        FormatError, match=r"is damaged, and left as it is: .*(model\.clq|layers\.parquet).*--force"
    ):
        run(tmp_path)


def test_force_makes_a_second_run_with_the_same_bytes(finished: tuple[Path, Result]) -> None:
    storage, result = finished
    again = run(storage, force=True)
    assert again.uri.endswith("-2")
    assert again.manifest["files"]["model.clq"] == result.manifest["files"]["model.clq"]


def test_another_learning_rate_reuses_the_search(finished: tuple[Path, Result]) -> None:
    storage, _ = finished
    stages = {s["stage"]: s["reused"] for s in run(storage, learning_rate=0.01).manifest["stages"]}
    assert stages["search"]
    assert not stages["finetune"]


def test_errors_know_their_exit_code() -> None:
    assert UserError.exit_code == 2


def test_of_two_equal_jobs_at_once_the_slower_one_returns_the_others_run(
    finished: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clipq_ray import pipeline

    _, first = finished
    there = Path(first.uri.removeprefix("file://"))
    original = pipeline.results.files

    def other_job_commits_first(*given: Any) -> dict[str, bytes]:
        place = tmp_path / "model=lenet5" / there.name
        place.mkdir(parents=True, exist_ok=True)
        shutil.copytree(there, place, dirs_exist_ok=True)
        return original(*given)

    monkeypatch.setattr(pipeline.results, "files", other_job_commits_first)
    result = run(tmp_path)
    assert result.reused
    assert result.manifest["created_utc"] == first.manifest["created_utc"]
    assert manifest.verify(Store(result.uri)) == []
