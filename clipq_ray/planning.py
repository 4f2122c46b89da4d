"""Before hours of work: what a run would do, how long it would take and what it would write, from short measurements.

Steps of training and evaluation are timed on this machine with the real network and data; a cluster's other machines may differ.
Not covered: the time that Ray takes to start (about twenty seconds a stage).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from clipq_ray import identity, network, packing, stages
from clipq_ray.config import Config
from clipq_ray.consistency import idle
from clipq_ray.errors import ClipqError, StorageError, brief
from clipq_ray.evaluate import logits
from clipq_ray.fleet.file import Ensemble
from clipq_ray.fleet.shares import Joining, as_members, without
from clipq_ray.groups import grouped
from clipq_ray.intent import Intent
from clipq_ray.operator import Operator, make_plan
from clipq_ray.original import inputs_of
from clipq_ray.plan import Theta
from clipq_ray.precision import autocast_dtype
from clipq_ray.redaction import redacted
from clipq_ray.source import Source
from clipq_ray.storage import Store
from clipq_ray.work import prepare_process

_RAY_SECONDS = 20.0  # start of a worker group, seen
_T = TypeVar("_T")
_VALUES = 1 << 21  # of images that are timed at a time: 13 of ImageNet's


@dataclass(frozen=True)
class Plan:
    """What a run would do: in words, its time [s] and its disk [bytes]; nothing of both where it is committed already, or `error` says why it cannot be made."""

    words: str
    seconds: float = 0.0
    disk: float = 0.0
    committed: bool = False
    error: ClipqError | None = None


def dry_run(sources: Sequence[Source], ensembles: Sequence[Ensemble] = ()) -> tuple[str, int]:
    """The plans of a job's networks in words without secrets, and their totals, and the exit code: of the networks that could not be made, 0 if there are none. Nothing
    is kept. `StorageError` where the storage takes nothing; of one network alone its error."""
    _check_storage(Store(sources[0].config.storage))
    plans = [_planned(sources[0])] if len(sources) == 1 else _plans(sources, ensembles)
    bad = [plan.error.exit_code for plan in plans if plan.error is not None]
    text = "\n\n".join(plan.words for plan in plans)
    if len(plans) > 1:
        done = sum(plan.committed for plan in plans)
        text += (
            f"\n\nall {len(plans)}      {done} committed already, {f'{len(bad)} that cannot be made, ' if bad else ''}{len(plans) - done - len(bad)} to make: about {_clock(sum(plan.seconds for plan in plans))} one "
            f"after the other, less where trainings and searches overlap; at most {sum(plan.disk for plan in plans) / 1e6:,.0f} MB in {sources[0].config.storage}"
        )
    return redacted(f"{text}\nnothing was done"), max(bad, default=0)


def _check_storage(storage: Store) -> None:
    """As the job will; of a directory, which would have to be made for that, what its nearest parent allows."""
    if storage.local is None:
        storage.check_writable()
        return
    there = next(one for one in (storage.local, *storage.local.parents) if os.path.lexists(one))
    if not os.access(there, os.W_OK | os.X_OK) or not os.path.isdir(there):
        why = "may not be written to" if os.path.isdir(there) else "is no directory"
        raise StorageError(f"cannot write to {storage.uri}: {there} {why}; choose another --storage")


def _plans(sources: Sequence[Source], ensembles: Sequence[Ensemble]) -> list[Plan]:
    """The plans of several networks: one that cannot be made hides no other, but that members of its ensemble with one intent are not made without it."""
    by_name = {source.name: source for source in sources}
    failed: dict[str, ClipqError] = {}
    together = [one for one in ensembles if one.wants]
    for ensemble in together:  # as the job identifies them: by all the others too
        found = {name: _or_error(Joining.of, by_name[name]) for name in ensemble.members}
        failed |= {name: one for name, one in found.items() if isinstance(one, ClipqError)}
        joining = [one for one in found.values() if isinstance(one, Joining)]
        if len(joining) == len(found):
            by_name |= {one.name: one for one in as_members(ensemble, joining)}
    plans: dict[str, Plan | ClipqError] = {
        name: failed[name] if name in failed else _or_error(_planned, source)
        for name, source in by_name.items()
    }
    for ensemble in together:
        bad = {name: one for name in ensemble.members if isinstance(one := plans[name], ClipqError)}
        if bad:
            plans |= {name: without(ensemble, bad) for name in ensemble.members if name not in bad}
    return [_not_made(name, one) if isinstance(one, ClipqError) else one for name, one in plans.items()]


def _or_error(make: Callable[[Source], _T], source: Source) -> _T | ClipqError:
    try:
        return make(source)
    except ClipqError as error:
        return error


def _not_made(name: str, error: ClipqError) -> Plan:
    return Plan(f"network     {name} cannot be made: {brief(error, None)}", error=error)


def _planned(source: Source) -> Plan:
    """The plan of one network."""
    config = source.config
    prepare_process(config.threads_per_worker)
    data = source.data()
    of_fit = source.check_fit()
    run, committed = identity.run_id(
        Store(config.storage), source.name, inputs_of(source), force=config.force
    )
    if committed is not None:
        return Plan(f"network     {source.name}: run {run} is committed already", committed=True)
    model, device = source.network(), source.device()
    sample = data.train.batch(torch.arange(min(2, len(data.train))), None)[0]
    found = network.inventory(model, sample, config.keep)
    of_size = packing.size_notes(source, model, found, data)  # of new weights, which take no more
    model, sample = model.to(device), sample.to(device)
    forward, step = _seconds(source, model, [layer.name for layer in found.layers])
    images, held = len(data.train), len(data.validation)
    groups = grouped(model, [layer.name for layer in found.layers], config.groups)
    its_trainings = trainings(source)
    drop = source.ensemble is None and Intent.of(config, found.bytes_before).kind == "max_drop"
    # a drop may need larger files than the first search is for
    searches = 1 + drop + config.search_again * sum(one.times for one in its_trainings if one.searched)
    evaluations = config.search_evaluations * len(groups) * searches
    trials, bound = at_a_time(config, len(groups), on_gpu=device.type == "cuda")
    search_seconds = evaluations * min(config.search_images, images) * forward / trials
    trained = [
        one.times * (one.epochs * (images * step / config.workers + held * forward) + _RAY_SECONDS)
        for one in its_trainings
    ]
    total = search_seconds + sum(trained)
    disk = found.bytes_before * (2 + 6 * sum(one.times for one in its_trainings))
    called = f"{config.name} ({config.model})" if config.name else config.model
    lines = [
        f"network     {called}: {found.parameters:,} parameters, {len(found.layers)} layers to compress"
        + (f" in {len(groups)} groups" if config.groups else ""),
        f"data        {data.description}: {images:,} training, {held:,} validation images",
        f"search      {'at most ' if searches > 1 else ''}{evaluations:,} evaluations of {min(config.search_images, images):,} images: {bound} {_clock(search_seconds)}"
        + (f", {trials} at a time" if trials > 1 else ""),
        *(
            f"{one.name:<11} {'at most ' if one.at_most else ''}{one.times * one.epochs} epochs on {config.workers} workers: about {_clock(seconds)}"
            for one, seconds in zip(its_trainings, trained, strict=True)
        ),
        f"time        {bound} {_clock(total)} on {config.workers} workers of {config.threads_per_worker} threads",
        f"disk        at most {disk / 1e6:,.0f} MB in {config.storage} (checkpoints included, removed at commit)",
    ]
    notes = (*idle(config, source.weights_origin()), *data.notes, *of_fit, *found.notes, *of_size)
    return Plan("\n".join([*lines, *(f"note        {note}" for note in notes)]), total, disk)


def at_a_time(config: Config, groups: int, *, on_gpu: bool) -> tuple[int, str]:
    """Trials of the search at a time, each of one of `groups`, and what their time is then: "about", or a bound where a cluster is joined, whose size is not
    known here: "at least" with as many trials as the job may make, "at most" with one where nothing caps them."""
    if config.engine == "local":
        return 1, "about"
    cap = min(config.search_parallel or groups, groups)
    if os.environ.get("RAY_ADDRESS"):
        return (1, "at most") if config.search_parallel is None else (cap, "at least")
    return max(1, min(cap, _room(config, on_gpu=on_gpu))), "about"


def _room(config: Config, *, on_gpu: bool) -> int:
    """How many trials of a search this machine holds within the job's limits."""
    cpus = min(os.cpu_count() or 1, config.limit_cpus or math.inf) // config.threads_per_worker
    if not on_gpu:
        return int(cpus)
    gpus = min(torch.cuda.device_count(), config.limit_gpus or math.inf)
    return int(min(cpus, gpus / config.search_gpu_share))


