"""The search on Ray: a trial, the driver or a node lost costs the evaluation under way; several networks share one Tuner.

An evaluation that is made a second time would have other seconds, so rows that come back with theirs were not made again.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from job_process import ROOT, Job, children, command, committed, finished, processes, sha256, started
from PIL import Image
from ray._common.utils import get_system_memory
from ray._private.utils import get_used_memory
from ray.cluster_utils import Cluster
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor

from clipq_ray import manifest, tables
from clipq_ray.storage import Store

pytestmark = pytest.mark.slow

Rows = dict[str, list[dict[str, Any]]]
LAYERS = 5
SEARCHED: dict[str, Any] = {"search_evaluations": 30, "search_stop_gain": 0, "workers": 1, "epochs": 1}
BRIEFLY = {**SEARCHED, "search_evaluations": 6}


@pytest.fixture(scope="module")
def weights(digits_weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "lenet5.safetensors"
    save_file(digits_weights, path)
    return path


@pytest.fixture(scope="module")
def undisturbed(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """The evaluations of a job that nothing disturbs, in one process without Ray."""
    place = tmp_path_factory.mktemp("undisturbed")
    assert finished(command(place / "s", weights, **SEARCHED, engine="local"), place / "errors") == (0, [])
    return rows_so_far(place / "s")


def rows_so_far(storage: Path) -> Rows:
    """The stored evaluations by layer, of finished and unfinished ones."""
    found: Rows = {}
    for path in storage.glob("_stages/search-*/*-*.json"):
        try:
            rows = json.loads(path.read_text())
        except FileNotFoundError:  # a partial one whose layer has just ended
            continue
        if len(rows) > len(found.get(rows[0]["layer"], [])):
            found[rows[0]["layer"]] = rows
    return found


def midway(storage: Path) -> bool:
    """Whether some layer is past its start points and none is finished."""
    rows = rows_so_far(storage)
    return any(len(one) >= 6 for one in rows.values()) and sum(map(len, rows.values())) < 100


def searchers(session: int) -> set[int]:
    """Those that are in a step: between two steps an actor's process may have no title."""
    return {process.pid for process in processes(session) if "ResourceTrainable" in process.title}


def searched(storage: Path) -> bool:
    return bool(list(storage.glob("_stages/search-*/done.json")))


def assert_as_undisturbed(undisturbed: Rows, storage: Path, before: Rows) -> None:
    """The same points and values; and the rows that were there `before` are there as they were, seconds and all."""
    after = rows_so_far(storage)
    for layer, rows in before.items():
        assert after[layer][: len(rows)] == rows

    def values(found: Rows) -> Rows:
        noise = ("seconds", "node")
        return {
            layer: [{k: v for k, v in row.items() if k not in noise} for row in rows]
            for layer, rows in found.items()
        }

    assert values(after) == values(undisturbed)
    assert sum(map(len, after.values())) == LAYERS * 30


def test_a_trial_that_is_killed_goes_on_behind_its_last_evaluation(
    undisturbed: Rows, weights: Path, tmp_path: Path
) -> None:
    storage = tmp_path / "s"
    with started(command(storage, weights, **SEARCHED), tmp_path / "errors") as job:
        job.until(lambda: midway(storage))
        searching = job.until(lambda: searchers(job.session))
        before = rows_so_far(storage)
        os.kill(min(searching), signal.SIGKILL)
        job.until(lambda: searched(storage))
        assert "was lost; it goes on behind its last evaluation" in (tmp_path / "errors").read_text()
    assert_as_undisturbed(undisturbed, storage, before)


def test_a_trial_that_hangs_is_ended_and_where_it_may_not_fail_it_is_named(
    undisturbed: Rows, weights: Path, tmp_path: Path
) -> None:
    storage = tmp_path / "s"
    again = command(storage, weights, **SEARCHED)
    with started([*again, "--stall-minutes=0.3", "--max-failures=0"], tmp_path / "errors") as job:
        job.until(lambda: midway(storage))
        searching = job.until(lambda: searchers(job.session))
        before = rows_so_far(storage)
        os.kill(min(searching), signal.SIGSTOP)
        ended = job.wait()
    assert ended.code == 1
    *said, named = ended.lines
    assert said
    assert "made no step for 0.3 minutes (--stall-minutes); its workers are ended" in said[0]
    assert re.match(
        r"compress: the search of \d layers or groups failed: it made no step for 0.3 minutes", named
    )
    assert "1 time; look at its node" in named
    with started(again, tmp_path / "errors") as job:
        job.until(lambda: searched(storage))
    assert_as_undisturbed(undisturbed, storage, before)


def held_searchers(job: Job, node: Any) -> list[int]:
    """The processes of a search that is stopped here: one of seconds may end before another job has come to its own."""
    raylet, held = node.all_processes["raylet"][0].process.pid, list[int]()

    def found() -> bool:  # between two steps an actor's process may have no title
        held.extend(child.pid for child in children([raylet]) if "ResourceTrainable" in child.title)
        return bool(held)

    job.until(found)
    for process in held:
        os.kill(process, signal.SIGSTOP)
    return held


