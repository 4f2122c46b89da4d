"""A real S3 server (Ceph), alone and behind a proxy that fails five requests in a hundred: what moto promises holds there too. `make test-s3`."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster
from s3_faults import KINDS, FaultyProxy, faulty
from store_promises import exercise

from clipq_ray import claims, codec, console, manifest, objects, pruning
from clipq_ray.cli import main
from clipq_ray.errors import StorageError
from clipq_ray.storage import MANIFEST, WORK, Store, run_store, stage_store

if TYPE_CHECKING:
    from ceph_server import Ceph

pytest_plugins = ["ceph_server"]
pytestmark = pytest.mark.s3
ROOT = Path(__file__).resolve().parents[1]
JOB = (
    "--epochs=2", "--baseline-epochs=2", "--batch-size=32", "--search-evaluations=4", "--search-start=3", "--search-images=60", "--target-ratio=15",
    "--rounds=1", "--control=never",
)  # fmt: skip
PART = 5 * 2**20


def use(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name in (
        "AWS_PROFILE",
        "AWS_SESSION_TOKEN",
        "AWS_REQUEST_CHECKSUM_CALCULATION",
        "AWS_RESPONSE_CHECKSUM_VALIDATION",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def bucket(ceph: Ceph, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of a new bucket, with the environment that its owner has; nothing in it says how checksums are made."""
    use(monkeypatch, ceph.environment())
    return f"s3://{ceph.bucket()}"


@pytest.fixture
def failing(ceph: Ceph, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, FaultyProxy]]:
    """A new bucket behind a proxy that fails five requests in a hundred, and the proxy."""
    with faulty(ceph.endpoint, silence_seconds=3.0) as (endpoint, proxy):
        use(monkeypatch, {**ceph.environment(endpoint), "CLIPQ_S3_TIMEOUT_SECONDS": "2"})
        yield f"s3://{ceph.bucket()}", proxy


# --- the store -----------------------------------------------------------------------------------------------------------------


def test_a_store_keeps_its_promises(bucket: str) -> None:
    store = Store(f"{bucket}/some/place")
    store.check_writable()
    assert store.exclusive()
    exercise(store, 20)
    assert abs(store.now() - time.time()) < 60
    filesystem, path = store.arrow()
    with filesystem.open_output_stream(f"{path}/by-arrow") as stream:
        stream.write(b"hello")
    assert store.read("by-arrow") == b"hello"


def test_a_store_that_fails_keeps_them_too(failing: tuple[str, FaultyProxy]) -> None:
    uri, proxy = failing
    exercise(Store(f"{uri}/some/place"), 60)
    assert set(proxy.faults) == set(KINDS), proxy.faults
    assert sum(proxy.faults.values()) > 0.02 * proxy.requests


def test_listings_are_whole_beyond_one_page(bucket: str) -> None:
    store = Store(f"{bucket}/many")
    names = [f"{number:05d}" for number in range(1_050)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.write(name, b"1"), names))
    assert store.names() == names
    assert list(store.entries()) == names


# --- large objects -------------------------------------------------------------------------------------------------------------


def test_a_large_object_goes_in_parts_through_faults_and_comes_back_the_same(
    ceph: Ceph, failing: tuple[str, FaultyProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "PART_BYTES", PART)
    uri, proxy = failing
    proxy.share = 0.35
    monkeypatch.setenv("CLIPQ_S3_TIMEOUT_SECONDS", "3")
    proxy.silence_seconds = 4.0
    store, data = Store(uri), os.urandom(3 * PART + 1)
    for number in range(3):
        store.write(f"large-{number}", data)
        assert store.read(f"large-{number}") == data
        etag = ceph.client().head_object(Bucket=uri.removeprefix("s3://"), Key=f"large-{number}")["ETag"]
        assert etag.strip('"').endswith("-4")
    assert sum(proxy.faults.values()) > 0


_WRITER = """
import sys
from clipq_ray import objects
from clipq_ray.storage import Store
objects.PART_BYTES, objects._PARTS_AT_ONCE = {part}, 1
Store(sys.argv[1]).write("large", bytes(64 * {part}))
"""


def test_of_an_object_that_is_cut_in_the_middle_nothing_is_seen(
    ceph: Ceph, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(f"{bucket}/runs")
    store.write("large", b"before")
    stage_store(store, "search", "aaaa").write("group-0000.json", b"[]")
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER.format(part=PART), store.uri], cwd=ROOT, start_new_session=True
    )  # fmt: skip
    try:
        limit, parts = time.monotonic() + 120, 0
        while parts < 2:
            assert writer.poll() is None
            assert time.monotonic() < limit
            uploads = store.uploads(older_than=-60.0)
            if uploads:
                key = f"runs/{uploads[0].name}"
                listed = ceph.client().list_parts(
                    Bucket=bucket.removeprefix("s3://"), Key=key, UploadId=uploads[0].id
                )
                parts = len(listed.get("Parts", []))
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    assert store.read("large") == b"before"
    assert store.names() == ["_stages/search-aaaa/group-0000.json", "large"]
    assert store.uploads(older_than=3600.0) == []  # it could still be under way
    assert main(["prune", store.uri]) == 0
    assert "never completed" not in capsys.readouterr().out
    (upload,) = store.uploads(older_than=-60.0)
    store.abandon(upload)
    assert store.uploads(older_than=-60.0) == []
    assert store.read("large") == b"before"


