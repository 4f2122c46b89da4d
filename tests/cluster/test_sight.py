"""A storage that not all nodes of a cluster see is refused before anything runs; nodes are raylets on this machine, one with a mount of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from refusals import refused

from clipq_ray.cluster import sight
from clipq_ray.cluster.on_ray import RayEngine
from clipq_ray.errors import StorageError
from clipq_ray.storage import Store

pytestmark = pytest.mark.slow
START_LIMIT_SECONDS = 90.0


def read_only(folder: Path) -> Path:
    return folder.with_name("read-only")


def alive() -> int:
    return sum(node["Alive"] for node in ray.nodes())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that two nodes of a cluster see as it is, and a third one as an empty one of its own; beside it one that the third may only read."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("a node with a mount of its own needs `unshare -m`, which is not allowed here")
    folder = tmp_path_factory.mktemp("seen")
    read_only(folder).mkdir()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    cluster.add_node(num_cpus=1)
    other = None
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        read = read_only(folder)
        start = (
            f"mount -t tmpfs -o size=1m tmpfs {folder} && mount --bind {read} {read} && mount -o remount,bind,ro {read} "
            f"&& exec {sys.executable} -m ray.scripts.scripts start"
        )
        other = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", f"{start} --address={cluster.address} --num-cpus=1 --block"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        )  # fmt: skip
        limit = time.monotonic() + START_LIMIT_SECONDS
        while alive() < 3:
            assert other.poll() is None, "the node ended"
            assert time.monotonic() < limit, "the node did not join"
            time.sleep(0.1)
        yield folder
    finally:
        ray.shutdown()
        if other is not None:
            other.terminate()
            try:
                other.wait(30)
            except subprocess.TimeoutExpired:
                other.kill()
                other.wait()
        cluster.shutdown()


def test_a_folder_that_one_node_has_for_itself_is_refused_with_the_node(place: Path) -> None:
    with (
        refused(StorageError, match="use object storage or a folder that all nodes mount") as caught,
        RayEngine() as engine,
    ):
        engine.reaches(Store(place / "runs"))
    line = str(caught.value)
    assert "expected a --storage that all 3 nodes see and may write to, but node " in line
    assert f"cannot read {place}/runs/.clipq-probe-" in line
    assert list((place / "runs").iterdir()) == []


def test_a_folder_that_one_node_may_only_read_is_refused_with_the_node(place: Path) -> None:
    with (
        refused(StorageError, match="use object storage or a folder that all nodes mount") as caught,
        RayEngine() as engine,
    ):
        engine.reaches(Store(read_only(place)))
    line = str(caught.value)
    assert "expected a --storage that all 3 nodes see and may write to, but node " in line
    assert f"cannot write to {read_only(place)}: Read-only file system" in line
    assert list(read_only(place).iterdir()) == []


def test_a_folder_that_all_nodes_have_is_taken_and_keeps_nothing(place: Path, tmp_path: Path) -> None:
    with RayEngine() as engine:
        engine.reaches(Store(tmp_path / "runs"))
    assert list((tmp_path / "runs").iterdir()) == []


def test_who_does_not_answer_in_time_is_passed_over(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sight, "LIMIT_SECONDS", 0.0)
    sight.check(Store(tmp_path))
    assert caplog.text.count("did not say within 0 s whether it sees") == 2
