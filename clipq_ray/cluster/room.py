"""What a job may take of a cluster, and which of its trainings and search trials takes it next.

Trainings come before trials, and of those that wait the first in rank. Whoever waits holds nothing; while a training could start if trials gave way,
no trial begins, so that it finds its workers. Ray places what is let in here; this decides when to ask it. Not covered: whom Ray gives what other
jobs leave.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from clipq_ray.errors import RunError

_LOOK_SECONDS = 0.2  # the cluster's state is asked for at most this often
_CHECK_SECONDS = 1.0  # and whether trainings still have their groups
_WAIT_SECONDS = 0.1
_LEAVING_SECONDS = 30.0
"""What has ended counts as in use until Ray has taken it back, or this long."""
_PATIENCE_SECONDS = 5.0
_NEAR = 1e-6


@dataclass(frozen=True)
class Amount:
    """CPUs and GPUs, of which Ray knows fractions."""

    cpus: float = 0.0
    gpus: float = 0.0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.cpus + other.cpus, self.gpus + other.gpus)

    def __sub__(self, other: Amount) -> Amount:
        return Amount(self.cpus - other.cpus, self.gpus - other.gpus)

    def times(self, count: int) -> Amount:
        """So many of it."""
        return Amount(self.cpus * count, self.gpus * count)

    @property
    def resources(self) -> dict[str, float]:
        """By Ray's names."""
        return {"CPU": self.cpus, "GPU": self.gpus}

    def holds(self, other: Amount) -> bool:
        """Whether `other` fits into it."""
        return self.cpus >= other.cpus - _NEAR and self.gpus >= other.gpus - _NEAR

    def count(self, other: Amount) -> int:
        """How many of `other` fit into it, at least 0."""
        pairs = ((self.cpus, other.cpus), (self.gpus, other.gpus))
        found = min((have / want for have, want in pairs if want > 0), default=math.inf)
        return 2**31 if math.isinf(found) else max(0, math.floor(found + _NEAR))


UNLIMITED = Amount(math.inf, math.inf)
NOTHING = Amount()


@dataclass(frozen=True)
class Group:
    """A placement group of the cluster: whether it has its resources, whether it is of a training (and not of a trial), its bundles."""

    placed: bool
    training: bool
    bundles: tuple[Amount, ...]


class Cluster(Protocol):
    """What is asked of a cluster."""

    def available(self) -> Amount:
        """What nobody uses just now."""

    def groups(self) -> Mapping[str, Group]:
        """The placement groups of all jobs by id, without those that are gone."""


@dataclass(eq=False)
class _Training:
    """One that waits, or is let in: `beside` counts as used by it and is not placed with it, `groups` are those that it was seen to have, `before` those
    of others; `begun` once it had some, whatever became of them."""

    worker: Amount
    workers: int
    rank: tuple[Any, ...]
    beside: Amount = NOTHING
    groups: set[str] = field(default_factory=set)
    before: frozenset[str] = frozenset()
    begun: bool = False
    since: float = field(default_factory=time.monotonic)

    @property
    def amount(self) -> Amount:
        return self.worker.times(self.workers)

    @property
    def counted(self) -> Amount:
        """What it takes of the job's limit."""
        return self.amount + self.beside

    def owns(self, name: str, group: Group) -> bool:
        fits = 0 < len(group.bundles) <= self.workers and all(
            one.holds(self.worker) and self.worker.holds(one) for one in group.bundles
        )
        return group.placed and group.training and fits and name not in self.before


@dataclass(eq=False)
class _Trial:
    """One that is let in: `group` once it has told, `begun` once it runs."""

    amount: Amount
    group: str | None = None
    begun: bool = False


@dataclass(frozen=True)
class _Leaving:
    """What has ended and may still be in use."""

    amount: Amount
    groups: frozenset[str]
    until: float


