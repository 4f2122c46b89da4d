"""`make bench-joint`: CLIP-Q's central claim, pruning and quantizing jointly, against the usual two stages.

ResNet-20 on CIFAR-10 from the given weights, one (p, b) for every layer, the same data, batches and number of epochs for both:

- joint: the operator in the loop for all epochs, one cosine. Clipped weights may come back at any step.
- two-stage: pruned once by magnitude, the same p per sign, fine-tuned with the zeros fixed for the first half of the epochs (one cosine); then
  quantized (p = 0 on what is left, the same b), the zeros still fixed, for the second half (another cosine).

Test accuracy of both at the end; nothing is selected on it. One (variant, seed) is one unit: its JSON is stored when it ends and is not
measured again, unless it was made with other settings. Not covered: other data or weights behind the same settings.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.record import RESULTS, Row, row, write
from clipq_ray import models, seeds
from clipq_ray.data import Data, batches, open_data
from clipq_ray.evaluate import evaluate
from clipq_ray.operator import Operator, make_plan
from clipq_ray.plan import Theta
from clipq_ray.quantizer import thresholds

VARIANTS = ("joint", "two-stage")
BATCH_SIZE = 128
"""Images per batch by default, and of units that do not say it: those stored before they did were made with it."""


def trained(weights: str) -> nn.Module:
    """ResNet-20 with the given weights."""
    architecture = models.architecture("resnet20", 10, {})
    model = models.build(architecture)
    models.apply_weights(model, models.read_weights(weights, architecture), weights)
    return model.to(memory_format=torch.channels_last)


def layers_of(model: nn.Module) -> list[str]:
    """Names of the conv and linear weights."""
    return [name for name, parameter in model.named_parameters() if parameter.dim() > 1]


def fine_tune(
    model: nn.Module, data: Data, given: argparse.Namespace, *, epochs: int, stage: str, seed: int,
    theta: Theta | None, masks: dict[str, torch.Tensor],
) -> Operator | None:  # fmt: skip
    """SGD with one cosine; the operator in the loop if `theta` is given; weights outside of `masks` stay zero."""
    operator = None
    if theta is not None:
        operator = Operator(model, make_plan(model, dict.fromkeys(layers_of(model), theta)))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=given.learning_rate, momentum=0.9, weight_decay=1e-4, nesterov=True
    )
    total = epochs * (len(data.train) // given.batch_size)
    done = 0
    for epoch in range(epochs):
        model.train()
        order = data.train.order(seeds.generator(seed, "bench", stage, epoch))
        rows = list(order[: len(order) // given.batch_size * given.batch_size].split(given.batch_size))
        place = (seed, "bench", stage, "augment", epoch)
        source = batches(data.train, rows, functools.partial(seeds.generator, *place))
        for images, labels in source:
            for group in optimizer.param_groups:
                group["lr"] = given.learning_rate * 0.5 * (1 + math.cos(math.pi * done / total))
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16):
                output = model(images.contiguous(memory_format=torch.channels_last))
            nn.functional.cross_entropy(output.float(), labels).backward()
            if operator is None:
                optimizer.step()
                keep_zeros(model, masks)
            else:
                with operator.full_precision():
                    optimizer.step()
                    keep_zeros(model, masks)
            done += 1
        print(f"  {stage}: epoch {epoch + 1} of {epochs}", flush=True)
    return operator


@torch.no_grad()
def keep_zeros(model: nn.Module, masks: dict[str, torch.Tensor]) -> None:
    """Set what was pruned to zero again."""
    for name, mask in masks.items():
        model.get_parameter(name).mul_(mask)


def pruned_masks(model: nn.Module, p: float) -> dict[str, torch.Tensor]:
    """What survives clipping with rate p, by layer."""
    masks = {}
    for name in layers_of(model):
        weight = model.get_parameter(name).detach()
        negative, positive = thresholds(weight, p)
        masks[name] = ((weight > positive) | (weight < -negative)).float()
    return masks


def settings(given: argparse.Namespace) -> dict[str, Any]:
    """What decides a unit besides variant and seed, as it stands in its JSON."""
    return {name: getattr(given, name) for name in ("p", "b", "epochs", "learning_rate", "batch_size")}


def stored(path: Path, given: argparse.Namespace) -> dict[str, Any] | None:
    """The unit at `path`, None where there is none or other settings made it."""
    if not path.exists():
        return None
    found: dict[str, Any] = {"batch_size": BATCH_SIZE, **json.loads(path.read_text(encoding="utf-8"))}
    return found if settings(given).items() <= found.items() else None


def unit(variant: str, seed: int, data: Data, given: argparse.Namespace) -> dict[str, Any]:
    """Train one variant with one seed; accuracy, zeros and recovery."""
    started = time.time()
    torch.manual_seed(seed)
    model, theta = trained(given.weights), Theta(given.p, given.b)
    if variant == "joint":
        operator = fine_tune(
            model, data, given, epochs=given.epochs, stage="joint", seed=seed, theta=theta, masks={}
        )
    else:
        first = given.epochs // 2
        masks = pruned_masks(model, given.p)
        keep_zeros(model, masks)
        fine_tune(model, data, given, epochs=first, stage="prune", seed=seed, theta=None, masks=masks)
        operator = fine_tune(
            model,
            data,
            given,
            epochs=given.epochs - first,
            stage="quantize",
            seed=seed,
            theta=Theta(0.0, given.b),
            masks=masks,
        )
    assert operator is not None
    assert data.test is not None
    found = evaluate(model, data.test, batch_size=250)
    weights = [model.get_parameter(name).detach() for name in layers_of(model)]
    recovery = operator.recovery()
    return {
        "variant": variant, "seed": seed, **settings(given),
        "test_top1_percent": 100 * found.top1, "test_loss": found.loss,
        "zeros_percent": 100 * sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights),
        "clipped_first": sum(one.clipped_first for one in recovery.values()),
        "recovered": sum(one.recovered for one in recovery.values()),
        "state_changes": sum(one.changes for one in recovery.values()),
        "seconds": time.time() - started,
    }  # fmt: skip


def main() -> int:
    """Measure what is not there yet, then the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True, help="folder with CIFAR-10")
    parser.add_argument("--weights", required=True, help="ResNet-20's weights")
    parser.add_argument("--p", type=float, default=0.8)
    parser.add_argument("--b", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument("--learning-rate", type=float, default=0.03)
    given = parser.parse_args()
    torch.set_num_threads(2)
    data = open_data(given.data, input_shape=(3, 32, 32), validation_images=500)
    units = RESULTS / "joint-units"
    units.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    for seed in range(given.seeds):
        for variant in VARIANTS:
            path = units / f"{variant}-p{given.p}-b{given.b}-e{given.epochs}-seed{seed}.json"
            one = stored(path, given)
            if one is None:
                print(f"{variant}, seed {seed}", flush=True)
                one = unit(variant, seed, data, given)
                path.write_text(json.dumps(one, indent=1) + "\n", encoding="utf-8")
            found[variant].append(one)
    place = f"joint/resnet20-cifar10/p{given.p}-b{given.b}-{given.epochs}epochs"
    rows: list[Row] = []
    for variant, runs in found.items():
        rows.append(row(f"{place}/{variant}/test_top1", [run["test_top1_percent"] for run in runs], "%"))
        rows.append(row(f"{place}/{variant}/zeros", [run["zeros_percent"] for run in runs], "%"))
    joint = found["joint"]
    rows.append(
        row(
            f"{place}/joint/recovered",
            [100 * run["recovered"] / run["clipped_first"] for run in joint],
            "% of first clipped",
        )
    )
    gains = [
        a["test_top1_percent"] - b["test_top1_percent"]
        for a, b in zip(joint, found["two-stage"], strict=True)
    ]
    rows.append(row(f"{place}/joint_minus_two_stage", gains, "points", goal=0.0, better="higher"))
    print(f"stored in {write('joint', rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
