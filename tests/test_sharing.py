"""What several jobs want is made by one of them, and by the next where that one ends without it."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused

from clipq_ray import claims, network, sharing
from clipq_ray.aim import Aim
from clipq_ray.batch import compress, compress_all
from clipq_ray.claims import Claim
from clipq_ray.cluster.engine import Done, LocalEngine
from clipq_ray.config import make
from clipq_ray.errors import ClipqError, DivergedError, HeldError, RunError
from clipq_ray.groups import grouped
from clipq_ray.pipeline import Result
from clipq_ray.progress import Reporter
from clipq_ray.searching import DONE, Search, planned, search_all
from clipq_ray.sharing import Maker, Mine
from clipq_ray.source import Source
from clipq_ray.stages import Run
from clipq_ray.states import WEIGHTS, write_state
from clipq_ray.storage import WORK, Store
from clipq_ray.work import CURVE, SearchTask, group_name

TINY: dict[str, Any] = {
    "engine": "local", "limit_images": 60, "epochs": 1, "baseline_epochs": 1, "search_evaluations": 4, "search_start": 3, "search_images": 20, "tradeoff": 1.0,
}  # fmt: skip


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


@dataclass
class Other:
    """Another job, which makes a stage for a run of its own."""

    run: Claim
    stage: Mine

    def end(self) -> None:
        """It dies, or comes to its end without the stage."""
        self.run.give_back()


def others(storage: Path, store: Store) -> Other:
    claim, maker = claimed(storage, "theirs")
    found = sharing.take(Store(storage), store, maker)
    assert isinstance(found, Mine)
    return Other(claim, found)


def claimed(storage: Path, run: str) -> tuple[Claim, Maker]:
    claim = claims.claim(Store(storage).child("model=lenet5", f"run={run}", WORK))
    assert isinstance(claim, Claim)
    return claim, Maker(f"model=lenet5/run={run}/{WORK}", claim.owner)


def started(storage: Path, reporter: Reporter, **options: Any) -> Run:
    source = Source(make(weights="random", limit_images=40, engine="local", **options))
    run = Run(source, LocalEngine(), reporter, Store(storage), threading.Lock())
    run.work = run.storage.child("model=lenet5", f"run={uuid.uuid4().hex}", WORK)
    claim = claims.claim(run.work)
    assert isinstance(claim, Claim)
    run.claim = claim
    return run


@pytest.fixture(autouse=True)
def claims_end() -> Iterator[None]:
    """Claims beat until they are given back."""
    kept: list[Claim] = []
    begin = Claim.__init__

    def noted(claim: Claim, *given: Any) -> None:
        begin(claim, *given)
        kept.append(claim)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Claim, "__init__", noted)
        yield
    for one in kept:
        one.give_back()


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
            other.stage.finish()

    run = started(tmp_path, reporter := Heard(threading.Thread(target=end, daemon=True).start))
    _, store = run.stage_store("baseline", {"weights": "w"})
    other = others(tmp_path, store)
    assert stage(run, made).uri == store.uri
    assert (made, reporter.waits, [one["reused"] for one in run.stages]) == ([], 1, [True])
    assert store.names() == [CURVE]


def test_a_stage_that_another_job_gives_up_is_made(tmp_path: Path) -> None:
    made: list[str] = []
    run = started(tmp_path, reporter := Heard(lambda: other.end()))
    _, store = run.stage_store("baseline", {"weights": "w"})
    other = others(tmp_path, store)
    stage(run, made)
    assert (made, reporter.waits, [one["reused"] for one in run.stages]) == (["here"], 1, [False])
    assert store.names() == [CURVE]


def test_a_training_that_diverges_does_so_for_all_who_wait_for_it_and_is_tried_again_by_who_comes_then(
    tmp_path: Path,
) -> None:
    def diverge() -> None:
        other.stage.__exit__(DivergedError, DivergedError("the loss is NaN in epoch 3"), None)

    run = started(tmp_path, reporter := Heard(diverge))
    _, store = run.stage_store("baseline", {"weights": "w"})
    other = others(tmp_path, store)
    made: list[str] = []
    with pytest.raises(DivergedError, match=r"^the loss is NaN in epoch 3$"):
        stage(run, made)
    assert (made, reporter.waits) == ([], 1)
    stage(run, made)  # submitted again
    assert (made, store.names()) == (["here"], [CURVE])


def test_a_stage_that_fails_is_the_next_jobs(tmp_path: Path) -> None:
    def fail(store: Store, progress: Any) -> None:
        assert store.names() == [f"{sharing.MAKING}/maker-000001.json"]
        raise RunError("diverged")

    run = started(tmp_path, Reporter(quiet=True))
    with run.turn, pytest.raises(RunError):
        run.stage("baseline", {}, CURVE, fail)
    _, store = run.stage_store("baseline", {})
    assert store.names() == []


def test_what_a_job_that_died_behind_the_end_of_a_stage_has_left_goes(tmp_path: Path) -> None:
    run = started(tmp_path, Reporter(quiet=True))
    _, store = run.stage_store("baseline", {"weights": "w"})
    store.write(CURVE, b"{}")
    others(tmp_path, store)
    made = list[str]()
    stage(run, made)
    assert (made, store.names()) == ([], [CURVE])


def test_a_run_that_was_taken_over_makes_no_stage_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started(tmp_path, Heard(lambda: None))
    _, store = run.stage_store("baseline", {"weights": "w"})
    other = others(tmp_path, store)
    real = Store.now
    with monkeypatch.context() as later:
        later.setattr(Store, "now", lambda store: real(store) + claims.lifetime() + 1)
        claimed(tmp_path, "theirs")
    stage(run, made := list[str]())
    assert made == ["here"]
    other.stage.give_back()
    assert store.names() == [CURVE]


def test_a_damaged_maker_and_a_try_before_this_one_keep_nobody_from_a_stage(tmp_path: Path) -> None:
    run = started(tmp_path, Heard(lambda: None))
    _, store = run.stage_store("baseline", {"weights": "w"})
    store.write(f"{sharing.MAKING}/maker-000004.json", b"{")
    assert run.take("baseline", store, set()) == Mine(store.child(sharing.MAKING), "maker-000005.json")
    assert run.take("baseline", store, set()) == Mine(store.child(sharing.MAKING), "maker-000005.json")
    stage(run, made := list[str]())
    assert (made, store.names()) == (["here"], [CURVE])


def test_nobody_waits_who_is_not_to_or_has_no_time_left(tmp_path: Path) -> None:
    run = started(tmp_path, Heard(lambda: None), on_claim="leave")
    _, store = run.stage_store("baseline", {"weights": "w"})
    other = others(tmp_path, store)
    with refused(HeldError, match="baseline: is being made by another job .* --on-claim wait"):
        stage(run, [])
    late = started(tmp_path, Heard(lambda: None), deadline_hours=1e-6)
    beside = stage(late, made := list[str]())
    assert made == ["here"]
    # what was cut short must not become the stage of the job that had time
    assert (store.exists(CURVE), beside.names()) == (False, [CURVE])
    assert late.stages[-1]["key"] in beside.uri
    assert stage(late, made) == beside  # submitted again while the other one goes on
    assert made == ["here"]
    other.end()
    assert stage(started(tmp_path, Heard(lambda: None), deadline_hours=1e-6), made) == store


def search(run: Run, seed: int, **options: Any) -> Search:
    """That of a LeNet-5; another seed's is another search."""
    source = Source(make(weights="random", limit_images=40, engine="local", seed=seed, **options))
    run = Run(source, run.engine, run.reporter, run.storage, threading.Lock(), run.work, run.claim)
    model, weights = source.network(), run.storage.child("weights", str(seed))
    write_state(weights, WEIGHTS, model.state_dict())
    images = torch.zeros(2, 1, 28, 28)
    inventory = network.inventory(model, images, ())
    return planned(
        run,
        model,
        weights,
        inventory,
        grouped(model, [one.name for one in inventory.layers], ()),
        images,
        Aim(),
    )


