"""Stages that several jobs want at the same time: one of them makes a stage, the others wait for it and take what it has made.

Who makes a stage is named in it by an object `maker-{n}`, created only if it is not there, n rising; it counts as long as the claim on the run that it names
(`claims`), so nothing more is kept alive. Whoever waits makes no other stage, so no two jobs wait for each other. As with runs this saves work and decides nothing: two that made a
stage would write the same. What a job that died has left of a search is gone on with; checkpoints of its training lie with its run, and the next job begins anew.
Not covered: the networks of one job, of which one at a time makes a stage (`stages.Run.alone`).
"""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass

from clipq_ray import claims
from clipq_ray.errors import DivergedError, StorageError
from clipq_ray.storage import Store

MAKING = "_making"
"""Where it stands who makes a stage, in the stage."""
WAIT_SECONDS = 5.0
"""Between two looks at a stage that another job makes."""
_DIVERGED = "diverged.txt"
_MAKER = re.compile(r"maker-(\d{6})\.json")


@dataclass(frozen=True)
class Maker:
    """A job's run, as it is named in a stage: its `_work` below the storage, and the owner of the claim on it."""

    work: str
    owner: str

    @classmethod
    def of(cls, storage: Store, work: Store, owner: str) -> Maker:
        """The maker whose unfinished things lie in `work`, somewhere below `storage`."""
        return cls(work.uri.removeprefix(storage.uri.rstrip("/") + "/"), owner)  # the root itself ends in one


@dataclass(frozen=True)
class Mine:
    """A stage that is this job's to make; `making` None where nobody is to know; `beside`: another job makes it too, for which there was no time to wait."""

    making: Store | None = None
    name: str = ""
    beside: bool = False

    def finish(self) -> None:
        """The stage is made, so nobody asks any more who makes it."""
        with contextlib.suppress(StorageError):  # it counts no longer than this job's run
            if self.making is not None:
                self.making.remove_tree()

    def give_back(self) -> None:
        """Others may make it now."""
        with contextlib.suppress(StorageError):
            if self.making is not None:
                self.making.remove(self.name)

    def diverged(self) -> DivergedError | None:
        """That of the one who made it before, if it did: it would again."""
        if self.making is None or not self.making.exists(_DIVERGED):
            return None
        return DivergedError(self.making.read(_DIVERGED).decode())

    def __enter__(self) -> None:
        """While it is made; it is anybody's again where that fails."""

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if error is None:
            self.finish()
            return
        if self.making is not None and isinstance(error, DivergedError):
            with contextlib.suppress(StorageError):  # who waits would make it in vain
                self.making.write(_DIVERGED, str(error).encode())
        self.give_back()


def take(storage: Store, stage: Store, maker: Maker) -> Mine | str:
    """The stage for `maker`, or the words that name the job that makes it already; all runs lie in `storage`. What was made between the caller's look and this is
    the caller's to see."""
    making, mine = stage.child(MAKING), json.dumps({"work": maker.work, "owner": maker.owner}).encode()
    while True:
        number, content = _latest(making)
        # of this very run: it was put, and only the answer got lost, or a try before this one failed
        if content == mine:
            return Mine(making, _name(number))
        if words := _alive(storage, content):
            return words
        if making.create(_name(number + 1), mine):
            return Mine(making, _name(number + 1))


def _name(number: int) -> str:
    return f"maker-{number:06d}.json"


def _latest(making: Store) -> tuple[int, bytes]:
    """Number and content of the last maker; 0 and nothing if there is none."""
    while True:
        numbers = [int(found[1]) for name in making.names() if (found := _MAKER.fullmatch(name))]
        if not numbers:
            return 0, b""
        try:
            return max(numbers), making.read(_name(max(numbers)))
        except StorageError:
            if making.exists(_name(max(numbers))):
                raise  # else given back since it was listed


def _alive(storage: Store, content: bytes) -> str:
    """The words that name the job of a maker whose run is still its own, empty where it is not."""
    try:
        said = json.loads(content)
        maker = Maker(str(said["work"]), str(said["owner"]))
        holder = claims.holder(storage.child(*maker.work.split("/")))
    except (ValueError, KeyError, TypeError):  # none, or damaged
        return ""
    return holder.words if holder is not None and holder.owner == maker.owner else ""


def clear(stage: Store) -> None:
    """Remove what a job that died right behind the end of a stage has left."""
    with contextlib.suppress(StorageError):  # nobody looks at it any more
        if stage.names(f"{MAKING}/"):
            stage.child(MAKING).remove_tree()
