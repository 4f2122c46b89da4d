"""A fleet on Ray: trainings overlap and change nothing, every line and metric says whose it is, limits hold; two jobs on the same run at the same time
make it once."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from data_files import parquet, png, write
from job_process import ROOT, Process, children, finished, output_of, sha256, started
from ray.cluster_utils import Cluster

from clipq_ray import manifest, tables
from clipq_ray.storage import TRIALS, Store

pytestmark = pytest.mark.slow

DEFAULTS: dict[str, Any] = {
    "epochs": 3, "baseline_epochs": 1, "batch_size": 32, "search_evaluations": 4, "search_start": 3, "search_images": 60,
    "target_ratio": 15, "rounds": 1, "bad_image_limit": 1,
}  # fmt: skip
MODELS = [{"model": "lenet5"}, {"model": "lenet_300_100"}]
NAMES = {"lenet5", "lenet_300_100"}


def submission(folder: Path, *more: str, data: str = "digits", **changes: Any) -> list[str]:
    path = folder / "fleet.yaml"
    content = {"name": "night", "defaults": {**DEFAULTS, "data": data}, "models": MODELS, **changes}
    path.write_text(yaml.safe_dump(content))
    return [sys.executable, str(ROOT / "jobs" / "compress.py"), f"--fleet={path}", *more]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One node with three CPUs; jobs come and go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
    try:
        yield made
    finally:
        made.shutdown()


def committed(storage: Path) -> list[manifest.CommittedRun]:
    return list(manifest.committed(Store(storage)))


def hashes(storage: Path) -> dict[str, str]:
    """SHA-256 of every committed network."""
    found = committed(storage)
    assert all(manifest.verify(run.store) == [] for run in found)
    return {run.model: sha256(manifest.read_manifest(run.store)) for run in found}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Data of which every process that opens them has something to say: one image cannot be read."""
    made: list[bytes | None] = [png(number, (28, 28), "L") for number in range(1400)]
    made[7] = b"no image"
    labels = [number % 256 // 64 for number in range(1400)]
    return write(tmp_path_factory.mktemp("data"), {"train.parquet": parquet(made, labels, (), rows=200)})


@pytest.fixture(scope="module")
def alone(images: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process without Ray makes, one network after the other."""
    folder = tmp_path_factory.mktemp("alone")
    arguments = submission(folder, "--engine=local", f"--storage={folder / 's'}", data=images)
    ended = finished(arguments, folder / "errors")
    assert ended.code == 0
    assert ended.lines[-1] == f"fleet: {folder / 's' / 'fleet=night'}"
    return hashes(folder / "s")


def test_trainings_overlap_and_change_nothing_and_every_line_and_metric_says_whose_it_is(
    alone: dict[str, str], images: str, cluster: Cluster, tmp_path: Path
) -> None:
    storage = tmp_path / "s"
    arguments = submission(tmp_path, f"--storage={storage}", data=images)
    with (
        scraped(cluster) as metrics,
        started(arguments, tmp_path / "errors", RAY_ADDRESS=cluster.address) as job,
    ):
        job.until(lambda: len(train_workers(cluster)) == 2)
        assert job.wait().code == 0, (tmp_path / "errors").read_text()
        assert hashes(storage) == alone
        metrics.until(lambda: metrics.total("bytes_saved_total") == saved(storage))
        metrics.until(lambda: metrics.total("evaluations_total") == evaluated(storage))
    for stage in ("search", "finetune"):
        assert {name for name, of in metrics.seen("images_per_second") if of == stage} == NAMES
    assert min(metrics.seen("images_per_second").values()) > 0
    assert_lines_say_whose_they_are(tmp_path / "errors")
    logs = Path(cluster.head_node.get_logs_dir_path())
    said = {actor: who_says(logs, actor) for actor in ("RayTrainWorker", "_GroupTrial")}
    assert said["RayTrainWorker"] == NAMES
    assert said["_GroupTrial"]
    assert said["_GroupTrial"] <= NAMES
    trains = "".join(path.read_text() for path in (logs / "train").glob("ray-train-app-worker-*.log"))
    assert {name for name in NAMES if f'"run_name": "{name}-finetune-' in trains} == NAMES


def train_workers(cluster: Cluster) -> list[Process]:
    raylet = cluster.head_node.all_processes["raylet"][0].process.pid
    return [one for one in children([raylet]) if "RayTrainWorker" in one.title]


def assert_lines_say_whose_they_are(errors: Path) -> None:
    """All that a job wrote, apart from what is of the whole fleet."""
    own, whole = "|".join(NAMES), r"\[[\d:]+\] (?:ray|search): |fleet: "
    lines = errors.read_text().splitlines()
    assert [line for line in lines if not re.match(rf"(\[[\d:]+\] )?({own}): |{whole}", line)] == []
    warned = [line for line in lines if "unreadable image" in line]
    assert warned
    table, _, below = output_of(errors).read_text().partition("\n\n")
    assert len(table.splitlines()) == 5
    last = below.splitlines().pop()
    assert last == "2 of 2 committed"
    told = [re.match(rf"({own}): (promise|run|note): ", line) for line in below.splitlines()[:-1]]
    assert {found[1] + " " + found[2] for found in told if found} == {
        f"{name} {what}" for name in NAMES for what in ("promise", "run", "note")
    }
    assert None not in told


def who_says(logs: Path, actor: str) -> set[str]:
    """Who an image cannot be read for, by the logs of all actors of a kind."""
    texts = [path.read_text() for path in logs.glob("worker-*.err")]
    lines = [line for text in texts if f":actor_name:{actor}\n" in text for line in text.splitlines()]
    return {line.partition(": unreadable image")[0] for line in lines if "unreadable image" in line}


def saved(storage: Path) -> dict[str, float]:
    """Bytes that every committed network saves, by its manifest."""
    metrics = {run.model: manifest.read_manifest(run.store)["metrics"] for run in committed(storage)}
    return {name: float(one["bytes_before"] - one["bytes_after"]) for name, one in metrics.items()}


def evaluated(storage: Path) -> dict[str, float]:
    """Evaluations of every committed network, by its table of trials."""
    return {run.model: float(len(tables.from_bytes(run.store.read(TRIALS)))) for run in committed(storage)}


class Scraped:
    """What Prometheus would have read of a cluster by now."""

    def __init__(self, cluster: Cluster) -> None:
        node = cluster.head_node
        self._address = f"http://{node.node_ip_address}:{node.metrics_export_port}/metrics"
        self._samples: dict[str, float] = {}
        self.end = threading.Event()

    def look(self) -> None:
        while not self.end.wait(0.5):
            with (
                suppress(OSError, HTTPException, ValueError),
                urllib.request.urlopen(self._address, timeout=10) as page,
            ):
                for line in page.read().decode().splitlines():
                    if line.startswith("ray_clipq_"):
                        name, _, value = line.rpartition(" ")
                        self._samples[name] = float(value)

    def seen(self, metric: str) -> dict[tuple[str, str], float]:
        """The sums over processes of a metric's samples, by network and stage, each as it was last."""
        found: Counter[tuple[str, str]] = Counter()
        for name, value in list(self._samples.items()):
            if name.startswith(f"ray_clipq_{metric}{{"):
                labels = dict(re.findall(r'(\w+)="([^"]*)"', name))
                found[labels["network"], labels.get("stage", "")] += value  # type: ignore[assignment]
        return dict(found)

    def total(self, metric: str) -> dict[str, float]:
        return {network: value for (network, _), value in self.seen(metric).items()}

    def until(self, what: Callable[[], bool]) -> None:
        limit = time.monotonic() + 60
        while not what():
            assert time.monotonic() < limit, self._samples
            time.sleep(0.2)


@contextmanager
def scraped(cluster: Cluster) -> Iterator[Scraped]:
    found = Scraped(cluster)
    looking = threading.Thread(target=found.look)
    looking.start()
    try:
        yield found
    finally:
        found.end.set()
        looking.join()


@contextmanager
def in_use(address: str) -> Iterator[list[float]]:
    """CPUs that Ray has given away on a cluster, looked at again and again, beginning when the job before has left."""
    found: list[float] = []
    ended = threading.Event()

    def used() -> float:
        return round(ray.cluster_resources().get("CPU", 0.0) - ray.available_resources().get("CPU", 0.0), 3)

    def look() -> None:
        while not ended.wait(0.05):
            found.append(used())

    ray.init(address=address, log_to_driver=False)
    limit = time.monotonic() + 60
    while used():
        assert time.monotonic() < limit, "the job before holds CPUs"
        time.sleep(0.1)
    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield found
    finally:
        ended.set()
        looking.join()
        ray.shutdown()


def test_a_limit_holds_for_trials_and_trainings_together_and_priority_says_who_comes_first(
    cluster: Cluster, tmp_path: Path
) -> None:
    """With one CPU for all of it, whatever held something while it waits would stop the job."""
    changes = {
        "models": [
            # long enough not to be over when the other one comes to its training
            {"model": "lenet5", "weights": "random", "search_evaluations": 20, "search_stop_gain": 0},
            {"model": "lenet_300_100", "weights": "random", "priority": 1},
        ],
        "limits": {"cpus": 1},
    }
    alone = finished(
        submission(tmp_path, "--engine=local", f"--storage={tmp_path / 'alone'}", **changes), tmp_path / "x"
    )
    assert alone.code == 0
    arguments = submission(tmp_path, f"--storage={tmp_path / 's'}", **changes)
    with (
        in_use(cluster.address) as used,
        started(arguments, tmp_path / "errors", RAY_ADDRESS=cluster.address) as job,
    ):
        assert job.wait().code == 0, (tmp_path / "errors").read_text()
    assert set(used) == {0, 1}
    lines = (tmp_path / "errors").read_text().splitlines()
    (first,) = (n for n, line in enumerate(lines) if "lenet_300_100: finetune: done" in line)
    (search,) = (n for n, line in enumerate(lines) if "search: done" in line)
    (second,) = (n for n, line in enumerate(lines) if "lenet5: finetune: done" in line)
    assert first < search < second
    assert hashes(tmp_path / "s") == hashes(tmp_path / "alone")


def test_an_interrupt_while_networks_train_in_threads_is_one_line(tmp_path: Path) -> None:
    """Of threads that hear from Ray that it has ended, nobody wants to know."""
    storage = tmp_path / "s"
    long = {**DEFAULTS, "epochs": 1000, "workers": 1, "weights": "random"}
    arguments = submission(tmp_path, f"--storage={storage}", defaults={**long, "data": "digits"})
    with started(arguments, tmp_path / "errors") as job:
        job.until(lambda: len(list(storage.glob("model=*/run=*/_work/finetune/*/*"))) >= 2)
        os.kill(job.process.pid, signal.SIGINT)
        ended = job.wait()
        assert ended == (130, ["compress: interrupted; run the same command again to continue"])


def test_the_second_of_two_jobs_waits_and_takes_the_result_or_leaves(
    alone: dict[str, str], images: str, tmp_path: Path
) -> None:
    storage = tmp_path / "s"
    arguments = submission(tmp_path, f"--storage={storage}", "--engine=local", data=images)
    with started(arguments, tmp_path / "first") as first:
        first.until(lambda: len(list(storage.glob("model=*/run=*/_work/claim-*"))) == 2)
        os.kill(first.process.pid, signal.SIGSTOP)  # so that the others find them, however slowly they start
        with (
            started([*arguments, "--on-claim=leave"], tmp_path / "leaving") as leaving,
            started(arguments, tmp_path / "second") as second,
        ):
            second.until(lambda: "waiting for it" in (tmp_path / "second").read_text())
            left = leaving.wait()
            os.kill(first.process.pid, signal.SIGCONT)
            assert left.code == 1
            assert "is being made by another job" in "".join(left.lines)
            said = "fleet: not written, since another job makes some of its runs or their stages; submit it again when that has ended"
            assert said in left.lines
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
