"""Images that do not fit into memory, read and decoded by Ray Data on any node of the cluster, for a training's worker.

`Decoders` gives the batches of `clipq_ray.data.batches`, bit by bit. Which images, in which order and with which crops is the plan's
(`data.reading`); a Ray Data task reads and decodes one piece of it, and what it makes, uint8, streams back in order. A task whose node is lost runs
again on another. The worker makes batches of what comes, and decodes itself where nothing comes for long: no training waits for CPUs that others
hold. Not covered: data in memory, which need no decoding; overlap of reading and decoding inside a task.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from ray.data import ExecutionResources, TaskPoolStrategy
from ray.data.exceptions import ExecutionTimeoutError
from torch import Tensor

from clipq_ray import errors, logs
from clipq_ray.config import Config
from clipq_ray.connections import answered
from clipq_ray.data import batches
from clipq_ray.data.decoding import Decoded
from clipq_ray.data.encoded import EncodedSplit
from clipq_ray.data.prefetch import Batch, Feed, ahead, one_by_one
from clipq_ray.data.reading import Reading, assembled, reading
from clipq_ray.data.split import Split
from clipq_ray.errors import ClipqError, ConfigError

log = logs.logger(__name__)
PIECE_BYTES = 16 * 2**20
"""Decoded images that a task makes at least: enough that its start does not count."""
BLOCK_BYTES = 4 * 2**20
STALL_SECONDS = 300.0
LOOK_SECONDS = 5.0
"""Before an epoch a free CPU is looked for so long: what has just ended is not known at once. Trials of a search may hold all of them for hours."""
_STORE_SHARE = (
    0.3  # of Ray's object store, for images on their way; Ray's own limit for one data set is half of it
)


class Decoders:
    """CPUs of the cluster that decode for one worker of a training; called as `data.batches`."""

    def __init__(self, cpus: int, waiting_bytes: int, object_store_bytes: float | None = None) -> None:
        """`cpus`: tasks at a time; `waiting_bytes`: decoded images in this process, about; `object_store_bytes`: of those on their way."""
        self.cpus, self.waiting_bytes, self.object_store_bytes = cpus, waiting_bytes, object_store_bytes
        self.stall_seconds, self.look_seconds = STALL_SECONDS, LOOK_SECONDS
        self._held: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        split: Split,
        index_batches: Iterable[Tensor],
        generators: Callable[[int], torch.Generator | None],
        prefetch: int = 2,
    ) -> Iterator[Batch]:
        """As `data.batches`. The generators must be as they were seeded: tasks seed their own the same."""
        if not isinstance(split, EncodedSplit):
            return batches(split, index_batches, generators, prefetch)
        if not self._cpu_is_free():
            log.warning("no CPU of the cluster is free to decode; this worker decodes its epoch itself")
            return batches(split, index_batches, generators, prefetch)
        made = self._made(split, list(index_batches), generators)
        return ahead(made, prefetch) if prefetch > 0 else made

    def _made(
        self,
        split: EncodedSplit,
        index_batches: list[Tensor],
        generators: Callable[[int], torch.Generator | None],
    ) -> Generator[Batch, None, None]:
        if not index_batches:
            return
        seeds = [_seed(generators(number)) for number in range(len(index_batches))]
        plan = reading(split, index_batches, seeds, waiting_bytes=self.waiting_bytes, piece_bytes=PIECE_BYTES)
        done = 0
        images = self._images(split, plan)
        try:
            for batch in assembled(split, plan, images, generators):
                yield batch
                done += 1
            return
        except ExecutionTimeoutError:
            log.warning(
                "no images from the cluster's decoders for %.0f s; this worker decodes the rest of the epoch itself",
                self.stall_seconds,
            )
        finally:
            images.close()
        yield from one_by_one(split, index_batches[done:], lambda number: generators(done + number))

    def _images(self, split: EncodedSplit, plan: Reading) -> Generator[Decoded, None, None]:
        """All images of the plan in the order of reading."""
        # one task per piece: both steps have the same limit, so Ray Data makes them one
        numbers = ray.data.range(plan.pieces, override_num_blocks=plan.pieces, concurrency=self.cpus)
        dataset = numbers.map_batches(
            _decode,
            batch_size=None,
            fn_kwargs={"key": _key(split), "split": self._shared(split), "plan": ray.put(plan)},
            compute=TaskPoolStrategy(size=self.cpus),
        )
        context = dataset.context
        context.execution_options.preserve_order = True
        context.execution_options.verbose_progress = False
        context.execution_options.resource_limits = ExecutionResources(
            object_store_memory=self.object_store_bytes
        )
        context.enable_progress_bars = False
        context.execution_no_progress_timeout_s = self.stall_seconds
        context.target_max_block_size = BLOCK_BYTES
        blocks = iter(dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1))
        try:
            for block in blocks:
                yield from _unpacked(block)
        finally:
            blocks.close()

    def _cpu_is_free(self) -> bool:
        limit = time.monotonic() + self.look_seconds
        while ray.available_resources().get("CPU", 0.0) < 1:
            if time.monotonic() > limit:
                return False
            time.sleep(0.1)
        return True

    def _shared(self, split: EncodedSplit) -> Any:
        """The split in the object store, once for all epochs."""
        key = _key(split)
        if key not in self._held:
            self._held[key] = ray.put(split.unbuffered())
        return self._held[key]


def refuse_without_cpus(config: Config) -> None:
    """`ConfigError` where the user wants decoding beside the workers and they leave no CPU; a cluster may still grow, so only our own Ray is checked."""
    if config.decode != "cluster" or os.environ.get("RAY_ADDRESS"):
        return
    if cpus_left(config, config.workers, 1) < 1:
        raise ConfigError(
            f"expected a CPU beyond its own for each of {config.workers} workers with --decode cluster, got "
            f"{ray.cluster_resources().get('CPU', 0):.0f} CPUs; lower --workers or use --decode auto"
        )


def counted(config: Config, trainings: int) -> int:
    """The CPUs that all decoders of a training take of --limit-cpus, where so many `trainings` may go on at a time; 0 where they have no limit."""
    if config.limit_cpus is None or config.decode != "cluster":
        return 0
    return config.workers * _most(config, cpus_left(config, config.workers, trainings))


def feed(config: Config, world: int, trainings: int, limit: int = 0) -> Feed:
    """What makes the batches of one of `world` workers, where so many `trainings` may go on at a time; `limit`: what `counted` said."""
    cpus = limit // world if limit else cpus_left(config, world, trainings)
    # trials and trainings may take a job's limit whole; decoders would be beyond it where they are not counted
    asked = config.decode == "cluster" or (config.decode == "auto" and config.limit_cpus is None and cpus > 0)
    if not asked:
        return batches
    cpus = _most(config, cpus)
    store = ray.cluster_resources().get("object_store_memory", 0.0)
    return Decoders(cpus, config.memory_limit_bytes // 2, _STORE_SHARE * store / (world * trainings))


def _most(config: Config, cpus: int) -> int:
    """Of so many CPUs that are left, those that decode for one worker."""
    return max(1, cpus if config.decode_cpus is None else min(cpus, config.decode_cpus))


def cpus_left(config: Config, world: int, trainings: int) -> int:
    """CPUs of the cluster for the decoders of one worker, beyond those that the workers of all trainings hold."""
    workers = world * trainings
    limit = math.inf if config.limit_cpus is None else config.limit_cpus
    there = min(limit, ray.cluster_resources().get("CPU", 0.0))
    return max(0, math.floor(float(there - workers * config.threads_per_worker) / workers))


def _seed(generator: torch.Generator | None) -> int | None:
    return None if generator is None else generator.initial_seed()


def _key(split: EncodedSplit) -> tuple[Any, ...]:
    """Splits of which any stands for the other: the copies that several workers of one training hold."""
    return split.fingerprint, split.preprocessing


_SPLITS: dict[tuple[Any, ...], EncodedSplit] = {}
_MOST_SPLITS = 2  # training and validation images


def _split(key: tuple[Any, ...], held: Any) -> EncodedSplit:
    """The split behind `held`, unpacked once per process."""
    if key not in _SPLITS:
        if len(_SPLITS) >= _MOST_SPLITS:
            _SPLITS.pop(next(iter(_SPLITS)))
        _SPLITS[key] = ray.get(held)
    return _SPLITS[key]


@functools.lru_cache(maxsize=2)
def _plan(held: Any) -> Reading:
    plan: Reading = ray.get(held)
    return plan


def _decode(pieces: dict[str, Any], key: tuple[Any, ...], split: Any, plan: Any) -> Iterator[dict[str, Any]]:
    """What a task does. Named errors travel as rows, since Ray would wrap them beyond recognition."""
    answered()
    shape: tuple[int, ...] = (1, 1, 1)
    try:
        images, order = _split(key, split), _plan(plan)
        shape = images.preprocessing.input_shape
        at_once = max(1, BLOCK_BYTES // int(np.prod(shape)))
        for piece in pieces["id"]:
            for part in order.decoded(images, int(piece), at_once):
                yield _packed(part, shape)
    except ClipqError as error:
        yield _packed([str(error)], shape, type(error).__name__)


def _packed(images: list[Decoded], shape: tuple[int, ...], error: str = "") -> dict[str, Any]:
    pixels = np.zeros((len(images), *shape), dtype=np.uint8)
    for position, image in enumerate(images):
        if not isinstance(image, str):
            pixels[position] = image
    reasons = np.array([image if isinstance(image, str) else "" for image in images], dtype=object)
    return {"pixels": pixels, "reason": reasons, "error": np.array([error] * len(images), dtype=object)}


def _unpacked(block: dict[str, Any]) -> Iterator[Decoded]:
    """The mirror of `_packed`: images, copied out of Ray's memory, or the error that a task met."""
    for pixels, reason, error in zip(block["pixels"], block["reason"], block["error"], strict=True):
        if error:
            raise errors.named(str(error), str(reason))
        yield str(reason) if reason else pixels.copy()
