"""What a driver and its workers on Ray tell each other: how far they are, and named errors.

Not covered: what they do (`on_ray`, `ray_search`).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Self

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clipq_ray.errors import (
    ArtifactError,
    ClipqError,
    ConfigError,
    DataError,
    FormatError,
    ModelError,
    RunError,
)
from clipq_ray.finetune import Progress
from clipq_ray.storage import Store

_POLL_SECONDS = 0.5
ERROR = "error.json"
"""The object in which a worker says to the driver why it fails."""


@ray.remote(num_cpus=0)
class _Board:
    """Where workers write how far they are and the driver reads it."""

    def __init__(self) -> None:
        self._items: dict[str, tuple[int, int, str]] = {}
        self._latest = ""

    def write(self, item: str, done: int, total: int, words: str) -> None:
        self._items[item] = (done, total, words)
        self._latest = words

    def read(self) -> tuple[int, int, str]:
        done = sum(item[0] for item in self._items.values())
        return done, max((item[1] for item in self._items.values()), default=0), self._latest


class Watch:
    """Passes the board's content to the driver's progress while Ray blocks the driver."""

    def __init__(self, progress: Progress) -> None:
        here = ray.get_runtime_context().get_node_id()
        # on the driver's node, so that it is lost with the driver only
        near = NodeAffinitySchedulingStrategy(here, soft=False)
        self.board = _Board.options(scheduling_strategy=near).remote()  # type: ignore[attr-defined]
        self._progress, self._end = progress, threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def _poll(self) -> None:
        while not self._end.wait(_POLL_SECONDS):
            self._show()

    def _show(self) -> None:
        done, total, words = ray.get(self.board.read.remote())
        if total:
            self._progress(done, total, words)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()
        if error[0] is None:
            self._show()
        ray.kill(self.board)


def tell(output: Store, error: ClipqError) -> None:
    """Leave a named error for the driver as text: Ray would wrap it beyond recognition."""
    output.write(ERROR, json.dumps({"kind": type(error).__name__, "error": str(error)}).encode())


def told(output: Store) -> ClipqError | None:
    """The named error that a worker left, if one did."""
    if not output.exists(ERROR):
        return None
    content = json.loads(output.read(ERROR))
    output.remove(ERROR)
    kind = {
        one.__name__: one for one in (ArtifactError, ConfigError, ModelError, DataError, FormatError)
    }.get(content["kind"], RunError)
    return kind(content["error"])


def visible_device(wanted: str) -> torch.device:
    """The device of a worker: what Ray gave it."""
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def last_line(error: BaseException) -> str:
    """What Ray says of a failure, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def apart(work: Callable[[], None]) -> None:
    """`work` in a thread of its own, to its end or to this thread's interrupt: Tune takes many seconds to end its actors, longer than `ray job stop` waits
    before it kills."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # raised again where it is waited for
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True, name="search")
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_SECONDS)
    if raised:
        raise raised[0]
