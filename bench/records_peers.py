"""What the rows of `records` are held against: the same network, epochs and size, prepared otherwise, from the same weights: those that are given, or those that `ours` trained
first, which are trained alike where its storage is not at hand.

- two-stage: the plan's rates and bits, first pruned, then quantized. For the first half of the epochs weights are pruned by magnitude, the rates rising as in the
  recipe, and what is pruned stays zero; when they have risen, so many more are pruned (one factor for all layers) that the file is no larger than that of `ours`. For the second half
  what is left is quantized (p = 0), another cosine; in its middle, codes having moved, the file is brought to that size once more. Learning rate, batches, data as in the recipe.
- uniform: one (p, b) for all layers, trained as the recipe trains in one round: rising rates, rate and distortion, held at the size of `ours` where the recipe
  does. It begins with the mildest p, in steps of 0.0001, with which the file of the weights as they are is no larger than that of `ours`, for b = 2 and for b = 3; of the two files
  the smaller one counts where one is larger than that of `ours` by more than a hundredth, else the better one on validation images.

Both are packed by the product, without what the recipe does behind its last round (levels). Not covered: which units there are (`records_units`).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipq_ray import identity, models, network, packing
from clipq_ray.checkpoints import Checkpoints
from clipq_ray.cluster.engine import LocalEngine
from clipq_ray.config import Config, make
from clipq_ray.consistency import NEEDS, PAPER
from clipq_ray.data.resident import placed
from clipq_ray.finetune import Progress, Trainer
from clipq_ray.operator import make_plan, mildest_rates
from clipq_ray.optimizers import Schedule
from clipq_ray.places import Costs
from clipq_ray.plan import Plan, Theta
from clipq_ray.quantizer import thresholds
from clipq_ray.ranks import Rank
from clipq_ray.rates import Ramp
from clipq_ray.source import Source
from clipq_ray.stages import schedule_of
from clipq_ray.states import WEIGHTS, put_state, read_state, write_state
from clipq_ray.storage import Store
from clipq_ray.training import Size, TrainTask, plan_after
from clipq_ray.work import CURVE, prepare_process

BITS = (2, 3)
SPARE = 1.01  # a file so much larger than that of `ours` counts as of its size
PRUNED_EVERY = 20  # steps
SIZES = 7  # tried to find one
OF_LEVERS = {name for name, (lever, _) in NEEDS.items() if lever in PAPER}
"""Options that have nothing to do without a lever."""


PLACES = ("storage", "data", "data_root", "weights", "validation_data")


def without_places(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what says where things lay."""
    return {name: value for name, value in config.items() if name not in PLACES}


def left(options: Mapping[str, Any], epochs: int) -> dict[str, Any]:
    """What of a recipe's options goes beyond the training of one round is left out; how images are shown is the same for all."""
    beyond = {*PAPER, *OF_LEVERS} - {"cutout_pixels"}
    return {**{name: value for name, value in options.items() if name not in beyond}, "epochs": epochs}


def peer(
    variant: str,
    options: Mapping[str, Any],
    recipe: Mapping[str, Any],
    ours: Mapping[str, Any],
    storage: Path,
) -> tuple[dict[str, Any], bytes]:
    """What is to be said of one variant with `options` (`left` of the `recipe`), and its file."""
    config = make(**options)
    given = _Given(config, ours, storage)
    started = time.time()
    found, packed = given.uniform(recipe) if variant == "uniform" else given.two_stage(recipe)
    return {
        **found, "ratio": given.inventory.bytes_before / len(packed.file), "dead_units": packed.dead_units, "epochs": config.epochs,
        "validation_top1_percent": 100 * packed.validation.top1, "seconds": round(time.time() - started, 1), "config": without_places(config.model_dump(mode="json")),
    }, packed.file  # fmt: skip


def mildest(bytes_of: Callable[[Theta], int], b: int, budget: float, steps: int = 10_000) -> Theta:
    """The mildest rate at `b` bits, in `steps` from 0 to 1, where `bytes_of` it is at most `budget`; the last below 1 where none is."""
    low, high = 0, steps - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if bytes_of(Theta(middle / steps, b)) > budget else (low, middle)
    return Theta(low / steps, b)


def each_epoch(name: str) -> Progress:
    """Says when another epoch of `name` begins."""
    said = ""

    def progress(_: int, __: int, words: str) -> None:
        nonlocal said
        if words != said:
            said = words
            print(f"  {name}: {words}", flush=True)

    return progress


