"""`make bench-imagenet`: the recipes for ImageNet's networks run through at real shapes, on generated images and random weights.

Each job is the product's own command with the recipe's options, cut to two epochs of a few steps: what is measured is that it runs through, how much memory it
takes and how long an image takes in training (128 images a step on a GPU, 32 without). To random weights nothing that is pruned matters, so the job's search plans next to nothing, whatever size is
asked for; the file is therefore measured at a (p, b) that is the same for all layers: four bits and the mildest rate with which the layers meet the recipe's
ratio. Its size is not that of a trained network and never to be set beside a published ratio. Hours are predicted from the time per image, for the
unit's machine and the trainings of the recipe from torchvision's weights (`clipq_ray.planning`), the dense control among them; searches and evaluations come on top.
One recipe is one unit under `bench/results/imagenet-units/`, stored when its job ends (`--what jobs`) and again with its file's size (`--what sizes`, which
wants no GPU); one of another recipe than by now is made anew.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import yaml

from bench import processes
from bench.images import jpegs
from bench.record import RESULTS, ROOT, Row, chosen, commit, machine, write
from bench.records_peers import mildest, without_places
from bench.records_units import agree
from clipq_ray import codec, console, identity, manifest, network, packing
from clipq_ray.config import Config, make
from clipq_ray.errors import ConfigError, RunError
from clipq_ray.operator import make_plan
from clipq_ray.plan import Theta
from clipq_ray.planning import trainings
from clipq_ray.quantizer import decide_share, quantize
from clipq_ray.source import Source
from clipq_ray.storage import Store
from clipq_ray.work import layer_bytes

UNITS = RESULTS / "imagenet-units"
RECIPES = tuple(sorted((ROOT / "recipes").glob("*-imagenet-*.yaml")))
CLASSES, TRAINING_IMAGES = 1000, 1_281_167 - 5_000
BATCH, STEPS = (128, 8) if torch.cuda.is_available() else (32, 3)
HELD_OUT = 8  # of the images that there are: the steps are of what is left
BITS, RATES = 4, 1000
CUT = {
    "batch_size": BATCH, "epochs": 2, "rungs": 1, "rounds": 1, "warmup_epochs": 0, "control": "never", "weights": "random", "engine": "local",
    "validation_images": HELD_OUT, "limit_images": BATCH * STEPS + HELD_OUT, "search_evaluations": 4, "search_start": 3, "search_images": 4,
    "evaluation_batch_size": 16, "batch_norm_images": 16, "profile": "fast", "threads_per_worker": os.cpu_count() or 1,
}  # fmt: skip
"""What is changed of a recipe so that its job ends in minutes on a few cores."""


def options_of(recipe: Path) -> dict[str, Any]:
    """What a recipe says."""
    found: dict[str, Any] = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    return found


def asked(recipe: Path, **other: Any) -> dict[str, Any]:
    """The options of a unit: the recipe's, cut, and `other` ones than by now; epochs decide only what is predicted from it."""
    options = options_of(recipe)
    return {**options, **CUT, "search_again": False, "profile": options["profile"], **other}


def unit_of(recipe: Path) -> dict[str, Any] | None:
    """The unit of a recipe as it is now, if it is there."""
    path = UNITS / f"{recipe.stem}.json"
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        # how many images there are depends on the machine, and both counts are beside what was measured
        steps = {"batch_size": found["batch"], "limit_images": found["config"]["limit_images"]}
        same = agree(found["config"], asked(recipe, **steps))
    except (ValueError, KeyError, TypeError, AttributeError):
        same = False
    return found if same else None


def ran(recipe: Path, data: str) -> dict[str, Any]:
    """One recipe's job, from its command to its file."""
    with tempfile.TemporaryDirectory() as folder:
        changes = {**CUT, "data": data, "storage": folder}
        words = [f"--{name.replace('_', '-')}={value}" for name, value in changes.items()] + [
            "--no-search-again",
        ]
        started = time.monotonic()
        command = [sys.executable, str(ROOT / "jobs" / "compress.py"), "--config", str(recipe), *words]
        code, used = processes.used_by(command)
        seconds = time.monotonic() - started
        if code == ConfigError.exit_code:
            raise ConfigError(f"{recipe.name}: the job refused its input, as it says above")
        runs = manifest.committed(Store(folder))
        if not runs:  # a promise that is not kept ends with 1 too; random weights say nothing of it
            raise RunError(f"{recipe.name}: the job ended with {code}; run again to make it")
        (run,) = runs
        document = manifest.read_manifest(run.store)
        (curve,) = Path(folder).glob("_stages/finetune-*/curve.json")
        trained = json.loads(curve.read_text(encoding="utf-8"))
    metrics = document["metrics"]
    return {
        "recipe": recipe.stem, "config": without_places(make(**asked(recipe)).model_dump(mode="json")), "weights": "random", "batch": BATCH, "peak_gib": used.ru_maxrss / 2**20,
        "gpu_gib": trained["gpu_bytes"] / 2**30 if "gpu_bytes" in trained else None, "job_seconds": seconds, "epoch_seconds": trained["curve"][-1]["seconds"], "steps": STEPS, "bytes_before": metrics["bytes_before"], "job_bytes": metrics["bytes_after"],
        "commit": commit(), "machine": machine(), "versions": identity.versions(),
    }  # fmt: skip


def bytes_of(config: Config, layers: Mapping[str, torch.Tensor], theta: Theta) -> int:
    """What all `layers` take at one theta, as they are."""
    total = 0
    for weight in layers.values():
        share = decide_share(weight, theta)
        total += layer_bytes(config, codec.coded(quantize(weight, theta, share), share))
    return total


