"""What Ray says of a failure, in one line that helps; and how often a training that Ray gives up is begun again."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from job_process import children
from ray.exceptions import RayActorError
from ray.train import ControllerError, WorkerGroupError
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from clipq_ray import network
from clipq_ray.cluster.failures import Restarts, low_memory, reason
from clipq_ray.cluster.handout import HandOut
from clipq_ray.cluster.on_ray import RayEngine
from clipq_ray.cluster.ray_search import turn
from clipq_ray.config import make
from clipq_ray.errors import ClipqError, RunError
from clipq_ray.groups import grouped
from clipq_ray.optimizers import Schedule
from clipq_ray.search import Settings
from clipq_ray.source import Source
from clipq_ray.states import WEIGHTS, write_state
from clipq_ray.storage import Store
from clipq_ray.training import TrainTask
from clipq_ray.work import CURVE, SearchTask, read_record

SAID = "4 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, ID: 6ffe) was 12.53GB used / 23.54GB limit (0.532329)"
OF_THE_MONITOR = f"""Training failed due to controller error:
{SAID}
OOM kill reason: Memory usage 13246066688B exceeded threshold of 13244891136B
Ray killed 4 worker(s) based on the killing policy
Refer to the documentation on how to address the out of memory issue: it is long."""
FRAMES = 'Traceback (most recent call last):\n  File "loop.py", line 3, in train\n    step()\n    ^^^^^^\n'
LEFT = RuntimeError(
    f"{FRAMES}RuntimeError: [third_party/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:4711"
)
CUDA = RuntimeError(
    f"{FRAMES}torch.AcceleratorError: CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported.\n"
    "For debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)
WAS = "torch.AcceleratorError: CUDA error: device-side assert triggered"


def test_of_low_memory_it_is_which_node_and_how_full_and_not_the_manual() -> None:
    failure = RuntimeError(OF_THE_MONITOR)
    assert low_memory(failure) == reason(failure) == SAID


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("Traceback:\n  here\nValueError: no\n\n", "ValueError: no"),
        ("", "RuntimeError"),
        (str(CUDA), WAS),
        (f"{FRAMES}KeyError: 'a'\n\nDuring handling of it:\n\n{FRAMES}AssertionError", "AssertionError"),
    ],
)
def test_of_others_it_is_type_and_message_without_advice(said: str, line: str) -> None:
    assert low_memory(RuntimeError(said)) is None
    assert reason(RuntimeError(said)) == line


def test_of_several_workers_it_is_what_one_says_that_did_not_merely_lose_another() -> None:
    def of(*workers: Exception) -> str:
        return reason(WorkerGroupError("all of it\nlast", dict(enumerate(workers))))

    storage = RuntimeError(f"{FRAMES}clipq_ray.errors.StorageError: cannot read s3://b: Connection refused")
    lost = RayActorError()
    assert of(LEFT, CUDA) == of(CUDA, LEFT) == of(CUDA) == WAS
    assert of(LEFT, storage).startswith("clipq_ray.errors.StorageError: cannot read")
    assert of(LEFT, lost) == str(lost).splitlines()[-1]
    assert "Connection closed by peer" in of(LEFT, LEFT)


def test_lost_workers_are_begun_again_as_long_as_there_are_new_checkpoints() -> None:
    lost = WorkerGroupError("lost", {})
    restarts = Restarts(1, None)
    assert [restarts.allowed(lost, name) for name in ("epoch-1", "epoch-3", "epoch-3")] == [True, True, False]
    assert not Restarts(3, "epoch-2").allowed(lost, "epoch-2")  # Ray has started them three times since
    assert not Restarts(0, None).allowed(lost, "epoch-1")
    assert Restarts(1, None).allowed(RayActorError(), None)  # Ray Train's own actor, which is no worker


def test_what_failed_outside_the_workers_is_begun_again_so_often_without_a_checkpoint() -> None:
    outside = ControllerError(RuntimeError("EADDRINUSE"))
    restarts = Restarts(2, None)
    assert [restarts.allowed(outside, None) for _ in range(3)] == [True, True, False]
    restarts = Restarts(2, None)
    names = (None, None, "epoch-1", "epoch-1", "epoch-1")
    assert [restarts.allowed(outside, name) for name in names] == [True, True, True, True, False]
    assert Restarts(1, None).allowed(RuntimeError(OF_THE_MONITOR), None)


# --- on Ray ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> Iterator[RayEngine]:
    """One on this machine for all that follows."""
    with RayEngine() as made:
        yield made


def training(place: Path, epochs: int, **changes: Any) -> TrainTask:
    config = make(
        model="lenet5",
        weights="random",
        data="digits",
        batch_size=32,
        device="cpu",
        **{"max_failures": 1, **changes},
    )
    schedule = Schedule(epochs, config.batch_size, 0.01, 0.0, 0.9, 0.0, 0.0)
    output, checkpoints = Store(place / "output").uri, Store(place / "checkpoints").uri
    return TrainTask(Source(config), "baseline", None, None, schedule, output, checkpoints)


@contextmanager
def killing(due: Callable[[int], bool]) -> Iterator[list[int]]:
    """Training workers are killed, each at most once, whenever one is `due` after so many."""
    killed, over = list[int](), threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            workers = [one.pid for one in children([os.getpid()]) if "RayTrainWorker" in one.title]
            fresh = [pid for pid in workers if pid not in killed]
            if fresh and due(len(killed)):
                killed.append(fresh[0])
                os.kill(fresh[0], signal.SIGKILL)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


@pytest.mark.slow
def test_a_training_that_is_interrupted_again_and_again_comes_to_its_end(
    engine: RayEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With one restart, of two losses; as of spot instances in a long training."""
    task = training(tmp_path, 16)
    seen = list[str]()

    def due(killed: int) -> bool:
        names = Store(task.checkpoints).names("epoch-")
        further = killed < 2 and bool(names) and names[-1] not in seen
        seen.extend(names if further else [])
        return further

    with killing(due) as killed:
        engine.train(task, lambda done, total, words: None)
    assert len(killed) == 2
    assert len(read_record(Store(task.output), CURVE)["curve"]) == 16
    assert caplog.text.count("it is begun again behind its last checkpoint") == 1