class Room:
    """Lets trainings and trials in; safe to use from several threads.

    `limit`: what the job may use at a time; `searches`: trials at a time; `grows`: whether the cluster may get more when asked.
    `trainings`, which a job sets once it knows its networks: trainings at a time.
    """

    def __init__(
        self, cluster: Cluster, limit: Amount = UNLIMITED, searches: int | None = None, *, grows: bool = False
    ) -> None:
        self._cluster, self._limit, self._searches, self._grows = cluster, limit, searches, grows
        self.trainings = sys.maxsize
        self._lock, self._closed, self._count = threading.Lock(), False, 0
        self._queue: list[_Training] = []
        self._trainings: list[_Training] = []
        self._trials: dict[Hashable, _Trial] = {}
        self._leaving: list[_Leaving] = []
        self._looked, self._checked, self._available = -math.inf, -math.inf, NOTHING

    def close(self) -> None:
        """Nothing is let in any more; what waits ends with `RunError`."""
        with self._lock:
            self._closed = True

    # -- trainings -----------------------------------------------------------------------------------------------------------
    @contextmanager
    def training(
        self, worker: Amount, workers: int, rank: Sequence[Any], beside: Amount = NOTHING
    ) -> Iterator[float]:
        """While a training of `workers` that take `worker` each goes on; waits until it is let in, the lowest `rank` first. Gives the seconds that it
        waited. `beside`: what it may take of the cluster besides where that is free, and of the limit in any case."""
        with self._lock:
            self._count += 1
            mine = _Training(worker, workers, (*rank, self._count), beside)
            self._queue.append(mine)
        began = time.monotonic()
        try:
            while not self._let_in(mine):
                time.sleep(_WAIT_SECONDS)
            yield time.monotonic() - began
        finally:
            self._left(mine)

    def _let_in(self, mine: _Training) -> bool:
        with self._lock:
            if self._closed:
                raise RunError("the job was ended while a training waited; run again to continue")
            self._look()
            first = min(self._queue, key=lambda one: one.rank)
            if first is not mine or self._full() or not self._fits(mine.amount, mine.beside):
                return False
            self._queue.remove(mine)
            mine.before = frozenset(self._cluster.groups())
            self._trainings.append(mine)
            return True

    def _left(self, mine: _Training) -> None:
        with self._lock:
            if mine in self._queue:
                self._queue.remove(mine)
            if mine in self._trainings:
                self._trainings.remove(mine)
                if not self._closed:
                    taken = {name for one in self._trainings for name in one.groups}
                    found = self._cluster.groups()  # a restarted one has others than it began with
                    self._leave(mine.amount, {name for name in found if mine.owns(name, found[name])} - taken)

    # -- trials --------------------------------------------------------------------------------------------------------------
    def begin(self, trial: Hashable, amount: Amount) -> bool:
        """Whether `trial` is let in now."""
        with self._lock:
            self._look()
            full = self._searches is not None and len(self._trials) >= self._searches
            if self._closed or full or self._held_back() or not self._fits(amount):
                return False
            self._trials[trial] = _Trial(amount)
            return True

    def may_follow(self) -> bool:
        """Whether a trial may take the seat of one that has just ended."""
        with self._lock:
            self._look()
            return not self._closed and not self._held_back(seats=True)

    def follow(self, before: Hashable, trial: Hashable) -> None:
        """`trial` takes the seat of `before`."""
        with self._lock:
            self._trials[trial] = _Trial(self._trials.pop(before).amount, begun=True)

    def runs(self, trial: Hashable, group: str | None) -> None:
        """`trial` was heard of; it runs in this placement group."""
        with self._lock:
            if trial in self._trials:
                self._trials[trial].group, self._trials[trial].begun = group, True

    def end(self, trial: Hashable) -> None:
        """`trial` has ended, and nobody takes its seat."""
        with self._lock:
            if (found := self._trials.pop(trial, None)) is not None:
                self._leave(found.amount, {found.group} if found.group else set())

    # -- what decides --------------------------------------------------------------------------------------------------------
    def _look(self) -> None:
        """Ask the cluster, if that was not done just now."""
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked, self._available = now, self._cluster.available()
        checked = now - self._checked < _CHECK_SECONDS or not self._trainings
        if checked and not self._leaving and all(one.groups for one in self._trainings):
            return
        self._checked, groups = now, self._cluster.groups()
        for training in self._trainings:
            training.groups &= set(groups)  # one that Ray starts again waits for others
        taken = {name for one in self._trainings for name in one.groups}
        for training in self._trainings:
            if not training.groups:
                found = {
                    name for name, group in groups.items() if name not in taken and training.owns(name, group)
                }
                training.groups |= set(sorted(found)[:1])
                training.begun = training.begun or bool(training.groups)
                taken |= training.groups
        self._leaving = [
            one for one in self._leaving if now < one.until and any(name in groups for name in one.groups)
        ]

    def _leave(self, amount: Amount, groups: set[str]) -> None:
        self._leaving.append(_Leaving(amount, frozenset(groups), time.monotonic() + _LEAVING_SECONDS))
        self._looked = -math.inf

    def _full(self) -> bool:
        """Whether as many trainings go on as may."""
        return len(self._trainings) >= self.trainings

    def _used(self) -> Amount:
        live = {one.group for one in self._trials.values()}
        amounts = [one.amount for one in self._trials.values()]
        amounts += [one.counted for one in self._trainings]
        # what has left may be another trial's seat by now
        amounts += [one.amount for one in self._leaving if not live & one.groups]
        return sum(amounts, NOTHING)

    def _asked(self) -> list[Amount]:
        """What was let in and is not placed yet, as far as is known; without trainings that wait for a lost host, beside which trials may go on."""
        within = self._free() + self._running()
        return [
            one.amount
            for one in self._trainings
            if not one.groups and (within.holds(one.amount) or not one.begun)
        ] + [one.amount for one in self._trials.values() if not one.begun]

    def _running(self) -> Amount:
        """What trials hold."""
        return sum((one.amount for one in self._trials.values()), NOTHING)

    def _free(self) -> Amount:
        """What nobody uses, or nobody will in a moment."""
        return sum((one.amount for one in self._leaving), self._available)

    def _fits(self, amount: Amount, beside: Amount = NOTHING) -> bool:
        """Whether `amount` is within the limit with what is `beside` it, and is there, or would be the only thing that Ray is asked for."""
        if not (self._limit - self._used()).holds(amount + beside):
            return False
        asked = self._asked()
        if (self._available - sum(asked, NOTHING)).holds(amount):
            return True
        return not asked and (self._grows or not (self._trials or self._trainings or self._leaving))

    def _held_back(self, *, seats: bool = False) -> bool:
        """Whether trials give way to a training: one that would have its workers without them. With `seats`: whether those that run must, since what is
        free and what is just being left does not do, or has not done for a while (workers that need one machine may find room on none)."""
        waiting = [one for one in self._trainings if not one.groups]
        if self._queue and not self._full():
            waiting.append(min(self._queue, key=lambda one: one.rank))
        trainings = sum((one.counted for one in self._trainings), NOTHING)
        trials, free = self._running(), self._free()
        for one in waiting:
            limit = self._limit - trainings + (NOTHING if one in self._queue else one.counted)
            if not limit.holds(one.counted) or not (free + trials).holds(one.amount):
                continue
            patient = time.monotonic() - one.since < _PATIENCE_SECONDS
            if seats and patient and (limit - trials).holds(one.counted) and free.holds(one.amount):
                continue
            return True
        return False
