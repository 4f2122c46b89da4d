"""A secret that is planted wherever a user may have one is in nothing that a job writes or says."""

from __future__ import annotations

import base64
import functools
import os
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import save_file
from torch import Tensor

from clipq_ray import refusals
from clipq_ray.errors import StorageError
from clipq_ray.redaction import redacted, redacted_json
from clipq_ray.storage import Store

pytest_plugins = ["s3_server"]
ROOT = Path(__file__).resolve().parents[1]
PLANTED = "pLaNtEd"
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": f"{PLANTED}-key-000", "AWS_SESSION_TOKEN": f"{PLANTED}-session-111", "HF_TOKEN": f"{PLANTED}-hub-222",
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot read https://me:pw@host/x: 403", "cannot read https://***@host/x: 403"),
        ("no attribute '//me:pw@host'", "no attribute '//***@host'"),
        ("https://me:p@w@host/x", "https://***@host/x"),
        ("s3://b/w.pt?X-Amz-Signature=abc&part=2", "s3://b/w.pt?X-Amz-Signature=***&part=2"),
        ("https://h/w?token=abc'; check", "https://h/w?token=***'; check"),
        ("s3://bucket/a@b/model=x/run=r-1", "s3://bucket/a@b/model=x/run=r-1"),
        ("InvalidURL: me:pw@host:80/x", "InvalidURL: ***@host:80/x"),
        ("mail me@host or memory://name", "mail me@host or memory://name"),
        ("layer1.0 at /home/me@work/x", "layer1.0 at /home/me@work/x"),
        ("s3://AKIAIOSFODNN7EXAMPLE:wJalr/K7MDENG/bPx@bucket/x@y", "s3://***@bucket/x@y"),
        ("https://me:p/w@1@host/x@y: 403", "https://***@host/x@y: 403"),
        (
            "https://host:8080/a@b and http://[::1]:8080/a:b@c",
            "https://host:8080/a@b and http://[::1]:8080/a:b@c",
        ),
        ("s3://bucket/a:b@c", "s3://bucket/a:b@c"),
        ('Invalid bucket name "AKIAIOSFODNN7EXAMPLE:wJalr": see', 'Invalid bucket name "***": see'),
        ('Invalid bucket name "minio:wJalr": see', 'Invalid bucket name "***": see'),
        (
            "https://h/o?X-Goog-Credential=a%40b&X-Goog-Signature=c&x=1",
            "https://h/o?X-Goog-Credential=***&X-Goog-Signature=***&x=1",
        ),
        (
            "https://h/o?api_key=a&api-key=b&apikey=c&auth=d",
            "https://h/o?api_key=***&api-key=***&apikey=***&auth=***",
        ),
        (
            "https://h/o?Policy=a&Signature=b&Key-Pair-Id=c",
            "https://h/o?Policy=***&Signature=***&Key-Pair-Id=***",
        ),
        ("https://h/o#access_token=a&refresh_token=b", "https://h/o#access_token=***&refresh_token=***"),
        (
            "https://h/o?author=a&tokens=3&policy_name=b#keys=c",
            "https://h/o?author=a&tokens=3&policy_name=b#keys=c",
        ),
    ],
)
def test_credentials_in_uris_are_stars_and_all_else_stays(text: str, shown: str) -> None:
    assert redacted(text) == shown


def test_values_of_secret_variables_are_stars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abcdefgh12345")
    monkeypatch.setenv("MY_TOKEN", "short")
    assert redacted_json({"a": ["x abcdefgh12345 y", 3], "b": "short"}) == {"a": ["x *** y", 3], "b": "short"}


@pytest.mark.parametrize("place", range(270, 305, 5))
def test_no_part_of_a_secret_is_left_where_a_long_error_is_cut(
    place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRETS["AWS_SECRET_ACCESS_KEY"])
    said = refusals.line(RuntimeError(f"{'x' * place} {SECRETS['AWS_SECRET_ACCESS_KEY']}"))
    assert len(said) <= 300
    assert set(said) <= {"x", " ", "*"}


def test_what_a_client_says_of_a_uri_with_a_secret_in_it_has_none(s3_uri: str) -> None:
    with pytest.raises(StorageError) as caught:
        Store(f"s3://AKIAIOSFODNN7EXAMPLE:{PLANTED}/{PLANTED}@bucket/x").read("y")
    assert PLANTED not in redacted(str(caught.value))


@pytest.fixture
def weights(digits_weights: dict[str, Tensor], tmp_path: Path) -> Iterator[str]:
    """A URI of weights on a web server, with a name, a password and a signature in it."""
    folder = tmp_path / "served"
    folder.mkdir()
    save_file(digits_weights, folder / "w.safetensors")

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *given: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://me:{PLANTED}-password-333@127.0.0.1:{server.server_address[1]}/w.safetensors"
    server.shutdown()
    server.server_close()


def submitted(storage: str, endpoint: str, weights: str, *more: str) -> subprocess.CompletedProcess[bytes]:
    from s3_server import environment

    command = [
        sys.executable, str(ROOT / "jobs" / "compress.py"), "--engine=local", "--epochs=1", "--batch-size=32", "--search-evaluations=4",
        "--search-start=3", "--search-images=60", "--target-ratio=15", "--rounds=1", "--control=never", f"--storage={storage}", f"--weights={weights}", *more,
    ]  # fmt: skip
    return subprocess.run(
        command, capture_output=True, timeout=800, check=False, cwd=ROOT,
        env={**os.environ, **environment(endpoint), **SECRETS},
    )  # fmt: skip