@pytest.mark.slow
def test_progress_that_cannot_be_told_once_is_told_from_then_on(
    engine: RayEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What tells it also ends what hangs."""
    told = list[int]()

    def progress(done: int, total: int, words: str) -> None:
        told.append(done)
        if len(told) == 1:
            raise OSError("no space left\nfor a line")

    engine.train(training(tmp_path, 12), progress)
    assert len(told) > 1
    assert "progress cannot be read, and is asked for again: no space left for a line" in caplog.text


@pytest.mark.slow
def test_workers_that_die_while_they_start_are_started_so_often_and_named(
    engine: RayEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        killing(lambda killed: True) as killed,
        pytest.raises(RunError, match="baseline failed: workers died while they started: "),
    ):
        engine.train(training(tmp_path, 1), lambda done, total, words: None)
    assert len(killed) == 2
    assert caplog.text.count("baseline: workers died while they started: ") == 1


class _NoGroup(_TorchBackend):  # type: ignore[misc]
    """Of torch's process group, which Ray makes: workers that cannot reach one another."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        raise RuntimeError("the address is in use")


class _NoGroupSettings(TorchConfig):  # type: ignore[misc]
    @property
    def backend_cls(self) -> Any:
        return _NoGroup


@pytest.mark.slow
def test_workers_that_fail_in_their_process_group_give_back_what_they_had_of_the_cluster(
    engine: RayEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are begun again would find no room else."""
    monkeypatch.setattr("ray.train.torch.TorchConfig", _NoGroupSettings)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the controller cannot import a test
    try:
        with pytest.raises(RunError, match=r"baseline failed: .*the address is in use"):
            engine.train(training(tmp_path, 1, workers=2, max_failures=0), lambda done, total, words: None)
    finally:
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])

    def held() -> list[str]:
        groups = ray.util.placement_group_table().values()
        return [one["placement_group_id"] for one in groups if one["state"] != "REMOVED"]

    limit = time.monotonic() + 60
    while held():
        assert time.monotonic() < limit
        time.sleep(0.1)


@pytest.mark.slow
def test_what_fails_behind_the_end_of_a_training_costs_nothing(
    engine: RayEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the half second in which Ray asks its workers again; said here behind a training that has come to its end."""
    fitted = RayEngine._fitted

    def fitted_and_lost(self: RayEngine, *arguments: Any) -> Exception:
        assert fitted(self, *arguments) is None
        return WorkerGroupError("lost", {0: RayActorError()})

    monkeypatch.setattr(RayEngine, "_fitted", fitted_and_lost)
    task = training(tmp_path, 1, max_failures=0)
    engine.train(task, lambda done, total, words: None)
    assert len(read_record(Store(task.output), CURVE)["curve"]) == 1


@pytest.mark.slow
def test_a_training_begins_with_as_few_workers_as_it_may_where_there_is_no_room_for_all(
    engine: RayEngine, tmp_path: Path
) -> None:
    there = os.cpu_count() or 1
    task = training(tmp_path, 1, workers=there + 1, min_workers=1)
    engine.check(task.source.config)
    engine.train(task, lambda done, total, words: None)
    (row,) = read_record(Store(task.output), CURVE)["curve"]
    assert 1 <= row["workers"] <= there


def searching(place: Path, seed: int, deadline: float | None = None, **changes: Any) -> SearchTask:
    given = {"max_failures": 0, **changes}
    source = Source(
        make(model="lenet_300_100", weights="random", data="digits", device="cpu", seed=seed, **given)
    )
    model, weights = source.network(), Store(place / f"weights{seed}")
    write_state(weights, WEIGHTS, model.state_dict())
    found = network.inventory(model, torch.zeros(2, 1, 28, 28), ())
    groups = grouped(model, [layer.name for layer in found.layers], ())
    output = Store(place / f"search{seed}").uri
    return SearchTask(
        source, weights.uri, groups, Settings(2, 2, (8.0,), seed), 40, found.bytes_before, output, deadline,
        deadline_share=0.75,
    )  # fmt: skip


Told = list[tuple[int, ClipqError | None]]


def searched(engine: RayEngine, *tasks: SearchTask) -> Told:
    """The tasks are searched; what was told of each by its number."""
    told = Told()
    engine.search(tasks, lambda done, total, words: None, lambda number, error: told.append((number, error)))
    return sorted(told, key=lambda one: one[0])


@pytest.mark.slow
def test_of_a_search_there_is_nothing_in_the_storage_but_what_it_has_found(
    engine: RayEngine, tmp_path: Path
) -> None:
    tasks = [searching(tmp_path, seed) for seed in (0, 1)]
    assert searched(engine, *tasks) == [(0, None), (1, None)]
    for task in tasks:
        assert task.open_groups() == []
        assert [name for name in Store(task.output).names() if not name.startswith("group-")] == []


@pytest.mark.slow
def test_a_trial_that_may_not_fail_is_given_up_with_what_ray_says_of_it(
    engine: RayEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard, killed = HandOut.heard, list[int]()

    def hear_and_kill(handout: HandOut, trial: Any, result: dict[str, Any]) -> None:
        heard(handout, trial, result)
        if not killed:
            killed.append(result["pid"])
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(HandOut, "heard", hear_and_kill)
    ((_, error),) = searched(engine, searching(tmp_path, 0))
    assert len(killed) == 1
    assert "the search of 1 layers or groups failed: The actor is dead because its worker" in str(error)


@pytest.mark.slow
def test_a_worker_that_is_lost_between_two_groups_ends_neither(
    engine: RayEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is kept for the next group, and dies before that is its own: Ray tells of this twice, and the second time gives the group up."""
    task = searching(tmp_path, 0, max_failures=1)
    end, killed = HandOut.end, list[int]()

    def end_and_kill(handout: HandOut, trial: Any, error: Exception | None) -> None:
        end(handout, trial, error)
        if not killed:
            assert handout.keeps()
            killed.append(trial.last_result["pid"])
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(HandOut, "end", end_and_kill)
    with RayEngine(make(search_parallel=1)) as one_worker:
        assert searched(one_worker, task) == [(0, None)]
    assert task.open_groups() == []
    assert len(killed) == 1
    assert caplog.text.count("was lost; it goes on behind its last evaluation") == 1


def test_a_search_that_waits_for_another_one_of_its_job_loses_only_its_share_of_that_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, lock = [searching(tmp_path, 0, 1000.0), searching(tmp_path, 1)], threading.Lock()
    asked_and_got = iter((5.0, 5.0, 10.0, 18.0))
    monkeypatch.setattr(
        "clipq_ray.cluster.ray_search.time", SimpleNamespace(monotonic=lambda: next(asked_and_got))
    )
    with turn(lock, tasks) as at_once:
        assert at_once[0].deadline == 1000.0
        assert lock.locked()
    lock.acquire()
    threading.Timer(0.2, lock.release).start()
    with turn(lock, tasks) as later:
        assert lock.locked()
        assert later[0].deadline == 1002.0
        assert later[1].deadline is None
