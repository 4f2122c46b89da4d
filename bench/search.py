"""`make bench-search`: the search against random search on ResNet-20 and CIFAR-10, and what its stop rule saves and loses.

Measured once: error, loss and bytes of every layer at 90 (p, b), by `LayerEvaluator` as in a run, on training images with only this layer
compressed; one layer is one unit of JSON in `bench/results/search-units/` and is not measured again. Compared by replay of these points: an
optimiser that asks for one of them gets what was measured, so it may be run again without an evaluation. Both sides choose among the
same 90 points and never twice, so random search sees a quarter of them in 24 evaluations. One search serves all lambdas, as in a run.
Not covered: the finer grid of a run (p in steps of 0.01), other networks, accuracy after fine-tuning.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.joint import layers_of, trained
from bench.record import RESULTS, Row, row, write
from clipq_ray import network, seeds
from clipq_ray.acquisition import Candidates
from clipq_ray.aim import LADDER
from clipq_ray.data import open_data
from clipq_ray.groups import Group
from clipq_ray.plan import Theta
from clipq_ray.quantizer import decide_share, quantize
from clipq_ray.search import LayerEvaluator, Settings, Trial, suggest
from clipq_ray.work import search_images

UNITS = RESULTS / "search-units"
RATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98)
BITS = (2, 3, 4, 5, 6, 8)
COLUMNS = ("p", "b", "errors", "loss", "bytes", "distortion")
EVALUATIONS, START, SEEDS, STOPS = 24, 4, 3, (0.05, 0.1, 0.3)
NEVER = 2.0  # of EVALUATIONS: what counts where 24 evaluations do not reach what random search's reach


def measure(weights: str, data_folder: str, images: int) -> None:
    """Measure every layer that has no unit yet."""
    torch.set_num_threads(1)
    model = trained(weights)
    names = layers_of(model)
    # so ordered that the first few stand for the whole network
    spread = [name for first in (0, 2, 1, 3) for name in names[first::4]]
    missing = [layer for layer in spread if not unit_path(names.index(layer), images).exists()]
    if not missing:
        return
    bytes_before = network.inventory(model, torch.zeros(2, 3, 32, 32)).bytes_before
    data = open_data(data_folder, input_shape=(3, 32, 32), validation_images=500)
    evaluator = LayerEvaluator(
        model, search_images(data.train, images, 0), bytes_before,
        batch_size=100, device=torch.device("cpu"), node="bench", cache_bytes=1 << 30,
    )  # fmt: skip
    UNITS.mkdir(parents=True, exist_ok=True)
    for layer in missing:
        content = unit(evaluator, layer, model, bytes_before)
        path = unit_path(names.index(layer), images)
        partial = path.with_suffix(".part")
        partial.write_text(as_text(content), encoding="utf-8")
        partial.replace(path)
        print(f"{layer}: {len(content['points'])} points in {content['seconds']} s", flush=True)


def unit(evaluator: LayerEvaluator, layer: str, model: nn.Module, bytes_before: int) -> dict[str, Any]:
    """All points of one layer."""
    weight = model.get_parameter(layer).detach()
    points, seconds, images = [], 0.0, 0
    for p in RATES:
        for b in BITS:
            made = evaluator.measure(
                Group(layer, (layer,)), Theta(p, b), step=0, origin="start", tradeoff=1.0
            )
            points.append(
                [p, b, round(made.error * made.images), round(made.loss, 5), made.bytes, distortion(weight, made.theta)]
            )  # fmt: skip
            seconds, images = seconds + made.seconds, made.images
    return {
        "layer": layer, "elements": weight.numel(), "network_bytes": bytes_before, "images": images, "seconds": round(seconds, 1),
        "columns": list(COLUMNS), "points": points,
    }  # fmt: skip


def distortion(weight: torch.Tensor, theta: Theta) -> float:
    """|w - q|^2 / |w|^2."""
    values = quantize(weight, theta, decide_share(weight, theta)).values
    return round(float((weight - values).double().square().sum() / weight.double().square().sum()), 6)


def as_text(content: dict[str, Any]) -> str:
    """JSON with one point a line."""
    head = json.dumps({name: value for name, value in content.items() if name != "points"})
    return head[:-1] + ', "points": [\n' + ",\n".join(json.dumps(one) for one in content["points"]) + "\n]}\n"


def unit_path(index: int, images: int) -> Path:
    """Where a layer's unit lies."""
    return UNITS / f"resnet20-n{images}-layer{index:02d}.json"


@dataclass(frozen=True)
class Table:
    """One layer's measured points."""

    layer: str
    images: int
    trials: dict[Theta, Trial]
    known: Candidates


def tables(images: int) -> list[Table]:
    """All units there are, in the order of the network."""
    found = [json.loads(path.read_text("utf-8")) for path in sorted(UNITS.glob(f"resnet20-n{images}-*.json"))]
    return [table(content) for content in found]


