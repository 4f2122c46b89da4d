"""The training loop: SGD on one or many ranks, with or without the operator in the loop.

The same function trains a network first (no plan, random start), fine-tunes it with CLIP-Q (a plan) and makes the dense control (no
plan, the given weights). It knows rank and world size through `torch.distributed`, not who started it. Every random choice is a
function of (seed, stage and its number, epoch, step, rank), and a checkpoint after every epoch holds all else, so a run that was killed goes on as if
it had not been. Not covered: other optimizers (`optimizers`), and float16 with loss scaling.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clipq_ray import logs, optimizers, seeds
from clipq_ray.checkpoints import Checkpoints
from clipq_ray.data import Split, batches
from clipq_ray.data.augment import cut_out
from clipq_ray.data.prefetch import Feed
from clipq_ray.errors import DataError, DivergedError, ModelError
from clipq_ray.evaluate import evaluate, logits
from clipq_ray.levels import Levels
from clipq_ray.operator import Operator, Recovery
from clipq_ray.optimizers import Schedule
from clipq_ray.places import Costs
from clipq_ray.plan import Plan
from clipq_ray.precision import autocast_dtype
from clipq_ray.probing import Probing
from clipq_ray.ranks import Patience, Rank, agreed, compare_codes
from clipq_ray.rates import Held, Ramp, Rates
from clipq_ray.sending import sent
from clipq_ray.states import put_state
from clipq_ray.trainable import FAST, PLAIN, in_layout, training_mode

log = logs.logger(__name__)
Progress = Callable[[int, int, str], None]  # (steps done, steps in all, words)


@dataclass(frozen=True)
class Epoch:
    """One row of a training's curve; `validation_top1_percent` is None without validation images, `workers` in runs before it was said."""

    epoch: int
    loss: float
    validation_top1_percent: float | None
    seconds: float
    workers: int | None = None


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _shared_out(images: int, world: int) -> int:
    """All `images` of a step; `DataError` where a rank has none, whose mean loss is no number."""
    if images < world:
        raise DataError(
            f"expected a training image for each of {world} workers in every step, got {images}; lower --workers"
        )
    return images


class _NotFinite(Exception):
    """A step made a weight NaN or infinite."""