@dataclass(frozen=True)
class Trainings:
    """Trainings of one kind: how many, of how many epochs each, whether fewer may do, and whether a search may go before each."""

    name: str
    times: int
    epochs: int
    at_most: bool = False
    searched: bool = False


def trainings(source: Source) -> list[Trainings]:
    """All trainings of a run, in their order."""
    config = source.config
    half = math.ceil(config.epochs / 2)
    further = config.rounds - 1 if config.tradeoff is None else 0
    tries = 2 if config.hold_size else 1  # where free codes take too much, or are no better
    return [
        one
        for one in (
            Trainings("baseline", int(source.weights_origin() == "train"), config.baseline_epochs),
            Trainings("rungs", config.rungs - 1, stages.rung_epochs(config), True, True),
            Trainings("fine-tuning", 1, config.epochs),
            Trainings("control", int(source.wants_control()), stages.control_epochs(config)),
            Trainings("more rounds", further, config.round_epochs or half, True, True),
            Trainings("levels", (1 + further) * tries, config.level_epochs, further > 0 or tries > 1),
        )
        if one.times and one.epochs
    ]


def _seconds(source: Source, model: nn.Module, layers: list[str]) -> tuple[float, float]:
    """Seconds per image of evaluation and of a training step with the operator, best of two; of as many images at a time as a training that is short of memory
    would take, two at least where a batch has them: batch norm may take no single one."""
    config, data = source.config, source.data()
    batch = min(max(1, config.batch_size // config.workers), len(data.train))
    size = min(batch, max(2, _VALUES // math.prod(data.train.batch(torch.arange(1), None)[0].shape)))
    images, labels = (part.to(source.device()) for part in data.train.batch(torch.arange(size), None))
    forward, step, quantized = [], [], []
    operator = Operator(model, make_plan(model, dict.fromkeys(layers, Theta(0.5, 3))))
    dtype = autocast_dtype(config.precision, source.device())
    for _ in range(2):
        started = _now()
        with torch.inference_mode():
            model.eval()(images)
        forward.append(_now() - started)
        started = _now()
        with torch.autocast(source.device().type, dtype, enabled=dtype != torch.float32):
            output = logits(model.train()(images)).float()
        nn.functional.cross_entropy(output, labels % output.shape[1]).backward()
        step.append(_now() - started)
        started = _now()
        with operator.full_precision():
            model.zero_grad()
        quantized.append(_now() - started)
    return min(forward) / size, min(step) / size + min(quantized) / batch


def _now() -> float:
    """The time, once a GPU has done what it was given [s]."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _clock(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.1f} min"
