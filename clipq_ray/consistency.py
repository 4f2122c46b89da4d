"""What options must fulfil together; what each must fulfil alone stands beside it in `clipq_ray.config`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipq_ray.config import Config

INTENTS = ("max_drop", "target_ratio", "target_bytes", "tradeoff")
"""What the user wants of the result: one of these options."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
NAME_WORDS = "letters, digits, '.', '_' and '-' that begins with a letter or digit, at most 200 in all"
"""What a result may be called: it is a hive partition, which every reader takes as it is, and part of the name of a folder, which may have 255 bytes."""

PAPER: dict[str, Any] = {
    "ramp_share": 0.0, "rungs": 1, "search_again": False, "search_loss_share": 0.0, "search_early_stop": False,
    "dead_units": "keep", "level_epochs": 0, "unit_order": "given", "vectors": "exact", "label_smoothing": 0.0,
    "hold_size": False, "rate_distortion": 0.0, "cutout_pixels": 0,
}  # fmt: skip
"""The method as published, beside what it leaves open (method: the lines marked *ours*): what --paper says of the options that go beyond it."""

_OF_THE_FIRST_TRAINING = ("baseline_epochs", "baseline_learning_rate")
NEEDS = {
    "rung_epochs": ("rungs", 1),
    "round_epochs": ("rounds", 1),
    "level_learning_rate": ("level_epochs", 0),
}
"""Options that say how something is done, and the option with which it is not done at all."""
_OF_RAY = {
    **dict.fromkeys(("search_parallel", "trainings", "limit_cpus", "limit_gpus", "min_workers", "decode_cpus"), "does one thing at a time"),
    **dict.fromkeys(("stall_minutes", "attempt_hours", "max_failures"), "watches over no worker"),
}  # fmt: skip
"""What a job may take of a cluster, or of this machine, and how its workers are watched, by Ray alone; and what --engine local does instead."""


def idle(config: Config, origin: str) -> Iterator[str]:
    """`origin`: of the weights (`Source.weights_origin`). What was said and has nothing to do, a sentence each: no mistake, since a recipe's part may be switched off by one option."""

    def said(name: str) -> bool:
        return bool(getattr(config, name) != type(config).model_fields[name].default)

    for name, (other, off) in NEEDS.items():
        if said(name) and getattr(config, other) == off:
            yield f"--{name.replace('_', '-')} has nothing to do with --{other.replace('_', '-')} {off}"
    for name in ("rounds", "round_epochs") if config.tradeoff is not None and config.rounds > 1 else ():
        if said(name):
            yield f"--{name.replace('_', '-')} has nothing to do with --tradeoff, which makes one round"
    for name in _OF_THE_FIRST_TRAINING if origin != "train" else ():
        if said(name):
            yield f"--{name.replace('_', '-')} has nothing to do with weights that are not trained first ({origin})"
    for name, instead in _OF_RAY.items() if config.engine == "local" else ():
        if said(name):
            yield f"--{name.replace('_', '-')} has nothing to do with --engine local, which {instead}"
    if config.engine == "ray" and config.decode == "worker" and said("decode_cpus"):
        yield "--decode-cpus has nothing to do with --decode worker"
    if said("data_root"):
        from clipq_ray.data import builtin  # torch is needed only here

        named = [one for one in (config.data, config.validation_data) if one is not None]
        if not any(one.removesuffix(":") in builtin.TORCHVISION for one in named):
            yield f"--data-root has nothing to do with {' and '.join(named)}: no torchvision set by its name alone"
    if config.search_start > config.search_evaluations:
        yield f"--search-start has nothing to do beyond --search-evaluations {config.search_evaluations}, which all lie where it says: nothing is proposed"


def problem(config: Config) -> str | None:
    """The first thing that is wrong with options together, in one line: expected, got, what to do."""
    return next(
        chain(_intent(config), _beyond_the_paper(config), _workers(config), _limits(config), _values(config)),
        None,
    )


