"""What a driver and its workers on Ray tell each other: who and how far they are, and named errors.

Not covered: what they do (`on_ray`, `ray_search`).
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from typing import Any, Self

import ray
import torch
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clipq_ray import errors, logs
from clipq_ray.cluster.apart import Apart, Left
from clipq_ray.cluster.hangs import Hangs, Limits, Signs, Worker
from clipq_ray.cluster.hosts import Hosts
from clipq_ray.connections import full
from clipq_ray.errors import ClipqError, StorageError
from clipq_ray.finetune import Progress
from clipq_ray.storage import Store

log = logs.logger(__name__)
_POLL_SECONDS, _LEASE_POLL_SECONDS, _LOOKS = 0.5, 2.0, 60
_NAMESPACE = "clipq_ray"
ERROR = "error.json"
"""The object in which a worker says to the driver why it fails."""


@ray.remote(num_cpus=0)
class _Board:
    """Where workers write who and how far they are, and the driver reads it."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._items: dict[str, tuple[int, int, str]] = {}
        self._latest = ""
        self._workers: dict[str, dict[int, Worker]] = {}
        self._words: dict[str, str] = {}
        self._begun: dict[str, float] = {}
        self._stepped: dict[str, float] = {}
        self._groups: list[PlacementGroup] = []

    def owner(self) -> str:
        return self._owner

    def begin(self, item: str, words: str, worker: Worker, rank: int = 0, world: int = 1) -> None:
        """An attempt at `item` begins in this worker, which is one of `world`."""
        others = self._workers.get(item, {})
        self._workers[item] = {one: other for one, other in others.items() if one < world} | {rank: worker}
        self._words[item] = words
        self._begun[item] = self._stepped[item] = time.monotonic()

    def loaded(self, item: str) -> None:
        """Its worker has what it needs; the first step begins."""
        if item in self._workers:
            self._stepped[item] = time.monotonic()

    def write(self, item: str, done: int, total: int, words: str) -> None:
        self._items[item] = (done, total, words)
        self._latest = words
        self._stepped[item] = time.monotonic()

    def leave(self, items: list[str]) -> None:
        """These have no workers any more."""
        for item in items:
            self._workers.pop(item, None)

    def under_way(self) -> int:
        """How many items have workers."""
        return len(self._workers)

    def hold(self, group: PlacementGroup) -> None:
        """Workers that are there hold this of the cluster, whether they have begun or not."""
        self._groups.append(group)

    def held(self) -> list[PlacementGroup]:
        return self._groups

    def read(self) -> tuple[int, int, str]:
        done = sum(item[0] for item in self._items.values())
        return done, max((item[1] for item in self._items.values()), default=0), self._latest

    def signs(self) -> list[Signs]:
        now = time.monotonic()
        return [
            Signs(
                item,
                self._words[item],
                list(workers.values()),
                now - self._stepped[item],
                now - self._begun[item],
            )
            for item, workers in self._workers.items()
        ]


class Watch:
    """Passes the board's content to the driver's progress while Ray blocks the driver, ends workers that hang, and says when hosts are missing."""

    def __init__(
        self, apart: Apart, progress: Progress, limits: Limits, hosts: Hosts | None = None, lease: str | None = None,
    ) -> None:  # fmt: skip
        """`lease`: only one watch of this name at a time in the whole cluster; the next one waits for its end, and says so."""
        self.board = _new_board() if lease is None else _leased_board(lease, apart)
        self.hangs = Hangs(limits)
        self._progress, self._hosts, self._end = progress, hosts, threading.Event()
        self._held: dict[str, PlacementGroup] = {}
        self._apart, self._ended = apart, threading.Event()

    def _poll(self) -> None:
        said = False
        while not self._end.wait(_POLL_SECONDS):
            self._apart.check()
            try:
                self._pass_on()
            except Exception as error:  # a thread that ended here would let everything hang from then on
                self._apart.check()
                if not (said or self._end.is_set()):
                    log.warning("progress cannot be read, and is asked for again: %s", logs.brief(error))
                said = True

    def _pass_on(self) -> None:
        self._show()
        self._look()
        if self._hosts is not None:
            self._hosts.look()
        if gone := self.hangs.look(ray.get(self.board.signs.remote())):
            self.board.leave.remote(gone)

    def release(self) -> None:
        """Give back what workers held, where their work has failed: Ray Train leaves it behind where it cannot end in order."""
        self._look()
        for group in self._held.values():
            remove_placement_group(group)
        self._held.clear()

    def _look(self) -> None:
        # not only where it is given back: the board may be lost together with the workers
        self._held |= {group.id.hex(): group for group in ray.get(self.board.held.remote())}

    def _show(self) -> None:
        done, total, words = ray.get(self.board.read.remote())
        if total:
            self._progress(done, total, words)

    def __enter__(self) -> Self:
        self._ended = self._apart.begin(self._poll, "watch")
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._ended.wait()
        if error[0] is Left:  # Ray is shut down, or is about to be
            return
        if error[0] is None:
            self._show()
        ray.kill(self.board)


def _new_board(**options: Any) -> Any:
    here = ray.get_runtime_context().get_node_id()
    # on the driver's node, so that it is lost with the driver only
    near = NodeAffinitySchedulingStrategy(here, soft=False)
    owner = f"{platform.node()}, process {os.getpid()}"
    # Ray's memory monitor may end it; what it knew of workers, those of the next attempt say again
    again = {"max_restarts": -1, "max_task_retries": -1}
    return _Board.options(scheduling_strategy=near, **again, **options).remote(owner)  # type: ignore[attr-defined]


def _leased_board(name: str, apart: Apart) -> Any:
    """A board of this name once nobody else has one; it is lost with its owner, and so is the lease."""
    said = False
    while True:
        try:
            return _new_board(name=f"{_NAMESPACE}-{name}", namespace=_NAMESPACE)
        except ValueError:  # the name is taken
            if not said:
                log.warning(
                    "%s: waits for that of another job on this cluster (%s); Ray runs one at a time",
                    name,
                    _owner(name, apart),
                )
            said = True
            apart.check(_LEASE_POLL_SECONDS)


def _owner(name: str, apart: Apart) -> str:
    try:
        asked = ray.get_actor(f"{_NAMESPACE}-{name}", namespace=_NAMESPACE).owner.remote()
        for _ in range(_LOOKS):  # an interrupt is not kept waiting by a board that is slow to answer
            if ray.wait([asked], timeout=_POLL_SECONDS)[0]:
                return str(ray.get(asked))
            apart.check()
    except (ValueError, RayError):  # it has just ended
        return "about to end"
    return "which does not say its name"


def tell(output: Store, error: ClipqError) -> None:
    """Leave a named error for the driver as text: Ray would wrap it beyond recognition. One of a store that another attempt may reach is raised instead, and
    Ray makes it, as it does where the store takes no word any more."""
    if isinstance(error, StorageError) and not full(error):
        raise error
    output.write(ERROR, json.dumps({"kind": type(error).__name__, "error": str(error)}).encode())


def told(output: Store) -> ClipqError | None:
    """The named error that a worker left, if one did."""
    if not output.exists(ERROR):
        return None
    content = json.loads(output.read(ERROR))
    output.remove(ERROR)
    return errors.named(content["kind"], content["error"])


def visible_device(wanted: str) -> torch.device:
    """The device of a worker: what Ray gave it."""
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
