"""A training that runs out of memory is retried once with half as many images at a time, then named. Allocations fail here because they really do."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from test_finetune import Killed, Network, network, trainer
from torch import Tensor

from clipq_ray import manifest
from clipq_ray.errors import RunError
from clipq_ray.memory import Attempts, most_that_fit, ran_out
from clipq_ray.storage import Store

sys.path.insert(0, str(Path(__file__).parent / "cluster"))

from job_process import Ended, started

HUNGRY = """
import resource
from torch import nn, empty

MIB = 2**20

class Hungry(nn.Sequential):
    # From the 40th step on, an image takes 64 MiB, and so much is there for three quarters of a batch.
    # The limit holds for this allocation only: what Ray's threads map between steps is not what is tested.
    steps = 0

    def forward(self, images):
        if self.training:
            self.steps += 1
        if self.training and self.steps >= 40:
            usual = resource.getrlimit(resource.RLIMIT_AS)
            used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + {room} * MIB, usual[1]))
            try:
                empty(len(images) * 64 * MIB // 4)
            finally:
                resource.setrlimit(resource.RLIMIT_AS, usual)
        return super().forward(images)

def net(num_classes=10):
    return Hungry(nn.Flatten(), nn.Linear(2352, 32), nn.ReLU(), nn.Linear(32, num_classes))
"""


def job(folder: Path, room: int, **changes: Any) -> Ended:
    """The end of a job whose network finds so many MiB for its steps; 32 images take 2,048."""
    (folder / "hungry.py").write_text(HUNGRY.replace("{room}", str(room)))
    root = Path(__file__).resolve().parents[1]
    given = {
        "storage": folder / "s", "model": "hungry:net", "weights": "random", "input_size": 28, "epochs": 3, "batch_size": 32, "control": "never",
        "search_evaluations": 4, "search_start": 3, "search_images": 60, "target_ratio": 5, "rounds": 1, "engine": "local", **changes,
    }  # fmt: skip
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    program = "import sys; from jobs.compress import main; from clipq_ray import console; sys.exit(console.run('compress', main))"
    arguments = [sys.executable, "-c", program, *words]
    with started(arguments, folder / "errors", PYTHONPATH=os.pathsep.join((str(root), str(folder)))) as job:
        return job.wait()


def attempts(folder: Path) -> Attempts:
    return Attempts(Store(folder), "finetune")


def test_an_allocation_that_fails_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**60)
    assert ran_out(failed.value)
    assert ran_out(MemoryError())
    assert ran_out(RuntimeError("CUDA error: out of memory"))  # of a driver, outside torch's allocator
    assert not ran_out(RuntimeError("sizes do not match"))


@pytest.mark.parametrize(
    ("images", "most", "room", "tried"),
    [
        (20, 20, 7, [20, 10, 5]),
        (6, 6, 2, [6, 3, 2]),
        (7, 7, 3, [7, 4, 3]),  # of 7 in twos one is left over
        (7, 7, 2, [7, 4, 3, 1]),
        (5, 5, 2, [5, 3, 1]),
        (3, 3, 2, [3, 1]),
        (6, 2, 2, [2]),
        (5, 2, 9, [1]),  # an attempt has found that more than two are too many
    ],
)
def test_images_that_do_not_fit_are_halved_but_into_no_part_of_a_single_one(
    images: int, most: int, room: int, tried: list[int]
) -> None:
    seen: list[int] = []

    def step(count: int) -> None:
        seen.append(count)
        if count > room:
            raise MemoryError

    assert most_that_fit(step, images, most) == tried[-1]
    assert seen == tried


@pytest.mark.parametrize(("images", "fewest"), [(5, 3), (4, 2)])
def test_where_the_fewest_images_for_batch_norm_do_not_fit_the_error_says_so(
    images: int, fewest: int
) -> None:
    def step(count: int) -> None:
        if count > 1:
            raise MemoryError
        raise ValueError("Expected more than 1 value per channel")

    with refused(RunError, match=rf"^{fewest} images at a time do not fit .* a single one is refused"):
        most_that_fit(step, images, images)
    with pytest.raises(ValueError, match="1 value"):  # a batch of one image is no lack of memory
        most_that_fit(step, 1, 1)


@pytest.mark.parametrize(
    "workers", [pytest.param(None, id="in one process"), pytest.param(2, id="on Ray", marks=pytest.mark.slow)]
)
def test_an_attempt_without_enough_memory_is_retried_with_half_as_many_images(
    tmp_path: Path, workers: int | None
) -> None:
    on_ray = {"engine": "ray", "workers": workers} if workers else {}
    share = 32 // (workers or 1)
    ended = job(tmp_path, 48 * share, **on_ray)
    assert ended.code in (0, 1), ended.lines  # random weights promise nothing
    said = f"finetune: out of memory with {share} images at a time; the next attempt takes half"
    assert workers or ended.lines[0] == said  # Ray's log has a worker's
    runs = list(manifest.committed(Store(tmp_path / "s")))
    assert len(runs) == 1, ended.lines
    notes = manifest.read_manifest(runs[0].store)["notes"]
    (note,) = [note for note in notes if f"micro-batches of {share // 2}" in note]
    assert "the bytes may be others than with more memory" in note


def test_an_attempt_that_is_ended_in_its_very_first_step_is_followed_by_a_smaller_one(tmp_path: Path) -> None:
    class Ended(Network):
        def forward(self, images: Tensor) -> Tensor:
            if len(images) > 2:
                raise Killed  # as the kernel ends a process
            return super().forward(images)

    with pytest.raises(Killed):
        trainer(tmp_path, network(Ended))
    attempts(tmp_path).heard("a worker was ended")
    assert attempts(tmp_path).most() == 10  # of batches of 20


def test_where_half_does_not_help_the_error_says_what_does(tmp_path: Path) -> None:
    ended = job(tmp_path, 512)
    assert ended.code == 1
    assert ended.lines[-1].startswith(
        "compress: finetune: out of memory with 16 images at a time on each worker, halved once; lower --batch-size"
    )


def test_an_attempt_that_the_kernel_ended_for_want_of_memory_is_followed_by_a_smaller_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = [7]
    monkeypatch.setattr("clipq_ray.memory._kills", lambda: kills[-1])
    attempts(tmp_path).begin(0, 32)
    assert attempts(tmp_path).most() is None  # ended by something else
    kills.append(8)
    assert attempts(tmp_path).most() == 16
    attempts(tmp_path).begin(0, 16)
    kills.append(9)
    with pytest.raises(RunError, match="out of memory with 16 images at a time on each worker, halved once"):
        attempts(tmp_path).most()
    assert attempts(tmp_path).most() == 16  # said once: another job may find more memory


def test_workers_that_run_out_together_halve_once(tmp_path: Path) -> None:
    first, second = attempts(tmp_path), attempts(tmp_path)
    first.begin(0, 16)
    assert "the next attempt takes half" in str(first.ask_for_less(16))
    second.begin(1, 16)  # the slower one may even begin behind the other's end
    assert "the next attempt takes half" in str(second.ask_for_less(16))
    assert attempts(tmp_path).most() == 8
    for rank, worker in enumerate((first, second)):
        worker.begin(rank, 8)
    with pytest.raises(RunError, match="out of memory with 8 images at a time on each worker, halved once"):
        second.ask_for_less(8)


def test_what_the_engine_hears_of_low_memory_counts_once(tmp_path: Path) -> None:
    for rank in range(2):
        attempts(tmp_path).begin(rank, 9)
    attempts(tmp_path).heard("a node was full")
    assert attempts(tmp_path).most() == 5
    attempts(tmp_path).begin(0, 5)
    attempts(tmp_path).heard("a node was full")  # of Ray Train too, which gave up behind its workers
    assert attempts(tmp_path).most() == 5


def test_low_memory_a_second_time_is_an_error_until_somebody_runs_it_again(tmp_path: Path) -> None:
    for number, images in enumerate((9, 5)):
        attempts(tmp_path).begin(0, images)
        attempts(tmp_path).heard(f"time {number}")
    with pytest.raises(
        RunError, match="finetune: out of memory with 5 images at a time on each worker, halved once"
    ):
        attempts(tmp_path).most()
    attempts(tmp_path).afresh()
    assert attempts(tmp_path).most() == 5


def test_an_attempt_that_came_to_its_end_leaves_no_doubt(tmp_path: Path) -> None:
    attempts(tmp_path).begin(0, 32)
    attempts(tmp_path).end(0)
    attempts(tmp_path).heard("a node was full")
    assert attempts(tmp_path).most() is None