def planned(config: Config) -> dict[str, Any]:
    """The (p, b) at which all layers of the random network together take of all tensors what the target ratio leaves, and the bytes of the file that has it."""
    source, ratio = Source(config), config.target_ratio
    assert ratio is not None
    model, data = source.network(), source.data()
    inventory = network.inventory(model, data.validation.batch(torch.arange(2), None)[0], config.keep)
    layers = {one.name: model.get_parameter(one.name).detach() for one in inventory.layers}
    theta = mildest(
        lambda theta: bytes_of(config, layers, theta), BITS, inventory.bytes_before / ratio, RATES
    )
    plan = make_plan(model, dict.fromkeys(layers, theta))
    size = packing.file_bytes(source, model.state_dict(), plan, inventory, data, packing.usual(source))
    return {"p": theta.p, "bits": theta.b, "bytes": size}


def epochs(recipe: Path, data: str) -> tuple[int, int]:
    """Of all trainings of a recipe's job: those that there are in any case, and those that there are at most."""
    cut = {"data": data, "limit_images": CUT["limit_images"], "validation_images": HELD_OUT}
    found = trainings(Source(make(**{**options_of(recipe), **cut})))
    return (
        sum(one.times * one.epochs for one in found if not one.at_most),
        sum(one.times * one.epochs for one in found),
    )


def rows(unit: dict[str, Any], least: int, most: int) -> list[Row]:
    """What a unit says, its recipe's epochs given."""
    place = f"imagenet/{unit['recipe']}"
    on_gpu = unit["gpu_gib"] is not None
    return [
        Row(f"{place}/peak_memory", unit["peak_gib"], f"GiB, {unit['batch']} images a step"),
        *([Row(f"{place}/gpu_memory", unit["gpu_gib"], f"GiB, {unit['batch']} images a step")] if on_gpu else []),
        Row(f"{place}/step", unit["epoch_seconds"] / unit["steps"], "s"),
        *_sizes(place, unit),
        *(
            Row(f"{place}/training_here{name}", hours(unit, count), f"hours for {count} epochs, predicted")
            for name, count in (("", least), ("_at_most", most))
        ),
    ]  # fmt: skip


def _sizes(place: str, unit: dict[str, Any]) -> list[Row]:
    if "bytes" not in unit:
        return []
    return [
        Row(f"{place}/random_weights/file", unit["bytes"], f"bytes, all layers at p {unit['p']:g}, b {unit['bits']}"),
        Row(f"{place}/random_weights/file_over_all_tensors", unit["bytes"] / unit["bytes_before"], "ratio"),
    ]  # fmt: skip


def stored(path: Path, unit: dict[str, Any]) -> None:
    """Write a unit whole."""
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(unit, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def hours(unit: Mapping[str, Any], count: int) -> float:
    """What so many epochs of all training images would take where the unit was made."""
    return float(unit["epoch_seconds"] / (unit["steps"] * unit["batch"]) * TRAINING_IMAGES * count / 3600)


def table(units: Sequence[Mapping[str, Any]], counts: Mapping[str, tuple[int, int]]) -> str:
    """The units that have a size as Markdown, as the documentation has them; hours to two digits."""
    lines = [
        "| recipe | memory, GiB | step, s | file of random weights, bytes | at p, b | epochs | hours there |",
        "|---|---|---|---|---|---|---|",
    ]
    for unit in units:
        if "bytes" not in unit:  # its job is done, its size is to come
            continue
        least, most = counts[unit["recipe"]]
        taken = [float(f"{hours(unit, count):.2g}") for count in (least, most)]
        name = unit["recipe"].partition("-")[0]
        lines.append(
            f"| `{name}` | {unit['peak_gib']:.1f} | {unit['epoch_seconds'] / unit['steps']:.1f} | {unit['bytes']:,} | {unit['p']:g}, {unit['bits']} | {least}, at most {most} | {taken[0]:,.0f}, at most {taken[1]:,.0f} |"
        )
    return "\n".join(lines)


def main(words: list[str]) -> int:
    """Make what is not there yet, then the table."""
    parser = console.OneLineParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[""], help="recipes whose names begin so; default: all")
    parser.add_argument("--what", nargs="+", choices=("jobs", "sizes"), default=["jobs", "sizes"])
    given = parser.parse_args(words)
    signal.signal(signal.SIGTERM, processes.end)
    UNITS.mkdir(parents=True, exist_ok=True)
    names = chosen(given.only, [one.stem for one in RECIPES])
    wanted = [(one, UNITS / f"{one.stem}.json") for one in RECIPES if one.stem in names]
    with tempfile.TemporaryDirectory() as folder:
        jpegs(folder, 2 * CLASSES, CLASSES)
        for recipe, path in wanted if "jobs" in given.what else ():
            if unit_of(recipe) is None:
                stored(path, ran(recipe, folder))
        for recipe, path in wanted if "sizes" in given.what else ():
            if (unit := unit_of(recipe)) is not None and "bytes" not in unit:
                stored(path, {**unit, **planned(make(**asked(recipe, data=folder)))})
        counts = {one.stem: epochs(one, folder) for one in RECIPES}
    units = [unit for one in RECIPES if (unit := unit_of(one)) is not None]
    notes = {
        "weights": "random",
        "images": "generated",
        "machines": {one["recipe"]: one["machine"] for one in units},
    }
    print(table(units, counts))
    print(
        f"stored in {write('imagenet', [one for unit in units for one in rows(unit, *counts[unit['recipe']])], notes=notes)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(console.run("imagenet", main))
