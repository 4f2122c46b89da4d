"""One job at a time makes a run; a dead one's claim goes to the next, by the clock of the store."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from refusals import refused

from clipq_ray import claims, connections
from clipq_ray.claims import Claim, Holder, claim
from clipq_ray.errors import ConfigError, HeldError, StorageError
from clipq_ray.storage import Store

pytest_plugins = ["s3_server"]


@pytest.fixture(params=["directory", "memory"])
def work(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(tmp_path if request.param == "directory" else f"memory://{uuid.uuid4().hex}")


def taken(store: Store) -> Claim:
    found = claim(store)
    assert isinstance(found, Claim)
    return found


def aged(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """The store's clock as if so much time had passed since the last write."""
    real = Store.now
    monkeypatch.setattr(Store, "now", lambda store: real(store) + seconds)


def test_the_second_sees_who_holds_the_run_until_it_is_given_back(work: Store) -> None:
    first = taken(work)
    second = claim(work)
    assert isinstance(second, Holder)
    assert f"process {__import__('os').getpid()}" in second.words
    first.give_back()
    taken(work).give_back()
    assert work.names() == []


def test_what_is_finished_leaves_nothing_though_its_claim_was_being_written(
    work: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.01)
    begun, write = threading.Event(), Store.write

    def slow(store: Store, name: str, data: bytes) -> None:
        begun.set()
        time.sleep(0.1)
        write(store, name, data)

    run = work.child("run")
    first = taken(run.child("_work"))
    run.write("_work/checkpoint/0", b"1")
    monkeypatch.setattr(Store, "write", slow)
    assert begun.wait(30)
    first.finish()
    first.give_back()
    assert run.names() == []
    assert run.local is None or list(run.local.iterdir()) == []


def test_of_many_at_once_one_gets_it(tmp_path: Path) -> None:
    """Not in fsspec's memory, where two may create the same object."""
    work, barrier = Store(tmp_path), threading.Barrier(8)

    def attempt(_: int) -> Claim | Holder:
        barrier.wait()
        return claim(work)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(attempt, range(8)))
    owners = [one for one in found if isinstance(one, Claim)]
    assert len(owners) == 1
    owners[0].give_back()


def test_a_claim_that_is_not_kept_alive_expires_by_the_stores_clock(
    work: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = taken(work)
    aged(monkeypatch, claims.lifetime() - 60)
    assert isinstance(claim(work), Holder)
    aged(monkeypatch, 90)
    second = taken(work)
    assert work.names() == ["claim-000001.json", "claim-000002.json"]
    first.give_back()
    second.give_back()


@pytest.mark.parametrize("said", ["2m", "nan", "-1", "inf"])
def test_a_patience_that_is_no_time_is_refused_in_one_line(
    said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPQ_S3_PATIENCE_SECONDS", said)
    with refused(ConfigError, match=f"seconds, 0 or more, in CLIPQ_S3_PATIENCE_SECONDS, got '{said}'"):
        claims.lifetime()


def test_a_claim_outlives_every_outage_that_its_own_job_waits_for(
    work: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert claims.lifetime() > connections.PATIENCE_SECONDS + 2 * claims.BEAT_SECONDS
    monkeypatch.setenv("CLIPQ_S3_PATIENCE_SECONDS", "900")
    first = taken(work)
    monkeypatch.delenv("CLIPQ_S3_PATIENCE_SECONDS")  # another job need not be as patient
    aged(monkeypatch, 900 + 2 * claims.BEAT_SECONDS)
    assert isinstance(claim(work), Holder)
    aged(monkeypatch, 2 * claims.BEAT_SECONDS)  # beside the time above
    second = taken(work)
    first.give_back()
    second.give_back()


@pytest.mark.parametrize("jump", [-86_400.0, 86_400.0])
def test_this_machines_clock_decides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    work = Store(tmp_path)
    first = taken(work)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump)
    assert isinstance(claim(work), Holder)
    first.give_back()


def test_who_was_away_for_too_long_learns_it_and_leaves_the_new_owners_claim(
    work: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.05)
    first = taken(work)
    first.check()
    work.write("claim-000002.json", json.dumps({"owner": "other", "words": "other"}).encode())
    limit = time.monotonic() + 120
    while not first._lost and time.monotonic() < limit:
        time.sleep(0.01)
    with pytest.raises(HeldError, match="another job took over"):
        first.check()
    first.give_back()
    assert "claim-000002.json" in work.names()


def test_a_claim_is_kept_alive(work: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.05)
    first = taken(work)
    before = work.modified("claim-000001.json")
    limit = time.monotonic() + 120
    while work.modified("claim-000001.json") <= before and time.monotonic() < limit:
        time.sleep(0.01)
    assert work.modified("claim-000001.json") > before
    first.give_back()


def test_the_claim_of_a_process_that_ended_on_this_machine_is_dead_at_once(tmp_path: Path) -> None:
    code = f"import os; from clipq_ray import claims, storage; claims.claim(storage.Store({str(tmp_path)!r})); os._exit(9)"
    subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    work = Store(tmp_path)
    assert work.names() == ["claim-000001.json"]
    taken(work).give_back()


def test_the_claim_of_another_users_process_that_cannot_be_seen_counts_by_its_age(
    work: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(number: int, signal: int) -> None:
        raise PermissionError

    first = taken(work)
    monkeypatch.setattr(claims, "process", lambda number: [])  # /proc with hidepid
    monkeypatch.setattr("os.kill", kill)
    assert isinstance(claim(work), Holder)
    aged(monkeypatch, claims.lifetime() + 1)
    second = taken(work)
    first.give_back()
    second.give_back()


def test_where_machines_cannot_be_told_a_claim_counts_by_its_age(
    work: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "place", lambda: "")
    first = taken(work)
    monkeypatch.setattr(claims, "runs", lambda process: False)  # on another machine
    assert isinstance(claim(work), Holder)
    first.give_back()


def test_a_damaged_claim_counts_by_its_age(work: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    work.write("claim-000007.json", b"{")
    assert claim(work) == Holder(7, "somebody")
    aged(monkeypatch, claims.lifetime() + 1)
    second = taken(work)
    assert work.names() == ["claim-000007.json", "claim-000008.json"]
    second.give_back()


def test_a_store_that_overwrites_in_silence_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    work = Store(tmp_path)
    assert work.exclusive()
    taken(work).give_back()
    assert caplog.messages == []

    def overwrite(name: str, data: bytes) -> bool:
        work._backend.write(name, data)
        return True

    monkeypatch.setattr(work._backend, "create", overwrite)
    assert not work.exclusive()
    taken(work).give_back()
    assert "has no conditional writes" in caplog.text


def test_claims_on_s3(s3_uri: str) -> None:
    work = Store(f"{s3_uri}/claims")
    assert work.exclusive()
    first = taken(work)
    assert isinstance(claim(work), Holder)
    first.give_back()


def test_a_claim_that_is_given_back_while_it_is_looked_at_is_none(
    work: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = taken(work)
    real = Store.read

    def read(store: Store, name: str) -> bytes:
        first.give_back()
        return real(store, name)

    monkeypatch.setattr(Store, "read", read)
    second = claim(work)
    assert isinstance(second, Claim)
    second.give_back()


def test_a_claim_that_could_not_be_given_back_holds_up_its_own_process_no_longer(
    work: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = taken(work)

    def refused(store: Store, name: str) -> None:
        raise StorageError("the store is gone")

    with monkeypatch.context() as gone:
        gone.setattr(Store, "remove", refused)
        first.give_back()
    assert work.names() == ["claim-000001.json"]
    taken(work).give_back()