class Searching(LocalEngine):
    """Leaves what a search leaves; fails where it is told to."""

    def __init__(self, failing: str = "") -> None:
        super().__init__()
        self.calls, self.failing = list[list[str]](), failing
        self.then: Callable[[], None] = lambda: None

    def search(self, tasks: Any, progress: Any, done: Done) -> None:
        self.calls.append([task.output for task in tasks])
        for number, task in enumerate(tasks):
            if task.output == self.failing:
                done(number, RunError("no host"))
                continue
            end(task)
            self.then()
            done(number, None)


def end(task: SearchTask) -> None:
    for index in range(len(task.groups)):
        Store(task.output).write(group_name(index), json.dumps([]).encode())


def test_a_search_that_another_job_makes_is_taken_behind_this_jobs_own(tmp_path: Path) -> None:
    def finish() -> None:
        end(first.task)
        first.store.write(DONE, b'{"late": false}')
        other.stage.finish()

    run = started(tmp_path, reporter := Heard(finish))
    first, second = search(run, 0), search(run, 1)
    other, engine, ended = others(tmp_path, first.store), Searching(), list[tuple[int, ClipqError | None]]()
    search_all([first, second], engine, reporter, lambda number, error: ended.append((number, error)))
    assert engine.calls == [[second.task.output]]
    assert (reporter.waits, sorted(ended, key=str)) == (1, [(0, None), (1, None)])
    assert [first.run.stages[0]["reused"], second.run.stages[0]["reused"]] == [True, False]
    assert not [name for one in (first, second) for name in one.store.names() if sharing.MAKING in name]


