"""The commit: what readers see, and what verify finds."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from committed_runs import commit, content, many_runs, run_files
from refusals import refused

from clipq_ray import manifest as manifests
from clipq_ray.cli import main
from clipq_ray.errors import FormatError, StorageError
from clipq_ray.storage import (
    LAYERS,
    MANIFEST,
    PREDICTIONS,
    REPORT,
    TRIALS,
    Store,
    run_store,
)

pytest_plugins = ["s3_server"]


@pytest.fixture
def storage(storage_uri: str) -> Store:
    return Store(storage_uri)


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return commit(Store(tmp_path), "lenet5", "r-1")


def test_a_committed_run_says_what_it_was_given_and_the_hash_of_every_file(storage: Store) -> None:
    run = commit(storage, "lenet5", "r-1")
    manifest = manifests.read_manifest(run)
    assert {key: manifest[key] for key in content("lenet5", "r-1")} == content("lenet5", "r-1")
    for name, data in run_files().items():
        assert run.read(name) == data
        assert manifest["files"][name] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifests.verify(run) == []


def test_the_manifest_is_written_last_so_a_job_that_dies_before_leaves_no_run(
    storage: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = Store.write

    def dying(self: Store, name: str, data: bytes) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(name)
        write(self, name, data)

    monkeypatch.setattr(Store, "write", dying)
    with pytest.raises(KeyboardInterrupt):
        commit(storage, "lenet5", "r-1")
    monkeypatch.undo()
    assert manifests.committed(storage) == []
    assert len(written) == 2
    with pytest.raises(StorageError, match="expected a committed run"):
        manifests.read_manifest(run_store(storage, "lenet5", "r-1"))


def test_a_committed_run_never_changes(storage: Store) -> None:
    run = commit(storage, "lenet5", "r-1")
    before = {name: run.read(name) for name in run.names()}
    with pytest.raises(StorageError, match="never changes"):
        manifests.commit(run, run_files(7), content("lenet5", "r-1"))
    assert {name: run.read(name) for name in run.names()} == before


def test_of_two_jobs_that_commit_the_same_run_one_is_told(
    storage: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_store(storage, "lenet5", "r-1")
    create = Store.create

    def beaten(self: Store, name: str, data: bytes) -> bool:
        create(self, name, b"{}")
        return create(self, name, data)

    monkeypatch.setattr(Store, "create", beaten)
    with pytest.raises(StorageError, match="never changes"):
        manifests.commit(run, run_files(), content("lenet5", "r-1"))
    assert run.read(MANIFEST) == b"{}"


def test_a_commit_whose_answer_got_lost_is_still_a_commit(
    storage: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Store.create

    def answer_lost(self: Store, name: str, data: bytes) -> bool:
        create(self, name, data)
        return create(self, name, data)

    monkeypatch.setattr(Store, "create", answer_lost)
    assert manifests.verify(commit(storage, "lenet5", "r-1")) == []


def test_what_a_job_that_lost_the_run_writes_late_does_not_stay(
    storage: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Store.create

    def beside(self: Store, name: str, data: bytes) -> bool:
        first = create(self, name, data)
        self.write(REPORT, b"<html>of another time</html>")  # its put was under way
        return first

    monkeypatch.setattr(Store, "create", beside)
    assert manifests.verify(commit(storage, "lenet5", "r-1")) == []


def test_a_job_that_was_halted_in_a_write_mends_the_run_that_it_damages(
    storage: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another job commits meanwhile, to the end."""
    write, other = Store.write, [True]
    run = run_store(storage, "lenet5", "r-1")
    files, document = run_files(), content("lenet5", "r-1")
    others = {**files, LAYERS: b"with other seconds"}

    def halted(self: Store, name: str, data: bytes) -> None:
        if name == LAYERS and other:
            other.clear()
            manifests.commit(run, others, document)
        write(self, name, data)

    waits: list[float] = []
    monkeypatch.setattr(Store, "write", halted)
    monkeypatch.setattr(time, "sleep", waits.append)
    manifests.commit(run, files, document)
    assert manifests.verify(run) == []
    assert {name: run.read(name) for name in files} == files
    assert sum(waits) >= 10  # the other might have been about to mend it


