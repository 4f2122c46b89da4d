"""The file of a round: with the levels and codes that training left, or with those trained behind it where validation images like these better.
A training of these that diverges takes nothing away: the round is there without it.

Not covered: how they are trained (`levels`), what is packed (`packing`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from clipq_ray import packing, stages
from clipq_ray.errors import DivergedError
from clipq_ray.network import Inventory
from clipq_ray.plan import Plan
from clipq_ray.stages import Run
from clipq_ray.storage import Store
from clipq_ray.work import CURVE, read_record


def packed(
    run: Run, tuned: Store, plan: Plan, inventory: Inventory, source_sha256: str, work: Store, number: int,
    *, further: bool, held: bool, most_bytes: int | None,
) -> tuple[Store | None, packing.PackedNetwork, tuple[Store, ...]]:  # fmt: skip
    """Of the `number`-th round, whose full-precision weights lie in `tuned`: the weights with trained levels and codes that were taken, if they were, the file, and all that was
    trained for it.

    `further`: whether levels and codes are trained behind it; `held`: whether it was held at a size, which leaves bytes for codes; `most_bytes`: of the file, where that is promised.
    """

    def pack(fitted: Store | None) -> packing.PackedNetwork:
        with run.reporter.stage(f"pack round {number}"):
            return packing.pack(run.source, tuned, plan, inventory, run.data, source_sha256, fitted)

    began = time.monotonic()
    made, trained, taken = [pack(None)], list[Store](), 0
    spent = time.monotonic() - began
    try:
        for fitted in _tries(run, tuned, plan, work, number, held, spent) if further else ():
            trained.append(fitted)
            made.append(pack(fitted))
            taken = packing.best(made, most_bytes)
            words = "taken" if taken == len(made) - 1 else "not taken, another file is better"
            run.reporter.say(f"levels and codes that were trained: {len(made[-1].file):,} bytes, {words}")
            if taken and packing.keeps(made[taken], most_bytes):
                break
    except DivergedError as error:  # at the same rate the next ones would, too
        kept = "those that were trained before" if taken else "its own"
        run.notes.append(f"the levels and codes of round {number} are {kept}: {error}")
        run.reporter.say(run.notes[-1])
    return trained[taken - 1] if taken else None, made[taken], tuple(trained)


def _tries(
    run: Run, tuned: Store, plan: Plan, work: Store, number: int, held: bool, pack_seconds: float
) -> Iterator[Store]:
    """The weights of a round with levels and codes that were trained, its clipped weights as they are; the next ones are trained when they are asked for, and
    while a deadline leaves time for an epoch and for packing what it made, which takes `pack_seconds`."""
    config = run.config
    # a decay would draw levels towards zero, which no clipping needs any more
    schedule = replace(
        stages.schedule_of(config, config.level_epochs, config.level_learning_rate),
        warmup_epochs=0.0,
        weight_decay=0.0,
    )
    # where bytes were left for codes they could take them; where they took more, or were not better, codes stay as they are
    for free in (True, False) if held else (False,):
        if not _has_time(run, tuned, number, pack_seconds):
            return
        yield stages.trained(run, "levels", schedule, tuned, plan, work, number, free_codes=free)


def _has_time(run: Run, tuned: Store, number: int, pack_seconds: float) -> bool:
    """Whether a deadline leaves time for one epoch, as long as the last one of the round in `tuned`, and for packing; a note where it does not."""
    if run.seconds_left is None:
        return True
    epoch: float = read_record(tuned, CURVE)["curve"][-1]["seconds"]
    needed, left = epoch + pack_seconds, run.seconds_left
    if left < needed:
        run.notes.append(
            f"levels: not trained behind round {number} by --deadline-hours, which leaves {max(left, 0):.0f} s for an epoch and packing ({needed:.0f} s)"
        )
    return left >= needed
