"""Storage: the same promises on a local directory, on S3 and in memory."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from refusals import refused

from clipq_ray import backends, connections, objects
from clipq_ray.connections import Connection
from clipq_ray.errors import ConfigError, StorageError
from clipq_ray.storage import Store, run_store, stage_store

pytest_plugins = ["s3_server"]


@pytest.fixture(params=["local", "s3", "memory"])
def store(request: pytest.FixtureRequest) -> Store:
    if request.param == "local":
        return Store(request.getfixturevalue("tmp_path") / "a" / "b")
    if request.param == "s3":
        return Store(f"{request.getfixturevalue('s3_uri')}/a/b")
    return Store(f"memory://{uuid.uuid4().hex}/a/b")


class S3Answer(Exception):
    """An answer with an error code, as botocore raises it."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.response = {"Error": {"Code": code}}


def own_connection(uri: str) -> Store:
    """A store whose connection no other test has."""
    store = Store(uri)
    store._backend.connection = Connection("s3")
    return store


def test_what_is_written_is_read_back_and_a_second_write_replaces_it(store: Store) -> None:
    store.write("x/one.bin", b"first")
    store.write("x/one.bin", b"second, longer")
    assert store.read("x/one.bin") == b"second, longer"
    assert store.size("x/one.bin") == 14
    store.write("empty", b"")
    assert store.read("empty") == b""
    assert store.size("empty") == 0


def test_names_are_relative_sorted_recursive_and_begin_with_the_prefix(store: Store) -> None:
    assert store.names() == []
    for name in ("model=b/run=2/m.json", "model=a/run=1/m.json", "model=a/x", "mode", "z[1].txt"):
        store.write(name, b"1")
    assert store.names() == ["mode", "model=a/run=1/m.json", "model=a/x", "model=b/run=2/m.json", "z[1].txt"]
    assert store.names("model=") == ["model=a/run=1/m.json", "model=a/x", "model=b/run=2/m.json"]
    assert store.names("model=a/") == ["model=a/run=1/m.json", "model=a/x"]
    assert store.names("model=a/r") == ["model=a/run=1/m.json"]
    assert store.names("none/") == []
    assert store.child("model=a").names() == ["run=1/m.json", "x"]


def test_a_directory_is_no_object(store: Store) -> None:
    store.write("folder/file", b"1")
    assert store.exists("folder/file")
    assert not store.exists("folder")
    assert not store.exists("other")
    with pytest.raises(StorageError, match="folder"):
        store.size("folder")


def test_listings_show_at_once_what_another_store_did(store: Store) -> None:
    other = Store(store.uri)
    for step in range(3):
        other.write(f"step-{step}", b"1")
        assert store.names() == [f"step-{one}" for one in range(step + 1)]
        assert store.exists(f"step-{step}")
    other.remove("step-1")
    assert store.names() == ["step-0", "step-2"]
    assert not store.exists("step-1")


def test_create_puts_an_object_only_where_none_is(store: Store) -> None:
    assert store.create("lock", b"first")
    assert not store.create("lock", b"second")
    assert store.read("lock") == b"first"
    assert store.names() == ["lock"]


def test_of_many_creators_at_once_exactly_one_wins_and_its_content_stands(storage_uri: str) -> None:
    store = Store(storage_uri)
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda one: Store(storage_uri).create("lock", str(one).encode()), range(8)))
    assert sum(won) == 1
    assert store.read("lock") == str(won.index(True)).encode()