# --- claims --------------------------------------------------------------------------------------------------------------------

ROUNDS = 12


def _race(uri: str, barrier: Barrier, answers: multiprocessing.Queue[list[bool]]) -> None:
    won, held = [], []
    for number in range(ROUNDS):
        barrier.wait(120)
        found = claims.claim(Store(f"{uri}/{number}"))
        won.append(isinstance(found, claims.Claim))
        if isinstance(found, claims.Claim):
            held.append(found)
    barrier.wait(120)
    for claim in held:
        claim.give_back()
    answers.put(won)


def test_of_two_processes_that_claim_the_same_run_one_gets_it(bucket: str) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(2), context.Queue()
    racers = [context.Process(target=_race, args=(f"{bucket}/claims", barrier, answers)) for _ in range(2)]
    for one in racers:
        one.start()
    try:
        first, second = (answers.get(timeout=180) for _ in racers)
    finally:
        for one in racers:
            one.join(30)
            if one.is_alive():
                one.kill()
    assert [one != other for one, other in zip(first, second, strict=True)] == [True] * ROUNDS
    assert Store(f"{bucket}/claims").names() == []


# --- runs, verify, prune -------------------------------------------------------------------------------------------------------


def test_verify_and_prune_see_what_is_there(bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    storage = Store(f"{bucket}/runs")
    run = run_store(storage, "m", "r-1")
    document = {"format": 1, "model": "m", "run": "r-1", "stages": [{"stage": "search", "key": "aaaa"}]}
    model = codec.encode(codec.Packed({}, {"bias": np.ones(3, np.float32)}))
    manifest.commit(run, {"report.html": b"page", "model.clq": model}, document)
    for key in ("aaaa", "bbbb"):
        stage_store(storage, "search", key).write("done.json", b"{}")
    run_store(storage, "m", "r-2").child(WORK).write("finetune/epoch", b"12345")
    assert main(["verify", storage.uri]) == 0
    run.write("report.html", b"other")
    assert main(["verify", storage.uri]) == 2
    assert f"{run.uri}/report.html: expected 4 bytes, got 5" in capsys.readouterr().out
    run.write("report.html", b"page")

    before = storage.names()
    assert main(["prune", storage.uri, "--yes"]) == 0
    assert "in 2 places were written to in the last 24 hours, and stay" in capsys.readouterr().out
    assert storage.names() == before
    time.sleep(1.1)  # this store's clock counts whole seconds
    assert len(pruning.leftovers(storage, 0.0).old) == 2
    assert main(["prune", storage.uri, "--yes", "--older-than-hours=0"]) == 0
    run_path = "model=m/run=r-1"
    assert storage.names() == [
        "_stages/search-aaaa/done.json",
        f"{run_path}/{MANIFEST}",
        f"{run_path}/model.clq",
        f"{run_path}/report.html",
    ]


# --- jobs ----------------------------------------------------------------------------------------------------------------------


def submitted(storage: str, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "compress.py"), *JOB, f"--storage={storage}", *more],
        capture_output=True, text=True, timeout=500, check=False, cwd=ROOT, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> str:
    """SHA-256 of the network that the same job leaves in a local folder."""
    storage = tmp_path_factory.mktemp("disk")
    ended = submitted(str(storage), "--engine=local")
    assert ended.returncode == 0, ended.stderr[-2000:]
    return network(str(storage))


def network(storage: str) -> str:
    """SHA-256 of the one committed network, after all its files were checked."""
    (run,) = manifest.committed(Store(storage))
    assert manifest.verify(run.store) == []
    found: str = manifest.read_manifest(run.store)["files"]["model.clq"]["sha256"]
    return found


def texts(name: str, data: bytes) -> bytes:
    """A stored object with what is compressed in it."""
    if name.endswith(".parquet"):
        import io

        return data + repr(pq.read_table(io.BytesIO(data)).to_pylist()).encode()
    if name.endswith(".clq"):
        return data + repr(codec.decode(data).metadata).encode()
    return data


def assert_clean(secret: str, ended: subprocess.CompletedProcess[str], storage: str | None = None) -> None:
    """The secret is in nothing that a job said, nor in anything that it stored."""
    assert secret not in ended.stdout + ended.stderr
    if storage is not None:
        store = Store(storage)
        assert len(store.names()) > 8
        for name in store.names():
            assert secret.encode() not in texts(name, store.read(name)), name


