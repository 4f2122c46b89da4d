"""`make bench-imagenet`: the recipes for ImageNet's networks run through at real shapes, on generated images and random weights.

Each job is the product's own command with the recipe's options, cut to two epochs of a few steps: what is measured is that it runs through, how much memory it
takes, how long an image takes in training, and the file at the (p, b) that the search plans. The weights are random, so accuracies say nothing and sizes
are not those of trained networks: they are never to be set beside a published ratio. Hours are predicted from the time per image, for this machine.
One recipe is one unit under `bench/results/imagenet-units/`, stored when it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

from bench.data import jpegs
from bench.record import RESULTS, ROOT, Row, write
from bench.records import total_epochs
from clipq_ray import manifest
from clipq_ray.storage import Store

UNITS = RESULTS / "imagenet-units"
RECIPES = tuple(sorted((ROOT / "recipes").glob("*-imagenet-*.yaml")))
CLASSES, TRAINING_IMAGES = 1000, 1_281_167 - 5_000
BATCH, STEPS = 32, 3
CUT = {
    "batch_size": BATCH, "epochs": 2, "rungs": 1, "rounds": 1, "warmup_epochs": 0, "control": "never", "weights": "random", "engine": "local",
    "validation_images": 8, "limit_images": BATCH * STEPS, "search_evaluations": 4, "search_start": 3, "search_images": 4,
    "evaluation_batch_size": 16, "batch_norm_images": 16, "threads_per_worker": os.cpu_count() or 1,
}  # fmt: skip
"""What is changed of a recipe so that it ends in minutes on a few cores."""


def ran(recipe: Path, data: str) -> dict[str, Any]:
    """One recipe's job, from its command to its file."""
    options = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        changes = {**CUT, "data": data, "storage": folder}
        words = [f"--{name.replace('_', '-')}={value}" for name, value in changes.items()] + [
            "--no-search-again",
        ]
        started = time.monotonic()
        job = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs" / "compress.py"), "--config", str(recipe), *words]
        )
        _, status, used = os.wait4(job.pid, 0)
        seconds = time.monotonic() - started
        code = os.waitstatus_to_exitcode(status)
        if code not in (0, 1):  # 1: the promise, of which random weights say nothing
            raise SystemExit(f"{recipe.name}: the job ended with {code}")
        (run,) = manifest.committed(Store(folder))
        document = manifest.read_manifest(run.store)
        (curve,) = Path(folder).glob("_stages/finetune-*/curve.json")
        last = json.loads(curve.read_text(encoding="utf-8"))["curve"][-1]
    metrics, promise = document["metrics"], document["promise"]
    return {
        "recipe": recipe.stem, "weights": "random", "batch": BATCH, "peak_gib": used.ru_maxrss / 2**20, "job_seconds": seconds,
        "epoch_seconds": last["seconds"], "steps": STEPS, "bytes_before": metrics["bytes_before"], "bytes": metrics["bytes_after"],
        "predicted_bytes": promise["predicted_bytes"], "epochs": total_epochs(options),
    }  # fmt: skip


def rows(unit: dict[str, Any]) -> list[Row]:
    """What a unit says."""
    place, per_image = f"imagenet/{unit['recipe']}", unit["epoch_seconds"] / (unit["steps"] * unit["batch"])
    return [
        Row(f"{place}/peak_memory", unit["peak_gib"], f"GiB, {unit['batch']} images a step"),
        Row(f"{place}/step", unit["epoch_seconds"] / unit["steps"], "s"),
        Row(f"{place}/random_weights/file", unit["bytes"], "bytes"),
        Row(f"{place}/random_weights/file_over_predicted", unit["bytes"] / unit["predicted_bytes"], "ratio"),
        Row(f"{place}/training_here", per_image * TRAINING_IMAGES * unit["epochs"] / 3600, f"hours for {unit['epochs']} epochs, predicted"),
    ]  # fmt: skip


def main() -> int:
    """Make what is not there yet, then the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[""], help="recipes whose names begin so; default: all")
    given = parser.parse_args()
    UNITS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for recipe in RECIPES:
            path = UNITS / f"{recipe.stem}.json"
            if path.exists() or not recipe.stem.startswith(tuple(given.only)):
                continue
            if not any(Path(folder).iterdir()):
                jpegs(folder, 2 * CLASSES, CLASSES)
            unit = ran(recipe, folder)
            path.write_text(json.dumps(unit, indent=1) + "\n", encoding="utf-8")
    units = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(UNITS.glob("*.json"))]
    notes = {"weights": "random", "images": "generated", "changed": CUT}
    print(f"stored in {write('imagenet', [one for unit in units for one in rows(unit)], notes=notes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
