"""The search of one network's layers as a unit of work, and what all units share.

A task is a value; what it makes lies in a store when it ends, whole. The same functions run in the driver's process and on a cluster, so both engines give
the same result. Not covered: who starts it (`cluster`), and training (`training`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from clipq_ray import codec, seeds
from clipq_ray.config import Config
from clipq_ray.data import Split
from clipq_ray.data.resident import placed
from clipq_ray.data.sampling import stratified
from clipq_ray.errors import FormatError, brief
from clipq_ray.groups import Group
from clipq_ray.operator import bake_keeping
from clipq_ray.plan import Plan
from clipq_ray.precision import exact_float32
from clipq_ray.search import LayerEvaluator, Settings, Trial, step_group
from clipq_ray.source import Source
from clipq_ray.states import put_state, read_state
from clipq_ray.storage import Store

CURVE = "curve.json"


def prepare_process(threads: int) -> None:
    """Threads and kernels are configuration, not inherited: equal inputs give equal bytes."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    exact_float32()


def read_record(store: Store, name: str) -> dict[str, Any]:
    """The JSON object that a stage has left."""
    try:
        found = json.loads(store.read(name))
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}")
    except ValueError as error:
        raise FormatError(
            f"expected a JSON object at {store.uri}/{name}, got {brief(error)}; remove {store.uri} and run again"
        ) from error
    return found


def here(deadline: float | None, store: Store) -> float | None:
    """A deadline by the clock of the storage as a time of this process's `time.monotonic()`, which no change of a clock moves afterwards."""
    return None if deadline is None else time.monotonic() + deadline - store.now()


def later(deadline: float | None, share: float, seconds: float) -> float | None:
    """A deadline that left a part `share` of the time until the end, of what could not begin for `seconds` since."""
    return None if deadline is None else deadline + (1 - share) * seconds


@dataclass(frozen=True)
class SearchTask:
    """The search of one network: one object of trials per group of layers is written to `output`.

    `work`: what an evaluation of each group costs beside others [FLOP]. `plan`: how all layers are compressed beside the group that is searched; None:
    they are not. After `deadline`, by the clock of the storage [s since 1970], a group ends with
    what it has, at least one trial; it leaves the search a part `deadline_share` of the time that there was when it was set.
    """

    source: Source
    weights: str
    groups: tuple[Group, ...]
    settings: Settings
    images: int
    network_bytes: int
    output: str
    deadline: float | None = None
    work: tuple[int, ...] = ()
    plan: Plan | None = None
    deadline_share: float = 1.0

    def after(self, seconds: float) -> SearchTask:
        """The same where it could not begin for `seconds`, which all stages before the end lose, not the search alone."""
        return replace(self, deadline=later(self.deadline, self.deadline_share, seconds))

    def open_groups(self) -> list[int]:
        """The numbers of the groups whose trials are not there yet, the longest first."""
        there = set(Store(self.output).names("group-"))
        missing = [index for index in range(len(self.groups)) if group_name(index) not in there]
        return sorted(missing, key=lambda index: -self.work[index] if self.work else 0)


def group_name(index: int) -> str:
    """The object that holds one group's trials."""
    return f"group-{index:04d}.json"


def partial_name(index: int) -> str:
    """The object that holds one group's trials until the group is done."""
    return f"partial-{index:04d}.json"


def late_name(index: int) -> str:
    """The object that says that a deadline cut a group short."""
    return f"late-{index:04d}.json"


def _to_json(trials: Sequence[Trial]) -> bytes:
    return json.dumps([trial.to_json() for trial in trials]).encode()


def fewest_of_late(task: SearchTask) -> int:
    """The fewest evaluations of the groups that a deadline cut short; 0 where it cut none."""
    there = set(Store(task.output).names("late-"))
    trials = read_trials(task) if there else {}
    late = [group.name for index, group in enumerate(task.groups) if late_name(index) in there]
    return min((len(trials[name]) for name in late), default=0)


def read_trials(task: SearchTask) -> dict[str, list[Trial]]:
    """All groups' trials by name, in the order of the network."""
    store = Store(task.output)
    result = {}
    for index, group in enumerate(task.groups):
        try:
            result[group.name] = [Trial(**row) for row in json.loads(store.read(group_name(index)))]
        except (ValueError, TypeError) as error:
            raise FormatError(
                f"expected trials at {store.uri}/{group_name(index)}, got {error}; remove the object and run again"
            ) from error
    return result


