"""The file of a round: with the levels that training left, or with levels and codes trained behind it where validation images like these better.

Not covered: how they are trained (`levels`), what is packed (`packing`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from clipq_ray import levels, packing, stages
from clipq_ray.network import Inventory
from clipq_ray.plan import Plan
from clipq_ray.stages import Run
from clipq_ray.storage import Store


def packed(
    run: Run, tuned: Store, plan: Plan, inventory: Inventory, source_sha256: str, work: Store, number: int,
    *, further: bool, held: bool, most_bytes: int | None,
) -> tuple[Store | None, packing.PackedNetwork]:  # fmt: skip
    """The weights with trained levels and codes, if there are any, and the file of the `number`-th round, whose full-precision weights lie in `tuned`.

    `further`: whether levels are trained behind it; `held`: whether it was held at a size, which leaves bytes for codes; `most_bytes`: of the file, where that is promised.
    """
    for fitted in _tries(run, tuned, plan, work, number, held) if further else (None,):
        with run.reporter.stage(f"pack round {number}"):
            made = packing.pack(
                run.source, tuned, plan, inventory, run.data, source_sha256, fitted, most_bytes
            )
        if fitted is not None:
            words = "taken" if made.levels == "fitted" else "not taken, with the means the file is better"
            run.reporter.say(f"levels that were trained: {words}")
        if made.levels == "fitted":
            break
    return fitted, made


def _tries(run: Run, tuned: Store, plan: Plan, work: Store, number: int, held: bool) -> Iterator[Store]:
    """The weights of a round with levels and codes that were trained, its clipped weights as they are; the next ones are trained when they are asked for."""
    config = run.config
    # a decay would draw levels towards zero, which no clipping needs any more
    schedule = replace(
        stages.schedule_of(config, config.level_epochs, config.level_learning_rate),
        warmup_epochs=0.0,
        weight_decay=0.0,
    )
    # where bytes were left for codes they may take them; where they take more, or are not better, their bits get a price
    for price in (0.0, levels.PRICE) if held else (levels.PRICE,):
        yield stages.trained(run, "levels", schedule, tuned, plan, work, number, bit_price=price)