def assert_clean(name: str, data: bytes) -> None:
    for secret in (PLANTED, base64.b64encode(PLANTED.encode()).decode().rstrip("=")[:-1]):
        assert secret.encode() not in data, name


URL = f"http://me:{PLANTED}-password-333@127.0.0.1:9"
PLACES = {
    "weights": [f"--weights={URL}/w.safetensors"],
    "data": [f"--data={URL}/images"],
    "validation data": [f"--validation-data={URL}/images"],
    "storage on the web": [f"--storage={URL}/runs"],
    "storage on S3": [f"--storage=s3://me:{PLANTED}-password-333@bucket/runs"],
    "a query": [f"--data=http://127.0.0.1:9/x?X-Amz-Signature={PLANTED}-444&token={PLANTED}-555"],
    "a name that no option has": [f"--wieghts={URL}/w.safetensors"],
    "a model": [f"--model={URL}"],
    "a configuration": ["--config=CONFIG"],
    "a fleet": ["--fleet=FLEET"],
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_url_with_a_password_is_said_without_it_wherever_it_stands(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    place: str,
) -> None:
    from test_jobs import imported

    from clipq_ray import console

    config, fleet = tmp_path / "config.yaml", tmp_path / "fleet.yaml"
    config.write_text(f"weights: {URL}/w.safetensors\n")
    defaults = f"{{engine: local, storage: {tmp_path / 'runs'}}}"
    fleet.write_text(
        f"name: night\ndefaults: {defaults}\nmodels: [{{model: lenet5, weights: '{URL}/w.safetensors'}}, {{model: lenet_300_100, data: '{URL}/x'}}]\n"
    )
    monkeypatch.setenv("CLIPQ_S3_PATIENCE_SECONDS", "0")
    given = [one.replace("CONFIG", str(config)).replace("FLEET", str(fleet)) for one in PLACES[place]]
    own = (
        []
        if place == "a fleet"
        else ["--engine=local", *([] if "storage" in place else [f"--storage={tmp_path / 'runs'}"])]
    )
    monkeypatch.setattr("sys.argv", ["compress.py", *own, *given])
    assert console.run("compress", imported("compress").main) == 2
    said = capsys.readouterr()
    assert said.err
    assert_clean(place, (said.out + said.err + caplog.text).encode())
    stored = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert (place == "a fleet") is any(path.name == "manifest.json" for path in stored)
    for path in stored:
        data = path.read_bytes()
        if path.suffix == ".parquet":
            data += repr(pq.read_table(path).to_pylist()).encode()
        assert_clean(str(path), data)


def test_what_a_job_would_do_is_said_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    from data_files import numbered
    from test_jobs import imported

    place = f"memory://me:{PLANTED}-password-333@host"
    for name, first in (("train", 0), ("test", 60)):
        Store(f"{place}/data").write(f"{name}-0.parquet", numbered(first, 60, (32, 32)))
    given = ["--engine=local", "--dry-run", "--model=resnet20", "--weights=random", "--search-images=8"]
    main = imported("compress").main
    assert main([*given, f"--data={place}/data", f"--storage={place}/runs"]) == 0
    said = capsys.readouterr()
    assert "memory://***@host/data" in said.out
    assert "memory://***@host/runs" in said.out
    assert_clean("a dry run", (said.out + said.err).encode())


def test_an_endpoint_with_a_password_and_the_keys_of_a_profile_are_not_said(
    tmp_path: Path, s3_server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from s3_server import environment, make_bucket

    from clipq_ray import cli

    bucket = make_bucket(s3_server)
    for name, value in environment(s3_server).items():
        monkeypatch.setenv(name, value)
    profile = tmp_path / "credentials"
    profile.write_text(f"[mine]\naws_access_key_id = KEY\naws_secret_access_key = {PLANTED}-profile-666\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profile))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    assert cli.main(["verify", f"s3://{bucket}/runs"]) == 2
    assert cli.main(["verify", "s3://no-such-bucket-here/runs"]) == 2
    monkeypatch.setenv("AWS_ENDPOINT_URL", URL)
    assert cli.main(["verify", f"s3://{bucket}/runs"]) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 3
    assert "there is no such bucket" in said.err
    assert "credentials encoded in URL" in said.err
    assert_clean("stderr", (said.out + said.err).encode())


def test_no_output_of_a_job_holds_a_secret(s3_server: str, weights: str, tmp_path: Path) -> None:
    from s3_server import make_bucket

    for storage, code in (
        (str(tmp_path / "s"), 0),
        (f"s3://{make_bucket(s3_server)}/s", 0),
        ("s3://no-such-bucket-here/s", 2),
    ):
        ended = submitted(storage, s3_server, weights)
        assert ended.returncode == code, ended.stderr[-2000:]
        assert_clean("stdout", ended.stdout)
        assert_clean("stderr", ended.stderr)
    gone = submitted(
        str(tmp_path / "other"),
        s3_server,
        weights.replace("w.safe", "nowhere.safe") + f"?X-Amz-Signature={PLANTED}-444",
    )
    assert gone.returncode == 2
    assert b"nowhere.safetensors" in gone.stderr
    assert_clean("stderr", gone.stderr)
    files = [path for path in (tmp_path / "s").rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"model.clq", "manifest.json", "report.html", "layers.parquet"}
    for path in files:
        data = path.read_bytes()
        if path.suffix == ".parquet":
            data += repr(pq.read_table(path).to_pylist()).encode()
        if path.suffix == ".clq":
            data += header(data)
        assert_clean(str(path), data)


def header(data: bytes) -> bytes:
    """The metadata of a packed network as text; it is compressed in the file."""
    from clipq_ray import codec

    assert zlib.crc32(data)
    return repr(codec.decode(data).metadata).encode()
