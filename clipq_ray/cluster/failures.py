"""What Ray says of work that has failed: the reason in one line, and whether what Ray has given up is begun again.

Not covered: workers that hang (`hangs`), and memory that an attempt ran out of (`memory`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import ReschedulingState

_OTHER_RANK = re.compile(
    r"^(?!clipq_ray\.)[\w.]+: .*(connection (was )?(closed|reset|refused)|broken pipe|socket (closed|timeout)|timed out waiting|gloo|nccl)"
    r"|^torch\.distributed\.",
    re.IGNORECASE,
)
"""What a worker says of a collective operation that another one has left."""
_NAMED = re.compile(r"[A-Za-z_][\w.]*(: |$)")
"""How Python begins the line with an exception's type and message."""


def low_memory(error: BaseException) -> str | None:
    """What Ray's memory monitor says of a node where it ended workers, the same for all that it ended at a time; None for other failures."""
    found = re.search(r"[^\n]*running low on memory\.[^\n]*", str(error))
    return None if found is None else found[0].strip()


def reason(error: BaseException) -> str:
    """Why work failed, in one line; of several workers, what the first one says that did not merely lose another one."""
    if (low := low_memory(error)) is not None:
        return low
    workers = getattr(error, "worker_failures", {}) if isinstance(error, WorkerGroupError) else {}
    lines = [_line(workers[rank]) for rank in sorted(workers)] or [_line(error)]
    return next((line for line in lines if not _OTHER_RANK.search(line)), lines[0])


def _line(error: BaseException) -> str:
    """`Type: message` of the last traceback in an error's text, without further lines of the message (of CUDA's errors they are advice); of other texts the
    last line."""
    lines = [line.rstrip() for line in str(error).splitlines() if line.strip()]
    frames = [place for place, line in enumerate(lines) if line.startswith('  File "')]
    named = (line for line in lines[frames[-1] :] if _NAMED.match(line)) if frames else iter(())
    return next(named, lines[-1].strip() if lines else type(error).__name__)


class UnstartedWorkers(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Ends a fit whose workers died while they started, in the controller's process: Ray would start them without end and without a word.

    Ray has found room for them by then; where it waits for a host, that is another error, and it goes on waiting. It gives that room back only where they
    died at the very first, so `board` is told of it before they begin."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def before_init_train_context(self, workers: Sequence[Any]) -> dict[str, list[Any]]:
        """They are there, and have made no process group yet."""
        group = ray.get(workers[0].execute_async(ray.util.get_current_placement_group))
        if group is not None:
            ray.get(self._board.hold.remote(group))
        return {}

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Raises where the workers are to be started again and have died before they ran."""
        if not isinstance(current_state, ReschedulingState) or current_state is previous_state:
            return
        failure = getattr(current_state.training_failed_error, "controller_failure", None)
        if isinstance(failure, WorkerGroupStartupFailedError):
            raise RuntimeError(f"workers died while they started: {_line(failure)}")


class Restarts:
    """How often a training is begun again that Ray has given up: `most` times without a new checkpoint.

    Ray itself starts lost workers again as often; what is not for it to restart (a failure outside the workers, its own actors lost) is begun again here,
    and so is a training whose workers were lost too often, but not without a checkpoint between.
    """

    def __init__(self, most: int, checkpoint: str | None) -> None:
        """`checkpoint`: the last one's name before the first attempt, None where there is none."""
        self._most, self._checkpoint, self._made = most, checkpoint, 0

    def allowed(self, failure: Exception, checkpoint: str | None) -> bool:
        """Whether it is begun again behind `failure`; `checkpoint`: the last one's name now."""
        further, self._checkpoint = checkpoint != self._checkpoint, checkpoint
        self._made = 1 if further else self._made + 1
        outside = isinstance(failure, ControllerError | RayActorError) or low_memory(failure) is not None
        return (outside or further) and self._made <= self._most


class _ActorLost(RayActorError):  # type: ignore[misc]
    """An actor that ended for a reason which Ray says by an error of another kind."""

    def __init__(self, said: str) -> None:
        super().__init__()
        self._said = said

    def __str__(self) -> str:
        return self._said

    def __reduce__(self) -> Any:
        return _ActorLost, (self._said,)


@contextmanager
def actors_lost() -> Iterator[None]:
    """Whatever ends an actor of Ray Tune costs its trial an attempt. Of an actor that Ray's memory monitor has ended Ray says `OutOfMemoryError`, which is no
    `RayActorError`; Tune takes that for a mistake of its own and ends the whole search (Ray 2.60)."""
    name = "_actor_task_failed"
    before = getattr(RayActorManager, name)

    def failed(self: Any, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, RayError) and not isinstance(exception, RayActorError | RayTaskError):
            exception = _ActorLost(str(exception))
        before(self, tracked_actor_task, exception)

    setattr(RayActorManager, name, failed)
    try:
        yield
    finally:
        setattr(RayActorManager, name, before)