def _intent(config: Config) -> Iterator[str]:
    wanted = [f"--{name.replace('_', '-')}" for name in INTENTS if getattr(config, name) is not None]
    if len(wanted) > 1:
        yield f"expected one intent, got {' and '.join(wanted)}; leave one out"
    if config.search_early_stop and config.tradeoff is None:
        yield "expected --tradeoff with --search-early-stop, which saves evaluations for one lambda; add it, or say --no-search-early-stop"
    sized = config.target_bytes is not None or config.target_ratio is not None
    if config.rungs > 1 and not sized:
        yield f"expected --target-bytes or --target-ratio with --rungs {config.rungs}, which are sizes on the way to one; add it, or leave --rungs out"
    if config.search_again and (config.tradeoff is not None or config.rungs == config.rounds == 1):
        yield "expected several rounds with --search-again, which searches before each further one, got one; raise --rounds or --rungs, or leave --search-again out"
    if config.hold_size and not sized:
        yield "expected --target-bytes or --target-ratio with --hold-size, which holds it; add it, or leave --hold-size out"


def _beyond_the_paper(config: Config) -> Iterator[str]:
    added = [name for name, value in PAPER.items() if getattr(config, name) != value]
    if config.paper and added:
        words = ", ".join(f"--{name.replace('_', '-')} {getattr(config, name)}" for name in added)
        yield f"expected the method as published with --paper, got {words}; leave out one or the other"


def _workers(config: Config) -> Iterator[str]:
    if config.engine == "local" and config.workers > 1:
        yield f"expected --workers 1 with --engine local, got {config.workers}; use --engine ray"
    if config.min_workers is not None and config.min_workers > config.workers:
        yield f"expected --min-workers of at most --workers ({config.workers}), got {config.min_workers}"
    if config.engine == "local" and config.decode == "cluster":
        yield "expected --engine ray with --decode cluster, got local; leave one of them out"
    if config.workers > config.batch_size:
        yield f"expected a --batch-size of at least --workers ({config.workers}), got {config.batch_size}"


def _limits(config: Config) -> Iterator[str]:
    taken, limit = config.workers * config.threads_per_worker, config.limit_cpus
    if limit is None:
        return
    if taken > limit:
        yield f"expected --workers x --threads-per-worker at most --limit-cpus ({limit}), got {taken}; lower one of them"
    if taken + config.least_decode_cpus > limit:
        yield (
            f"expected at most --limit-cpus ({limit}) for --workers x --threads-per-worker and a CPU for each worker with "
            f"--decode cluster, got {taken + config.least_decode_cpus}; lower one of them, or use --decode worker"
        )


def _values(config: Config) -> Iterator[str]:
    try:
        json.dumps(config.model_args, allow_nan=False)
    except (ValueError, TypeError):  # the file and the manifest hold them
        yield f"expected JSON values (text, numbers, true, false, null, lists, mappings; no NaN, infinity or date) in --model-args, got {config.model_args}"
    for name in type(config).model_fields:
        try:
            json.dumps(getattr(config, name), ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:  # bytes of a command line that are no UTF-8, halves of surrogate pairs
            yield f"expected text in UTF-8 as --{name.replace('_', '-')}, got {getattr(config, name)!r}; correct it"
    if config.warmup_epochs >= config.epochs:
        yield f"expected --warmup-epochs below --epochs ({config.epochs}), got {config.warmup_epochs}"
    if config.mean is not None and not all(0 <= one <= 1 for one in config.mean):
        yield f"expected --mean of values in 0..1, as images have them, got {config.mean}; divide both --mean and --std by 255"
    if config.std is not None and min(config.std, default=1.0) <= 0:
        yield f"expected --std above 0, got {config.std}"
    if config.name is not None and not NAME.fullmatch(config.name):
        yield f"expected a --name of {NAME_WORDS}, got {config.name!r}"
