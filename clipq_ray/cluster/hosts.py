"""Whether the cluster has the hosts that a training or a search needs; where it has not, Ray waits without a word, so this says it.

Not covered: hosts that are there and in use by others.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping

from clipq_ray import logs
from clipq_ray.cluster.capacity import there

log = logs.logger(__name__)
_LOOK_SECONDS = 2.0


class Hosts:
    """What it needs of the cluster: so many workers, each with these resources; a search goes on with one."""

    def __init__(self, words: str, workers: int, each: Mapping[str, float]) -> None:
        self._words, self._workers, self._each = words, workers, each
        self._needs = f"{workers} workers" if workers > 1 else "a worker"
        self._next, self._waits = 0.0, False

    def look(self) -> None:
        """Say once that it waits, since when and for what, and once that it does no more."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _LOOK_SECONDS
        room = there().room(self._each)
        if room < self._workers and not self._waits:
            now = datetime.datetime.now(datetime.UTC).isoformat(sep=" ", timespec="seconds")
            each = ", ".join(f"{amount:g} {name}" for name, amount in self._each.items() if amount)
            without = f"; --min-workers {max(room, 1)} would go on without" if room else ""
            log.warning(
                "%s waits for a host since %s: it needs %s and the cluster has room for %d (%s each); it goes on when a host joins%s",
                self._words, now, self._needs, room, each, without,
            )  # fmt: skip
        elif room >= self._workers and self._waits:
            log.warning("%s: the host is there, it goes on", self._words)
        self._waits = room < self._workers
