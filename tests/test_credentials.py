"""Who asks, and where: environment, profile and instance role are each found, for s3fs and pyarrow alike, and buckets stand in the path."""

from __future__ import annotations

import datetime
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from s3_faults import FaultyProxy, faulty

from clipq_ray.storage import Store

pytest_plugins = ["s3_server"]
ROLE = {"AccessKeyId": "ROLEKEY", "SecretAccessKey": "role-secret", "Token": "role-token"}


@pytest.fixture
def place(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str, FaultyProxy]]:
    """A bucket, its endpoint and a proxy that writes down who asks; the environment says nothing about it yet."""
    from s3_server import make_bucket

    for name in (
        "AWS_PROFILE",
        "AWS_SESSION_TOKEN",
        "AWS_ENDPOINT_URL",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
    ):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with faulty(s3_server, share=0.0) as (endpoint, proxy):
        yield f"s3://{make_bucket(s3_server)}", endpoint, proxy


def asked(uri: str, proxy: FaultyProxy) -> set[tuple[str, str]]:
    """Access keys and session tokens with which both clients ask."""
    store = Store(f"{uri}/runs")
    store.write("x", b"data")
    filesystem, path = store.arrow()
    with filesystem.open_input_stream(f"{path}/x") as stream:
        assert stream.read() == b"data"
    assert {one.path.split("/")[1].split("?")[0] for one in proxy.seen} == {uri.removeprefix("s3://")}
    return {
        (one.authorization.partition("Credential=")[2].partition("/")[0], one.token) for one in proxy.seen
    }


def test_the_environment_says_who_asks(
    place: tuple[str, str, FaultyProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    from s3_server import environment

    uri, endpoint, proxy = place
    for name, value in environment(endpoint).items():
        monkeypatch.setenv(name, value)
    assert asked(uri, proxy) == {("testing", "")}


def test_a_profile_says_who_asks_and_where(
    place: tuple[str, str, FaultyProxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, endpoint, proxy = place
    config, credentials = tmp_path / "config", tmp_path / "credentials"
    # by its name, not by a number, where buckets would stand before the host's name
    named = endpoint.replace("127.0.0.1", "localhost")
    config.write_text(f"[profile mine]\nregion = us-east-1\nendpoint_url = {named}\n")
    credentials.write_text("[mine]\naws_access_key_id = PROFILEKEY\naws_secret_access_key = profile-secret\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    assert asked(uri, proxy) == {("PROFILEKEY", "")}


@pytest.fixture
def metadata() -> Iterator[str]:
    """A server that answers as the metadata service of a machine with a role does, to who has fetched a token."""

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self._answer(b"metadata-token" if self.path == "/latest/api/token" else None)

        def do_GET(self) -> None:
            if self.headers.get("x-aws-ec2-metadata-token") != "metadata-token":
                self._answer(None)
                return
            until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
            role = {"Code": "Success", **ROLE, "Expiration": until.strftime("%Y-%m-%dT%H:%M:%SZ")}
            root = "/latest/meta-data/iam/security-credentials/"
            self._answer({root: b"worker", f"{root}worker": json.dumps(role).encode()}.get(self.path))

        def _answer(self, content: bytes | None) -> None:
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, format: str, *given: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_machine_with_a_role_needs_no_keys(
    place: tuple[str, str, FaultyProxy], metadata: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, endpoint, proxy = place
    assert urlsplit(metadata).hostname == "127.0.0.1"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", metadata)
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED", raising=False)
    assert asked(uri, proxy) == {(ROLE["AccessKeyId"], ROLE["Token"])}
