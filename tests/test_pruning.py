"""What is removed from a storage is what nobody needs, and only after it was shown."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import boto3
import pytest

from clipq_ray import claims, manifest
from clipq_ray.cli import main
from clipq_ray.storage import MANIFEST, USES, WORK, Store, fleet_store, run_store, stage_store

pytest_plugins = ["s3_server"]
KEPT = ["search-aaaa", "finetune-bbbb"]


@pytest.fixture
def storage(tmp_path: Path) -> Store:
    """A committed run with its stages, and leftovers of every kind."""
    result = Store(tmp_path)
    stages = [{"stage": one.partition("-")[0], "key": one.partition("-")[2]} for one in KEPT]
    run = run_store(result, "lenet5", "r-000000000001")
    document = {"format": 1, "model": "lenet5", "run": "r-000000000001", "stages": stages}
    manifest.commit(run, {"report.html": b"report"}, document)
    for one in [*KEPT, "search-cccc"]:
        name, _, key = one.partition("-")
        stage_store(result, name, key).write("done.json", b"{}")
    run.child(WORK).write("finetune/checkpoint", b"12345")
    half = run_store(result, "lenet5", "r-000000000002")
    half.write("model.clq", b"half")
    half.child(WORK).write(f"{USES}/search-cccc", b"")
    fleet_store(result, "night").write("models.parquet", b"table")
    old = tmp_path / "_stages" / "search-aaaa" / ".clipq-dead.part"
    old.write_bytes(b"part")
    (tmp_path / ".clipq-new.part").write_bytes(b"under way")
    result.write("notes.txt", b"somebody's own")
    age(tmp_path, 25)
    return result


def age(folder: Path, hours: float) -> None:
    """As if everything in it, apart from a write that is under way, had been written so long ago."""
    then = time.time() - 3600 * hours
    for path in folder.rglob("*"):
        if path.is_file() and path.name != ".clipq-new.part":
            os.utime(path, (then, then))


def pruned(storage: Store, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert main(["prune", storage.uri, *more]) == 0
    return capsys.readouterr().out


def test_leftovers_are_shown_and_nothing_is_removed(
    storage: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    before = storage.names()
    said = pruned(storage, capsys)
    assert storage.names() == before
    for words in (
        "model=lenet5/run=r-000000000001: not named by the run's manifest, and no job makes it",
        "model=lenet5/run=r-000000000002: an unfinished run, which the same job would continue, and no job makes it",
        "fleet=night: a fleet without a manifest",
        "_stages/search-cccc: a stage that no committed run and no job under way uses",
        ".: writes that did not come to their end",
        "in 5 places; nothing was removed, --yes removes them",
    ):
        assert words in said


def test_what_was_shown_is_removed_and_nothing_else(
    storage: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    pruned(storage, capsys, "--yes")
    run = "model=lenet5/run=r-000000000001"
    assert storage.names() == sorted(
        [
            *(f"_stages/{one}/done.json" for one in KEPT),
            f"{run}/{MANIFEST}",
            f"{run}/report.html",
            "notes.txt",
        ]
    )
    assert not list(Path(storage.uri).rglob(".clipq-dead.part"))
    assert list(Path(storage.uri).rglob(".clipq-new.part"))
    assert f"nothing is left over in {storage.uri}" in pruned(storage, capsys, "--yes")


def test_what_a_job_under_way_uses_stays(storage: Store, capsys: pytest.CaptureFixture[str]) -> None:
    claim = claims.claim(run_store(storage, "lenet5", "r-000000000002").child(WORK))
    assert isinstance(claim, claims.Claim)
    said = pruned(storage, capsys, "--yes")
    assert "r-000000000002" not in said
    assert "search-cccc" not in said
    assert "_stages/search-cccc/done.json" in storage.names()
    claim.give_back()
    assert "search-cccc: a stage" in pruned(storage, capsys)


def test_what_was_claimed_since_it_was_shown_stays(
    storage: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from clipq_ray import pruning

    found: list[Any] = pruning.leftovers(storage).old
    claim = claims.claim(run_store(storage, "lenet5", "r-000000000002").child(WORK))
    assert isinstance(claim, claims.Claim)
    said: list[str] = []
    pruning.remove(storage, found, said.append)
    claim.give_back()
    assert said == [
        "kept: model=lenet5/run=r-000000000002 is used by now",
        "kept: _stages/search-cccc is used by now",
    ]
    assert "model=lenet5/run=r-000000000002/model.clq" in storage.names()


def test_what_was_written_to_in_the_last_day_stays_and_is_counted(
    storage: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job that was killed an hour ago may be submitted again; whoever is sure says so."""
    place = Path(storage.uri) / "_stages" / "search-cccc" / "done.json"
    for hours, stays in ((23, True), (25, False)):
        then = time.time() - 3600 * hours
        os.utime(place, (then, then))
        said = pruned(storage, capsys)
        assert ("_stages/search-cccc: a stage" not in said) is stays
        assert ("2 bytes  in 1 places were written to in the last 24 hours, and stay" in said) is stays
    said = pruned(storage, capsys, "--older-than-hours=26")
    assert (
        "in 3 places were written to in the last 26 hours, and stay; --older-than-hours 0 shows them" in said
    )
    assert "nothing else is left over" in said
    assert "search-cccc" not in said  # a run that stays goes on behind its search
    assert main(["prune", storage.uri, "--older-than-hours=-1"]) == 2
    assert "--older-than-hours: expected a number of hours" in capsys.readouterr().err


