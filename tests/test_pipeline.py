"""A whole run in one process, on the digits: what it leaves, what it repeats, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import clipq_ray
from clipq_ray import manifest, options
from clipq_ray.cluster.engine import LocalEngine
from clipq_ray.config import make
from clipq_ray.data import open_data
from clipq_ray.errors import ConfigError, UserError
from clipq_ray.evaluate import evaluate
from clipq_ray.pipeline import Result, compress
from clipq_ray.progress import Reporter
from clipq_ray.storage import Store
from clipq_ray.work import Source

ROOT = Path(__file__).parents[1]
QUICK: dict[str, Any] = {
    "engine": "local", "epochs": 2, "baseline_epochs": 2, "batch_size": 32, "search_evaluations": 4, "search_start": 3,
    "search_images": 100,
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


def test_the_loaded_network_scores_what_the_job_reported(finished: tuple[Path, Result]) -> None:
    _, result = finished
    test = open_data("digits", input_shape=(1, 28, 28)).test
    assert test is not None
    scored = evaluate(clipq_ray.load(result.uri), test, batch_size=250)
    assert 100 * scored.top1 == result.manifest["metrics"]["test"]["compressed"]["top1_percent"]


def test_the_same_job_again_does_nothing(finished: tuple[Path, Result]) -> None:
    storage, result = finished
    again = run(storage)
    assert again.reused
    assert again.uri == result.uri


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


class Tied(nn.Module):
    """A user's own network with tied weights and a layer that nothing reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.last = nn.Linear(16, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(torch.relu(self.second(torch.relu(self.first(images.flatten(1))))))
        return out


def test_a_users_own_module_and_loaders_are_compressed_from_python(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(200, 1, 4, 4)
    labels = images.flatten(1)[:, :4].argmax(1)
    model = Tied()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    loader = DataLoader(TensorDataset(images, labels), batch_size=20)
    result = clipq_ray.compress(model, loader, test_loader=loader, storage=str(tmp_path), quiet=True, **QUICK)
    loaded = clipq_ray.load(result.uri, factory=Tied)
    assert torch.equal(loaded.first.weight, loaded.second.weight)  # type: ignore[union-attr,arg-type]
    assert any("unused.weight" in note for note in result.manifest["notes"])
    assert any("tied" in note for note in result.manifest["notes"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "resnet51"], "nearest names"),
        (["--targetratio", "3"], "did you mean --target-ratio"),
        (["--target-ratio", "0.5"], "greater than 1"),
        (["--target-ratio", "3", "--tradeoff", "1"], "leave one out"),
        (["--data", "/nowhere/at/all", "--model", "resnet20"], "/nowhere/at/all"),
        (["--storage", "/proc/nothing"], "/proc/nothing"),
        (["--weights", "/nowhere.safetensors"], "/nowhere.safetensors"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], words: str, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "jobs" / "compress.py"),
        "--engine",
        "local",
        "--storage",
        str(tmp_path / "s"),
    ]
    ended = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=False)
    lines = [line for line in ended.stderr.splitlines() if line.startswith("compress:")]
    assert ended.returncode == 2
    assert len(lines) == 1
    assert words in lines[0]
    assert "Traceback" not in ended.stderr


def test_unknown_keys_of_a_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("epoch: 3\n")
    with pytest.raises(ConfigError, match="did you mean --epochs"):
        options.parse(["--config", str(path)], "")
    path.write_text("epochs: 3\nseed: 4\n")
    assert options.parse(["--config", str(path), "--seed", "5"], "").model_dump()["seed"] == 5


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "jobs" / "compress.py"),
        "--dry-run",
        "--storage",
        str(tmp_path / "s"),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "nothing was done" in ended.stdout
    assert not (tmp_path / "s").exists()


def test_importing_the_package_and_its_loader_needs_neither_ray_nor_training_code() -> None:
    code = (
        "import sys, json; sys.modules['ray'] = None; import clipq_ray; clipq_ray.load; "
        "print(json.dumps(sorted(m for m in sys.modules if m.startswith('clipq_ray'))))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    found = set(json.loads(ended.stdout))
    assert not found & {"clipq_ray.finetune", "clipq_ray.search", "clipq_ray.pipeline", "clipq_ray.cluster"}


def test_ray_is_imported_in_one_package_only() -> None:
    for path in [*ROOT.glob("clipq_ray/**/*.py"), *ROOT.glob("jobs/*.py")]:
        if path.parent.name != "cluster":
            lines = path.read_text().splitlines()
            assert not [line for line in lines if line.strip().startswith(("import ray", "from ray"))], path


def test_errors_know_their_exit_code() -> None:
    assert UserError.exit_code == 2


@pytest.mark.slow
def test_both_engines_give_the_same_bytes_at_one_worker(
    finished: tuple[Path, Result], tmp_path: Path
) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "compress.py"), "--storage", str(tmp_path)]
    for name, value in {**QUICK, "engine": "ray"}.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    subprocess.run(command, capture_output=True, text=True, timeout=400, check=True)
    (other,) = manifest.committed(Store(tmp_path))
    ours = finished[1].manifest["files"]["model.clq"]["sha256"]
    assert manifest.read_manifest(other.store)["files"]["model.clq"]["sha256"] == ours


def test_of_two_equal_jobs_at_once_the_slower_one_returns_the_others_run(
    finished: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

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
