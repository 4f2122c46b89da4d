"""A fleet on Ray: trainings overlap and change nothing; two jobs on the same run at the same time make it once."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from job_process import ROOT, finished, processes, sha256, started

from clipq_ray import manifest
from clipq_ray.storage import Store

pytestmark = pytest.mark.slow

DEFAULTS: dict[str, Any] = {
    "epochs": 8, "baseline_epochs": 2, "batch_size": 32, "search_evaluations": 4, "search_start": 3, "search_images": 60,
    "target_ratio": 15, "rounds": 1,
}  # fmt: skip
MODELS = [{"model": "lenet5"}, {"model": "lenet_300_100"}]


def submission(folder: Path, *more: str, trainings: int = 2) -> list[str]:
    path = folder / "fleet.yaml"
    content = {"name": "night", "defaults": DEFAULTS, "limits": {"trainings": trainings}, "models": MODELS}
    path.write_text(yaml.safe_dump(content))
    return [sys.executable, str(ROOT / "jobs" / "compress.py"), f"--fleet={path}", *more]


def train_workers(session: int) -> set[int]:
    return {process.pid for process in processes(session) if "RayTrainWorker" in process.title}


def hashes(storage: Path) -> dict[str, str]:
    """SHA-256 of every committed network."""
    found = list(manifest.committed(Store(storage)))
    assert all(manifest.verify(run.store) == [] for run in found)
    return {run.model: sha256(manifest.read_manifest(run.store)) for run in found}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process without Ray makes, one network after the other."""
    folder = tmp_path_factory.mktemp("alone")
    ended = finished(submission(folder, "--engine=local", f"--storage={folder / 's'}"), folder / "errors")
    assert ended == (0, [f"fleet: {folder / 's' / 'fleet=night'}"])
    return hashes(folder / "s")


def test_trainings_overlap_and_change_nothing(alone: dict[str, str], tmp_path: Path) -> None:
    with started(submission(tmp_path, f"--storage={tmp_path / 's'}"), tmp_path / "errors") as job:
        job.until(lambda: len(train_workers(job.session)) == 2)
        ended = job.wait()
    assert ended == (0, [f"fleet: {tmp_path / 's' / 'fleet=night'}"])
    assert hashes(tmp_path / "s") == alone


def test_the_second_of_two_jobs_waits_and_takes_the_result_or_leaves(
    alone: dict[str, str], tmp_path: Path
) -> None:
    storage = tmp_path / "s"
    arguments = submission(tmp_path, f"--storage={storage}", "--engine=local")
    with started(arguments, tmp_path / "first") as first:
        first.until(lambda: list(storage.glob("model=lenet5/run=*/_work/claim-*")))
        with (
            started([*arguments, "--on-claim=leave"], tmp_path / "leaving") as leaving,
            started(arguments, tmp_path / "second") as second,
        ):
            second.until(lambda: "waiting for it" in (tmp_path / "second").read_text())
            left = leaving.wait()
            assert left.code == 1
            assert "is being made by another job" in "".join(left.lines)
            assert first.wait().code == 0
            assert second.wait().code == 0
    assert (tmp_path / "second").read_text().count("is committed already") == 2
    assert hashes(storage) == alone
    assert len(list(storage.glob("model=*/run=*"))) == 2


def test_the_claim_of_a_killed_job_holds_up_nobody(tmp_path: Path) -> None:
    storage = tmp_path / "s"
    arguments = submission(tmp_path, f"--storage={storage}", "--engine=local")
    with started(arguments, tmp_path / "first") as first:
        first.until(lambda: list(storage.glob("_stages/search-*/done.json")))
        os.kill(first.process.pid, signal.SIGKILL)
        first.process.wait()
    assert list(storage.glob("model=*/run=*/_work/claim-*"))
    assert finished(arguments, tmp_path / "again").code == 0
    assert "waiting" not in (tmp_path / "again").read_text()