def the_second_waits(
    first: list[str], second: list[str], storage: Path, tmp_path: Path, cluster: Cluster, said: str
) -> None:
    """Two jobs on one cluster, of which the second comes to its search in the middle of the first one's, in `storage`, and says so by `said`; both finish."""
    node = cluster.add_node(num_cpus=2)
    with started(first, tmp_path / "first", RAY_ADDRESS=cluster.address) as one:
        one.until(lambda: rows_so_far(storage))
        held = held_searchers(one, node)
        with started(second, tmp_path / "second", RAY_ADDRESS=cluster.address) as other:
            other.until(lambda: said in (tmp_path / "second").read_text())
            assert not searched(storage)
            for process in held:
                os.kill(process, signal.SIGCONT)
            assert one.wait() == (0, [])
            assert other.wait().code == 0
    (line,) = (line for line in (tmp_path / "second").read_text().splitlines() if said in line)
    assert str(one.process.pid) in line


def test_a_second_job_on_the_cluster_waits_with_its_search_and_says_so_and_both_finish(
    weights: Path, tmp_path: Path, cluster: Cluster
) -> None:
    first, second = (
        command(tmp_path / name, weights, **{**SEARCHED, "seed": seed}) for name, seed in (("a", 0), ("b", 1))
    )
    said = "search: waits for that of another job on this cluster ("
    the_second_waits(first, second, tmp_path / "a", tmp_path, cluster, said)
    for name in ("a", "b"):
        (run,) = manifest.committed(Store(tmp_path / name))
        assert manifest.verify(run.store) == []


def test_a_second_job_on_the_cluster_that_needs_the_same_search_takes_it_as_it_is(
    weights: Path, tmp_path: Path, cluster: Cluster
) -> None:
    """Two networks that differ behind the search."""
    storage = tmp_path / "s"
    first, second = (
        command(storage, weights, **{**SEARCHED, "name": name, "target_ratio": ratio})
        for name, ratio in (("a", 16), ("b", 20))
    )
    said = "search: is being made by another job ("
    the_second_waits(first, second, storage, tmp_path, cluster, said)
    a, b = (committed_run(storage, name) for name in ("a", "b"))
    assert a == b  # with their seconds, which a second measurement would have changed


def committed_run(storage: Path, name: str) -> list[dict[str, Any]]:
    """The trials of the run of this name."""
    (run,) = (one for one in manifest.committed(Store(storage)) if f"model={name}/" in one.store.uri)
    assert manifest.verify(run.store) == []
    rows = tables.from_bytes(run.store.read("trials.parquet")).to_pylist()
    return [{name: value for name, value in row.items() if name != "chosen"} for row in rows]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_search_whose_driver_is_killed_or_interrupted_goes_on_behind_its_last_evaluation(
    number: int, code: int, undisturbed: Rows, weights: Path, tmp_path: Path
) -> None:
    storage = tmp_path / "s"
    with started(command(storage, weights, **SEARCHED), tmp_path / "errors") as job:
        job.until(lambda: midway(storage))
        os.kill(job.process.pid, number)
        ended = job.wait()
    assert ended.code == code
    if number == signal.SIGINT:
        words = "compress: interrupted; run the same command again to continue"
        assert ended.lines[-1].startswith(words)
    assert not searched(storage)
    before = rows_so_far(storage)
    assert 6 <= sum(map(len, before.values())) < LAYERS * 30
    with started(command(storage, weights, **SEARCHED), tmp_path / "errors") as job:
        job.until(lambda: searched(storage))
    assert_as_undisturbed(undisturbed, storage, before)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without CPUs and two nodes of one each, all on this machine."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        yield made
    finally:
        made.shutdown()


def test_a_node_that_is_lost_costs_the_evaluation_under_way(
    undisturbed: Rows, weights: Path, tmp_path: Path, cluster: Cluster
) -> None:
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    storage = tmp_path / "s"
    arguments = command(storage, weights, **SEARCHED)
    with started(arguments, tmp_path / "errors", RAY_ADDRESS=cluster.address) as job:
        job.until(lambda: midway(storage) and len(rows_so_far(storage)) == 2)  # one layer on each node
        before = rows_so_far(storage)
        cluster.remove_node(nodes[0], allow_graceful=False)
        job.until(lambda: searched(storage))
    assert_as_undisturbed(undisturbed, storage, before)


def test_trials_share_a_gpu_by_its_fraction(weights: Path, tmp_path: Path, cluster: Cluster) -> None:
    """The GPU is one by name only; what Ray packs onto it is the same."""
    cluster.add_node(num_cpus=3, num_gpus=1)
    storage = tmp_path / "s"
    long = {**SEARCHED, "search_evaluations": 500}  # so that no layer ends and a third begins
    arguments = command(storage, weights, **long, search_gpu_share=0.5)
    with started(arguments, tmp_path / "errors", RAY_ADDRESS=cluster.address) as job:
        job.until(lambda: sum(len(rows) >= 5 for rows in rows_so_far(storage).values()) == 2)
        assert len(rows_so_far(storage)) == 2  # and not three, for which there are CPUs


