"""Commands that a bench runs, one or several at a time, and that hear what ends it. Not covered: what they are."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_UNDER_WAY: list[subprocess.Popen[bytes]] = []
"""Commands that end with this process."""


def code_of(command: Sequence[str], hear: Callable[[str], None] | None = None) -> int:
    """The exit code of a command, which hears too what ends this process; `hear` gets each line that it prints, which is printed here as well."""
    with subprocess.Popen(command, stdout=subprocess.PIPE if hear else None) as child:
        _UNDER_WAY.append(child)
        try:
            for line in child.stdout or ():
                print(text := line.decode(errors="replace"), end="", flush=True)
                if hear:
                    hear(text)
            return child.wait()
        except BaseException:
            if child.stdout:  # what ends stores what it has, and must find somebody who listens until then
                child.stdout.read()
            raise
        finally:
            _UNDER_WAY.remove(child)


def used_by(command: Sequence[str]) -> tuple[int, resource.struct_rusage]:
    """As `code_of`, and what the command used."""
    with subprocess.Popen(command) as child:
        _UNDER_WAY.append(child)
        try:
            _, status, used = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            return child.returncode, used
        finally:
            _UNDER_WAY.remove(child)


def end(number: int, frame: Any) -> None:
    """Handler of a signal: end what is under way, which stores what it has, then this process."""
    for child in list(_UNDER_WAY):
        child.send_signal(number)
    raise SystemExit(128 + number)


def codes_of(commands: Sequence[Sequence[str]], at_once: int) -> list[int]:
    """Their exit codes, `at_once` at a time, in the order of the list."""
    with ThreadPoolExecutor(at_once) as pool:
        try:
            return list(pool.map(code_of, commands))
        except BaseException:  # ended or interrupted: what has not begun is not to begin
            pool.shutdown(cancel_futures=True)
            raise
