"""An S3 server on loopback for the tests: moto_server as a subprocess on a free port, ended by its pid.

A test module takes it by `pytest_plugins = ["s3_server"]` and uses the fixture `s3_uri` (a new, empty bucket, with the environment that
every client reads) or, for fixtures of a wider scope, `s3_server` with `environment` and `make_bucket`. One server serves the whole
session. Not covered: signatures (moto accepts any secret) and what real stores do differently; the cluster tests use Ceph for that.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import boto3
import pytest

START_LIMIT_SECONDS = 60.0


def environment(endpoint: str) -> dict[str, str]:
    """The variables with which s3fs, boto3 and pyarrow find the server, and nobody's own profile."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }


def make_bucket(endpoint: str) -> str:
    """The name of a new, empty bucket."""
    name = f"clipq-{uuid.uuid4().hex[:12]}"
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
    )
    client.create_bucket(Bucket=name)
    return name


@contextmanager
def serving() -> Iterator[str]:
    """The endpoint of a running server, `http://127.0.0.1:PORT`; the environment is left alone."""
    # Port 0: the system gives a free port and the server prints it, so no other process can take it in between.
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield _endpoint(process)
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _endpoint(process: subprocess.Popen[str]) -> str:
    """Read the server's output until it names its address; a thread goes on reading, so that the pipe never fills."""
    found: list[str] = []
    said: list[str] = []
    ready = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if ready.is_set():
                continue
            said.append(line)
            if match := re.search(r"http://127\.0\.0\.1:\d+", line):
                found.append(match.group())
                ready.set()
        ready.set()

    threading.Thread(target=read, daemon=True).start()
    if not ready.wait(START_LIMIT_SECONDS) or not found:
        raise RuntimeError(f"moto_server did not start: {''.join(said)[-500:]}")
    return found[0]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """`serving`, once for all tests."""
    with serving() as endpoint:
        yield endpoint


@pytest.fixture
def s3_uri(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """`s3://BUCKET` of a new, empty bucket; the environment points every client at the test server."""
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    for name, value in environment(s3_server).items():
        monkeypatch.setenv(name, value)
    return f"s3://{make_bucket(s3_server)}"


@pytest.fixture(params=["local", "s3"])
def storage_uri(request: pytest.FixtureRequest) -> str:
    """An empty storage: each test that takes it runs on a local directory and on S3."""
    if request.param == "local":
        return str(request.getfixturevalue("tmp_path") / "runs")
    return f"{request.getfixturevalue('s3_uri')}/some/runs"
