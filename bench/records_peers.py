"""What the rows of `records` are held against: the same network, weights, epochs and size, prepared otherwise.

- two-stage: the plan's rates and bits, first pruned, then quantized. For the first half of the epochs weights are pruned by magnitude, the rates rising as in the
  recipe, and what is pruned stays zero; for the second half what is left is quantized (p = 0), another cosine. Learning rate, batches, data as in the recipe.
- uniform: one (p, b) for all layers, trained as the recipe trains in one round, by rate and distortion where the recipe does. For b = 2 and b = 3 the mildest p, in steps of 0.0001, with which the layers take at
  most one hundredth more bytes than those of `ours`; the better one on validation images counts.

Both are packed by the product. Not covered: which units there are (`records`).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipq_ray import codec, identity, models, network, packing, seeds
from clipq_ray.cluster.engine import LocalEngine
from clipq_ray.config import Config, make
from clipq_ray.consistency import PAPER
from clipq_ray.data import batches
from clipq_ray.data.augment import cut_out
from clipq_ray.operator import Operator, make_plan, mildest_rates
from clipq_ray.optimizers import sgd
from clipq_ray.places import Costs
from clipq_ray.plan import Plan, Theta
from clipq_ray.precision import autocast_dtype
from clipq_ray.quantizer import decide_share, quantize, thresholds
from clipq_ray.rates import Ramp
from clipq_ray.stages import schedule_of
from clipq_ray.storage import Store
from clipq_ray.training import TrainTask
from clipq_ray.work import WEIGHTS, Source, layer_bytes, prepare_process, read_state, write_state

BITS = (2, 3)
SPARE = 1.01  # files grow by a hundredth or so while they are trained


def peer(
    variant: str, options: Mapping[str, Any], ours: Mapping[str, Any], data: str, storage: Path, seed: int
) -> tuple[dict[str, Any], bytes]:
    """What is to be said of one variant, and its file."""
    left_out = {*PAPER, "rung_epochs"} - {"cutout_pixels"}  # how images are shown is the same for all
    kept = {name: value for name, value in options.items() if name not in left_out}
    config = make(**{**kept, "data": data, "seed": seed, "engine": "local", "epochs": ours["epochs"]})
    given = _Given(config, ours, storage)
    started = time.time()
    found = given.uniform(options) if variant == "uniform" else given.two_stage(options)
    packed = found[1]
    return {
        **found[0], "ratio": given.inventory.bytes_before / len(packed.file), "dead_units": packed.dead_units, "epochs": config.epochs,
        "validation_top1_percent": 100 * packed.validation.top1, "seconds": round(time.time() - started, 1), "config": {name: value for name, value in config.model_dump(mode="json").items() if name not in ("storage", "data", "weights")},
    }, packed.file  # fmt: skip


def bytes_of(config: Config, layers: Mapping[str, torch.Tensor], theta: Theta) -> int:
    """What all `layers` take at one theta, as they are."""
    total = 0
    for weight in layers.values():
        share = decide_share(weight, theta)
        total += layer_bytes(config, codec.coded(quantize(weight, theta, share), share))
    return total


def mildest(bytes_of: Callable[[Theta], int], b: int, budget: float, steps: int = 10_000) -> Theta:
    """The mildest rate at `b` bits, in `steps` from 0 to 1, where `bytes_of` it is at most `budget`; the last below 1 where none is."""
    low, high = 0, steps - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if bytes_of(Theta(middle / steps, b)) > budget else (low, middle)
    return Theta(low / steps, b)


def silent(*_: Any) -> None:
    """No progress."""


class _Given:
    """The weights from which `ours` started, and where to work."""

    def __init__(self, config: Config, ours: Mapping[str, Any], storage: Path) -> None:
        prepare_process(config.threads_per_worker)
        self.source, self.ours = Source(config), ours
        (baseline,) = (one["key"] for one in ours["stages"] if one["stage"] == "baseline")
        self.initial = Store(storage / "_stages" / f"baseline-{baseline}")
        self.work = storage / "peers" / f"{ours['target']}-seed{config.seed}"
        self.model = self.source.network()
        self.state = read_state(self.initial)
        self.model.load_state_dict(self.state)
        self.data = self.source.data()
        sample = self.data.train.batch(torch.arange(2), None)[0]
        self.inventory = network.inventory(self.model, sample, ())
        self.thetas = {one["layer"]: Theta(one["p"], one["bits"]) for one in ours["plan"]}

    def packed(self, tuned: Store, plan: Plan) -> packing.PackedNetwork:
        """The file."""
        sha256 = models.weights_sha256(self.state)
        return packing.pack(self.source, tuned, plan, self.inventory, self.data, sha256)

    def uniform(self, options: Mapping[str, Any]) -> tuple[dict[str, Any], packing.PackedNetwork]:
        """One theta for all layers, by the product's own loop."""
        config = self.source.config
        budget = SPARE * sum(one["bytes"] for one in self.ours["plan"])
        layers = {name: self.model.get_parameter(name).detach() for name in self.thetas}
        found = []
        for b in BITS:
            theta = mildest(lambda theta: bytes_of(config, layers, theta), b, budget)
            plan = make_plan(self.model, dict.fromkeys(self.thetas, theta))
            share = options.get("ramp_share", 0.0)
            schedule = schedule_of(config, config.epochs, config.learning_rate)
            ramp = Ramp(mildest_rates(self.model, plan), share) if share else None
            power = options.get("rate_distortion", 0.0)
            costs = Costs(power) if power else None
            inputs = {
                "weights": models.weights_sha256(self.state), "data": identity.of_data(self.data), "plan": plan.to_json(), "schedule": asdict(schedule),
                "ramp": asdict(ramp) if ramp else None, "seed": config.seed, "precision": config.precision,
                **({"costs": asdict(costs)} if costs else {}),
            }  # fmt: skip
            key = identity.stage_key("finetune", config, inputs)
            tuned = Store(self.work / f"uniform-b{b}-{key}")
            task = TrainTask(
                self.source, "finetune", self.initial.uri, plan, schedule, tuned.uri,
                Store(self.work / f"uniform-b{b}-{key}-checkpoints").uri, ramp=ramp, costs=costs,
            )  # fmt: skip
            if not tuned.exists("curve.json"):
                LocalEngine().train(task, silent)
            found.append((theta, self.packed(tuned, plan)))
        theta, best = max(found, key=lambda one: one[1].validation.top1)
        return {"plan": [{"layer": name, "p": theta.p, "bits": theta.b} for name in self.thetas]}, best

    def two_stage(self, options: Mapping[str, Any]) -> tuple[dict[str, Any], packing.PackedNetwork]:
        """Pruned, then quantized."""
        first = self.source.config.epochs // 2
        share = options.get("ramp_share", 0.0)
        masks: dict[str, torch.Tensor] = {}
        self._epochs("prune", first, masks, share, None)
        plan = make_plan(self.model, {name: Theta(0.0, theta.b) for name, theta in self.thetas.items()})
        operator = Operator(self.model, plan)
        self._epochs("quantize", self.source.config.epochs - first, masks, 0.0, operator)
        operator.detach()
        tuned = Store(self.work / "two-stage")
        write_state(tuned, WEIGHTS, self.model.state_dict())
        return {
            "plan": [{"layer": name, "p": theta.p, "bits": theta.b} for name, theta in self.thetas.items()]
        }, self.packed(tuned, plan)

    def _epochs(
        self, stage: str, epochs: int, masks: dict[str, torch.Tensor], share: float, operator: Operator | None
    ) -> None:
        """The product's optimizer, schedule and precision; without an operator the weights are pruned on the way, `masks` are what is left."""
        config, train = self.source.config, self.data.train
        schedule = schedule_of(config, epochs, config.learning_rate)
        optimizer = sgd(self.model, schedule)
        device = self.source.device()
        dtype = autocast_dtype(config.precision, device)
        self.model.to(device).to(memory_format=torch.channels_last)
        steps = len(train) // config.batch_size
        self.model.train()
        for epoch in range(epochs):
            order = train.index_batches(
                seeds.generator(config.seed, stage, "order", epoch), config.batch_size
            )
            place = functools.partial(seeds.generator, config.seed, stage, "augment", epoch)
            for step, (images, labels) in enumerate(batches(train, order, place)):
                done = (epoch + step / steps) / epochs
                for group in optimizer.param_groups:
                    group["lr"] = schedule.rate(done, epoch + step / steps)
                if operator is None and step % 20 == 0:
                    self._prune(masks, 1 - max(0.0, 1 - done / share) ** 3 if share else 1.0)
                optimizer.zero_grad(set_to_none=True)
                draws = seeds.generator(config.seed, stage, "cutout", epoch, step)
                images = cut_out(images.to(device), schedule.cutout_pixels, draws)
                images = images.contiguous(memory_format=torch.channels_last)
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    output = self.model(images)
                nn.functional.cross_entropy(output.float(), labels.to(device)).backward()
                if operator is None:
                    optimizer.step()
                    keep_zeros(self.model, masks)
                else:
                    with operator.full_precision():
                        optimizer.step()
                        keep_zeros(self.model, masks)
            print(f"  {stage}: epoch {epoch + 1} of {epochs}", flush=True)
        if operator is None:
            self._prune(masks, 1.0)

    def _prune(self, masks: dict[str, torch.Tensor], risen: float) -> None:
        """Zero what a part `risen` of the plan's rates clips, for good."""
        for name, theta in self.thetas.items():
            weight = self.model.get_parameter(name).detach()
            alive = weight[weight != 0]
            share_left = (1 - risen * theta.p) * weight.numel() / max(alive.numel(), 1)
            if share_left < 1:
                negative, positive = thresholds(alive, 1 - share_left)
                masks[name] = ((weight > positive) | (weight < -negative)).float()
        keep_zeros(self.model, masks)


@torch.no_grad()
def keep_zeros(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    """Set what was pruned to zero again."""
    for name, mask in masks.items():
        model.get_parameter(name).mul_(mask)