class _Given:
    """The weights to start from, and where to work."""

    def __init__(self, config: Config, ours: Mapping[str, Any], storage: Path) -> None:
        prepare_process(config.threads_per_worker)
        self.source, self.ours = Source(config), ours
        self.work = storage / "peers" / f"{ours['target']}-seed{config.seed}"
        self.model = self.source.network()
        self.initial = self._initial(storage)
        self.state = read_state(self.initial)
        put_state(self.model, self.state)
        self.data = self.source.data()
        sample = self.data.train.batch(torch.arange(2), None)[0]
        self.inventory = network.inventory(self.model, sample, ())
        self.usual = packing.usual(self.source)
        self.thetas = {one["layer"]: Theta(one["p"], one["bits"]) for one in ours["plan"]}

    def _initial(self, storage: Path) -> Store:
        """Where the weights lie: those that are given, those that `ours` has trained first, or where it was made elsewhere such as are trained alike here."""
        config = self.source.config
        if config.weights is None:
            (key,) = (one["key"] for one in self.ours["stages"] if one["stage"] == "baseline")
            store = Store(storage / "_stages" / f"baseline-{key}")
            if store.exists(CURVE):
                return store
            store = Store(
                self.work / f"baseline-{key}"
            )  # apart: what `ours` made may differ, by threads or CPU
            if not store.exists(CURVE):
                schedule = schedule_of(config, config.baseline_epochs, config.baseline_learning_rate)
                checkpoints = self.work / f"baseline-{key}-checkpoints"
                task = TrainTask(self.source, "baseline", None, None, schedule, store.uri, str(checkpoints))
                LocalEngine().train(task, each_epoch("baseline"))
            return store
        origin = self.source.weights_origin()
        models.apply_weights(self.model, models.read_weights(origin, self.source.architecture()), origin)
        store = Store(self.work / "given")
        write_state(store, WEIGHTS, self.model.state_dict())
        return store

    def packed(self, tuned: Store, plan: Plan) -> packing.PackedNetwork:
        """The file."""
        sha256 = models.weights_sha256(self.state)
        return packing.pack(self.source, tuned, plan, self.inventory, self.data, sha256)

    def folder(self, name: str, schedule: Schedule, **inputs: Any) -> str:
        """Where a training of `name` stores what it makes: another one for everything that decides it."""
        config = self.source.config
        decided = {
            "weights": models.weights_sha256(self.state), "data": identity.of_data(self.data), "schedule": asdict(schedule),
            "seed": config.seed, "precision": config.precision, "shift_pixels": config.shift_pixels, **inputs,
        }  # fmt: skip
        return f"{name}-{identity.stage_key('finetune', config, decided)}"

    def uniform(self, options: Mapping[str, Any]) -> tuple[dict[str, Any], packing.PackedNetwork]:
        """One theta for all layers, by the product's own loop."""
        config = self.source.config
        share, power = options.get("ramp_share", 0.0), options.get("rate_distortion", 0.0)
        held = options.get("hold_size", False)
        found = []
        for b in BITS:
            theta = mildest(lambda theta: self._bytes(self.state, self._same(theta)), b, self.ours["bytes"])
            plan = self._same(theta)
            schedule = schedule_of(config, config.epochs, config.learning_rate)
            ramp = Ramp(mildest_rates(self.model, plan), share) if share else None
            costs = Costs(power) if power else None
            size = Size(self.ours["bytes"], self.inventory, self.usual) if held else None
            folder = self.folder(
                f"uniform-b{b}", schedule, plan=plan.to_json(), ramp=asdict(ramp) if ramp else None,
                costs=asdict(costs) if costs else None, held=[size.bytes, str(self.usual)] if size else None,
            )  # fmt: skip
            tuned = Store(self.work / folder)
            task = TrainTask(
                self.source, "finetune", self.initial.uri, plan, schedule, tuned.uri,
                Store(self.work / f"{folder}-checkpoints").uri, ramp=ramp, costs=costs, size=size,
            )  # fmt: skip
            if not tuned.exists(CURVE):
                LocalEngine().train(task, each_epoch(f"uniform, {b} bits"))
            ended, _ = plan_after(tuned, plan)
            found.append((ended, self.packed(tuned, ended)))
        ended, best = min(found, key=lambda one: self._worse(one[1]))
        return {
            "plan": [{"layer": one.layer, "p": one.theta.p, "bits": one.theta.b} for one in ended.layers],
            "trained_with": {"ramp_share": share, "rate_distortion": power, "held_bytes": self.ours["bytes"] if held else None},
        }, best  # fmt: skip

    def _same(self, theta: Theta) -> Plan:
        """The plan of one theta for all layers."""
        return make_plan(self.model, dict.fromkeys(self.thetas, theta))

    def _worse(self, packed: packing.PackedNetwork) -> tuple[float, float]:
        """To order files by: first how far they are above the size, beyond what is of no account, then by validation images."""
        above = len(packed.file) / self.ours["bytes"] - SPARE
        return max(0.0, above), -packed.validation.top1

    def two_stage(self, options: Mapping[str, Any]) -> tuple[dict[str, Any], packing.PackedNetwork]:
        """Pruned, then quantized."""
        config, share = self.source.config, options.get("ramp_share", 0.0)
        planned = [{"layer": name, "p": theta.p, "bits": theta.b} for name, theta in self.thetas.items()]
        first = schedule_of(config, config.epochs // 2, config.learning_rate)
        pruned = self.folder("prune", first, thetas=planned, share=share, bytes=self.ours["bytes"])
        self._train("prune", pruned, first, None, share)
        plan = make_plan(self.model, {name: Theta(0.0, theta.b) for name, theta in self.thetas.items()})
        second = schedule_of(config, config.epochs - first.epochs, config.learning_rate)
        quantized = self.folder("quantize", second, pruned=pruned, plan=plan.to_json())
        self._train("quantize", quantized, second, plan, share)
        tuned = Store(self.work / quantized)
        kept = {name: int((self.model.get_parameter(name) != 0).sum()) for name in self.thetas}
        return {
            "plan": [{**one, "nonzeros": kept[one["layer"]]} for one in planned],
            "trained_with": {
                "ramp_share": share, "pruned_epochs": first.epochs, "quantized_epochs": second.epochs, "cut_to_bytes": self.ours["bytes"], "cuts": 2,
            },
        }, self.packed(tuned, plan)  # fmt: skip

    def _train(self, stage: str, folder: str, schedule: Schedule, plan: Plan | None, share: float) -> None:
        """The product's loop from and to the network's weights. What is zero stays zero; without a plan more becomes so, for a part `share` of the steps."""
        made = Store(self.work / folder)
        if not made.exists(WEIGHTS):
            config, device = self.source.config, self.source.device()
            trainer = Trainer(
                self.model, placed(self.data.train, device), placed(self.data.validation, device), plan=plan, schedule=schedule,
                seed=config.seed, stage=stage, rank=Rank(0, 1, device), checkpoints=Checkpoints(Store(self.work / f"{folder}-checkpoints")),
                evaluation_batch_size=config.evaluation_batch_size, precision=config.precision,
            )  # fmt: skip
            with trainer.operator.reading_full_precision() if trainer.operator else nullcontext():
                left = {name: self.model.get_parameter(name).detach() != 0 for name in self.thetas}
            steps = max(1, len(self.data.train) // config.batch_size)
            numbers = itertools.count(len(trainer.curve) * steps + 1)
            risen = max(1, round(share * schedule.epochs * steps))
            fitted = risen if plan is None else schedule.epochs * steps // 2

            def behind_a_step(*_: Any) -> None:
                number = next(numbers)
                if plan is None and (number % PRUNED_EVERY == 0 or number == risen):
                    self._prune(left, 1 - max(0.0, 1 - number / risen) ** 3)
                if number == fitted:
                    self._fit_size(left)
                keep_zeros(self.model, left)

            trainer.optimizer.register_step_post_hook(behind_a_step)
            trainer.run(each_epoch(stage), lambda _: None)
            write_state(made, WEIGHTS, self.model.state_dict())
        put_state(self.model, read_state(made))

    def _prune(self, left: dict[str, torch.Tensor], risen: float) -> None:
        """Take from what is `left` what a part `risen` of the plan's rates clips."""
        for name, theta in self.thetas.items():
            weight, alive = self.model.get_parameter(name).detach(), int(left[name].sum())
            left[name] &= largest(weight, left[name], (1 - risen * theta.p) * weight.numel() / max(alive, 1))

    def _fit_size(self, left: dict[str, torch.Tensor]) -> None:
        """Take from what is `left` as much more as the size of `ours` asks for, the same share of every layer."""
        weights = {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}
        if self._pruned_bytes(weights, left) <= self.ours["bytes"]:
            return
        low, high = 0.0, 1.0
        for _ in range(SIZES):
            share = (low + high) / 2
            fits = self._pruned_bytes(weights, shared_out(weights, left, share)) <= self.ours["bytes"]
            low, high = (share, high) if fits else (low, share)
        for name, mask in shared_out(weights, left, low).items():
            left[name] &= mask.to(left[name].device)

    def _pruned_bytes(self, weights: Mapping[str, torch.Tensor], left: Mapping[str, torch.Tensor]) -> int:
        """Of the file, were it quantized and packed now with what is `left`."""
        pruned = {**weights, **{name: weights[name] * mask.cpu() for name, mask in left.items()}}
        model = self.source.network()
        put_state(model, pruned)
        plan = make_plan(model, {name: Theta(0.0, theta.b) for name, theta in self.thetas.items()})
        return self._bytes(pruned, plan)

    def _bytes(self, weights: Mapping[str, torch.Tensor], plan: Plan) -> int:
        """Of the file that these weights would make by now."""
        return packing.file_bytes(self.source, weights, plan, self.inventory, self.data, self.usual)


def shared_out(
    weights: Mapping[str, torch.Tensor], left: Mapping[str, torch.Tensor], share: float
) -> dict[str, torch.Tensor]:
    """Where the largest `share` of the weights that are `left` is, in every layer."""
    return {name: largest(weights[name], mask.cpu(), share) for name, mask in left.items()}


def largest(weight: torch.Tensor, left: torch.Tensor, share: float) -> torch.Tensor:
    """Where the largest `share` of the weights that are `left` is, by magnitude on their side."""
    if share >= 1:
        return left
    negative, positive = thresholds(weight[left], 1 - share)
    return left & ((weight > positive) | (weight < -negative))


@torch.no_grad()
def keep_zeros(model: nn.Module, left: Mapping[str, torch.Tensor]) -> None:
    """Set what was pruned to zero again."""
    for name, mask in left.items():
        model.get_parameter(name).mul_(mask)