def table(content: dict[str, Any]) -> Table:
    """One unit as trials and candidates."""
    layer, images, whole = content["layer"], content["images"], content["network_bytes"]
    trials, far = {}, []
    for p, b, errors, loss, size, lost in content["points"]:
        saved = (4 * content["elements"] - size) / whole
        trials[Theta(p, b)] = Trial(
            layer, 0, "start", p, b, images, errors / images, loss, size, saved, 0.0, 0.0, "replay"
        )
        far.append(lost)
    saved_all = np.array([trial.saved for trial in trials.values()])
    return Table(layer, images, trials, Candidates(tuple(trials), saved_all, np.array(far)))


def searched(given: Table, loss_share: float) -> tuple[list[Trial], list[float | None]]:
    """The search's points in their order, and the gain [images] that was expected before each."""
    settings = Settings(EVALUATIONS, START, LADDER, seed=0, loss_share=loss_share)
    trials: list[Trial] = []
    gains: list[float | None] = []
    for step in range(EVALUATIONS):
        found = suggest(trials, given.layer, settings, given.known)
        gains.append(None if found.gain is None else found.gain * given.images)
        trials.append(replace(given.trials[found.theta], step=step, origin=found.origin))
    return trials, gains


def drawn(given: Table, seed: int) -> list[Trial]:
    """Random search: uniform over the same points, without return."""
    place = random.Random(seeds.derive(seed, "bench", "random search", given.layer))
    return place.sample(list(given.trials.values()), EVALUATIONS)


def best(trials: Sequence[Trial], tradeoff: float) -> float:
    """The lowest objective among them."""
    return min(trial.objective(tradeoff) for trial in trials)


def needed(trials: Sequence[Trial], tradeoff: float, target: float) -> float:
    """Evaluations until the objective is at most `target`, over all of random search's."""
    for count, trial in enumerate(trials, start=1):
        if trial.objective(tradeoff) <= target + 1e-12:
            return count / EVALUATIONS
    return NEVER


def against_random(
    found: Sequence[Table], runs: Sequence[Sequence[Trial]], name: str, goal: float | None
) -> list[Row]:
    """Evaluations over those of random search: to its best point, and to half an image from it beside random search's own way there."""
    exact: dict[float, list[float]] = {tradeoff: [] for tradeoff in LADDER}
    near, random_near = [], []
    for given, trials in zip(found, runs, strict=True):
        for seed in range(SEEDS):
            others = drawn(given, seed)
            for tradeoff in LADDER:
                target = best(others, tradeoff)
                exact[tradeoff].append(needed(trials, tradeoff, target))
                near.append(needed(trials, tradeoff, target + 0.5 / given.images))
                random_near.append(needed(others, tradeoff, target + 0.5 / given.images))
    together = [value for values in exact.values() for value in values]
    never = 100 * sum(value == NEVER for value in together) / len(together)
    return [
        row(f"{name}/evaluations_over_random", together, "", goal=goal),
        *(row(f"{name}/evaluations_over_random/lambda{tradeoff:g}", exact[tradeoff], "") for tradeoff in LADDER),
        Row(f"{name}/not_reached_in_{EVALUATIONS}", never, "%", n=len(together)),
        row(f"{name}/evaluations_to_half_an_image", near, ""),
        row(f"{name}/evaluations_to_half_an_image/random", random_near, ""),
    ]  # fmt: skip


def stopped(
    found: Sequence[Table], runs: Sequence[tuple[list[Trial], list[float | None]]], stop: float, name: str
) -> list[Row]:
    """What the stop rule leaves of the evaluations, and what it loses of the objective, mean over layers."""
    used, lost = [], []
    for given, (trials, gains) in zip(found, runs, strict=True):
        ends = (step for step, gain in enumerate(gains) if gain is not None and gain < stop)
        kept = next(ends, EVALUATIONS)
        used.append(kept / EVALUATIONS)
        for tradeoff in LADDER:
            lost.append(given.images * (best(trials[:kept], tradeoff) - best(trials, tradeoff)))
    return [
        Row(f"{name}/stop{stop:g}/evaluations", statistics.mean(used), "of all", n=len(used)),
        Row(f"{name}/stop{stop:g}/objective_lost", statistics.mean(lost), "images", n=len(lost)),
        Row(f"{name}/stop{stop:g}/objective_lost_most", max(lost), "images", n=len(lost)),
    ]


def main() -> int:
    """Measure what is not there yet, then the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True, help="folder with CIFAR-10")
    parser.add_argument("--weights", required=True, help="ResNet-20's weights")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--replay-only", action="store_true", help="compare on the layers that are there")
    given = parser.parse_args()
    if not given.replay_only:
        measure(given.weights, given.data, given.images)
    torch.set_num_threads(1)
    found, rows = tables(given.images), []
    for name, loss_share, goal in (
        ("search/resnet20", Settings.loss_share, 0.5),
        ("search/resnet20/error_only", 0.0, None),
    ):
        runs = [searched(one, loss_share) for one in found]
        rows += against_random(found, [trials for trials, _ in runs], name, goal)
        if loss_share:
            rows += [line for stop in STOPS for line in stopped(found, runs, stop, name)]
    notes = {
        "layers": len(found), "images": given.images, "points": len(RATES) * len(BITS), "evaluations": EVALUATIONS,
        "seeds": f"{SEEDS}, of random search; the search draws nothing", "lambdas": list(LADDER), "not_reached_counts_as": NEVER,
    }  # fmt: skip
    print(f"stored in {write('search', rows, notes=notes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
