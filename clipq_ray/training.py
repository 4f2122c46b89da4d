"""One training as a unit of work that an engine carries to where it runs, on one rank.

A task is a value that any process can rebuild its network and data from; what it makes lies in a store when it ends, whole. The same function runs in the
driver's process and on a cluster, so both engines give the same result. Not covered: who starts it (`cluster`), the loop (`finetune`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clipq_ray.checkpoints import Checkpoints
from clipq_ray.data import Data, batches
from clipq_ray.data.listing import few
from clipq_ray.data.prefetch import Feed
from clipq_ray.data.resident import placed
from clipq_ray.finetune import Progress, Trainer
from clipq_ray.folding import Precision
from clipq_ray.network import Inventory
from clipq_ray.optimizers import Schedule
from clipq_ray.packing import file_bytes
from clipq_ray.places import Costs
from clipq_ray.plan import Plan
from clipq_ray.quantizer import slow_on
from clipq_ray.ranks import Rank
from clipq_ray.rates import Held, Ramp
from clipq_ray.source import Source
from clipq_ray.states import WEIGHTS, put_state, read_state, write_state
from clipq_ray.storage import Store
from clipq_ray.work import CURVE, here, later, prepare_process, read_record


@dataclass(frozen=True)
class Size:
    """The `bytes` of the file that a training is to end at; `inventory`: what of the network the file holds, its vectors on grids of `precision`."""

    bytes: int
    inventory: Inventory
    precision: Precision | None


DENSITIES = "densities.safetensors"
"""Beside weights that were divided by what their places cost (`places`): of each planned layer, what that follows from."""


@dataclass(frozen=True)
class TrainTask:
    """One training: `stage` is "baseline", "finetune", "levels" (`free_codes`: what the given weights have clipped stays clipped, and levels are trained, with the codes or without) or "control"; URIs name stores.
    `deadline`: by the clock of the storage [s since 1970], which left it a part `deadline_share` of the time that there was when it was set.
    `number`: which training of its kind it is in the run, since each shows the images otherwise."""

    source: Source
    stage: str
    initial: str | None
    plan: Plan | None
    schedule: Schedule
    output: str
    checkpoints: str
    deadline: float | None = None
    ramp: Ramp | None = None
    size: Size | None = None
    free_codes: bool | None = None
    costs: Costs | None = None
    deadline_share: float = 1.0
    number: int = 1

    def after(self, seconds: float) -> TrainTask:
        """The same where it could not begin for `seconds`, as of a search."""
        return replace(self, deadline=later(self.deadline, self.deadline_share, seconds))


def train(
    task: TrainTask,
    rank: Rank,
    progress: Progress,
    report: Callable[[dict[str, Any]], None],
    feed: Feed = batches,
) -> None:
    """Run `task` as one rank; rank 0 writes the full-precision weights, then the curve, which says that all is there.

    `feed` makes the batches, as `batches` does and of the same bytes.
    """
    config = task.source.config
    prepare_process(config.threads_per_worker)
    if rank.device.type == "cuda" and torch.cuda.is_initialized():  # the peak is to be this training's
        torch.cuda.reset_peak_memory_stats(rank.device)
    model = task.source.network()
    if task.initial is not None:
        put_state(model, read_state(Store(task.initial)))
    data = task.source.data()
    trainer = Trainer(
        model,
        placed(data.train, rank.device),
        placed(data.validation, rank.device),
        plan=task.plan,
        schedule=task.schedule,
        seed=config.seed,
        stage=task.stage,
        number=task.number,
        rank=rank,
        checkpoints=Checkpoints(Store(task.checkpoints)),
        evaluation_batch_size=config.evaluation_batch_size,
        deadline=here(task.deadline, Store(task.output)),
        precision=config.precision,
        ramp=task.ramp,
        held=_held(task, data),
        costs=task.costs,
        densities=_densities(task),
        free_codes=task.free_codes,
        feed=feed,
    )
    trainer.run(progress, report)
    output = Store(task.output)
    # of two jobs that made it, the first one has built on its own already: that one counts
    if rank.rank == 0 and not output.exists(CURVE):
        trainer.notes += _notes(task, rank, trainer, data)
        write_state(output, WEIGHTS, model.state_dict())
        if trainer.densities:
            write_state(output, DENSITIES, {str(at): one for at, one in enumerate(trainer.densities)})
        rows = [asdict(row) for row in trainer.curve]
        recovery = {layer: asdict(one) for layer, one in trainer.recovery.items()}
        content: dict[str, Any] = {"curve": rows, "notes": trainer.notes, "recovery": recovery}
        if rank.device.type == "cuda":
            content["gpu_bytes"] = torch.cuda.max_memory_reserved(rank.device)
        if task.size is not None and trainer.rates is not None:
            content["held"] = {"plan": trainer.rates.plan.to_json(), "scale": trainer.rates.scale}
        output.write(CURVE, json.dumps(content).encode())


def _densities(task: TrainTask) -> list[Tensor] | None:
    """Those by which the weights are divided with which the training begins."""
    if task.costs is None or not task.costs.divided or task.initial is None:
        return None
    found = read_state(Store(task.initial), DENSITIES)
    return [found[str(at)] for at in range(len(found))]


def _notes(task: TrainTask, rank: Rank, trainer: Trainer, data: Data) -> Iterator[str]:
    """What else is to be said of it."""
    if bad := data.train.unreadable:  # met while training; the driver has not read these images
        more = " or more" * (rank.world > 1)  # other workers have met their own
        yield f"{task.stage}: {len(bad)} unreadable images{more} were replaced by their next ones: {few(bad)}"
    if task.source.config.precision == "auto":
        yield f"{task.stage}: computed in {str(trainer.autocast).removeprefix('torch.')} (--precision auto)"
    if task.plan is not None and (slow := slow_on(rank.device)):
        yield f"{task.stage}: {slow}"


def _held(task: TrainTask, data: Data) -> Held | None:
    if task.size is None:
        return None
    source, size = task.source, task.size
    return Held(
        size.bytes,
        lambda weights, plan: file_bytes(source, weights, plan, size.inventory, data, size.precision),
    )


def epochs_in(trained: Store) -> int:
    """The epochs of the training that lies in `trained`, also where a deadline has shortened it."""
    return len(read_record(trained, CURVE)["curve"])


def plan_after(trained: Store, plan: Plan) -> tuple[Plan, float]:
    """What became of `plan` in the training that lies in `trained`, with other pruning rates where it was held at a size, and of the planned weights the
    share that was kept then."""
    held = read_record(trained, CURVE).get("held")
    return (Plan.from_json(held["plan"]), float(held["scale"])) if held else (plan, 1.0)