def digit_images(folder: Path) -> str:
    """The digits as an image folder; its path relative to where jobs run."""
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images[:400], digits.target[:400], strict=True)):
        place = folder / "train" / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).astype("uint8")).resize((28, 28)).save(place / f"{number}.png")
    return os.path.relpath(folder, ROOT)


def test_several_networks_share_one_tuner_and_one_that_fails_stops_no_other(tmp_path: Path) -> None:
    text = "from torch import nn\n\ndef few(num_classes=3):\n    return nn.Sequential(nn.Flatten(), nn.Linear(784, 3))\n"
    (tmp_path / "narrow.py").write_text(text)
    given = command(tmp_path / "s", "random", **{**BRIEFLY, "search_parallel": 2})
    names = [f"--model={name}" for name in ("lenet_300_100", "narrow:few", "lenet5")]
    data = [f"--data={digit_images(tmp_path / 'digits')}", "--validation-images=100"]
    arguments = [*given, *names, *data, "--input-size=28"]
    with started(arguments, tmp_path / "errors", PYTHONPATH=str(tmp_path)) as job:
        ended = job.wait()
    assert ended.code == 1
    (line,) = ended.lines
    assert line.startswith("compress: narrow.few: expected a network that takes images of (3, 28, 28)")
    runs = {run.model: run.store for run in manifest.committed(Store(tmp_path / "s"))}
    assert set(runs) == {"lenet5", "lenet_300_100"}
    for store in runs.values():
        assert manifest.verify(store) == []
        trials = tables.from_bytes(store.read("trials.parquet"))
        assert set(trials["step"].to_pylist()) == set(range(6))
    assert (tmp_path / "errors").read_text().count("search: done") == 1


def test_a_worker_that_the_memory_monitor_ends_costs_the_evaluation_under_way(tmp_path: Path) -> None:
    """Ray's own, for once: a network takes all the memory that there is the first time that an actor asks it, which is in the search."""
    total, used = get_system_memory(), get_used_memory()
    if used > 0.7 * total:
        pytest.skip("no memory to spare here")
    text = f"""
import time
from pathlib import Path
import ray
from torch import nn

marker = Path({str(tmp_path / "greedy")!r})

class Greedy(nn.Linear):
    def forward(self, images):
        if not marker.exists() and ray.is_initialized() and ray.get_runtime_context().get_actor_id():
            marker.touch()
            taken = []
            for _ in range(100):
                taken.append(bytearray(b"1") * {total // 250})
                time.sleep(0.02)
        return super().forward(images)

def few(num_classes=10):
    return nn.Sequential(nn.Flatten(), Greedy(3 * 784, 20), nn.ReLU(), nn.Linear(20, num_classes))
"""
    (tmp_path / "hungry.py").write_text(text)
    given = command(tmp_path / "s", "random", **BRIEFLY, max_failures=5)
    limits = {
        "RAY_memory_usage_threshold": f"{used / total + 0.2:.3f}",
        "RAY_memory_monitor_refresh_ms": "100",
    }
    arguments = [*given, "--model=hungry:few", "--input-size=28"]
    with started(arguments, tmp_path / "errors", PYTHONPATH=str(tmp_path), **limits) as job:
        ended = job.wait()
    assert ended.code == 0
    assert (tmp_path / "greedy").exists()
    assert any("was lost; it goes on behind its last evaluation" in line for line in ended.lines)


def test_a_search_behind_a_training_can_be_interrupted_too(tmp_path: Path) -> None:
    """Ray Train has a handler of its own, which swallows interrupts of what comes after it."""
    storage = tmp_path / "s"
    trained = command(storage, "train", **SEARCHED, baseline_epochs=1)
    with started(trained, tmp_path / "errors") as job:
        job.until(lambda: rows_so_far(storage))
        os.kill(job.process.pid, signal.SIGINT)
        ended = job.wait()
    assert ended == (130, ["compress: interrupted; run the same command again to continue"])
    assert not searched(storage)


def test_trainings_and_searches_give_the_same_bytes_as_one_process_and_rungs_search_between_them(
    tmp_path: Path,
) -> None:
    options: dict[str, Any] = {
        "workers": 1, "baseline_epochs": 2, "epochs": 2, "rungs": 2, "rung_epochs": 1, "target_ratio": 30, "search_stop_gain": 0,
    }  # fmt: skip
    for engine in ("local", "ray"):
        given = [*command(tmp_path / engine, "train", **options, engine=engine), "--search-again"]
        assert finished(given, tmp_path / "errors").code == 0
    one, other = (committed(tmp_path / engine) for engine in ("local", "ray"))
    stages = [stage["stage"] for stage in other["stages"]]
    assert stages[0] == "baseline"
    assert stages.count("search") == 2
    assert sha256(one) == sha256(other)