class _Share:
    """The time of a group that begins now: its part of what is left before a `deadline` [s of `time.monotonic()`], beside as many others as were seen
    under way since. They need not have begun before it, so it asks again when its time is over by what it knows."""

    def __init__(self, deadline: float, groups: int, under_way: Callable[[], int]) -> None:
        """`groups`: that are to be searched before the deadline."""
        self._began, self._groups, self._under_way = time.monotonic(), max(groups, 1), under_way
        self._left, self._seen = max(0.0, deadline - self._began), 1

    def _past(self) -> bool:
        return time.monotonic() > self._began + self._left * min(1.0, self._seen / self._groups)

    def over(self) -> bool:
        """Whether it is."""
        if self._past():
            self._seen = max(self._seen, self._under_way())
        return self._past()


class Searcher:
    """Searches groups of layers of one network in this process; network and images are loaded once."""

    def __init__(self, task: SearchTask, device: torch.device) -> None:
        config = task.source.config
        prepare_process(config.threads_per_worker)
        self.task = task
        model = task.source.network()
        put_state(model, read_state(Store(task.weights)))
        full = {} if task.plan is None else bake_keeping(model, task.plan)
        self._deadline = here(task.deadline, Store(task.output))
        self._share: _Share | None = None
        self._evaluator = LayerEvaluator(
            model,
            placed(
                search_images(
                    task.source.data().train, task.images, config.seed, shuffled=task.settings.early_stop
                ),
                device,
            ),
            task.network_bytes,
            batch_size=config.evaluation_batch_size,
            device=device,
            node=platform.node(),
            size=functools.partial(layer_bytes, config),
            cache_bytes=min(config.search_cache_bytes, _fair_share(device, config.search_gpu_share)),
            full=full,
            rates={layer.layer: layer.theta.p for layer in task.plan.layers} if task.plan else None,
        )

    def begin(self, index: int, behind: int = 0, under_way: Callable[[], int] = lambda: 1) -> list[Trial]:
        """The trials of group `index` that an attempt before left behind; `behind`: groups of other networks that wait behind those of this one; `under_way`: says
        how many groups are, whoever's, this one among them."""
        store, name = Store(self.task.output), partial_name(index)
        trials: list[Trial] = []
        if store.exists(name):
            # of another version nothing is taken; what is measured anew is at most one group
            with contextlib.suppress(ValueError, TypeError):
                trials = [Trial(**row) for row in json.loads(store.read(name))]
        if self._deadline is not None:
            self._share = _Share(self._deadline, len(self.task.open_groups()) + behind, under_way)
        return trials

    def step(self, index: int, trials: list[Trial]) -> bool:
        """One more trial of group `index`, if one is worth measuring; True when the group is done, and then its trials are stored."""
        made = step_group(self._evaluator, self.task.groups[index], trials, self.task.settings)
        late = self._share is not None and self._share.over()
        if made is not None and len(trials) < self.task.settings.evaluations:
            if not late:
                Store(self.task.output).write(partial_name(index), _to_json(trials))
                return False
            Store(self.task.output).write(late_name(index), b"{}")
        elif self._share is not None:  # an attempt that was killed may have been late
            Store(self.task.output).remove(late_name(index))
        Store(self.task.output).write(group_name(index), _to_json(trials))
        Store(self.task.output).remove(partial_name(index))
        return True


def _fair_share(device: torch.device, gpu_share: float) -> int:
    """Bytes that one of as many trials as a machine runs may keep: results do not depend on it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1] * min(gpu_share, 1.0)) // 2
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(memory) // (2 * (os.cpu_count() or 1))


def layer_bytes(config: Config, layer: codec.CodedLayer) -> int:
    """What `layer` takes in the file that this configuration writes."""
    stored = layer.halved() if config.vectors == "auto" else layer
    return codec.layer_bytes(stored, config.profile)


def search_images(train_split: Split, images: int, seed: int, *, shuffled: bool = False) -> Split:
    """The seeded subset of the training images that scores the search, in the order of the files, or `shuffled`, so that the first speak for all.

    Where images are read in groups it lies in as few as can be: every evaluation that does not find them in memory reads these whole.
    """
    draw = seeds.generator(seed, "search images")
    if train_split.groups is None:
        order = torch.randperm(len(train_split), generator=draw)[:images]
    else:
        n = min(images, len(train_split))
        rows = torch.from_numpy(stratified(train_split.labels, n, seed, "search images", train_split.groups))
        order = rows[torch.randperm(n, generator=draw)]
    return train_split.subset(order if shuffled else order.sort().values)
