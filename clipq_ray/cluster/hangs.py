"""Workers that hang: what makes no step for too long is ended where it runs, and Ray starts it again behind its last checkpoint.

The driver looks at the signs on the board. The signal is sent by a task on the worker's node: it ends a process that is stopped, that waits for another
one forever, or that holds Python's lock. One that is ended counts as a failure like one that is lost (`--max-failures`). Not covered: a node that hangs as a
whole, which Ray itself gives up.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clipq_ray import logs
from clipq_ray.claims import process, runs
from clipq_ray.config import Config
from clipq_ray.errors import RunError

log = logs.logger(__name__)
_ANSWER_SECONDS = 30.0  # a process on the worker's node may have to be started first


class Worker(NamedTuple):
    """A process of a cluster: its node, its number and when it started there (`claims.process`)."""

    node: str
    process: list[int]

    @classmethod
    def here(cls) -> Self:
        """This one."""
        return cls(ray.get_runtime_context().get_node_id(), process(os.getpid()))


class Signs(NamedTuple):
    """What the board knows of one piece of work: its workers, and the seconds since the last step and since they began."""

    item: str
    words: str
    workers: Sequence[Worker]
    since_step: float
    since_begin: float


@dataclass(frozen=True)
class Limits:
    """How long a worker may take for one step, and for one attempt at a training or at one search of a layer [s]."""

    step_seconds: float
    attempt_seconds: float | None

    @classmethod
    def of(cls, configs: Sequence[Config]) -> Self:
        """The most generous of these configurations."""
        attempts = [config.attempt_hours for config in configs]
        hours = [one for one in attempts if one is not None]
        return cls(
            60 * max(config.stall_minutes for config in configs),
            3600 * max(hours) if len(hours) == len(attempts) else None,
        )

    def broken(self, signs: Signs) -> str | None:
        """What is wrong with what shows these signs, if anything is."""
        if signs.since_step > self.step_seconds:
            return f"made no step for {self.step_seconds / 60:g} minutes (--stall-minutes)"
        if self.attempt_seconds is not None and signs.since_begin > self.attempt_seconds:
            return f"took more than {self.attempt_seconds / 3600:g} hours (--attempt-hours)"
        return None


@ray.remote(num_cpus=0, max_retries=0)  # type: ignore[untyped-decorator]
def _end(found: list[int]) -> bool:
    """Whether this process was still there to be ended."""
    if not runs(found):
        return False
    os.kill(found[0], signal.SIGKILL)
    return True


class Hangs:
    """Ends what hangs, and remembers it until the next attempt makes steps."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._ended: Counter[str] = Counter()
        self._last: dict[str, str] = {}

    def look(self, everything: Sequence[Signs]) -> list[str]:
        """End what breaks a limit; the items whose workers are gone now."""
        gone = []
        for signs in everything:
            reason = self._limits.broken(signs)
            if reason is None:
                self._last.pop(signs.item, None)  # whatever it may fail of from here on is another thing
                continue
            gone.append(signs.item)
            if sum(
                _ended(worker) for worker in signs.workers
            ):  # else it was lost before, and others have seen that
                self._ended[signs.item] += 1
                self._last[signs.item] = reason
                log.warning(
                    "%s %s; its workers are ended, and it goes on behind the last checkpoint",
                    signs.words,
                    reason,
                )
        return gone

    def error(self, item: str) -> RunError | None:
        """The error of an item that was given up because it hung."""
        if item not in self._last:
            return None
        times = self._ended[item]
        return RunError(
            f"it {self._last[item]}, {times} time{'s' if times > 1 else ''}; look at its node and at the storage of its data, or raise the limit; run again "
            "to continue"
        )


def _ended(worker: Worker) -> bool:
    there = NodeAffinitySchedulingStrategy(worker.node, soft=False)
    try:
        return bool(
            ray.get(_end.options(scheduling_strategy=there).remote(worker.process), timeout=_ANSWER_SECONDS)
        )
    except GetTimeoutError:  # as a rule of a busy node, which ends it as soon as it can
        return True
    except RayError:  # the node is lost, and the worker with it
        return False
