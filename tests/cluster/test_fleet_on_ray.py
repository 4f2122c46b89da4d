"""A fleet on Ray: trainings overlap and change nothing; two jobs on the same run at the same time make it once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from job_process import ROOT, finished, processes, sha256, started
from ray.cluster_utils import Cluster

from clipq_ray import manifest
from clipq_ray.storage import Store

pytestmark = pytest.mark.slow

DEFAULTS: dict[str, Any] = {
    "epochs": 8, "baseline_epochs": 2, "batch_size": 32, "search_evaluations": 4, "search_start": 3, "search_images": 60,
    "target_ratio": 15, "rounds": 1,
}  # fmt: skip
MODELS = [{"model": "lenet5"}, {"model": "lenet_300_100"}]


def submission(folder: Path, *more: str, **changes: Any) -> list[str]:
    path = folder / "fleet.yaml"
    content = {"name": "night", "defaults": DEFAULTS, "models": MODELS, **changes}
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


@contextmanager
def in_use(address: str) -> Iterator[list[float]]:
    """CPUs that Ray has given away on a cluster, looked at again and again."""
    found: list[float] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.05):
            used = ray.cluster_resources().get("CPU", 0.0) - ray.available_resources().get("CPU", 0.0)
            found.append(round(used, 3))

    ray.init(address=address, log_to_driver=False)
    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield found
    finally:
        ended.set()
        looking.join()
        ray.shutdown()


def test_a_limit_holds_for_trials_and_trainings_together_and_priority_says_who_comes_first(
    tmp_path: Path,
) -> None:
    """With one CPU for all of it, whatever held something while it waits would stop the job."""
    changes = {
        "models": [
            {"model": "lenet5", "weights": "random"},
            {"model": "lenet_300_100", "weights": "random", "priority": 1},
        ],
        "limits": {"cpus": 1},
    }
    alone = finished(
        submission(tmp_path, "--engine=local", f"--storage={tmp_path / 'alone'}", **changes), tmp_path / "x"
    )
    assert alone.code == 0
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
    try:
        arguments = submission(tmp_path, f"--storage={tmp_path / 's'}", **changes)
        with (
            in_use(cluster.address) as used,
            started(arguments, tmp_path / "errors", RAY_ADDRESS=cluster.address) as job,
        ):
            assert job.wait().code == 0, (tmp_path / "errors").read_text()
    finally:
        cluster.shutdown()
    assert set(used) == {0, 1}
    lines = (tmp_path / "errors").read_text().splitlines()
    (first,) = (n for n, line in enumerate(lines) if "lenet_300_100: finetune: done" in line)
    (search,) = (n for n, line in enumerate(lines) if "search: done" in line)
    (second,) = (n for n, line in enumerate(lines) if "lenet5: finetune: done" in line)
    assert first < search < second
    assert hashes(tmp_path / "s") == hashes(tmp_path / "alone")


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
            assert "fleet: not written, since another job makes some of its runs" in left.lines
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
