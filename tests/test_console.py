"""How a command ends: what SIGTERM does, and the exit code that `ray job submit` would not tell."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clipq_ray import console
from clipq_ray.errors import ConfigError, RunError

ROOT = Path(__file__).parents[1]
SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
WAITING = """
import sys, time
from clipq_ray import console

def main(arguments):
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        print("given back", flush=True)

sys.exit(console.run("work", main, []))
"""


@pytest.mark.parametrize(("error", "code"), [(None, 0), (RunError("it broke"), 1), (ConfigError("wrong"), 2)])
def test_a_submitted_job_says_its_exit_code_last(
    error: Exception | None, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(arguments: list[str]) -> int:
        if error is not None:
            raise error
        return 0

    monkeypatch.setenv(SUBMITTED, "{}")
    assert console.run("work", main, []) == code
    assert capsys.readouterr().err.splitlines()[-1] == f"work: exit code {code}"
    monkeypatch.delenv(SUBMITTED)
    assert console.run("work", main, []) == code
    assert "exit code" not in capsys.readouterr().err


def test_an_unexpected_failure_of_a_submitted_job_has_its_exit_code_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(arguments: list[str]) -> int:
        raise ZeroDivisionError

    monkeypatch.setenv(SUBMITTED, "{}")
    assert console.run("work", main, []) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2:] == ["ZeroDivisionError", "work: exit code 1"]


def test_the_traceback_of_an_unexpected_failure_tells_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(arguments: list[str]) -> int:
        raise ZeroDivisionError("https://me:secret@host/x")

    monkeypatch.delenv(SUBMITTED, raising=False)
    assert console.run("work", main, []) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "ZeroDivisionError: https://***@host/x"


def test_sigterm_lets_a_job_give_back_what_it_holds_and_says_so() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), SUBMITTED: "{}"}
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert out == "given back\n"
    assert errors.splitlines() == [
        "work: stopped; run the same command again to continue",
        "work: exit code 143",
    ]


def test_afterwards_sigterm_does_what_it_did_before() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert console.run("work", lambda arguments: 0, []) == 0
    assert signal.getsignal(signal.SIGTERM) == before


PRINTING = """
import sys
from clipq_ray import console
sys.exit(console.run("work", lambda arguments: console.show("L\\u00e4ufe \\u2603")))
"""


def shown(redirected: str, **environment: str) -> tuple[int, str, str]:
    """What becomes of a line on a standard output of another kind: exit code, output, errors."""
    command = ["sh", "-c", f'"$0" -c "$1" {redirected}', sys.executable, PRINTING]
    given = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    ended = subprocess.run(command, capture_output=True, env=given, check=False)
    return ended.returncode, ended.stdout.decode("latin-1"), ended.stderr.decode()


def test_a_standard_output_that_is_full_closed_or_of_another_encoding_is_no_traceback() -> None:
    code, _, errors = shown("> /dev/full")
    assert code == 1
    assert errors.startswith("work: cannot write to standard output: No space left on device; what was done")
    assert errors.count("\n") == 1
    assert shown(">&-") == (0, "", "")
    assert shown("", PYTHONIOENCODING="latin-1") == (0, "L\u00e4ufe \\u2603\n", "")


def test_an_option_is_written_out_and_given_once() -> None:
    parser = console.OneLineParser()
    parser.add_argument("--data")
    parser.add_argument("--yes", action="store_true")
    for _ in range(2):
        assert parser.parse_args(["--data", "a", "--yes"]).data == "a"
    with pytest.raises(ConfigError, match="--data: expected it once on the command line, got it again"):
        parser.parse_args(["--data", "a", "--data", "b"])
    with pytest.raises(ConfigError, match="unrecognized arguments: --y"):
        parser.parse_args(["--y"])
