"""A real S3 server on loopback for `make test-s3`: Ceph's monitor, one OSD in memory and radosgw, installed by apt where they are missing.

A test module takes it by `pytest_plugins = ["ceph_server"]` and the fixture `ceph`, one server for a session; signatures are checked, buckets
have owners, conditional puts hold. Needs root, and Debian's or Ubuntu's apt for the first time; where they are missing the tests are skipped in
one line. Data, sockets and logs lie in one temporary folder, which goes at the end; the processes end too where the tests are killed.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import pytest
from botocore.config import Config

PACKAGES = ("ceph-mon", "ceph-osd", "ceph-common", "radosgw")
START_LIMIT_SECONDS = 90.0
_CONFIGURATION = """
[global]
fsid = {fsid}
mon_initial_members = a
mon_host = v2:127.0.0.1:{mon}
public_network = 127.0.0.0/8
ms_bind_ipv6 = false
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pgp_num = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_data_avail_crit = 1
mon_data_avail_warn = 1
run_dir = {folder}
admin_socket = {folder}/$name.asok
log_file = {folder}/$name.log
pid_file = {folder}/$name.pid
crash_dir = {folder}
[mon.a]
host = localhost
mon_data = {folder}/mon
[osd.0]
osd_data = {folder}/osd
osd_objectstore = memstore
memstore_device_bytes = 2147483648
[client.rgw]
auth_client_required = none
ms_mon_client_mode = crc
rgw_data = {folder}/rgw
rgw_frontends = beast endpoint=127.0.0.1:{port}
rgw_run_sync_thread = false
rgw_enable_usage_log = false
rgw_enable_gc_threads = false
rgw_enable_lc_threads = false
"""


class Keys(NamedTuple):
    """An account of the server."""

    access: str
    secret: str


class Ceph(NamedTuple):
    """A running server: its endpoint, the owner of what tests make, and an account without rights on that."""

    endpoint: str
    owner: Keys
    stranger: Keys

    def environment(self, endpoint: str | None = None, keys: Keys | None = None) -> dict[str, str]:
        """The variables with which every client finds the server; `endpoint`: of a proxy before it. Checksums are left to the job."""
        access, secret = keys or self.owner
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint, "AWS_ACCESS_KEY_ID": access, "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost",
        }  # fmt: skip

    def client(self) -> Any:
        """boto3's client of the owner."""
        return boto3.client(
            "s3", endpoint_url=self.endpoint, region_name="us-east-1", aws_access_key_id=self.owner.access,
            aws_secret_access_key=self.owner.secret, config=Config(request_checksum_calculation="when_required"),
        )  # fmt: skip

    def bucket(self) -> str:
        """The name of a new, empty bucket."""
        name = f"clipq-{uuid.uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=name)
        return name


_REASONS: set[str] = set()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Why there was no server, in one line for all tests."""
    for reason in _REASONS:
        terminalreporter.write_line(reason)


@pytest.fixture(scope="session")
def ceph() -> Iterator[Ceph]:
    """The server of this session."""
    if reason := _missing():
        _REASONS.add(reason)
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="clipq-s3-"))
    server = _Server(folder)
    try:
        yield server.start()
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _missing() -> str:
    """Why there can be no server here; empty where there can, and then its packages are installed."""
    if os.geteuid() != 0:
        return "no real S3 server: it needs root"
    if all(shutil.which(name) for name in ("ceph-mon", "ceph-osd", "ceph", "radosgw", "radosgw-admin")):
        return ""
    if shutil.which("apt-get") is None:
        return "no real S3 server: Ceph is not installed, and there is no apt-get to install it"
    apt = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=300"]
    for command in (
        [*apt, "update"],
        [*apt, "install", "-y", "--no-install-recommends", *PACKAGES],
    ):
        ended = subprocess.run(
            command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        )  # fmt: skip
    if ended.returncode:
        said = (ended.stderr.strip() or ended.stdout.strip() or "no reason given").splitlines()[-1]
        return f"no real S3 server: apt-get could not install {', '.join(PACKAGES)}: {said}"
    return ""


class _Server:
    """The processes of one server, children of this one."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._configuration = folder, folder / "ceph.conf"
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> Ceph:
        mon, port = _free_ports(2)
        fsid, folder = str(uuid.uuid4()), self._folder
        self._configuration.write_text(
            _CONFIGURATION.format(fsid=fsid, mon=mon, port=port, folder=folder), encoding="utf-8"
        )
        for name in ("mon", "osd", "rgw"):
            (folder / name).mkdir()
        monmap = str(folder / "monmap")
        self._run("monmaptool", "--create", "--addv", "a", f"[v2:127.0.0.1:{mon}]", "--fsid", fsid, monmap)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap)
        self._begin("ceph-mon", "-f", "-i", "a")
        osd = str(uuid.uuid4())
        self._run("ceph", "--connect-timeout", "30", "osd", "new", osd)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._begin("ceph-osd", "-f", "-i", "0")
        self._begin("radosgw", "-f", "-n", "client.rgw")
        endpoint = f"http://127.0.0.1:{port}"
        self._wait(endpoint)
        return Ceph(endpoint, self._account("owner"), self._account("stranger"))

    def _run(self, *command: str) -> None:
        name, *rest = command
        configured = [] if name == "monmaptool" else ["-c", str(self._configuration)]
        ended = subprocess.run(
            [name, *configured, *rest], capture_output=True, text=True, check=False, timeout=START_LIMIT_SECONDS,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert ended.returncode == 0, f"{' '.join(command)}: {ended.stdout[-1000:]} {ended.stderr[-2000:]}"

    def _begin(self, *command: str) -> None:
        name, *rest = command
        arguments = [name, "-c", str(self._configuration), *rest]
        with (self._folder / f"{name}.out").open("wb") as out:
            self._processes.append(
                subprocess.Popen(
                    arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    preexec_fn=_end_with_parent,
                    cwd=self._folder,
                )
            )

    def _wait(self, endpoint: str) -> None:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        limit = time.monotonic() + START_LIMIT_SECONDS
        while True:
            for process in self._processes:
                assert process.poll() is None, (
                    f"{process.args} ended with {process.returncode}: {self._said()}"
                )
            try:
                opener.open(endpoint, timeout=5).close()
                return
            except urllib.error.HTTPError:  # it answers
                return
            except OSError as error:
                if time.monotonic() > limit:
                    raise RuntimeError(f"no answer from {endpoint}; {self._said()}") from error
            time.sleep(0.2)

    def _said(self) -> str:
        return " ".join(path.read_text(errors="replace")[-500:] for path in self._folder.glob("*.out"))

    def _account(self, name: str) -> Keys:
        keys = Keys(f"{name.upper()}{uuid.uuid4().hex[:8]}", uuid.uuid4().hex)
        self._run(
            "radosgw-admin", "user", "create", f"--uid={name}", f"--display-name={name}", f"--access-key={keys.access}",
            f"--secret-key={keys.secret}",
        )  # fmt: skip
        return keys

    def stop(self) -> None:
        for process in reversed(self._processes):  # at once, since nothing that they hold is to last
            process.kill()
            process.wait()


def _end_with_parent() -> None:
    """In a child: the kernel ends it when the tests are killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    with_ports = [socket.socket() for _ in range(count)]
    try:
        for one in with_ports:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in with_ports]
    finally:
        for one in with_ports:
            one.close()
