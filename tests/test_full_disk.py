"""A file system that is full ends a run by name and loses nothing; with more space it goes on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clipq_ray import manifest
from clipq_ray.batch import compress
from clipq_ray.cluster.engine import LocalEngine
from clipq_ray.config import make
from clipq_ray.errors import RunError, StorageError
from clipq_ray.pipeline import Result
from clipq_ray.progress import Reporter
from clipq_ray.source import Source
from clipq_ray.storage import Store

ROOT = Path(__file__).parents[1]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB: the weights and a search fit, the checkpoints of a training do not."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )  # fmt: skip
    if mounted.returncode:
        pytest.skip(f"a small file system needs root and mount: {mounted.stderr.strip() or os.geteuid()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def run(storage: Path) -> Result:
    options = {
        "engine": "local", "epochs": 2, "batch_size": 32, "search_evaluations": 4, "search_start": 3, "search_images": 60, "control": "never",
        "target_ratio": 15, "rounds": 1, "weights": "random"
    }  # fmt: skip
    return compress(Source(make(**options, storage=str(storage))), LocalEngine(), Reporter(quiet=True))


def test_a_full_disk_ends_the_run_by_name_and_with_more_space_it_goes_on(small: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        run(small)
    line = str(caught.value)
    assert caught.value.exit_code == 1
    said = re.fullmatch(
        rf"cannot write [\d,]+ bytes to {small}/model=lenet5/run=r-[0-9a-f]{{12}}/_work/finetune/[0-9a-f]{{16}}/(epoch-\d+\.safetensors): "
        rf"No space left on device, [\d,]+ bytes are free; free space there or choose another storage; "
        rf"what is finished is kept in {small}: the same command again goes on behind it",
        line,
    )
    assert said, line
    there = Store(small).names()
    assert not [name for name in there if name.endswith(("model.clq", said[1]))]
    assert not list(small.rglob(".clipq-*"))
    assert not [name for name in there if "/claim-" in name]

    subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
    result = run(small)
    assert manifest.verify(Store(result.uri)) == []
    reused = {one["stage"]: one["reused"] for one in result.manifest["stages"]}
    assert reused == {"baseline": True, "search": True, "finetune": False}
    undisturbed = run(tmp_path / "other")
    assert result.manifest["files"]["model.clq"] == undisturbed.manifest["files"]["model.clq"]


@pytest.mark.slow
def test_a_full_disk_ends_a_job_on_ray_by_the_same_words(small: Path) -> None:
    options = [
        "--epochs=2", "--batch-size=32", "--search-evaluations=4", "--search-start=3", "--search-images=60", "--control=never", "--target-ratio=15",
        "--rounds=1", "--weights=random", f"--storage={small}", "--model=lenet5",
    ]  # fmt: skip
    ended = subprocess.run([sys.executable, str(ROOT / "jobs" / "compress.py"), *options], capture_output=True, text=True, check=False, timeout=400)  # fmt: skip
    assert ended.returncode == 1
    said = re.search(
        r"cannot write [\d,]+ bytes to \S+/epoch-\d+\.safetensors: No space left on device.* what is finished is kept in",
        ended.stderr,
    )
    assert said, ended.stderr
    assert "begun again" not in ended.stderr


def test_a_disk_that_is_full_before_anything_starts_is_a_mistake_of_the_input(
    small: Path, tmp_path: Path
) -> None:
    size = os.statvfs(small)
    (small / "other").write_bytes(bytes(size.f_bavail * size.f_frsize))
    with pytest.raises(StorageError, match="No space left on device, 0 bytes are free") as caught:
        run(small)
    assert caught.value.exit_code == 2
