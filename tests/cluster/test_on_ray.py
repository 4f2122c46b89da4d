"""The Ray engine on this machine: two gloo workers, one that hangs in mid-training, interrupts, mistakes that only a worker finds. What is killed stands in `test_chaos`."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from job_process import command, committed, finished, processes, sha256, started
from safetensors.torch import save_file
from torch import Tensor

from clipq_ray.checkpoints import Checkpoints
from clipq_ray.errors import StorageError
from clipq_ray.storage import Store

pytestmark = pytest.mark.slow

EPOCHS = 12


@pytest.fixture(scope="module")
def weights(digits_weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LeNet-5 that knows the digits a little, so that no job has to train one first."""
    path = tmp_path_factory.mktemp("weights") / "lenet5.safetensors"
    save_file(digits_weights, path)
    return path


def train_workers(session: int) -> set[int]:
    return {process.pid for process in processes(session) if "RayTrainWorker" in process.title}


def both_workers(session: int) -> set[int]:
    """None where one has no title, as between two tasks."""
    found = train_workers(session)
    return found if len(found) == 2 else set()


def curve_so_far(storage: Path) -> list[dict[str, Any]]:
    """The rows of fine-tuning's last checkpoint, wall seconds included; empty before the third epoch's."""
    for place in storage.glob("model=*/run=*/_work/finetune/*"):
        try:
            last = Checkpoints(Store(place)).latest()
        except StorageError:  # removed while it was read: the next look finds its successor
            return []
        if last is not None and len(last[1]["curve"]) >= 3:
            rows: list[dict[str, Any]] = last[1]["curve"]
            return rows
    return []


def unfinished(storage: Path) -> bool:
    return not list(storage.glob("_stages/finetune-*/curve.json"))


@pytest.fixture(scope="module")
def temporary() -> Iterator[Path]:
    """A folder for temporary files, with a name that is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def undisturbed_storage(tmp_path_factory: pytest.TempPathFactory, weights: Path, temporary: Path) -> Path:
    """The storage of a job with two workers that nothing disturbs."""
    place = tmp_path_factory.mktemp("undisturbed")
    folders = {"TMPDIR": str(temporary), "RAY_TMPDIR": str(temporary)}
    ended = finished(command(place / "s", weights), place / "errors", **folders)
    assert ended == (0, [])
    return place / "s"


@pytest.fixture(scope="module")
def undisturbed(undisturbed_storage: Path) -> dict[str, Any]:
    """The manifest of that job."""
    return committed(undisturbed_storage)


def test_a_job_that_ended_well_leaves_no_file_in_temporary_folders(
    undisturbed_storage: Path, temporary: Path
) -> None:
    assert undisturbed_storage.exists()
    assert [path for path in temporary.rglob("*") if not path.is_dir()] == []


@pytest.fixture
def searched(undisturbed_storage: Path, tmp_path: Path) -> Path:
    """A storage in which the search of that job is finished and no training is begun."""
    shutil.copytree(
        undisturbed_storage / "_stages",
        tmp_path / "s" / "_stages",
        ignore=shutil.ignore_patterns("finetune-*"),
    )
    return tmp_path / "s"


def test_two_workers_end_with_a_committed_run(undisturbed: dict[str, Any]) -> None:
    assert undisturbed["config"]["workers"] == 2
    assert [row["epoch"] for row in undisturbed["curves"]["finetune"]] == list(range(1, EPOCHS + 1))
    assert undisturbed["metrics"]["test"]["compressed"]["top1_percent"] > 80


def test_a_worker_that_hangs_is_ended_and_the_training_goes_on_with_the_same_bytes(
    undisturbed: dict[str, Any], weights: Path, searched: Path, tmp_path: Path
) -> None:
    given = command(searched, weights, stall_minutes=0.25, max_failures=20)
    with started(given, tmp_path / "errors") as job:
        before = job.until(lambda: curve_so_far(searched))
        first = job.until(lambda: both_workers(job.session))
        os.kill(max(first), signal.SIGSTOP)  # the other one waits for it
        assert unfinished(searched)
        ended = job.wait()
    assert ended.code == 0
    assert ended.lines  # more than one where the machine is so busy that healthy workers stand still, too
    for line in ended.lines:
        assert line.startswith(
            "finetune made no step for 0.25 minutes (--stall-minutes); its workers are ended"
        )
    assert not first & {process.pid for process in processes(job.session)}
    after = committed(searched)
    assert sha256(after) == sha256(undisturbed)
    assert after["curves"]["finetune"][: len(before)] == before


@pytest.mark.parametrize(
    ("sign", "code", "word", "workers"),
    [(signal.SIGINT, 130, "interrupted", 2), (signal.SIGTERM, 143, "stopped", 1)],
)
def test_an_interrupted_training_says_so(
    weights: Path, searched: Path, tmp_path: Path, sign: signal.Signals, code: int, word: str, workers: int
) -> None:
    with started(command(searched, weights, workers=workers, epochs=1000), tmp_path / "errors") as job:
        job.until(lambda: curve_so_far(searched))
        os.kill(job.process.pid, sign)
        ended = job.wait()
    assert ended.code == code
    assert ended.lines[-1] == f"compress: {word}; run the same command again to continue"
    assert unfinished(searched)


def test_more_workers_than_the_machine_has_cpus_is_one_line_and_exit_code_2(
    weights: Path, tmp_path: Path
) -> None:
    workers = (os.cpu_count() or 1) + 1
    given = command(tmp_path / "s", weights, workers=workers)
    code, lines = finished(given, tmp_path / "errors")
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("compress: ")
    assert "--workers" in lines[0]
    assert str(workers) in lines[0]


def test_a_training_that_diverges_in_its_workers_is_one_line_that_names_the_option(
    weights: Path, searched: Path, tmp_path: Path
) -> None:
    groups: list[set[int]] = []
    with started(command(searched, weights, learning_rate=1e9), tmp_path / "errors") as job:
        while job.process.poll() is None:
            workers = train_workers(job.session)
            if len(workers) == 2 and workers not in groups:
                groups.append(workers)
            time.sleep(0.02)
        code, lines = job.wait()
    assert code == 1
    assert len(lines) == 1, lines
    assert lines[0].startswith("compress: finetune diverged in epoch 1 ")
    assert "lower --learning-rate (now 1e+09 in this training" in lines[0]
    assert not list(tmp_path.rglob("model.clq"))
    assert len(groups) <= 2, "a mistake that comes again was tried again and again"