def test_create_works_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refused)
    store = Store(tmp_path)
    assert store.create("lock", b"first")
    assert not store.create("lock", b"second")
    assert store.read("lock") == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_what_could_not_be_created_without_hard_links_is_not_there(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    def failing(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, "link", no_links)
    store = Store(tmp_path)
    with monkeypatch.context() as while_failing:
        while_failing.setattr(os, "replace", failing)
        with pytest.raises((StorageError, KeyboardInterrupt)):
            store.create("lock", b"first")
    assert not list(tmp_path.iterdir())
    assert store.create("lock", b"second")
    assert store.read("lock") == b"second"


def test_removing_takes_what_is_there_and_minds_nothing_that_is_not(store: Store) -> None:
    store.write("keep", b"1")
    store.write("work/a/b", b"1")
    store.write("work/c", b"1")
    store.remove("nothing")
    store.child("work").remove_tree()
    store.child("work").remove_tree()
    assert store.names() == ["keep"]
    store.remove("keep")
    assert store.names() == []


def test_a_file_that_another_process_removes_meanwhile_does_not_keep_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "s")
    for name in ("a", "b/c", "b/d", "e"):
        store.write(name, b"1")
    unlink = os.unlink

    def second(path: str, **options: Any) -> None:
        unlink(path, **options)  # the other process is first, every time
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", second)
    store.remove_tree()
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("method", ["write", "create"])
@pytest.mark.parametrize("moment", ["open", "link", "replace"])
def test_what_is_written_while_a_directory_is_removed_is_there_whole(
    method: str, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when one job ends while another looks whether it may begin."""
    store, removals = Store(tmp_path / "s"), [2]
    kind: Any = Path if moment == "open" else os
    real = getattr(kind, moment)

    def beside(*given: Any, **more: Any) -> Any:
        if removals[0] and "deep" in str(given[0]):
            removals[0] -= 1
            store.remove_tree()
        return real(*given, **more)

    monkeypatch.setattr(kind, moment, beside)
    getattr(store, method)("deep/below/a", b"whole")
    assert store.read("deep/below/a") == b"whole"
    assert store.names() == ["deep/below/a"]


def test_a_directory_that_another_process_writes_into_while_it_is_removed_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "s")
    store.write("a/b", b"1")
    rmdir = os.rmdir

    def beside(path: Any, **more: Any) -> None:
        store._backend.root.joinpath("a/c").write_bytes(b"2") if (tmp_path / "s" / "a").exists() else None
        rmdir(path, **more)

    monkeypatch.setattr(os, "rmdir", beside)
    store.remove_tree()
    assert store.names() == ["a/c"]


def test_links_to_directories_are_followed_and_loops_end(tmp_path: Path) -> None:
    store, disk = Store(tmp_path / "s"), tmp_path / "disk"
    Store(disk).write("run=1/a", b"1")
    store.write("b", b"2")
    (tmp_path / "s" / "model=x").symlink_to(disk)
    (disk / "back").symlink_to(tmp_path / "s")
    assert store.names() == ["b", "model=x/run=1/a"]
    assert store.entries("model=x/").keys() == {"model=x/run=1/a"}


def test_removing_everything_in_a_bucket_keeps_the_bucket(s3_uri: str) -> None:
    store = Store(s3_uri)
    store.write("a/b", b"1")
    store.remove_tree()
    assert store.names() == []
    store.write("c", b"1")
    assert store.names() == ["c"]


def test_check_writable_leaves_nothing_behind(store: Store) -> None:
    store.check_writable()
    assert store.names() == []
    if store.local is not None:
        assert list(store.local.iterdir()) == []


def test_names_that_leave_the_store_are_refused(store: Store) -> None:
    for name in ("", "..", "a/../../b", "/etc/passwd", "a//b", "a/", "./a", "a\0b"):
        with pytest.raises(StorageError, match="relative name"):
            store.write(name, b"1")
    with pytest.raises(StorageError, match="relative name"):
        store.child("..")
    with pytest.raises(StorageError, match="relative name"):
        store.names("../")


def test_reading_what_is_not_there_names_the_uri(store: Store) -> None:
    with refused(StorageError, match=re.escape(f"cannot read {store.uri}/missing.bin")) as caught:
        store.read("missing.bin")
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_a_store_pickles_as_its_uri_and_equals_its_copy(store: Store) -> None:
    store.write("x", b"before")
    data = pickle.dumps(store.child("sub"))
    assert len(data) < 250
    copy = pickle.loads(data)
    assert copy == store.child("sub")
    assert hash(copy) == hash(store.child("sub"))
    copy.write("y", b"1")
    assert store.names() == ["sub/y", "x"]


def _read_in_child(store: Store, answers: multiprocessing.Queue[bytes]) -> None:
    answers.put(store.read("x"))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_uses_the_store_that_it_inherits(storage_uri: str) -> None:
    store = Store(storage_uri)
    store.write("x", b"hello")
    context = multiprocessing.get_context("fork")
    answers: multiprocessing.Queue[bytes] = context.Queue()
    child = context.Process(target=_read_in_child, args=(store, answers))
    child.start()
    try:
        assert answers.get(timeout=60) == b"hello"
    finally:
        child.join(10)
        if child.is_alive():
            child.kill()
    assert store.read("x") == b"hello"


def test_arrow_reads_and_writes_the_same_objects(store: Store) -> None:
    filesystem, path = store.arrow()
    store.write("t/a.txt", b"hello")
    with filesystem.open_input_stream(f"{path}/t/a.txt") as stream:
        assert stream.read() == b"hello"
    table = pa.table({"x": [1, 2]})
    pq.write_table(table, f"{path}/t/b.parquet", filesystem=filesystem)
    assert store.names() == ["t/a.txt", "t/b.parquet"]
    assert pq.read_table(f"{path}/t/b.parquet", filesystem=filesystem, partitioning=None).equals(table)


def test_arrow_file_systems_travel_to_other_processes(storage_uri: str) -> None:
    store = Store(storage_uri)
    store.write("a.txt", b"hello")
    filesystem, path = pickle.loads(pickle.dumps(store.arrow()))
    with filesystem.open_input_stream(f"{path}/a.txt") as stream:
        assert stream.read() == b"hello"


def test_local_uris_are_absolute_whatever_way_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = str(tmp_path / "runs")
    spelled = (
        "runs",
        "./runs/",
        f"file://{expected}",
        f"file://localhost{expected}",
        f"{expected}/",
        "~/runs",
    )
    for uri in (*spelled, Path("runs")):
        assert Store(uri).uri == expected
    assert Store("s3://bucket/a/").uri == "s3://bucket/a"
    assert Store("s3://bucket/a").child("b", "c").uri == "s3://bucket/a/b/c"
    assert Store("s3://bucket").local is None
    assert Store("runs").local == tmp_path / "runs"


@pytest.mark.parametrize(
    "uri",
    [
        "",
        " ",
        "s3://",
        "memory:///",
        "nosuch://bucket/x",
        "simplecache::s3://bucket/x",
        "s3:/bucket/x",
        "s3:bucket/x",
    ],
)
def test_a_uri_that_names_no_storage_is_refused_at_once(uri: str) -> None:
    with refused(StorageError, match="^expected "):
        Store(uri)


def test_of_file_splits_a_uri_into_store_and_name(tmp_path: Path) -> None:
    assert Store.of_file(tmp_path / "m.clq") == (Store(tmp_path), "m.clq")
    assert Store.of_file("s3://bucket/a/m.clq") == (Store("s3://bucket/a"), "m.clq")
    assert Store.of_file("/m.clq") == (Store("/"), "m.clq")
    with pytest.raises(StorageError, match="URI of a file"):
        Store.of_file("s3://bucket")


def test_a_write_that_fails_leaves_the_old_content_and_no_leftovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    store.write("x", b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with refused(
        StorageError,
        match=rf"^cannot write 3 bytes to {tmp_path}/x: No space left on device, [\d,]+ bytes are free; free space there or choose another storage$",
    ):
        store.write("x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_leftovers_of_a_killed_writer_are_never_listed_and_go_with_the_tree(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    store.write("x", b"1")
    (tmp_path / "s" / f"{backends.INTERNAL}0123.part").write_bytes(b"half")
    assert store.names() == ["x"]
    store.remove_tree()
    assert not (tmp_path / "s").exists()


def test_readers_see_a_whole_object_while_it_is_rewritten(tmp_path: Path) -> None:
    store = Store(tmp_path)
    contents = [bytes([one]) * 200_000 for one in range(4)]
    store.write("x", contents[0])
    seen, over, reads = set[bytes](), threading.Event(), 0

    def rewrite() -> None:
        for content in itertools.cycle(contents):
            store.write("x", content)
            if over.is_set():
                return

    thread = threading.Thread(target=rewrite)
    thread.start()
    limit = time.monotonic() + 60
    try:
        while (reads < 200 or len(seen) < len(contents)) and time.monotonic() < limit:
            seen.add(store.read("x"))
            reads += 1
    finally:
        over.set()
        thread.join()
    assert seen == set(contents)


def test_a_path_below_a_file_is_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with refused(StorageError, match="choose a path whose parents are directories"):
        Store(tmp_path / "file" / "runs").check_writable()


@pytest.fixture
def nobody() -> Iterator[None]:
    """Whoever runs this, without root's permission to write everywhere."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield
    if root:
        os.seteuid(0)


def test_a_directory_without_permission_is_refused_with_advice(nobody: None) -> None:
    # not below tmp_path, which belongs to whoever runs this, and others may not even enter
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o500)
        with pytest.raises(StorageError, match="give yourself permission"):
            Store(Path(folder) / "runs").check_writable()
        Path(folder).chmod(0o700)


