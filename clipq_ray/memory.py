"""Out of memory in a training: what it looks like, how many images at a time there is memory for, and what an attempt leaves so that the next one takes half as many.

Where an allocation fails, the worker says so itself (`ask_for_less`). Where the kernel ends it, it cannot: so every rank leaves a note of its machine's count
of such kills, and the next attempt on that machine sees whether it has grown. Ray's memory monitor is heard by the engine (`heard`). An attempt is
retried with less once; the second time it is an error with what to do. Not covered: the steps that find it out (`probing`), and which of the machine's processes the kernel ended.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from clipq_ray.claims import place
from clipq_ray.errors import RunError, brief
from clipq_ray.storage import Store

SMALLER, LOW = "smaller.json", "low-memory.json"
_ATTEMPT = "attempt-"
_REFUSED = ("can't allocate memory", "out of memory")


class OutOfMemory(Exception):
    """An attempt ran out of memory; the next one takes less."""


def ran_out(error: BaseException) -> bool:
    """Whether `error` says that memory could not be had, of a GPU or of the machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # what a driver refuses (pinned memory, a CUDA graph) is a RuntimeError, or torch's own kind of one
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _REFUSED)


def without_single(images: int, most: int) -> int:
    """`most` of `images` at a time, or three where two leave a single one over, which batch norm may not take; other parts as even as can be have none."""
    return 3 if most == 2 and images % 2 else most


def most_that_fit(step: Callable[[int], object], images: int, most: int) -> int:
    """How many of `images` at a time `step` has memory for: `most`, half of them, and so on, and single ones only where all are; `RunError` where one does not fit, or
    only one does and `step` takes no single one."""
    if without_single(images, most) > most:  # an attempt has run out of memory with more than two
        most = 1
    while True:
        try:
            step(most)
            return most
        except Exception as error:
            if ran_out(error) and most == 1:
                raise RunError("one image does not fit the device's memory; use a larger device") from None
            if not ran_out(error):
                if isinstance(error, ValueError) and most == 1 < images:  # as batch norm's is
                    raise RunError(
                        f"{without_single(images, 2)} images at a time do not fit the device's memory, and a single one is refused "
                        f"({brief(error)}); use a larger device"
                    ) from error
                raise
            half = without_single(images, math.ceil(most / 2))
            most = half if half < most else 1


class Attempts:
    """The attempts at one training, in the store of its checkpoints."""

    def __init__(self, store: Store, stage: str) -> None:
        self._store, self._stage = store, stage

    def most(self) -> int | None:
        """How many images an attempt may take at a time, once one has run out of memory; `RunError` where that did not help."""
        heard = self._read(LOW)
        if heard is not None and heard["over"] is not None:
            raise RunError(heard["over"])
        for left in self._left():
            if _killed(left):
                try:
                    self._less(left["images"])
                except RunError:
                    self._forget()  # said once: whoever runs again may have more memory by then
                    raise
        return self._most()

    def begin(self, rank: int, images: int) -> None:
        """This rank takes `images` at a time from now on."""
        here = {"images": images, "place": place(), "kills": _kills()}
        self._store.write(f"{_ATTEMPT}{rank}.json", json.dumps(here).encode())

    def end(self, rank: int) -> None:
        """This rank has come to its end."""
        self._store.remove(f"{_ATTEMPT}{rank}.json")

    def heard(self, event: str) -> None:
        """Workers of the last attempt were ended for want of memory; `event` tells this time from others, since it may be heard more than once."""
        before, over = self._read(LOW), None
        if before is not None and before["event"] == event:
            return
        try:
            for left in self._left():
                self._less(left["images"])
        except RunError as error:
            over = str(error)
        self._store.write(LOW, json.dumps({"event": event, "over": over}).encode())

    def afresh(self) -> None:
        """Whoever runs again after an error may have more memory now."""
        self._store.remove(LOW)

    @contextmanager
    def watching(self, images: int) -> Iterator[None]:
        """`OutOfMemory` where there is no memory for what is done here with `images` at a time, and the next attempt takes less."""
        try:
            yield
        except Exception as error:
            if ran_out(error):
                raise self.ask_for_less(images) from error
            raise

    def ask_for_less(self, images: int) -> OutOfMemory:
        """The error of an attempt that could not have memory for `images` at a time."""
        self._less(images)
        return OutOfMemory(
            f"{self._stage}: out of memory with {images} images at a time; the next attempt takes half"
        )

    def _less(self, images: int) -> None:
        # Ranks of one attempt run out together: another one may have halved already what both of them took.
        most = self._most()
        limited = most is not None and images <= most
        if limited or images == 1:
            raise RunError(
                f"{self._stage}: out of memory with {images} images at a time on each worker{', halved once' if limited else ''}; lower --batch-size or "
                "--memory-limit-gib, raise --workers, or use machines with more memory"
            )
        self._store.write(SMALLER, json.dumps({"images": math.ceil(images / 2)}).encode())

    def _forget(self) -> None:
        for name in self._store.names(_ATTEMPT):
            self._store.remove(name)

    def _left(self) -> list[dict[str, Any]]:
        found = [self._read(name) for name in self._store.names(_ATTEMPT)]
        return [left for left in found if left is not None]

    def _most(self) -> int | None:
        left = self._read(SMALLER)
        return None if left is None else int(left["images"])

    def _read(self, name: str) -> dict[str, Any] | None:
        if not self._store.exists(name):
            return None
        try:
            found: dict[str, Any] = json.loads(self._store.read(name))
        except ValueError:  # damaged: what it told is found again, by an attempt that ends
            return None
        return found


def _killed(left: dict[str, Any]) -> bool:
    """Whether the kernel has ended a process of this machine for want of memory since the attempt that left this began."""
    return bool(left["place"]) and left["place"] == place() and _kills() > left["kills"]


def _kills() -> int:
    """How many processes the kernel has ended for want of memory since the machine's start; 0 where it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
