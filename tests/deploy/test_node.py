"""What every node does before Ray starts: the token, the variables of the cluster file, the environment, and the GPU driver that comes up late."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
TOKEN = "0123456789abcdef" * 4


class Node:
    """A home with a checkout in it, and programs that stand in for what only a node has."""

    def __init__(self, home: Path) -> None:
        self.home, self.checkout = home, home / "clipq_ray"
        self.programs = self.checkout / ".venv" / "bin"
        self.programs.mkdir(parents=True)
        shutil.copytree(ROOT / "deploy", self.checkout / "deploy")
        self.program("lspci", "echo")
        self.program("ray", f"mkdir -p ~/.ray; [ -e ~/.ray/auth_token ] || printf {TOKEN} >~/.ray/auth_token")

    def program(self, name: str, script: str) -> None:
        path = self.programs / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def sourced(self, kind: str) -> subprocess.CompletedProcess[str]:
        command = f"cd ~/clipq_ray && source deploy/node.sh {kind} && echo READY && env"
        return subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, check=False, timeout=60,
            env={"HOME": str(self.home), "PATH": os.environ["PATH"]},
        )  # fmt: skip


@pytest.fixture
def node(tmp_path: Path) -> Node:
    made = Node(tmp_path)
    environment = {
        "CLIPQ_STORAGE": "s3://bucket/a b", "NCCL_DEBUG": "INFO", "NCCL_IB_DISABLE": True, "CLIPQ_OFF": False, "CLIPQ_DATA": None,
    }  # fmt: skip
    (tmp_path / "ray_bootstrap_config.yaml").write_text(
        json.dumps({"metadata": {"environment": environment}})
    )
    return made


def test_the_head_makes_a_token_once_and_hands_on_the_variables_of_the_cluster_file(node: Node) -> None:
    ended = node.sourced("head")
    assert ended.returncode == 0, ended.stderr
    for line in ("READY", "RAY_AUTH_MODE=token", "CLIPQ_STORAGE=s3://bucket/a b", "NCCL_DEBUG=INFO", "NCCL_IB_DISABLE=1", "CLIPQ_OFF=0", f"PYTHONPATH={node.checkout}"):  # fmt: skip
        assert line in ended.stdout.splitlines()
    assert "CLIPQ_DATA" not in ended.stdout  # it was left blank
    token = node.home / ".ray" / "auth_token"
    assert token.read_text() == TOKEN
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    token.write_text("f" * 64)
    assert node.sourced("head").returncode == 0
    assert token.read_text() == "f" * 64


def test_a_worker_takes_what_the_head_sent_and_makes_no_token(node: Node) -> None:
    (node.home / ".ray").mkdir()
    (node.home / ".ray" / "auth_token").write_text(TOKEN)
    (node.home / ".clipq_environment").write_text("CLIPQ_DATA='s3://bucket/x'\n")
    node.program("ray", "exit 1")
    ended = node.sourced("worker")
    assert ended.returncode == 0, ended.stderr
    assert "CLIPQ_DATA=s3://bucket/x" in ended.stdout.splitlines()


def test_a_worker_without_the_token_does_not_start(node: Node) -> None:
    node.program("ray", "exit 1")
    ended = node.sourced("worker")
    assert ended.returncode != 0
    assert "READY" not in ended.stdout
    assert "auth_token" in ended.stderr


def test_the_gpu_driver_is_waited_for(node: Node) -> None:
    """At the first boot `nvidia-smi` fails for a while; Ray would count no GPU."""
    node.program("lspci", "echo '00:1e.0 3D controller: NVIDIA Corporation Device'")
    node.program("nvidia-smi", "echo x >>~/tries; [ $(wc -l <~/tries) -gt 3 ]")
    node.program("sleep", "exit 0")
    ended = node.sourced("head")
    assert ended.returncode == 0, ended.stderr
    assert (node.home / "tries").read_text().count("x") == 4


def test_a_gpu_driver_that_never_comes_up_stops_the_node_and_says_so(node: Node) -> None:
    node.program("lspci", "echo '00:1e.0 3D controller: NVIDIA Corporation Device'")
    node.program("nvidia-smi", "exit 9")
    node.program("sleep", "exit 0")
    ended = node.sourced("head")
    assert ended.returncode != 0
    assert "READY" not in ended.stdout
    assert "the GPU driver did not come up" in ended.stderr


def test_names_that_are_none_are_refused(node: Node) -> None:
    (node.home / "ray_bootstrap_config.yaml").write_text(
        json.dumps({"metadata": {"environment": {"A;rm": "x"}}})
    )
    ended = node.sourced("head")
    assert ended.returncode != 0
    assert "'A;rm'" in ended.stderr


def test_an_environment_with_the_pinned_versions_is_left_alone_and_another_needs_python(
    tmp_path: Path,
) -> None:
    for name in ("deploy/setup.sh", "constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "CLIPQ_PYTHON": "no-such-python"}
    command = ["sh", str(tmp_path / "deploy" / "setup.sh")]
    refused = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert refused.returncode == 2
    assert refused.stderr.startswith("setup: expected python3.11")
    (tmp_path / ".venv").mkdir()
    shutil.copy(ROOT / "constraints.txt", tmp_path / ".venv")
    for _ in range(2):
        subprocess.run(command, check=True, env=environment)
    assert (tmp_path / ".bashrc").read_text().count("export PATH=") == 1


class _Answers(BaseHTTPRequestHandler):
    version = "2.0.1"

    def do_GET(self) -> None:
        good = self.headers["Authorization"] == f"Bearer {TOKEN}"
        self.send_response(200 if good else 403)
        self.end_headers()
        self.wfile.write(json.dumps({"ray_version": self.version}).encode() if good else b"")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> object:
    made = HTTPServer(("127.0.0.1", 0), _Answers)
    Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()


def token_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_clipq_connect", ROOT / "deploy" / "connect.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_token_is_checked_with_the_job_server_and_so_is_its_version(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = token_module()
    monkeypatch.setattr(module, "version", lambda name: "2.0.1")
    module.check(server, TOKEN, "cluster.yaml")
    with pytest.raises(module.Refused, match=r"does not take the token of cluster\.yaml"):
        module.check(server, "wrong", "cluster.yaml")
    with pytest.raises(module.Refused, match=r"run `ray dashboard cluster\.yaml`"):
        module.check("http://127.0.0.1:9", TOKEN, "cluster.yaml")
    monkeypatch.setattr(module, "version", lambda name: "2.1.0")
    with pytest.raises(
        module.Refused, match=r"expected the cluster's Ray 2\.0\.1 on this machine, got 2\.1\.0"
    ):
        module.check(server, TOKEN, "cluster.yaml")


def connected(*arguments: str) -> list[str]:
    """What connect.py says of a mistake; it ends with 2, and the shell that takes what it prints is connected to no cluster."""
    command = [sys.executable, str(ROOT / "deploy" / "connect.py"), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert ended.returncode == 2
    script = f'{ended.stdout}\necho "$? $RAY_API_SERVER_ADDRESS$RAY_AUTH_TOKEN_PATH$RAY_AUTH_TOKEN"'
    before = {
        "RAY_API_SERVER_ADDRESS": "http://other:1",
        "RAY_AUTH_TOKEN_PATH": "/other",
        "RAY_AUTH_TOKEN": "x",
    }
    shell = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False, env=before)
    assert shell.stdout == "1 \n"
    return ended.stderr.splitlines()


def test_a_cluster_file_that_is_none_is_one_line() -> None:
    assert connected("nothing.yaml") == [
        "connect: expected a cluster file, got 'nothing.yaml', which is none"
    ]


def test_a_cluster_file_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_bytes(b"cluster_name: \xff\n")
    (said,) = connected(str(tmp_path / "cluster.yaml"))
    assert "expected a cluster file as UTF-8 text" in said


def test_without_ray_s_command_it_is_said_what_to_activate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cluster.yaml").write_text("cluster_name: a\nprovider: {}\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    (said,) = connected(str(tmp_path / "cluster.yaml"))
    assert said.startswith("connect: expected the command `ray`, got none; activate the environment")


def test_a_slip_in_its_options_leaves_the_cluster_of_before_too() -> None:
    assert connected("cluster.yaml", "--prt", "1") == ["connect: unrecognized arguments: --prt 1; see --help"]


def test_a_cluster_file_with_what_no_yaml_has_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_bytes(b"cluster_name: a\x07\n")
    (said,) = connected(str(tmp_path / "cluster.yaml"))
    assert "cluster.yaml: expected YAML, got unacceptable character #x0007" in said


def test_the_token_goes_past_proxies(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody answers
    module = token_module()
    monkeypatch.setattr(module, "version", lambda name: "2.0.1")
    module.check(server, TOKEN, "cluster.yaml")


@pytest.mark.parametrize("name", ["cluster.yaml", "deploy/on-premises.yaml"])
def test_a_cluster_file_that_is_not_edited_is_one_line_with_the_number_of_the_line(name: str) -> None:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines, 1) if re.match(r"[^#]*[: \[]@", line))
    (said,) = connected(name)
    assert said.startswith(f"connect: {name}, line {first}: found character '@'")