def test_a_bucket_that_is_not_there_is_named_with_what_to_do(s3_uri: str) -> None:
    store = Store("s3://no-such-bucket-of-ours/runs")
    calls = (
        store.check_writable, store.names, lambda: store.read("x"), lambda: store.create("x", b"1"), lambda: store.exists("x"),
    )  # fmt: skip
    for call in calls:
        with refused(StorageError, match=r"s3://no-such-bucket-of-ours/runs.*create the bucket first"):
            call()


def test_a_process_that_begins_in_the_middle_of_a_job_waits_for_a_store_as_the_others_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[float] = []

    class Silent:
        def cat_file(self, _: str) -> bytes:
            asked.append(time.monotonic())
            if len(asked) < 3:
                raise ConnectionError("no route to host")
            return b"1"

    monkeypatch.setattr(connections, "_ANSWERED", False)
    monkeypatch.setattr(connections, "delays", lambda limit: iter([0.0] * 5))
    monkeypatch.setattr(Connection, "open", lambda connection: Silent())
    with pytest.raises(StorageError):
        own_connection("s3://bucket/x").read("y")
    assert len(asked) == 1
    connections.answered()
    assert own_connection("s3://bucket/x").read("y") == b"1"
    assert len(asked) == 3


def test_missing_credentials_are_named_with_what_to_do(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with refused(StorageError, match=r"check the credentials \(AWS_ACCESS_KEY_ID"):
        Store(s3_uri).check_writable()


def test_an_endpoint_that_does_not_answer_is_named_with_what_to_do(
    s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Port 9 (discard) is below the range that the system hands out, so nothing else listens there.
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with refused(StorageError, match="check AWS_ENDPOINT_URL and the network"):
        Store(s3_uri).check_writable()


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        ("AccessDenied", "; allow these credentials to get, put, delete and list"),
        ("RequestTimeTooSkewed", "; set this machine's clock$"),
    ],
)
def test_what_s3_refuses_as_not_permitted_is_told_apart(code: str, advice: str) -> None:
    class Denying:
        def cat_file(self, _: str) -> bytes:
            raise PermissionError("no") from S3Answer(code)

    store = own_connection("s3://bucket/x")
    store._backend.connection._made = (os.getpid(), Denying())
    with pytest.raises(StorageError, match=advice):
        store.read("y")


