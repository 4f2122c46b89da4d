"""What several jobs want is made by one of them, and by the next where that one ends without it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clipq_ray import claims, network, sharing
from clipq_ray.claims import Claim
from clipq_ray.cluster.engine import Done, LocalEngine
from clipq_ray.config import make
from clipq_ray.errors import ClipqError, RunError
from clipq_ray.groups import grouped
from clipq_ray.progress import Reporter
from clipq_ray.searching import DONE, Search, planned, search_all
from clipq_ray.source import Source
from clipq_ray.stages import Run
from clipq_ray.states import WEIGHTS, write_state
from clipq_ray.storage import Store
from clipq_ray.work import CURVE, SearchTask, group_name


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "WAIT_SECONDS", 0.05)


class Heard(Reporter):
    """Does `then` when the job says that it waits."""

    def __init__(self, then: Callable[[], None]) -> None:
        super().__init__(quiet=True)
        self.then, self.waits = then, 0

    def say(self, text: str) -> None:
        if "being made by another job" in text:
            self.waits += 1
            self.then()


def others(store: Store) -> Claim:
    """The claim of another job on this stage."""
    found = claims.claim(store.child(sharing.MAKING), shared=True)
    assert isinstance(found, Claim)
    return found


def started(storage: Path, reporter: Reporter, **options: Any) -> Run:
    source = Source(make(weights="random", limit_images=40, engine="local", **options))
    return Run(source, LocalEngine(), reporter, Store(storage), threading.Lock())


def stage(run: Run, made: list[str]) -> Store:
    def make_it(store: Store, progress: Any) -> None:
        made.append("here")
        store.write(CURVE, b"{}")

    with run.turn:
        return run.stage("baseline", {"weights": "w"}, CURVE, make_it)


def test_a_stage_that_another_job_makes_is_waited_for_and_taken(tmp_path: Path) -> None:
    made: list[str] = []

    def end() -> None:
        with run.turn:  # the networks beside it go on
            store.write(CURVE, b"{}")
            other.finish()

    run = started(tmp_path, reporter := Heard(threading.Thread(target=end, daemon=True).start))
    _, store = run.stage_store("baseline", {"weights": "w"})
    other = others(store)
    assert stage(run, made).uri == store.uri
    assert (made, reporter.waits, [one["reused"] for one in run.stages]) == ([], 1, [True])
    assert store.names() == [CURVE]


def test_a_stage_that_another_job_gives_up_is_made(tmp_path: Path) -> None:
    made: list[str] = []
    run = started(tmp_path, reporter := Heard(lambda: other.give_back()))
    _, store = run.stage_store("baseline", {"weights": "w"})
    other = others(store)
    stage(run, made)
    assert (made, reporter.waits, [one["reused"] for one in run.stages]) == (["here"], 1, [False])
    assert store.names() == [CURVE]


def test_a_stage_that_fails_is_the_next_jobs(tmp_path: Path) -> None:
    def fail(store: Store, progress: Any) -> None:
        assert store.names() == [f"{sharing.MAKING}/claim-000001.json"]
        raise RunError("diverged")

    run = started(tmp_path, Reporter(quiet=True))
    with run.turn, pytest.raises(RunError):
        run.stage("baseline", {}, CURVE, fail)
    _, store = run.stage_store("baseline", {})
    assert store.names() == []


def test_what_a_job_that_died_behind_the_end_of_a_stage_has_left_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started(tmp_path, Reporter(quiet=True))
    _, store = run.stage_store("baseline", {"weights": "w"})
    store.write(CURVE, b"{}")
    other = others(store)
    made = list[str]()
    stage(run, made)
    assert store.names() == [f"{sharing.MAKING}/claim-000001.json", CURVE]  # it lives, and ends by itself
    other._rest()
    monkeypatch.setattr(claims, "runs", lambda process: False)
    stage(run, made)
    assert (made, store.names()) == ([], [CURVE])


def search(run: Run, seed: int) -> Search:
    """That of a LeNet-5; another seed's is another search."""
    source = Source(make(weights="random", limit_images=40, engine="local", seed=seed))
    run = Run(source, run.engine, run.reporter, run.storage, threading.Lock())
    model, weights = source.network(), run.storage.child("weights", str(seed))
    write_state(weights, WEIGHTS, model.state_dict())
    images = torch.zeros(2, 1, 28, 28)
    inventory = network.inventory(model, images, ())
    return planned(
        run, model, weights, inventory, grouped(model, [one.name for one in inventory.layers], ()), images
    )


class Searching(LocalEngine):
    """Leaves what a search leaves; fails where it is told to."""

    def __init__(self, failing: str = "") -> None:
        super().__init__()
        self.calls, self.failing = list[list[str]](), failing

    def search(self, tasks: Any, progress: Any, done: Done) -> None:
        self.calls.append([task.output for task in tasks])
        for number, task in enumerate(tasks):
            if task.output == self.failing:
                done(number, RunError("no host"))
                continue
            end(task)
            done(number, None)


def end(task: SearchTask) -> None:
    for index in range(len(task.groups)):
        Store(task.output).write(group_name(index), json.dumps([]).encode())


def test_a_search_that_another_job_makes_is_taken_behind_this_jobs_own(tmp_path: Path) -> None:
    def finish() -> None:
        end(first.task)
        first.store.write(DONE, b'{"late": false}')
        other.finish()

    run = started(tmp_path, reporter := Heard(finish))
    first, second = search(run, 0), search(run, 1)
    other, engine, ended = others(first.store), Searching(), list[tuple[int, ClipqError | None]]()
    search_all([first, second], engine, reporter, lambda number, error: ended.append((number, error)))
    assert engine.calls == [[second.task.output]]
    assert (reporter.waits, sorted(ended, key=str)) == (1, [(0, None), (1, None)])
    assert [first.run.stages[0]["reused"], second.run.stages[0]["reused"]] == [True, False]
    assert not [name for one in (first, second) for name in one.store.names() if sharing.MAKING in name]


def test_a_search_that_fails_or_is_left_by_another_job_is_the_next_ones(tmp_path: Path) -> None:
    run = started(tmp_path, reporter := Heard(lambda: other.give_back()))
    first, second = search(run, 0), search(run, 1)
    other, engine = others(first.store), Searching(failing=second.task.output)
    ended: dict[int, ClipqError | None] = {}
    search_all([first, second], engine, reporter, ended.__setitem__)
    assert sorted(engine.calls) == sorted([[second.task.output], [first.task.output]])
    assert ended[0] is None
    assert isinstance(ended[1], RunError)
    assert not [name for one in (first, second) for name in one.store.names() if sharing.MAKING in name]
