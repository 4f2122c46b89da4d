"""Ray's ways to refuse a cluster, each as one line that says what to do; and what a job leaves as it found it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("ray")

from clipq_ray.cluster.connection import explained
from clipq_ray.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_another_version_is_named_with_both() -> None:
    """The text of Ray's own check, made by that check."""
    from ray._private.utils import check_version_info

    with pytest.raises(RuntimeError) as raised:
        check_version_info({"ray_version": "2.58.1", "python_version": "3.11.2"}, "here")
    error = explained(raised.value, "10.0.0.1:6379")
    assert isinstance(error, ConfigError)
    assert "Ray 2.58.1 and Python 3.11.2, got Ray " + version("ray") in str(error)
    assert error.exit_code == 2


def test_what_is_not_known_is_not_explained() -> None:
    assert explained(RuntimeError("the moon"), "10.0.0.1:6379") is None
    assert explained(ConnectionError("no"), "") is None


def started(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, str(ROOT / "jobs" / "compress.py"), "--storage", str(tmp_path / "runs")]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, cwd=ROOT,
        env={**kept, "HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0", **environment},
    )  # fmt: skip


@pytest.mark.slow
def test_a_missing_token_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    """Ray finds out before it looks for the cluster; a wrong token is refused by the cluster, in `test_real_cluster`."""
    ended = started(tmp_path, RAY_ADDRESS="127.0.0.1:1", RAY_AUTH_MODE="token")
    assert ended.returncode == 2, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if not line.startswith("[")]
    assert line.startswith("compress: the cluster at 127.0.0.1:1 does not take this token")
    assert "deploy/connect.py" in line


def test_sigterm_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray puts in a handler of its own, which would end a job with exit code 15 and its claim held."""
    from clipq_ray.cluster import connection

    def init(**settings: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise ConnectionError("no cluster")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(connection.ray, "init", init)
    with pytest.raises(ConfigError, match=r"expected a Ray cluster at RAY_ADDRESS=10\.0\.0\.1:6379"):
        connection.connect({})
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_a_thread_that_outlives_a_jobs_engine_starts_no_other_ray() -> None:
    """By itself, Ray starts on this machine at the first call that finds none; so does Tune."""
    code = """
from clipq_ray.console import run

def late(arguments):
    import ray, ray.tune
    for call in (lambda: ray.put(1), lambda: ray.tune.run(print, verbose=0)):
        try:
            call()
        except Exception as error:
            print("started" if ray.is_initialized() else "none")

run("late", late, [])
"""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TUNE_"))}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, cwd=ROOT, env=kept
    )
    assert ended.stdout == "none\nnone\n", ended.stderr
