"""Joining a Ray cluster, with Ray's ways to fail as one line each.

Not covered: a cluster that is lost later, which is a failure of the run.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from clipq_ray.errors import ClipqError, ConfigError

_FORGET_SECONDS, _LOOKS = 15.0, 3


def connect(settings: dict[str, Any]) -> Path | None:
    """Join the cluster that `RAY_ADDRESS` names, else start a Ray of our own on this machine, and give the folder in which that one keeps its logs; `ConfigError`
    says what is wrong with the address, the token or the version."""
    try:
        if os.environ.get("RAY_ADDRESS"):
            with handlers_kept():
                ray.init(**settings)
            return None
        os.environ.setdefault("RAY_worker_niceness", "0")
        with handlers_kept():
            found = ray.init(address="local", include_dashboard=False, **settings)
        return Path(found.address_info["session_dir"])
    except (AuthenticationError, ConnectionError, RuntimeError, ValueError) as error:
        named = explained(error, os.environ.get("RAY_ADDRESS", ""))
        if named is None:
            raise
        raise named from error


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Of SIGINT and SIGTERM, where Ray puts in its own and leaves them: `ray.init`'s ends the process with exit code 15, a training's swallows interrupts of what
    comes after it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def forget(session: Path) -> None:
    """Remove what a Ray of our own that has ended keeps of itself on this machine."""
    ended, gone = time.monotonic() + _FORGET_SECONDS, 0
    while gone < _LOOKS and time.monotonic() < ended:  # its last processes may still write
        gone = 0 if session.exists() else gone + 1
        shutil.rmtree(session, ignore_errors=True)
        time.sleep(0.1)
    latest = session.parent / "session_latest"
    if latest.is_symlink() and not latest.exists():
        with suppress(FileNotFoundError):
            latest.unlink()


def explained(error: BaseException, address: str) -> ClipqError | None:
    """What a failure to join the cluster at `address` means for the user; None where that is not known."""
    said = " ".join(_chain(error))
    if "AuthenticationError" in said or "authentication token" in said:
        return ConfigError(
            f"the cluster at {address} does not take this token; expected RAY_AUTH_MODE=token and the cluster's own token in RAY_AUTH_TOKEN_PATH "
            '(or ~/.ray/auth_token), see: eval "$(python deploy/connect.py cluster.yaml)"'
        )
    if "ersion mismatch" in said:
        versions = re.findall(r"(?:Ray|Python): ([\d.]+\w*)", said)
        there = f"Ray {versions[0]} and Python {versions[1]}" if len(versions) >= 4 else "another version"
        here = f"Ray {versions[2]} and Python {versions[3]}" if len(versions) >= 4 else ray.__version__
        return ConfigError(
            f"expected the versions of the cluster at {address}, {there}, got {here}; install those, or submit the job to the cluster: ray job submit"
        )
    if isinstance(error, ConnectionError) and address:
        return ConfigError(
            f"expected a Ray cluster at RAY_ADDRESS={address}, got no answer; start it, mend the address, or unset RAY_ADDRESS to use this machine"
        )
    return None


def _chain(error: BaseException | None) -> list[str]:
    """An error and what it came from, as text."""
    found = []
    while error is not None:
        found.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return found