class Logged(NamedTuple):
    address: str
    folder: Path

    def logs(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file() and not path.is_symlink()]


@contextmanager
def logged_cluster() -> Iterator[Logged]:
    """A Ray that outlives the job, so that what its processes wrote is still there to be read; a job's own Ray takes its files along."""
    with tempfile.TemporaryDirectory(prefix="clipq-ray-") as own:  # short, since Ray's sockets lie in it
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 2, "include_dashboard": False, "temp_dir": own},
        )
        try:
            yield Logged(cluster.address, Path(own))
        finally:
            cluster.shutdown()


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_job_through_faults_leaves_the_bytes_that_it_leaves_in_a_folder(
    ceph: Ceph, failing: tuple[str, FaultyProxy], on_disk: str, engine: str
) -> None:
    uri, proxy = failing
    with logged_cluster() if engine == "ray" else nullcontext() as cluster:
        where = {} if cluster is None else {"RAY_ADDRESS": cluster.address}
        ended = submitted(f"{uri}/runs", f"--engine={engine}", **where)
        logs = [] if cluster is None else cluster.logs()
        assert (len(logs) > 20) is (engine == "ray")
        assert [path for path in logs if ceph.owner.secret.encode() in path.read_bytes()] == []
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert sum(proxy.faults.values()) > 2
    proxy.share = 0.0
    assert network(f"{uri}/runs") == on_disk
    assert not [name for name in Store(f"{uri}/runs").names() if f"/{WORK}/" in name]
    assert_clean(ceph.owner.secret, ended, f"{uri}/runs")
    again = submitted(f"{uri}/runs", f"--engine={engine}") if engine == "local" else None
    assert again is None or (again.returncode == 0 and "is committed already" in again.stderr)


def test_a_job_on_it_leaves_the_bytes_that_it_leaves_in_a_folder(
    bucket: str, on_disk: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = submitted(f"{bucket}/runs", "--engine=local")
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert network(f"{bucket}/runs") == on_disk
    assert main(["verify", f"{bucket}/runs"]) == 0
    assert capsys.readouterr().out.endswith(": ok\n")


# --- mistakes ------------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_used_is_one_line_before_anything_starts(
    ceph: Ceph, bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ceph_server import Keys
    from test_jobs import imported

    name, planted = bucket.removeprefix("s3://"), "pLaNtEd-secret-000"
    wrong = {**ceph.environment(keys=Keys(ceph.owner.access, planted))}
    nobody = {**ceph.environment(keys=Keys("NOBODYKNOWSME", planted))}
    reader = {**ceph.environment(keys=ceph.stranger)}
    everybody = {"Effect": "Allow", "Principal": "*", "Action": ["s3:GetObject", "s3:ListBucket"]}
    resources = [f"arn:aws:s3:::{name}", f"arn:aws:s3:::{name}/*"]
    policy = {"Version": "2012-10-17", "Statement": [{**everybody, "Resource": resources}]}
    cases: list[tuple[str, dict[str, str], list[str]]] = [
        ("s3://no-such-bucket-of-ours/runs", {}, ["there is no such bucket (NoSuchBucket)", "create the bucket first or correct its name"]),
        (f"{bucket}/runs", wrong, ["the store refuses the secret key (SignatureDoesNotMatch)", "check the credentials (AWS_ACCESS_KEY_ID"]),
        (f"{bucket}/runs", nobody, ["the store does not know the access key (InvalidAccessKeyId)", "check the credentials"]),
        (f"{bucket}/runs", reader, ["the store refuses access (AccessDenied)", "allow these credentials to get, put, delete and list"]),
        ("s3://A_bucket!/runs", {}, ["s3://A_bucket!/runs"]),
    ]  # fmt: skip
    ceph.client().put_bucket_policy(Bucket=name, Policy=json.dumps(policy))
    for storage, environment, words in cases:
        use(monkeypatch, environment or ceph.environment())
        monkeypatch.setattr("sys.argv", ["compress.py", *JOB, "--engine=local", f"--storage={storage}"])
        assert console.run("compress", imported("compress").main) == 2
        said = capsys.readouterr()
        assert said.out == ""
        (line,) = said.err.splitlines()
        assert line.startswith(f"compress: cannot write to {storage}: "), line
        assert all(word in line for word in words), line
        assert planted not in line
        assert ceph.owner.secret not in line
    use(monkeypatch, ceph.environment())
    assert Store(bucket).names() == []


def test_verify_and_prune_of_what_cannot_be_read_are_one_line(
    ceph: Ceph, bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, ceph.environment(keys=ceph.stranger))
    for command in ("verify", "prune"):
        assert main([command, f"{bucket}/runs"]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        (line,) = said.err.splitlines()
        assert "the store refuses access (" in line
    with pytest.raises(StorageError, match="there is no such bucket"):
        Store("s3://no-such-bucket-of-ours").names()