def test_a_young_run_keeps_the_stages_that_it_has_begun(
    storage: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    """A long job whose machine was lost an hour ago: its search ended long before."""
    storage.write(f"model=lenet5/run=r-000000000002/{WORK}/finetune/epoch-00001.safetensors", b"new")
    pruned(storage, capsys, "--yes")
    assert "_stages/search-cccc/done.json" in storage.names()
    assert f"model=lenet5/run=r-000000000002/{WORK}/{USES}/search-cccc" in storage.names()
    pruned(storage, capsys, "--yes", "--older-than-hours=0")
    assert "_stages/search-cccc/done.json" not in storage.names()
    assert not [path for path in Path(storage.uri).rglob("*") if path.is_dir() and not any(path.iterdir())]


def test_what_lies_behind_a_link_is_another_storages(
    storage: Store, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """And runs that are linked need their stages here."""
    other = Store(tmp_path_factory.mktemp("other"))
    (Path(other.uri) / "_stages").symlink_to(Path(storage.uri) / "_stages")
    before = storage.names()
    assert "nothing is left over" in pruned(other, capsys, "--yes")
    assert storage.names() == before
    disk = tmp_path_factory.mktemp("disk") / "model=lenet5"
    (Path(storage.uri) / "model=lenet5").rename(disk)
    (Path(storage.uri) / "model=lenet5").symlink_to(disk)
    pruned(storage, capsys, "--yes")
    assert {f"_stages/{one}/done.json" for one in KEPT} <= set(storage.names())


@pytest.mark.parametrize("moment", ["curve.json", "weights.safetensors"])
def test_what_is_made_anew_right_before_its_removal_stays(
    moment: str, storage: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clipq_ray import pruning

    stage = stage_store(storage, "baseline", "dddd")
    for name in ("curve.json", "weights.safetensors"):
        stage.write(name, b"old")
    age(Path(storage.uri), 25)
    found = [one for one in pruning.leftovers(storage).old if one.place.endswith("dddd")]
    is_as, made = pruning._is_as, []

    def beside(storage: Store, name: str, before: Any) -> bool:
        if name.endswith(f"dddd/{moment}") and not made:
            made.append(name)
            for one in ("weights.safetensors", "curve.json"):
                stage.write(one, b"new")
        return is_as(storage, name, before)

    monkeypatch.setattr(pruning, "_is_as", beside)
    pruning.remove(storage, found, lambda _: None)
    assert {name: stage.read(name) for name in stage.names()} == {
        "curve.json": b"new",
        "weights.safetensors": b"new",
    }


def test_age_is_told_by_the_clock_of_the_storage(
    storage: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = pruned(storage, capsys)
    real = time.time
    for jump in (-86_400.0, 86_400.0):
        monkeypatch.setattr(time, "time", lambda jump=jump: real() + jump)
        assert pruned(storage, capsys) == before


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_job_that_begins_while_things_are_removed_finds_a_stage_whole_or_not_at_all(
    storage: Store, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """It claims, names the stage, and then looks whether it is there: the order of the pipeline."""
    from clipq_ray import pruning

    stage_store(storage, "search", "cccc").write("group-0000.json", b"[]")
    age(Path(storage.uri), 25)
    found = pruning.leftovers(storage).old
    run, stage = run_store(storage, "lenet5", "r-000000000003"), stage_store(storage, "search", "cccc")
    held, seen = list[claims.Claim](), list[bool]()
    done, real = "_stages/search-cccc/done.json", Store.remove

    def job() -> None:
        claim = claims.claim(run.child(WORK))
        assert isinstance(claim, claims.Claim)
        held.append(claim)
        run.child(WORK).write(f"{USES}/search-cccc", b"")
        seen.append(stage.exists("done.json"))

    def removing(store: Store, name: str) -> None:
        if name == done and not held and moment == "before":
            job()
        real(store, name)
        if name == done and not held and moment == "after":
            job()

    monkeypatch.setattr(Store, "remove", removing)
    said: list[str] = []
    pruning.remove(storage, found, said.append)
    held[0].give_back()
    assert seen == [moment == "before"]
    assert "kept: _stages/search-cccc is used by now" in said
    assert stage.names() == ["done.json", "group-0000.json"]


def test_the_ends_of_stages_are_those_of_the_pipeline() -> None:
    from clipq_ray import pruning, searching, states, work

    assert all(
        pruning._is_end(f"_stages/x/{name}") for name in (work.CURVE, searching.DONE, "group-0007.json")
    )
    assert not pruning._is_end(f"_stages/x/{states.WEIGHTS}")


def test_what_a_later_job_writes_while_things_are_removed_stays(
    storage: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks when the end is gone already, and makes the stage again before its other objects are removed."""
    from clipq_ray import pruning

    stage = stage_store(storage, "baseline", "dddd")
    stage.write("weights.safetensors", b"old")
    stage.write("curve.json", b"{}")
    age(Path(storage.uri), 25)
    found = [one for one in pruning.leftovers(storage).old if one.place.endswith("dddd")]
    real, made = Store.remove, list[bool]()

    def removing(store: Store, name: str) -> None:
        if name.endswith("dddd/weights.safetensors"):
            raise AssertionError("what a job has made anew")
        real(store, name)

    look = pruning._without_their_ends

    def looked(*given: Any) -> Any:
        result = look(*given)
        made.append(stage.exists("curve.json"))
        stage.write("weights.safetensors", b"new")
        stage.write("curve.json", b"{}")
        return result

    monkeypatch.setattr(Store, "remove", removing)
    monkeypatch.setattr(pruning, "_without_their_ends", looked)
    pruning.remove(storage, found, lambda _: None)
    assert made == [False]
    assert stage.read("weights.safetensors") == b"new"
    assert stage.exists("curve.json")


def test_uploads_of_others_below_the_storage_are_not_ended(
    s3_uri: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, client = s3_uri.removeprefix("s3://"), boto3.client("s3")
    names = ("data/huge.tar", "imagenet.tar", "model=lenet5/run=r-000000000002/model.clq")
    for name in names:
        client.create_multipart_upload(Bucket=bucket, Key=name)
    store = Store(s3_uri)
    store.write("_stages/search-cccc/done.json", b"{}")
    real = Store.now
    monkeypatch.setattr(Store, "now", lambda store: real(store) + 3600 * 25)
    said = pruned(store, capsys, "--yes")
    assert f"parts of an object that was never completed ({names[2]})" in said
    left = [one["Key"] for one in client.list_multipart_uploads(Bucket=bucket)["Uploads"]]
    assert sorted(left) == sorted(names[:2])
    assert store.names() == []


def test_with_a_damaged_manifest_nothing_is_removed(
    storage: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    run_store(storage, "lenet5", "r-000000000001").write(MANIFEST, b"{")
    before = storage.names()
    assert main(["prune", storage.uri, "--yes"]) == 2
    assert "expected JSON in" in capsys.readouterr().err
    assert storage.names() == before


def test_a_run_is_no_storage(storage: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", f"{storage.uri}/model=lenet5/run=r-000000000001"]) == 2
    assert "expected a storage, got a run or a fleet" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["nowhere", "model=lenet5"])
def test_a_place_that_is_no_storage_is_refused(
    storage: Store, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    assert main(["prune", f"{storage.uri}/{place}"]) == 2
    assert "expected a storage that jobs have written to, got none at" in capsys.readouterr().err
