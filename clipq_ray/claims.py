"""Who makes a run: one job at a time, by objects `claim-{n}` in the run's `_work`, each created only if it is not there, n rising.

The owner writes its claim again every `BEAT_SECONDS`; one that was not written for the seconds that it states (`lifetime`), by the clock of the store, is dead, at once if
its process ran on this machine and does no more; then the next job creates the one with the next number. A job that finds a higher number than its own has lost the run,
and learns it at its next stage (`Claim.check`). What protects the result is not the claim but the commit (`manifest`): claims save work. Where a store has no conditional writes two jobs at the same moment may both go on, and that is said.
Not covered: stages that several jobs want (`sharing`).
"""

from __future__ import annotations

import json
import os
import platform
import re
import threading
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from clipq_ray import logs
from clipq_ray.connections import patience
from clipq_ray.errors import HeldError, StorageError
from clipq_ray.redaction import redacted
from clipq_ray.storage import Store

BEAT_SECONDS = 15.0
_CLAIM = re.compile(r"claim-(\d{6})\.json")
log = logs.logger(__name__)


_ENDED: set[str] = set()
"""Owners of claims that this process has done with and could not give back."""


def lifetime() -> float:
    """How long a claim of this process counts without being written [s]: its beats wait for the store like everything else, so it outlives every outage that the job itself
    does. One beat may be due when the outage begins; two more are for the requests themselves, whose clients try again before they fail."""
    return patience() + 3 * BEAT_SECONDS


@dataclass(frozen=True)
class Holder:
    """Who holds a claim: `number` of the claim, the words that name the job, and the claim's own `owner`, which no other claim has."""

    number: int
    words: str
    owner: str = field(default="", compare=False)


@dataclass(frozen=True)
class _Found:
    """The claim with the highest number, 0 if there is none; `gone` where its process is known to have ended; `seconds` that it counts without being written."""

    number: int
    owner: str
    words: str
    gone: bool
    seconds: float = 0.0

    def alive(self, work: Store) -> bool:
        """Whether its job is, as far as can be seen."""
        if self.gone:
            return False
        try:
            return work.now() - work.modified(_name(self.number)) <= self.seconds
        except StorageError:
            if work.exists(_name(self.number)):
                raise
            return False  # given back meanwhile


def _latest(work: Store) -> _Found:
    numbers = [int(found[1]) for name in work.names() if (found := _CLAIM.fullmatch(name))]
    if not numbers:
        return _Found(0, "", "", True)
    name = _name(max(numbers))
    try:
        content = json.loads(work.read(name))
        owner, words, seconds = str(content["owner"]), str(content["words"]), float(content["seconds"])
        gone = owner in _ENDED or (
            content["place"] != "" and content["place"] == place() and not runs(content["process"])
        )
    except (ValueError, KeyError, TypeError):
        owner, words, gone, seconds = "", "somebody", False, lifetime()  # of another version; its age counts
    except StorageError:
        if work.exists(name):
            raise
        return _latest(work)  # given back since it was listed
    return _Found(max(numbers), owner, words, gone, seconds)


def place() -> str:
    """This machine since its start, and this set of processes on it; empty where that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def process(number: int) -> list[int]:
    """A process and when it started [clock ticks since the machine's start]; empty where there is none."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return []
    return [] if fields[0] in "ZX" else [number, int(fields[19])]


def runs(found: list[int]) -> bool:
    """Whether this very process still runs on this machine, as far as can be seen; `found`: what `process` said of it."""
    return bool(found) and (process(found[0]) == found or _hidden(found[0]))


def _hidden(number: int) -> bool:
    """Whether there is a process of another user's of which this one may not see more."""
    try:
        os.kill(number, 0)
    except PermissionError:
        return process(number) == []
    except OSError:
        pass
    return False


def _name(number: int) -> str:
    return f"claim-{number:06d}.json"


class Claim:
    """A run that this job makes; kept alive until it is given back."""

    def __init__(self, work: Store, number: int, owner: str) -> None:
        self._work, self._number, self.owner = work, number, owner
        self._end, self._lost = threading.Event(), False
        self._thread = threading.Thread(target=logs.carried(self._beat), daemon=True, name="claim")
        self._thread.start()

    def _rest(self) -> None:
        self._end.set()
        self._thread.join()

    def finish(self) -> None:
        """The run is committed: its `_work` goes, with this claim, which is not written again behind that."""
        self._rest()
        try:
            self._work.remove_tree()
        except StorageError as failed:  # the next job that finds the run removes them
            log.warning(
                "the run is committed, but its checkpoints could not be removed: %s", redacted(str(failed))
            )

    def give_back(self) -> None:
        """Others may make the run now."""
        self._rest()
        try:
            if not self._lost:
                self._work.remove(_name(self._number))
        except StorageError as failed:  # it expires by itself, and for this process at once
            _ENDED.add(self.owner)
            log.warning("the claim on %s could not be given back: %s", self._work.uri, redacted(str(failed)))

    def _beat(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            try:
                found = _latest(self._work)
                if found.number > self._number or (
                    found.number == self._number and found.owner != self.owner
                ):
                    self._lost = True
                    _ENDED.add(self.owner)  # this process must not wait for itself where the new owner ends
                    return
                self._work.write(_name(self._number), _content(self.owner))
            except StorageError as failed:  # may pass; if not, the claim expires
                log.warning(
                    "the claim on %s could not be kept alive: %s", self._work.uri, redacted(str(failed))
                )

    def check(self) -> None:
        """`HeldError` where another job has taken the run over, because this one was away for too long."""
        if self._lost:
            raise HeldError(
                f"another job took over {self._work.uri}, since this one did not answer for {lifetime():.0f} s; "
                "what is finished is stored"
            )


def _content(owner: str) -> bytes:
    here = {
        "place": place(),
        "process": process(os.getpid()),
        "words": f"{platform.node()}, process {os.getpid()}",
        "seconds": lifetime(),
    }
    return json.dumps({"owner": owner, **here}).encode()


def holder(work: Store) -> Holder | None:
    """Who holds the run whose `_work` this is; None where nobody does or the holder is dead."""
    found = _latest(work)
    return Holder(found.number, found.words, found.owner) if found.alive(work) else None


def claim(work: Store) -> Claim | Holder:
    """Claim the run whose `_work` this is; who holds it where somebody else does."""
    owner = uuid.uuid4().hex
    while True:
        found = _latest(work)
        if found.owner == owner:  # it was put, and only the answer got lost
            return Claim(work, found.number, owner)
        if found.alive(work):
            return Holder(found.number, found.words, found.owner)
        if work.create(_name(found.number + 1), _content(owner)):
            break
    if not work.exclusive():
        log.warning(
            "%s has no conditional writes: another job that is submitted at the same moment may make the same run, for nothing",
            work.uri,
        )
    return Claim(work, found.number + 1, owner)
