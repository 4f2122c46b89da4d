"""A store that goes away, or refuses, when a run is to be committed: what was done is kept, said, and not done again."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from s3_faults import FaultyProxy, faulty

from clipq_ray import codec, manifest
from clipq_ray.batch import compress
from clipq_ray.cluster.engine import LocalEngine
from clipq_ray.config import Config, make
from clipq_ray.errors import RunError
from clipq_ray.pipeline import Result
from clipq_ray.progress import Reporter
from clipq_ray.source import Source
from clipq_ray.storage import Store

pytest_plugins = ["s3_server"]
Commit = Callable[[Store, Mapping[str, bytes], Mapping[str, Any]], None]


@pytest.fixture
def place(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, FaultyProxy]]:
    """A bucket behind a proxy, which lets everything through until a test says otherwise."""
    from s3_server import environment, make_bucket

    with faulty(s3_server, share=0.0) as (endpoint, proxy):
        for name, value in environment(endpoint).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("CLIPQ_S3_PATIENCE_SECONDS", "0.5")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        yield f"s3://{make_bucket(s3_server)}/runs", proxy


def run(storage: str, engine: LocalEngine | None = None) -> Result:
    options = {
        "engine": "local", "epochs": 1, "batch_size": 32, "search_evaluations": 4, "search_start": 3, "search_images": 60, "control": "never",
        "target_ratio": 15, "rounds": 1, "weights": "random",
    }  # fmt: skip
    return compress(Source(make(**options, storage=storage)), engine or LocalEngine(), Reporter(quiet=True))


def before_commit(monkeypatch: pytest.MonkeyPatch, change: Callable[[], None]) -> None:
    """Let `change` happen when everything is made and the commit begins."""
    real: Commit = manifest.commit

    def commit(target: Store, files: Mapping[str, bytes], document: Mapping[str, Any]) -> None:
        change()
        real(target, files, document)

    monkeypatch.setattr(manifest, "commit", commit)


@pytest.mark.parametrize(
    ("state", "reason"),
    [("refusing", r"the store refuses access \(AccessDenied\); allow these credentials to get, put, delete and list objects there, and to list and abort multipart uploads"),
     ("gone", r"the store cut the connection \(\w+\); check AWS_ENDPOINT_URL and the network")],
)  # fmt: skip
def test_a_run_that_cannot_be_committed_is_kept_and_committed_by_the_same_command(
    place: tuple[str, FaultyProxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, reason: str
) -> None:
    storage, proxy = place
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before_commit(monkeypatch, lambda: setattr(proxy, state, True))
    with pytest.raises(RunError) as caught:
        run(storage)
    setattr(proxy, state, False)
    line, kept = str(caught.value), tmp_path / "clipq-uncommitted"
    said = re.fullmatch(
        rf"the run cannot be committed: cannot (?:write [\d,]+ bytes to|look up) {storage}/model=lenet5/run=(r-\w+)/[\w.]+: {reason}; "
        rf"its stages are kept in {storage}, its files in {kept}/model=lenet5/run=\1 on \S+: "
        r"the same command again commits it, and makes only the last step anew",
        line,
    )
    assert said, line
    files = {path.name: path.read_bytes() for path in (kept / "model=lenet5" / f"run={said[1]}").iterdir()}
    assert {"model.clq", "layers.parquet", "trials.parquet"} <= files.keys()
    assert codec.decode(files["model.clq"]).tensors
    assert manifest.committed(Store(storage)) == []

    monkeypatch.setattr(manifest, "commit", Unchanged.commit)
    result = run(storage)
    assert manifest.verify(Store(result.uri)) == []
    assert all(one["reused"] for one in result.manifest["stages"]), result.manifest["stages"]
    assert Store(result.uri).read("model.clq") == files["model.clq"]


class Unchanged:
    """The commit as it is."""

    commit = staticmethod(manifest.commit)


def test_a_store_that_goes_away_in_the_middle_ends_the_run_and_says_what_is_kept(
    place: tuple[str, FaultyProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, proxy = place
    real = LocalEngine.train

    def train(engine: LocalEngine, task: Any, progress: Any) -> None:
        proxy.refusing = True
        real(engine, task, progress)

    monkeypatch.setattr(LocalEngine, "train", train)
    with pytest.raises(
        RunError,
        match=rf"; what is finished is kept in {storage}: the same command again goes on behind it\Z",
    ):
        run(storage)
    monkeypatch.undo()


class GoneAtTheClaim(LocalEngine):
    """Of a store that goes away once it was seen that it can be written, before the run is claimed."""

    proxy: FaultyProxy

    def check(self, config: Config) -> None:
        super().check(config)
        self.proxy.gone = True


def test_a_store_that_goes_away_before_a_run_is_claimed_is_no_mistake_of_the_input(
    place: tuple[str, FaultyProxy],
) -> None:
    storage, proxy = place
    engine = GoneAtTheClaim()
    engine.proxy = proxy
    with pytest.raises(RunError, match=f"what is finished is kept in {storage}: the same command again"):
        run(storage, engine)


def test_a_committed_run_that_cannot_be_read_is_not_called_damaged(
    place: tuple[str, FaultyProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, proxy = place
    result, real = run(storage), manifest.checked

    def checked(data: bytes, stated: Mapping[str, Any], origin: str) -> bytes:
        proxy.gone = True  # behind the first of its files
        return real(data, stated, origin)

    with monkeypatch.context() as away:
        away.setattr(manifest, "checked", checked)
        with pytest.raises(RunError, match=f"what is finished is kept in {storage}") as caught:
            run(storage)
        assert "damaged" not in str(caught.value)
        proxy.gone = False
        # who verifies everything is told of each file that could not be read
        assert len(manifest.verify(Store(result.uri))) == len(result.manifest["files"]) - 1
    proxy.gone = False
    assert run(storage).reused


def test_a_manifest_whose_answer_got_lost_is_this_runs_own(
    place: tuple[str, FaultyProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The put came through, the client asked again, and the store said that there is one."""
    storage, _ = place
    store, real = Store(storage), Store.create

    def create(self: Store, name: str, data: bytes) -> bool:
        assert real(self, name, data)
        return real(self, name, data)

    monkeypatch.setattr(Store, "create", create)
    target = store.child("fleet=f")
    manifest.commit(target, {"x": b"1"}, {"format": 1, "fleet": "f"})
    assert json.loads(target.read("manifest.json"))["fleet"] == "f"
    assert manifest.verify(target) == []
