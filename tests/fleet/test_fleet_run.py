"""A fleet in one process: every network is committed or named with the reason, and a second submission redoes nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from manifest_fields import assert_described

import clipq_ray
from clipq_ray import claims, cli, manifest, tables
from clipq_ray.data import open_data
from clipq_ray.storage import WORK, Store

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS: dict[str, Any] = {
    "engine": "local", "epochs": 1, "baseline_epochs": 2, "batch_size": 32, "search_evaluations": 4, "search_start": 3,
    "search_images": 60, "target_ratio": 20, "rounds": 1,
}  # fmt: skip


def fleet(folder: Path, models: list[dict[str, Any]], **more: Any) -> Path:
    path = folder / "fleet.yaml"
    content = {
        "name": "night",
        "defaults": {**DEFAULTS, "storage": str(folder / "s")},
        "models": models,
        **more,
    }
    path.write_text(yaml.safe_dump(content))
    return path


def submitted(
    path: Path, *more: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / "compress.py"), "--fleet", str(path), *more]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=path.parent,
        env={**os.environ, **(environment or {})},
    )


GOOD = [{"model": "lenet5"}, {"model": "lenet5", "name": "smaller", "target_ratio": 25}]
BROKEN = {"model": "lenet_300_100", "weights": "nowhere.safetensors"}


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("fleet")
    return folder, submitted(fleet(folder, [GOOD[0], BROKEN, GOOD[1]]))


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    table = tables.from_bytes((folder / "s" / "fleet=night" / "models.parquet").read_bytes())
    return {row["model"]: row for row in table.to_pylist()}


def test_one_that_fails_stops_no_other_and_is_named(
    night: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, ended = night
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    said = [line for line in ended.stderr.splitlines() if line.startswith("compress: ")]
    assert len(said) == 1
    assert said[0].startswith("compress: lenet_300_100: cannot read ")
    assert "nowhere.safetensors" in said[0]
    found = rows(folder)
    assert list(found) == ["lenet5", "lenet_300_100", "smaller"]
    assert [found[name]["status"] for name in found] == ["committed", "failed", "committed"]
    assert found["lenet_300_100"]["error"] == said[0].removeprefix("compress: lenet_300_100: ")
    assert found["smaller"]["bytes"] < found["lenet5"]["bytes"]


def test_the_fleets_row_is_what_the_run_says(night: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = night
    for name in ("lenet5", "smaller"):
        row = rows(folder)[name]
        store = Store(folder / "s").child(f"model={name}", f"run={row['run']}")
        metrics = manifest.read_manifest(store)["metrics"]
        assert (row["bytes"], row["ratio"]) == (metrics["bytes_after"], metrics["ratio"])
        assert row["top1_percent"] == metrics["test"]["compressed"]["top1_percent"]
        assert row["kept"] is True


def test_the_table_has_totals(night: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, ended = night
    found = [row for row in rows(folder).values() if row["status"] == "committed"]
    (line,) = (line for line in ended.stdout.splitlines() if "all 2" in line)
    assert f"{sum(row['bytes'] for row in found):,}" in line
    assert any(line.split() == ["lenet_300_100", "failed"] for line in ended.stdout.splitlines())
    stated = json.loads((folder / "s" / "fleet=night" / "manifest.json").read_text())
    page = (folder / "s" / "fleet=night" / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert all(word in page for word in ("lenet_300_100", "cannot read", "2 of 3", "smaller"))
    assert ended.stdout.splitlines()[-1] == "2 of 3 committed"
    assert stated["totals"]["bytes"] == sum(row["bytes"] for row in found)
    assert (stated["totals"]["committed"], stated["totals"]["failed"]) == (2, 1)


def test_networks_that_differ_behind_the_search_share_it(
    night: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = night
    assert len(list((folder / "s" / "_stages").glob("search-*"))) == 1
    assert len(list((folder / "s" / "_stages").glob("baseline-*"))) == 1
    assert len(list((folder / "s" / "_stages").glob("finetune-*"))) == 2


def test_a_second_submission_redoes_nothing_and_tries_what_failed(
    night: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = night
    before = {name: row["run"] for name, row in rows(folder).items()}
    written = {
        path: path.stat().st_mtime_ns for path in (folder / "s").glob("model=*/run=*/*") if path.is_file()
    }
    mended = {**BROKEN, "weights": "train"}
    ended = submitted(fleet(folder, [GOOD[0], mended, GOOD[1]]))
    assert (ended.returncode, [x for x in ended.stderr.splitlines() if x.startswith("compress")]) == (0, [])
    found = rows(folder)
    assert [row["reused"] for row in found.values()] == [True, False, True]
    assert all(found[name]["run"] == run for name, run in before.items() if run)
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())


def test_what_another_job_makes_is_waited_for_behind_everything_else_and_with_nothing_held(
    tmp_path: Path,
) -> None:
    """Two jobs that each held what the other one waited for would wait for ever."""
    path = fleet(tmp_path, [{**GOOD[0], "priority": 1}, GOOD[1]], limits={"trainings": 1})
    assert submitted(path).returncode == 0
    runs = {name: next((tmp_path / "s" / f"model={name}").glob("run=*")) for name in ("lenet5", "smaller")}
    for run in runs.values():
        shutil.rmtree(run)
    other = claims.claim(Store(runs["lenet5"]).child(WORK))
    assert isinstance(other, claims.Claim)
    command = [sys.executable, str(ROOT / "jobs" / "compress.py"), "--fleet", str(path)]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        try:
            deadline, work = time.monotonic() + 120, Store(runs["smaller"]).child(WORK)
            while not (runs["smaller"] / "manifest.json").exists() or claims.holder(work) is not None:
                assert time.monotonic() < deadline
                assert job.poll() is None
                time.sleep(0.1)
            assert not (runs["lenet5"] / "manifest.json").exists()
            other.give_back()
            said, _ = job.communicate(timeout=120)
        finally:
            job.kill()
    assert job.returncode == 0, said
    assert "the other networks of this job come first" in said
    assert (runs["lenet5"] / "manifest.json").exists()
    assert claims.holder(Store(runs["lenet5"]).child(WORK)) is None


def test_verify_checks_a_fleet_and_the_runs_that_it_names(
    night: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = night
    place = str(folder / "s" / "fleet=night")
    assert cli.main(["verify", place]) == 0
    assert "fleet=night: ok" in capsys.readouterr().out
    row = rows(folder)["lenet5"]
    stated = folder / "s" / "model=lenet5" / f"run={row['run']}" / "manifest.json"
    content = stated.read_bytes()
    table = folder / "s" / "fleet=night" / "models.parquet"
    whole = table.read_bytes()
    stated.unlink()
    table.write_bytes(whole[:-1])
    try:
        assert cli.main(["verify", place]) == 2
        said = capsys.readouterr().out
        assert f"expected run {row['run']} of lenet5 to be committed" in said
        assert f"expected {len(whole)} bytes, got {len(whole) - 1}" in said
    finally:
        stated.write_bytes(content)
        table.write_bytes(whole)
    assert cli.main(["verify", str(folder / "s")]) == 0


def test_mistakes_in_a_fleet_are_one_line_before_anything_is_written(tmp_path: Path) -> None:
    path = fleet(tmp_path, [{"model": "lenet5", "epoch": 3}, {"model": "lenet5", "name": "x", "seed": -1}])
    ended = submitted(path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert len(ended.stderr.splitlines()) == 1
    assert "2 mistakes" in ended.stderr
    assert not (tmp_path / "s").exists()
    both = submitted(fleet(tmp_path, GOOD), "--model", "lenet5")
    assert (both.returncode, both.stderr) == (
        2, "compress: --fleet: expected its file to name the networks, got --model as well; leave one out\n",
    )  # fmt: skip


def test_an_ensemble_is_scored_by_averaged_probabilities_of_the_decoded_files(
    night: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = night
    vote = [{"name": "vote", "members": ["lenet5", "smaller"]}]
    ended = submitted(fleet(folder, GOOD, ensembles=vote))
    assert ended.returncode == 0
    stated = json.loads((folder / "s" / "fleet=night" / "manifest.json").read_text())
    assert_described(stated, "A fleet")
    (told,) = stated["ensembles"]
    assert any(line.startswith("ensemble vote (lenet5, smaller): ") for line in ended.stdout.splitlines())
    test = open_data("digits", input_shape=(1, 28, 28)).test
    assert test is not None
    images, labels = test.batch(torch.arange(len(test)), None)
    votes = torch.zeros(len(test), 10, dtype=torch.float64)
    for name in ("lenet5", "smaller"):
        network = clipq_ray.load(f"{folder / 's'}/model={name}/run={rows(folder)[name]['run']}")
        with torch.inference_mode():
            votes += torch.softmax(network(images).double(), dim=1)
    assert told["top1_percent"] == pytest.approx(100 * float((votes.argmax(dim=1) == labels).double().mean()))
    assert told["images"] == len(test)
    assert told["bytes"] == sum(rows(folder)[name]["bytes"] for name in ("lenet5", "smaller"))
    # both have the same original, so its vote is its own
    assert told["top1_before_percent"] == pytest.approx(rows(folder)["lenet5"]["top1_before_percent"])


def test_an_ensemble_whose_member_failed_is_not_scored(tmp_path: Path) -> None:
    vote = [{"name": "vote", "members": ["lenet_300_100", "lenet5"]}]
    ended = submitted(fleet(tmp_path, [BROKEN, {"model": "lenet5", "weights": "nowhere.pt"}], ensembles=vote))
    assert ended.returncode == 2  # nothing could be made, by mistakes in the input
    assert "ensemble vote: not scored, lenet_300_100, lenet5 failed" in ended.stdout


def test_what_nobody_expected_stops_no_other_and_networks_with_equal_weights_are_searched_apart(
    tmp_path: Path,
) -> None:
    (tmp_path / "own.py").write_text(
        "import torch\nfrom torch import nn\n\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, kind, **_):\n"
        "        super().__init__()\n"
        "        self.kind, self.first, self.end = kind, nn.Linear(784, 12), nn.Linear(12, 10)\n"
        "    def forward(self, x):\n"
        "        if self.kind == 'broken' and self.training and len(x) > 2:\n"
        "            raise KeyError('nobody expected this')\n"
        "        if self.kind == 'picky' and len(self.first.weight.unique()) < 300:\n"
        "            raise KeyError('nor that: a layer with few levels, as a search tries them')\n"
        "        h = self.first(x.mean(dim=1).flatten(1))\n"
        "        return self.end(h.relu() if self.kind == 'relu' else h.abs())\n\n"
        "def net(kind, **more):\n    torch.manual_seed(0)\n    return Net(kind)\n"
    )
    models = [
        {
            "model": "own:net",
            "name": kind,
            "model_args": {"kind": kind},
            "input_size": 28,
            "weights": "random",
        }
        for kind in ("relu", "picky", "broken", "abs")
    ]
    ended = submitted(fleet(tmp_path, models), environment={"PYTHONPATH": str(tmp_path)})
    assert ended.returncode == 1
    found = rows(tmp_path)
    assert {kind: row["status"] for kind, row in found.items()} == {
        "relu": "committed", "picky": "failed", "broken": "failed", "abs": "committed",
    }  # fmt: skip
    for kind in ("picky", "broken"):
        assert "unexpected KeyError" in found[kind]["error"]
        assert f"{kind}: failed: unexpected KeyError" in ended.stderr  # at once, not only at the end
    assert len(list((tmp_path / "s" / "_stages").glob("search-*/done.json"))) == 3


def test_what_a_fleet_would_do_has_totals_and_says_what_is_committed(
    night: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = night
    ended = submitted(fleet(folder, [GOOD[0], {"model": "lenet5", "name": "new", "seed": 1}]), "--dry-run")
    assert ended.returncode == 0, ended.stderr
    assert "network     lenet5: run r-" in ended.stdout
    assert "network     new (lenet5): 61,706 parameters" in ended.stdout
    assert "all 2      1 committed already, 1 to make: about " in ended.stdout
    assert not (folder / "s" / "model=new").exists()


def test_in_what_a_fleet_would_do_members_of_one_intent_are_not_made_without_each_other(
    tmp_path: Path,
) -> None:
    vote = [{"name": "vote", "members": ["lenet_300_100", "lenet5"], "max_drop": 1.0}]
    other = {"model": "lenet5", "name": "other"}
    defaults = {name: value for name, value in DEFAULTS.items() if name != "target_ratio"}
    defaults["storage"] = str(tmp_path / "s")
    ended = submitted(
        fleet(tmp_path, [BROKEN, GOOD[0], other], ensembles=vote, defaults=defaults), "--dry-run"
    )
    assert (ended.returncode, ended.stderr) == (2, "")
    assert "network     lenet_300_100 cannot be made: cannot read " in ended.stdout
    assert "network     lenet5 cannot be made: its ensemble vote has one intent" in ended.stdout
    assert "network     other (lenet5): 61,706 parameters" in ended.stdout
    assert "all 3      0 committed already, 2 that cannot be made, 1 to make: about " in ended.stdout


def test_in_what_a_fleet_would_do_a_network_that_cannot_be_made_hides_no_other(tmp_path: Path) -> None:
    ended = submitted(fleet(tmp_path, [BROKEN, GOOD[0]]), "--dry-run")
    assert (ended.returncode, ended.stderr) == (2, "")
    assert "network     lenet_300_100 cannot be made: cannot read " in ended.stdout
    assert "network     lenet5: 61,706 parameters" in ended.stdout
    assert "all 2      0 committed already, 1 that cannot be made, 1 to make: about " in ended.stdout
    assert list(tmp_path.iterdir()) == [tmp_path / "fleet.yaml"]