@pytest.mark.parametrize("said", ["abc", "0", "-1", "2.5"])
def test_attempts_that_are_no_number_are_refused_in_one_line(
    said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", said)
    with refused(ConfigError, match=f"1 or more, in AWS_MAX_ATTEMPTS, got '{said}'; correct it"):
        connections._options("s3")


@pytest.mark.parametrize(
    ("code", "there", "won"),
    [("412", True, False), ("PreconditionFailed", True, False), ("NotImplemented", False, True), ("501", True, False),
     ("ConditionalRequestConflict", True, False)],
)  # fmt: skip
def test_create_understands_what_other_s3_stores_answer(code: str, there: bool, won: bool) -> None:
    class Other:
        def __init__(self) -> None:
            self.written: list[str] = []

        def pipe_file(self, path: str, data: bytes, mode: str, **_: object) -> None:
            if mode == "create":
                raise OSError(22, "refused") from S3Answer(code)
            self.written.append(path)

        def info(self, path: str) -> dict[str, object]:
            if not there:
                raise FileNotFoundError(path)
            return {"type": "file", "size": 1}

    store = own_connection("s3://bucket/x")
    other = Other()
    store._backend.connection._made = (os.getpid(), other)
    assert store.create("y", b"1") is won
    assert other.written == (["bucket/x/y"] if won else [])


def test_create_tries_again_when_s3_asks_for_it() -> None:
    class Busy:
        def __init__(self) -> None:
            self.puts = 0

        def pipe_file(self, *_: object, **__: object) -> None:
            self.puts += 1
            if self.puts == 1:
                raise OSError(16, "conflict") from S3Answer("ConditionalRequestConflict")

        def info(self, path: str) -> dict[str, object]:
            raise FileNotFoundError(path)

    store = own_connection("s3://bucket/x")
    busy = Busy()
    store._backend.connection._made = (os.getpid(), busy)
    assert store.create("y", b"1")
    assert busy.puts == 2


def etag(uri: str, name: str) -> str:
    found: str = boto3.client("s3").head_object(Bucket=uri.removeprefix("s3://"), Key=name)["ETag"]
    return found.strip('"')


def test_a_large_object_goes_to_s3_in_parts_and_is_created_in_one_put(
    s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "PART_BYTES", 5 * 2**20)
    store, data = Store(s3_uri), os.urandom(11 * 2**20)
    store.write("large", data)
    assert etag(s3_uri, "large").endswith("-3")
    assert store.read("large") == data
    assert store.create("once", data)
    assert "-" not in etag(s3_uri, "once")
    assert not store.create("once", b"other")
    store.write("small", data[: 9 * 2**20])
    assert "-" not in etag(s3_uri, "small")


def test_parts_that_were_never_completed_are_seen_by_nobody_and_can_be_let_go(s3_uri: str) -> None:
    bucket, client = s3_uri.removeprefix("s3://"), boto3.client("s3")
    store = Store(f"{s3_uri}/runs")
    for key in ("runs/x/model.clq", "other/y"):
        client.create_multipart_upload(Bucket=bucket, Key=key)
    assert store.names() == []
    (upload,) = store.uploads(older_than=-60.0)
    assert upload.name == "x/model.clq"
    store.abandon(upload)
    store.abandon(upload)
    assert store.uploads(older_than=-60.0) == []
    assert [one["Key"] for one in client.list_multipart_uploads(Bucket=bucket)["Uploads"]] == ["other/y"]


def checksums(uri: str) -> dict[str, str]:
    """What a new connection says about checksums."""
    store = Store(uri)
    store.names()
    return {
        name: value
        for name, value in store._backend.connection.open().config_kwargs.items()
        if "checksum" in name
    }


def test_stores_that_a_user_names_get_the_checksums_that_they_take(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"):
        monkeypatch.delenv(name)
    needed = {
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    assert checksums(s3_uri) == needed
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    profile = tmp_path / "config"
    monkeypatch.setenv("AWS_CONFIG_FILE", str(profile))
    profile.write_text(f"[default]\nendpoint_url = {endpoint}\n")
    assert checksums(s3_uri) == needed
    profile.write_text(
        f"[profile mine]\nservices = here\nrequest_checksum_calculation = when_supported\n"
        f"[services here]\ns3 =\n  endpoint_url = {endpoint}\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "mine")
    assert checksums(s3_uri) == {"response_checksum_validation": "when_required"}
    assert "AWS_REQUEST_CHECKSUM_CALCULATION" not in os.environ


def test_amazons_own_store_keeps_its_checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    assert "request_checksum_calculation" not in connections._options("s3")["config_kwargs"]


def test_waits_grow_differ_and_end() -> None:
    waits = list(connections.delays(120.0))
    assert sum(waits) == pytest.approx(120.0)
    assert 0.25 <= waits[0] <= 0.5
    assert max(waits) <= 20.0
    assert waits != list(connections.delays(120.0))


class Wavering:
    """A store that fails so many times, in a way that may pass."""

    def __init__(self, failures: int) -> None:
        self.failures, self.calls = failures, 0

    def cat_file(self, path: str) -> bytes:
        self.calls += 1
        if self.failures:
            self.failures -= 1
            raise OSError(16, "busy") from S3Answer("SlowDown")
        return b"data"


def test_a_store_that_has_answered_is_waited_for_and_one_that_never_did_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "delays", lambda limit: iter([0.0, 0.0]))
    store, wavering = own_connection("s3://bucket/x"), Wavering(1)
    store._backend.connection._made = (os.getpid(), wavering)
    with pytest.raises(StorageError, match=r"the store is too busy \(SlowDown\)"):
        store.read("y")
    assert store.read("y") == b"data"
    wavering.failures = 2
    assert store.read("y") == b"data"
    wavering.failures, wavering.calls = 9, 0
    for calls in (3, 4):  # the second time nobody waits
        with pytest.raises(StorageError):
            store.read("y")
        assert wavering.calls == calls


def test_without_s3fs_an_s3_uri_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from clipq_ray.storage import Store, StorageError\n"
        "try: Store('s3://bucket/x')\n"
        "except StorageError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.stdout.strip().endswith("install clipq_ray[s3]")


def test_the_run_directory_has_one_owner_of_its_names() -> None:
    storage = Store("s3://bucket/x")
    assert (
        run_store(storage, "resnet20", "r-0123456789ab").uri
        == "s3://bucket/x/model=resnet20/run=r-0123456789ab"
    )
    assert stage_store(storage, "search", "ab12").uri == "s3://bucket/x/_stages/search-ab12"


@pytest.mark.parametrize("name", ["", "a/b", "a=b", "a b", "..", "a%20b", "é", "-x", "pkg.mod:net"])
def test_a_model_name_that_is_no_partition_key_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="expected a model name of letters"):
        run_store(Store("runs"), name, "r-1")