def test_what_a_job_has_written_over_another_that_still_commits_is_mended_by_that_one(
    storage: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other is between its manifest and its last look."""
    run = run_store(storage, "lenet5", "r-1")
    files, document = run_files(), content("lenet5", "r-1")
    others = {**files, LAYERS: b"with other seconds"}
    waits: list[float] = []

    def waited(seconds: float) -> None:
        waits.append(seconds)
        for one, data in files.items():
            run.write(one, data)

    manifests.commit(run, files, document)
    monkeypatch.setattr(time, "sleep", waited)
    for one, data in others.items():
        run.write(one, data)
    with pytest.raises(StorageError, match="never changes"):
        manifests._behind_another(run, others, others, document)
    assert len(waits) == 1
    assert manifests.verify(run) == []


@pytest.mark.parametrize("late", [REPORT, MANIFEST])
def test_a_summary_that_two_write_at_once_is_one_of_both(
    late: str, storage: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, write, other = storage.child("fleet=night"), Store.write, [b"other"]

    def beside(self: Store, name: str, data: bytes) -> None:
        write(self, name, data)
        if name == MANIFEST and other:
            write(self, late, other.pop())

    monkeypatch.setattr(Store, "write", beside)
    manifests.replace(fleet, {REPORT: b"first"}, {"format": 1, "fleet": "night", "runs": {}})
    assert manifests.verify(fleet) == []
    assert fleet.read(REPORT) == b"first"


def test_a_summary_whose_writer_dies_is_none(storage: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, write = storage.child("fleet=night"), Store.write
    document = {"format": 1, "fleet": "night", "runs": {}}
    manifests.replace(fleet, {REPORT: b"first"}, document)

    def dies(self: Store, name: str, data: bytes) -> None:
        if name == MANIFEST:
            raise StorageError("gone")
        write(self, name, data)

    monkeypatch.setattr(Store, "write", dies)
    with pytest.raises(StorageError, match="gone"):
        manifests.replace(fleet, {REPORT: b"second, longer"}, document)
    assert manifests.fleets(storage) == []


def test_files_that_come_back_other_than_written_are_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_store(Store(tmp_path), "lenet5", "r-1")
    monkeypatch.setattr(Store, "read", lambda self, name: b"garbled")
    with pytest.raises(StorageError, match="came back other than it was written"):
        manifests.commit(run, run_files(), content("lenet5", "r-1"))
    assert not run.exists(MANIFEST)


@pytest.mark.parametrize("bad", [{"metrics": float("nan")}, {"metrics": {1, 2}}, {"format": 2}])
def test_a_manifest_that_is_no_json_or_of_another_format_is_refused_before_anything_is_written(
    tmp_path: Path, bad: dict[str, Any]
) -> None:
    run = run_store(Store(tmp_path), "lenet5", "r-1")
    with pytest.raises(FormatError):
        manifests.commit(run, run_files(), content("lenet5", "r-1", **bad))
    assert run.names() == []


def test_every_truncation_and_every_changed_character_of_a_manifest_is_a_named_error(run: Store) -> None:
    data = run.read(MANIFEST)
    for length in range(0, len(data), 7):
        run.write(MANIFEST, data[:length])
        with pytest.raises(FormatError, match=re.escape(run.uri)):
            manifests.read_manifest(run)
    for place in range(len(data)):
        if data[place : place + 1].isspace():
            continue
        run.write(MANIFEST, data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert manifests.verify(run) != [], f"byte {place}"


@pytest.mark.parametrize(
    "text",
    [
        "[]", "3", "{}", '{"format": 2}', '{"format": 1}', '{"format": 1, "files": []}',
        '{"format": 1, "files": {"x": {"bytes": -1, "sha256": "' + "0" * 64 + '"}}}',
        '{"format": 1, "files": {"x": {"bytes": true, "sha256": "' + "0" * 64 + '"}}}',
        '{"format": 1, "files": {"x": {"bytes": 1, "sha256": "00"}}}',
        '{"format": 1, "files": {"../x": {"bytes": 1, "sha256": "' + "0" * 64 + '"}}}',
    ],
)  # fmt: skip
def test_json_that_is_no_manifest_is_a_named_error(run: Store, text: str) -> None:
    run.write(MANIFEST, text.encode())
    with pytest.raises(FormatError, match=re.escape(run.uri)):
        manifests.read_manifest(run)


def test_verify_names_every_damaged_file_in_one_line_each(storage: Store) -> None:
    run = commit(storage, "lenet5", "r-1")
    data = run.read(LAYERS)
    run.write(LAYERS, data[:50] + bytes([data[50] ^ 1]) + data[51:])
    run.write(REPORT, b"longer than before")
    run.remove(TRIALS)
    problems = manifests.verify(run)
    assert len(problems) == 3
    assert problems[0].startswith(f"{run.uri}/{LAYERS}: expected SHA-256")
    assert (
        problems[1]
        == f"{run.uri}/{REPORT}: expected 13 bytes, got 18; restore it, or make a new run with --force"
    )
    assert "got no file; restore it, or make a new run with --force" in problems[2]


def test_data_that_is_not_what_the_manifest_states_is_refused_by_name() -> None:
    data = b"content"
    stated = {"bytes": 7, "sha256": hashlib.sha256(data).hexdigest()}
    assert manifests.checked(data, stated, "uri") is data
    for other, entry in ((b"contenu", stated), (b"", stated), (data, {})):
        with pytest.raises(FormatError, match=r"^uri: expected "):
            manifests.checked(other, entry, "uri")


def test_reading_a_manifest_does_without_pyarrow() -> None:
    code = "import sys; sys.modules['pyarrow'] = None; import clipq_ray.manifest"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_verify_notices_a_run_that_lies_under_another_name(tmp_path: Path) -> None:
    run = commit(Store(tmp_path), "lenet5", "r-1")
    moved = tmp_path / "model=other"
    (tmp_path / "model=lenet5").rename(moved)
    problems = manifests.verify(Store(moved / "run=r-1"))
    assert problems == [
        f"{moved}/run=r-1/{MANIFEST}: expected model 'other' as in the path, got 'lenet5'; give the directory its name back"
    ]
    assert not run.exists(MANIFEST)


def test_only_committed_runs_are_listed_sorted(storage: Store) -> None:
    assert manifests.committed(storage) == []
    many_runs(storage)
    found = manifests.committed(storage)
    assert [(one.model, one.run) for one in found] == [("2024", "r-2"), ("lenet5", "r-1")]
    assert found[1].store == run_store(storage, "lenet5", "r-1")


def test_a_run_without_its_own_hash_is_read_but_not_called_sound(run: Store) -> None:
    manifest = json.loads(run.read(MANIFEST))
    del manifest["manifest_sha256"]
    run.write(MANIFEST, json.dumps(manifest).encode())
    assert manifests.read_manifest(run)["model"] == "lenet5"
    assert manifests.verify(run) == [f"{run.uri}/{MANIFEST}: expected a manifest_sha256, got none"]


DAMAGED = {
    "not a number": b'{"format": 1, "manifest_sha256": "", "x": NaN}',
    "infinite": b'{"format": 1, "manifest_sha256": "", "x": 1e999}',
    "half of a surrogate pair": b'{"format": 1, "manifest_sha256": "", "x": "\\ud800"}',
    "other text": b'{"format": 1, "x": "\xed\xa0\x80"}',
    "nested beyond Python": b'{"format": 1, "manifest_sha256": "", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested": b'{"format": 1, "manifest_sha256": "", "x": ' + b"[" * 64 + b"]" * 64 + b"}",
    "opened only": b"[" * 100_000,
    "long number": b'{"format": ' + b"9" * 5000 + b"}",
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_manifest_that_json_allows_but_nobody_can_use_is_damaged(
    damage: str, run: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    run.write(MANIFEST, DAMAGED[damage])
    at = f"{run.uri}/{MANIFEST}"
    with refused(FormatError, match=f"expected JSON in {re.escape(at)}, got .*; restore it"):
        manifests.read_manifest(run)
    assert main(["verify", run.uri]) == main(["inspect", run.uri]) == 2
    shown = capsys.readouterr()
    assert shown.out.startswith(f"expected JSON in {at}, got ")
    assert shown.err.startswith(f"clipq: expected JSON in {at}, got ")
    assert shown.out.count("\n") == shown.err.count("\n") == 1
    manifests.refuse_newer(run)  # a damaged one is no newer one


@pytest.mark.parametrize(
    "changes",
    [
        *({"runs": runs} for runs in (None, [], "r-1", {"a": 5}, {"a/../..": "b"}, {"a": ".."})),
        *({"stages": stages} for stages in (5, None, ["x"], [{}], [{"stage": "search", "key": 5}])),
        *({name: 5} for name in ("metrics", "data", "curves", "promise", "model", "run")),
        {"notes": [5]},
    ],
    ids=repr,
)
def test_a_sound_hash_makes_no_manifest_of_what_says_something_else(
    changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = Store(tmp_path).child("fleet=night")
    with refused(FormatError, match="say .* as manifests do"):
        manifests.replace(fleet, {}, {"format": 1, "fleet": "night", **changes})
        manifests.read_manifest(fleet)
    assert main(["verify", fleet.uri]) == main(["verify", str(tmp_path)]) == 2
    assert capsys.readouterr().out.count("\n") == 2


def test_what_a_renderer_does_not_find_in_a_manifest_is_one_line() -> None:
    with refused(FormatError, match="^expected place/manifest.json to say of a run what manifests do"), manifests.understood("place"):  # fmt: skip
        {"metrics": {}}["metrics"]["test"]


def test_a_run_without_a_network_is_not_called_sound(tmp_path: Path) -> None:
    run = run_store(Store(tmp_path), "lenet5", "r-1")
    manifests.commit(run, {REPORT: b""}, content("lenet5", "r-1"))
    (problem,) = manifests.verify(run)
    assert "expected it to list model.clq" in problem


@pytest.mark.parametrize("place", ["run=5", "model=x", "exp/run=5"])
def test_a_storage_may_be_called_as_a_run(place: str, tmp_path: Path) -> None:
    storage = Store(tmp_path / place)
    manifests.replace(storage.child("fleet=night"), {}, {"format": 1, "fleet": "night", "runs": {}})
    assert manifests.verify(storage.child("fleet=night")) == []


def test_a_manifest_may_be_nested(tmp_path: Path) -> None:
    run = run_store(Store(tmp_path), "lenet5", "r-1")
    manifests.commit(run, run_files(), content("lenet5", "r-1", deep=json.loads("[" * 60 + "]" * 60)))
    assert manifests.verify(run) == []


def test_the_names_of_a_run_are_those_of_the_design() -> None:
    assert (LAYERS, TRIALS, PREDICTIONS, REPORT, MANIFEST) == (
        "layers.parquet",
        "trials.parquet",
        "predictions.parquet",
        "report.html",
        "manifest.json",
    )
