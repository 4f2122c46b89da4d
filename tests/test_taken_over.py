"""A run that another job takes over while this one makes it: this one notices at its next stage, and waits for the other like for any that it finds."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clipq_ray import claims, identity, manifest, pipeline
from clipq_ray.batch import compress, compress_all
from clipq_ray.claims import Claim
from clipq_ray.cluster.engine import LocalEngine
from clipq_ray.config import make
from clipq_ray.errors import HeldError
from clipq_ray.pipeline import Result
from clipq_ray.progress import Reporter
from clipq_ray.source import Source
from clipq_ray.storage import MANIFEST, WORK, Store
from clipq_ray.training import TrainTask

OPTIONS: dict[str, Any] = {
    "engine": "local", "epochs": 1, "baseline_epochs": 1, "batch_size": 32, "search_evaluations": 4, "search_start": 3, "search_images": 60,
    "target_ratio": 15, "rounds": 1, "control": "always",
}  # fmt: skip
NOW = Store.now


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(pipeline, "_WAIT_SECONDS", 0.05)


def beating() -> int:
    """How many claims of this process are kept alive, those of tests that failed included."""
    return sum(one.name == "claim" for one in threading.enumerate())


class Outage(LocalEngine):
    """In its training `stage` this job is away for so long that another one takes its run over."""

    def __init__(self, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.stage, self.trained = stage, list[str]()
        self.monkeypatch, self.other = monkeypatch, list[Claim]()

    def train(self, task: TrainTask, progress: Any) -> float:
        self.trained.append(task.stage)
        if task.stage == self.stage and not self.other:
            self.take_over(Store(task.checkpoints.partition(f"/{WORK}/")[0]).child(WORK))
        return super().train(task, progress)

    def take_over(self, work: Store) -> None:
        before = beating()
        with self.monkeypatch.context() as later:
            later.setattr(Store, "now", lambda store: NOW(store) + 1000)
            found = claims.claim(work)
        assert isinstance(found, Claim)
        self.other.append(found)
        limit = time.monotonic() + 30
        while beating() > before:  # the first owner has not noticed yet
            assert time.monotonic() < limit
            time.sleep(0.01)


class Heard(Reporter):
    """Does `then` when a job says that it waits."""

    def __init__(self, then: Callable[[], None]) -> None:
        super().__init__(quiet=True)
        self.then, self.lines = then, list[str]()

    def say(self, text: str) -> None:
        self.lines.append(text)
        if "waiting for it" in text:
            self.then()


def source(storage: Path, **more: Any) -> Source:
    return Source(make(**OPTIONS, **more, storage=str(storage)))


@pytest.mark.parametrize("stage", ["baseline", "control"])
def test_where_the_new_owner_ends_without_a_result_the_run_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    engine = Outage(stage, monkeypatch)
    trained: list[str] = []

    def give_back() -> None:
        trained.extend(engine.trained)
        engine.other[0].give_back()

    reporter = Heard(give_back)
    result = compress(source(tmp_path), engine, reporter)
    assert trained[-1] == stage  # nothing behind it was made while the run was another job's
    assert any("another job took over" in line for line in reporter.lines)
    assert engine.trained == ["baseline", "control", "finetune"]
    assert not result.reused
    assert manifest.verify(Store(result.uri)) == []
    found = [one["stage"] for one in result.manifest["stages"]]
    assert len(found) == len(set(found))
    assert not any(one["reused"] for one in result.manifest["stages"])
    assert len(set(result.manifest["notes"])) == len(result.manifest["notes"])


def test_what_the_new_owner_commits_is_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = compress(source(tmp_path / "there"), LocalEngine(), Reporter(quiet=True))
    engine = Outage("control", monkeypatch)

    def commit() -> None:
        (target,) = (tmp_path / "here").glob("model=*/run=*")
        files = sorted(
            Path(there.uri.removeprefix("file://")).iterdir(), key=lambda one: one.name == MANIFEST
        )
        for one in files:
            shutil.copy(one, target)
        engine.other[0].give_back()

    found = compress(source(tmp_path / "here"), engine, Heard(commit))
    assert found.reused
    assert found.manifest == there.manifest
    assert engine.trained == ["baseline", "control"]


@pytest.mark.slow
def test_a_job_that_makes_others_too_makes_them_first_and_waits_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds claims that the other job may wait for."""
    engine, before = Outage("control", monkeypatch), beating()
    committed: list[str] = []

    def give_back() -> None:
        committed.extend(run.model for run in manifest.committed(Store(tmp_path)))
        assert beating() == before + 1  # the other job's
        engine.other[0].give_back()

    reporter = Heard(give_back)
    taken, made = compress_all(
        [source(tmp_path, name="a"), source(tmp_path, name="b", seed=1)], engine, reporter
    )
    assert committed == ["b"]
    assert any("the other networks of this job come first" in line for line in reporter.lines)
    for one in (taken, made):
        assert isinstance(one, Result)
        assert not one.reused
        assert manifest.verify(Store(one.uri)) == []
    assert engine.trained == ["baseline", "baseline", "control", "control", "finetune", "finetune"]


def test_a_job_that_is_not_to_wait_leaves_the_run_to_its_new_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Outage("control", monkeypatch)
    sources = [source(tmp_path, name="a", on_claim="leave"), source(tmp_path, name="b", on_claim="leave")]
    left, made = compress_all(sources, engine, Reporter(quiet=True))
    assert isinstance(left, HeldError)
    assert "--on-claim wait" in str(left)
    assert isinstance(made, Result)
    engine.other[0].give_back()


def test_a_run_that_is_committed_while_it_is_claimed_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a look for its result and the claim another job may have ended."""
    there = compress(source(tmp_path / "there"), LocalEngine(), Reporter(quiet=True))
    (target,) = (tmp_path / "there").glob("model=*/run=*")
    run_id, answers = identity.run_id, iter([None])

    def before_the_commit(*given: Any, **more: Any) -> tuple[str, dict[str, Any] | None]:
        found, committed = run_id(*given, **more)
        return found, next(answers, committed)

    monkeypatch.setattr(identity, "run_id", before_the_commit)
    engine = Outage("none", monkeypatch)
    found = compress(source(tmp_path / "there"), engine, Reporter(quiet=True))
    assert found.reused
    assert found.manifest == there.manifest
    assert engine.trained == []
    assert not (target / WORK).exists()