class Trainer:
    """One training of `model`, in place; after `run` the parameters hold full-precision weights.

    `train` and `validation` are splits; `plan` None trains plainly. `deadline` is a time of `time.monotonic()` before which the last epoch
    should end: the schedule is shortened to fit, never below one more epoch, and `notes` say so. `held`: with a plan, the size that pruning rates
    hold the file at. `costs`: with a plan, weights are divided by what their places cost while rates rise; `densities`: by which they are already. `number`: which training of its kind it is in the run. `free_codes`: with a plan, what the given weights have clipped stays clipped, and levels of the others are trained, with their codes or without. `feed` makes the batches.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Split,
        validation: Split | None,
        *,
        plan: Plan | None,
        schedule: Schedule,
        seed: int,
        stage: str,
        rank: Rank,
        checkpoints: Checkpoints,
        evaluation_batch_size: int,
        deadline: float | None = None,
        precision: str = "float32",
        ramp: Ramp | None = None,
        held: Held | None = None,
        costs: Costs | None = None,
        densities: Sequence[Tensor] | None = None,
        free_codes: bool | None = None,
        number: int = 1,
        feed: Feed = batches,
    ) -> None:
        self.model = model.to(rank.device)
        self.train_split, self.validation, self.feed = train, validation, feed
        self.schedule, self.seed, self.stage, self.rank = schedule, seed, stage, rank
        self.drawn = stage if number == 1 else f"{stage}-{number}"  # names this training's random numbers
        self.checkpoints, self.deadline = checkpoints, deadline
        self.evaluation_batch_size = evaluation_batch_size
        self.images_per_step = _shared_out(min(schedule.batch_size, len(train)), rank.world)
        self.epochs = schedule.epochs
        self.curve: list[Epoch] = []
        self.notes: list[str] = []
        self.progressed = 0.0  # the part of the schedule that is done, 0..1
        self.loss = nn.CrossEntropyLoss(label_smoothing=schedule.label_smoothing)
        found = checkpoints.latest()
        begun = found[1] if found else {}
        self._probing = Probing(self.model, train, self._index_batches(0)[0], (seed, stage), rank, self._loss)
        self._settle_bits(begun, precision)
        # what is clipped follows from the weights with which the training began
        fitted = Levels(model, plan, free_codes) if plan and free_codes is not None else None
        if found:
            self._load_model(found[0])
        done, scale = (found[1]["progressed"], found[1].get("scale", 1.0)) if found else (0.0, 1.0)
        self.rates = Rates(plan, ramp, held, done=done, scale=scale) if plan and free_codes is None else None
        self.operator: Operator | Levels | None = fitted or (
            Operator(model, plan, self.rates.now, costs, densities) if plan and self.rates else None
        )
        self.recovery: dict[str, Recovery] = {}
        self.densities: list[Tensor] = []  # by which weights were divided, behind the end
        self.optimizer = optimizers.sgd(model, schedule)
        if found:
            self._load_progress(*found)
            if self.operator:
                self.operator.load_state(_under("operator/", found[0]))
        self.attempts = checkpoints.attempts(stage)
        self.micro_batch, unread = self._fitting_micro_batch()
        self.wrapped = self._as_one_of_several(unread)
        self.patience = Patience(rank)

    def _as_one_of_several(self, unread: bool) -> nn.Module:
        """The network as this rank trains it; `unread`: whether there are parameters that get no gradient."""
        world = self.rank.world
        # buffers follow rank 0; parameters were equal from the start and stay so. Gradients that never come (of a head that only other losses read) are not waited for
        wrapped = (
            DistributedDataParallel(self.model, find_unused_parameters=unread) if world > 1 else self.model
        )
        self.attempts.begin(self.rank.rank, self.micro_batch)
        if world > 2 and not unread:  # with some unread it lays out nothing anew
            with self.attempts.watching(self.micro_batch):
                self._probing.settle(wrapped, self.micro_batch)
        return wrapped

    def _settle_bits(self, begun: dict[str, Any], precision: str) -> None:
        """What decides the bits stays as the training began, wherever it goes on; `begun`: its checkpoint's words."""
        usual = autocast_dtype(precision, self.rank.device) == torch.bfloat16
        reduced = agreed(self.rank, begun.get("bfloat16", usual))
        self.autocast = torch.bfloat16 if reduced else torch.float32
        self.layout = FAST
        fast = begun["channels_last"] if "channels_last" in begun else self._probing.takes_fast()
        self.layout = FAST if agreed(self.rank, fast) else PLAIN
        self.model.to(memory_format=self.layout)

    # -- checkpoints ---------------------------------------------------------------------------------------------------------
    def _load_model(self, tensors: dict[str, Tensor]) -> None:
        put_state(self.model, _under("model/", tensors))

    def _load_progress(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.curve = [Epoch(**row) for row in state["curve"]]
        self.notes, self.epochs, self.progressed = state["notes"], state["epochs"], state["progressed"]
        optimizers.load_state(self.model, self.optimizer, tensors)

    def _save(self) -> None:
        if self.rank.rank:
            return
        with self.operator.reading_full_precision() if self.operator else nullcontext():
            tensors = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
            tensors |= optimizers.state(self.model, self.optimizer)
            if self.operator:
                tensors |= {f"operator/{name}": tensor for name, tensor in self.operator.state().items()}
            state = {
                "curve": [asdict(row) for row in self.curve],
                "notes": self.notes,
                "epochs": self.epochs,
                "progressed": self.progressed,
                "scale": self.rates.scale if self.rates else 1.0,
                "bfloat16": self.autocast == torch.bfloat16,
                "channels_last": self.layout == FAST,
            }
            self.checkpoints.save(len(self.curve), tensors, state)

    # -- the loop ------------------------------------------------------------------------------------------------------------
    def run(self, progress: Progress, report: Callable[[dict[str, Any]], None]) -> None:
        """Train from the last checkpoint to the end; `report` is called on every rank after every epoch."""
        while len(self.curve) < self.epochs:
            started = time.monotonic()
            epoch = len(self.curve)
            loss = self._epoch(epoch, progress)
            self.progressed += (1.0 - self.progressed) / (self.epochs - epoch)
            self._follow_size(progress)
            if self.rates and isinstance(self.operator, Operator) and self.rates.rising(self.progressed):
                self.operator.follow_costs()
            if self._move_rates(self.progressed) and self.operator:
                self.operator.requantize()  # as a process that starts from the checkpoint has them
            top1 = self._validate(progress)
            self.patience.wait()
            row = Epoch(epoch + 1, loss, top1, time.monotonic() - started, self.rank.world)
            self.curve.append(row)
            self._fit_deadline(row.seconds)
            if self.operator and self.rank.world > 1:
                compare_codes(
                    self.rank, self.operator.code_hashes(), f"{self.stage}, epoch {len(self.curve)}"
                )
            self._save()
            report(asdict(row))
        self.attempts.end(self.rank.rank)
        self._say_worlds()
        if self.operator:
            self.recovery = self.operator.recovery()
            self.densities = self.operator.densities if isinstance(self.operator, Operator) else []
            self.operator.detach()
            self.operator = None

    def _say_worlds(self) -> None:
        """A note where the number of workers changed on the way."""
        worlds = [row.workers for row in self.curve]
        if len(set(worlds)) > 1:
            self.notes.append(
                f"{self.stage}: workers by epoch: {', '.join(map(str, worlds))} (--min-workers); what was promised holds, the bytes are not those of a "
                "run with one number of workers"
            )

    def _index_batches(self, epoch: int) -> list[Tensor]:
        """This rank's rows of every global batch; the last, smaller one is left out unless it is the only one."""
        generator = seeds.generator(self.seed, self.drawn, "order", epoch)
        return self.train_split.index_batches(
            generator, self.schedule.batch_size, self.rank.rank, self.rank.world
        )

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        place = (self.drawn, "augment", epoch)
        return self.feed(
            self.train_split,
            self._index_batches(epoch),
            lambda step: seeds.generator(self.seed, *place, step, self.rank.rank),
        )

    def _steps(self) -> int:
        """Steps of an epoch."""
        return len(self.train_split) // self.images_per_step

    def _epoch(self, epoch: int, progress: Progress) -> float:
        training_mode(self.wrapped)
        steps = self._steps()
        total = torch.zeros((), dtype=torch.float64, device=self.rank.device)
        for step, (images, labels) in enumerate(self._batches(epoch)):
            for group in self.optimizer.param_groups:
                group["lr"] = self.schedule.rate(self._done(epoch, step / steps), epoch + step / steps)
            self._move_rates(self._done(epoch, (step + 1) / steps))
            draws = seeds.everywhere(self.seed, self.drawn, "step", epoch, step, self.rank.rank)
            masks = seeds.generator(self.seed, self.drawn, "cutout", epoch, step, self.rank.rank)
            try:
                with self.attempts.watching(self.micro_batch), draws:
                    images = cut_out(sent(images, self.rank.device), self.schedule.cutout_pixels, masks)
                    total += self._step(images, sent(labels, self.rank.device))
            except _NotFinite as error:
                raise self._diverged(epoch, "weights NaN or infinite") from error
            progress(epoch * steps + step + 1, self.epochs * steps, f"epoch {epoch + 1} of {self.epochs}")
        if self.operator:
            try:
                self.operator.check()
            except ModelError as error:
                raise self._diverged(epoch, "weights NaN or infinite") from error
        total /= steps
        if self.rank.world > 1:
            dist.all_reduce(total)
            total /= self.rank.world
        mean = total.item()
        if not math.isfinite(mean):
            raise self._diverged(epoch, f"loss {mean}")
        return mean

    def _diverged(self, epoch: int, what: str) -> DivergedError:
        option = {"baseline": "--baseline-learning-rate", "levels": "--level-learning-rate"}.get(
            self.stage, "--learning-rate"
        )
        rate = f"now {self.schedule.learning_rate:g}"
        if self.stage == "finetune":
            rate += " in this training; a further round has half"
        warmup = " or raise --warmup-epochs" if self.schedule.warmup_epochs else ""
        return DivergedError(
            f"{self.stage} diverged in epoch {epoch + 1} ({what}); lower {option} ({rate}){warmup}"
        )

    def _done(self, epoch: int, within: float) -> float:
        """The part of the schedule that is over, 0..1."""
        return self.progressed + (1.0 - self.progressed) / (self.epochs - epoch) * within

    def _move_rates(self, done: float) -> bool:
        """The pruning rates for when a part `done` of the schedule is over, from the next quantization on; whether they are others than before."""
        if self.rates is None or not isinstance(self.operator, Operator) or not self.rates.move(done):
            return False
        self.operator.set_rates(self.rates.now)
        return True

    def _follow_size(self, progress: Progress) -> None:
        """Rank 0 measures what the file would take by now, which can take minutes, so with a sign of life before; all ranks follow."""
        if self.rates is None or self.operator is None or not self.rates.follows(self.progressed):
            return
        scale = torch.tensor(self.rates.scale, dtype=torch.float64, device=self.rank.device)
        epoch, steps = len(self.curve) + 1, self._steps()
        progress(epoch * steps, self.epochs * steps, f"epoch {epoch} of {self.epochs}")
        if self.rank.rank == 0:
            with self.operator.reading_full_precision():
                weights = {name: value.cpu() for name, value in self.model.state_dict().items()}
                scale.fill_(self.rates.scale_for(weights))
        self.patience.wait()
        if self.rank.world > 1:
            dist.broadcast(scale, src=0)
        self.rates.scale = float(scale)

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One step over this rank's images, in micro-batches where memory asks for it; their loss as of `_backward`."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._backward(images, labels, self.micro_batch)
        try:
            with self.operator.full_precision() if self.operator else nullcontext():
                self.optimizer.step()
        except ModelError as error:  # the quantizer refuses what the step has made
            raise _NotFinite from error
        return loss

    def _backward(self, images: Tensor, labels: Tensor, micro: int) -> Tensor:
        """Gradients, and the loss, whose means over all ranks are those of the step's images, of which some ranks have one more than others. The loss is float64 on
        the device: asking for its value would wait for a GPU at every step."""
        total = torch.zeros((), dtype=torch.float64, device=self.rank.device)
        parts = -(-len(images) // micro)  # as even as can be, see `without_single`
        for number, part in enumerate(
            zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True), 1
        ):
            silent = self.rank.world > 1 and number < parts
            with self.wrapped.no_sync() if silent else nullcontext():  # type: ignore[operator]
                share = len(part[1]) * self.rank.world / self.images_per_step
                loss = self._loss(self.wrapped, *part) * share
                loss.backward()
            total += loss.detach()
        return total

    def _loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        images = in_layout(images, self.layout)
        reduced = self.autocast != torch.float32
        with torch.autocast(self.rank.device.type, self.autocast if reduced else None, enabled=reduced):
            output = logits(model(images))
        loss: Tensor = self.loss(output.float(), labels)
        return loss

    def _fitting_micro_batch(self) -> tuple[int, bool]:
        """The largest micro-batch that fits all ranks' memory, found by one step without effect before training, and whether parameters got no gradient in it."""
        micro, unread = self._probing.fitting(self.attempts)
        n = self._probing.images
        if micro < n:
            note = (
                f"{self.stage}: {n} images per worker do not fit the device's memory; gradients are "
                f"accumulated over micro-batches of {micro} (batch norm sees {micro} images at a time, and the bytes may be others than with more memory)"
            )
            log.warning(note)
            if note not in self.notes:  # a checkpoint may have brought it
                self.notes.append(note)
        return micro, unread

    def _validate(self, progress: Progress) -> float | None:
        """Top-1 of the quantized network on validation images [%], by rank 0; it says between batches that it goes on."""
        if self.validation is None or self.rank.rank:
            return None
        epoch, steps = len(self.curve) + 1, self._steps()

        def goes_on(done: int, n: int) -> None:
            if done < n:
                progress(epoch * steps, self.epochs * steps, f"epoch {epoch} of {self.epochs}")

        result = evaluate(
            self.model, self.validation, batch_size=self.evaluation_batch_size, device=self.rank.device,
            progress=goes_on, feed=self.feed,
        )  # fmt: skip
        return 100.0 * result.top1

    def _fit_deadline(self, epoch_seconds: float) -> None:
        if self.deadline is None:
            return
        fit = max(0, math.floor((self.deadline - time.monotonic()) / epoch_seconds))
        planned = torch.tensor(min(self.epochs, len(self.curve) + fit), device=self.rank.device)
        if self.rank.world > 1:
            dist.broadcast(planned, src=0)
        if int(planned) < self.epochs:
            note = f"{self.stage}: shortened from {self.schedule.epochs} to {int(planned)} epochs by --deadline-hours"
            log.warning(note)
            self.notes = [*(n for n in self.notes if "by --deadline-hours" not in n), note]
            self.epochs = int(planned)