def test_a_search_that_another_job_has_made_meanwhile_waits_for_no_more_of_this_jobs_own(
    tmp_path: Path,
) -> None:
    def finish() -> None:
        if not first.finished:
            end(first.task)
            first.store.write(DONE, b'{"late": false}')
            other.stage.finish()

    run = started(tmp_path, Heard(lambda: None))
    first, second, third = (search(run, seed) for seed in range(3))
    other, engine, ended = others(tmp_path, first.store), Searching(), list[int]()
    engine.then = finish
    search_all([first, second, third], engine, run.reporter, lambda number, error: ended.append(number))
    assert ended == [1, 0, 2]
    assert len(engine.calls) == 1


def test_a_search_that_is_not_to_be_waited_for_is_left_and_the_others_are_made(tmp_path: Path) -> None:
    run = started(tmp_path, Heard(lambda: None))
    first, second = search(run, 0, on_claim="leave"), search(run, 1)
    others(tmp_path, first.store)
    ended: dict[int, ClipqError | None] = {}
    search_all([first, second], Searching(), run.reporter, ended.__setitem__)
    assert isinstance(ended[0], HeldError)
    assert ended[1] is None


def test_a_search_with_no_time_left_is_made_beside_that_of_a_job_that_has_it(tmp_path: Path) -> None:
    run = started(tmp_path, reporter := Heard(lambda: None), deadline_hours=1e-6)
    first, same, engine = (
        search(run, 0, deadline_hours=1e-6),
        search(run, 0, deadline_hours=1e-6),
        Searching(),
    )
    theirs = first.store
    others(tmp_path, theirs)
    ended: list[tuple[int, ClipqError | None]] = []
    search_all([first, same], engine, reporter, lambda number, error: ended.append((number, error)))
    assert sorted(ended, key=str) == [(0, None), (1, None)]
    assert engine.calls == [[first.task.output]]
    assert first.task.output == same.task.output != theirs.uri
    assert first.finished
    assert [name for name in theirs.names() if sharing.MAKING not in name] == []
    assert [one["key"] for one in (*first.run.stages, *same.run.stages)] == [first.key, first.key]
    search_all([first], engine, reporter, lambda number, error: ended.append((number, error)))
    assert len(engine.calls) == 1


def test_a_search_that_fails_or_is_left_by_another_job_is_the_next_ones(tmp_path: Path) -> None:
    run = started(tmp_path, reporter := Heard(lambda: other.end()))
    first, second = search(run, 0), search(run, 1)
    other, engine = others(tmp_path, first.store), Searching(failing=second.task.output)
    ended: dict[int, ClipqError | None] = {}
    search_all([first, second], engine, reporter, ended.__setitem__)
    assert sorted(engine.calls) == sorted([[second.task.output], [first.task.output]])
    assert ended[0] is None
    assert isinstance(ended[1], RunError)
    assert not [name for one in (first, second) for name in one.store.names() if sharing.MAKING in name]


@pytest.mark.parametrize("storage", ["/", "/runs", "s3://bucket", "s3://bucket/runs/", "memory://x"])
def test_a_maker_is_named_below_the_storage_whatever_that_ends_in(storage: str) -> None:
    work = Store(storage).child("model=lenet5", "run=mine", WORK)
    assert Maker.of(Store(storage), work, "o") == Maker(f"model=lenet5/run=mine/{WORK}", "o")


def test_a_fleet_that_is_not_to_wait_for_a_stage_ends_that_network_alone(tmp_path: Path) -> None:
    first = compress(Source(make(**TINY, storage=str(tmp_path / "a"))), LocalEngine(), Reporter(quiet=True))
    (key,) = (one["key"] for one in first.manifest["stages"] if one["stage"] == "finetune")
    storage = tmp_path / "b"
    others(storage, Store(storage).child("_stages", f"finetune-{key}"))
    sources = [
        Source(make(**TINY, storage=str(storage), on_claim="leave", name=name, seed=seed))
        for seed, name in enumerate(("held", "free"))
    ]
    held, free = compress_all(sources, LocalEngine(), Reporter(quiet=True))
    assert isinstance(held, HeldError)
    assert "finetune: is being made by another job" in str(held)
    assert isinstance(free, Result)
    (work,) = (storage / "model=held").glob(f"run=r-*/{WORK}")
    assert claims.holder(Store(work)) is None


@pytest.mark.parametrize("stage", ["baseline", "search", "finetune"])
def test_a_job_that_is_not_to_wait_for_a_stage_says_which_and_holds_nothing(
    tmp_path: Path, stage: str
) -> None:
    first = compress(Source(make(**TINY, storage=str(tmp_path / "a"))), LocalEngine(), Reporter(quiet=True))
    (key,) = (one["key"] for one in first.manifest["stages"] if one["stage"] == stage)
    others(tmp_path / "b", Store(tmp_path / "b").child("_stages", f"{stage}-{key}"))
    source = Source(make(**TINY, storage=str(tmp_path / "b"), on_claim="leave"))
    with refused(HeldError, match=f"^{stage}: is being made by another job"):
        compress(source, LocalEngine(), Reporter(quiet=True))
    (work,) = (tmp_path / "b" / "model=lenet5").glob(f"run=r-*/{WORK}")
    assert claims.holder(Store(work)) is None
