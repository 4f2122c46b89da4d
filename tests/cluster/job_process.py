"""Jobs in a session of their own, found and ended through /proc, so that nothing else on the machine is ever touched; and what they leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from clipq_ray import manifest
from clipq_ray.storage import Store

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = float(os.environ.get("CLIPQ_TEST_LIMIT_SECONDS", "400"))


def command(storage: Path, weights: Path | str, **changes: Any) -> list[str]:
    given = {
        "storage": storage, "weights": weights, "epochs": 12, "workers": 2, "batch_size": 32, "control": "never",
        "search_evaluations": 4, "search_start": 3, "search_images": 60, "learning_rate": 0.01, "target_ratio": 15, "rounds": 1,
        **changes,
    }  # fmt: skip
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    return [sys.executable, str(ROOT / "jobs" / "compress.py"), *words]


class Ended(NamedTuple):
    """A job that has ended; `lines`: what it wrote to stderr apart from progress."""

    code: int
    lines: list[str]


class Process(NamedTuple):
    pid: int
    title: str


def processes(session: int) -> list[Process]:
    """The live processes of a session."""
    return [process for process, _, own in _all_processes() if own == session]


def children(parents: Iterable[int]) -> list[Process]:
    """The live processes below some others, at any depth."""
    everything = list(_all_processes())
    found, above = list[Process](), set(parents)
    while above:
        below = [process for process, parent, _ in everything if parent in above]
        found += below
        above = {process.pid for process in below}
    return found


def _all_processes() -> Iterator[tuple[Process, int, int]]:
    """The live processes of this machine with their parents and sessions, by /proc."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
        if fields[0] not in "ZX":
            yield Process(int(entry.name), title.strip()), int(fields[1]), int(fields[3])


def end(session: int) -> None:
    """End what is left of a session that a test started."""
    limit = time.monotonic() + 60
    while left := processes(session):  # some may have started others meanwhile
        assert time.monotonic() < limit, f"they do not end: {left}"
        for process in left:
            with suppress(ProcessLookupError):  # it was faster
                os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.02)


def output_of(errors: Path) -> Path:
    """The file with what a job wrote to stdout, beside that of its errors."""
    return errors.with_name(f"{errors.name}.out")


class Job:
    """A job under way in a session of its own."""

    def __init__(self, arguments: list[str], errors: Path, environment: Mapping[str, str]) -> None:
        self._errors = errors
        inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with errors.open("w") as stream, output_of(errors).open("w") as output:
            self.process = subprocess.Popen(
                arguments,
                stdout=output,
                stderr=stream,
                cwd=ROOT,
                env={**inherited, **environment},
                start_new_session=True,
            )
        self.session = self.process.pid

    def wait(self) -> Ended:
        code = self.process.wait(LIMIT_SECONDS)
        lines = self._errors.read_text().splitlines()
        return Ended(code, [line for line in lines if not line.startswith("[")])

    def until(self, what: Callable[[], Any]) -> Any:
        """What `what` gives as soon as it is true; the job must not end before."""
        limit = time.monotonic() + LIMIT_SECONDS
        while not (found := what()):
            assert self.process.poll() is None, f"the job ended early: {self._errors.read_text()[-2000:]}"
            assert time.monotonic() < limit, "it took too long"
            time.sleep(0.02)
        return found


@contextmanager
def started(arguments: list[str], errors: Path, **environment: str) -> Iterator[Job]:
    job = Job(arguments, errors, environment)
    try:
        yield job
    finally:
        end(job.session)
        job.process.wait()


def finished(arguments: list[str], errors: Path, **environment: str) -> Ended:
    with started(arguments, errors, **environment) as job:
        return job.wait()


def committed(storage: Path) -> dict[str, Any]:
    (run,) = manifest.committed(Store(storage))
    assert manifest.verify(run.store) == []
    return manifest.read_manifest(run.store)


def sha256(document: dict[str, Any]) -> str:
    digest: str = document["files"]["model.clq"]["sha256"]
    return digest
