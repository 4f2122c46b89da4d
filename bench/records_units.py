"""Units of `make bench-records`: one (target, variant, seed) each, what it is asked for, made by and keeps.

A unit that was made with other settings than the recipe's by now counts as not there; so does one for the size of another `ours` than the one that is there.

Variants: `ours` (the recipe), `paper` (with --paper), `two-stage` and `uniform` (`records_peers`: pruned first and quantized then, and one (p, b) for all
layers). All are made in as many epochs as `ours` of their seed, so it comes first. The last two are for the size of its file, and `two-stage` takes its plan; `paper` is asked
for the target's size, as the recipe is. `without-LEVER`: the recipe with one option as --paper has it, in as many epochs as the recipe takes without levels of fixed codes.

`epochs` (`--epochs N`) gives all variants, `ours` too, a last round of N epochs: what takes a GPU in full is so compared on a CPU. Such units stand beside the row, and in no record.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench import processes, records_peers
from bench.record import RESULTS, ROOT, commit, machine
from clipq_ray import identity, manifest, packing, tables
from clipq_ray.consistency import NEEDS, PAPER
from clipq_ray.storage import Store

UNITS = RESULTS / "records-units"
PEERS = ("two-stage", "uniform")
VARIANTS = ("ours", "paper", *PEERS)
PLACES = ("storage", "data", "data_root", "weights", "validation_data")
LEVERS = (
    "rungs",
    "search_again",
    "ramp_share",
    "hold_size",
    "level_epochs",
    "unit_order",
    "dead_units",
    "vectors",
    "rate_distortion",
    "cutout_pixels",
)
WITHOUT = tuple(f"without-{name.replace('_', '-')}" for name in LEVERS)


@dataclass(frozen=True)
class Target:
    """What a row has to reach: `most_bytes` of the file at `most_error` percent of the test images; `data` and `weights` below the shared folder, weights
    None where the job trains them first."""

    name: str
    data: str
    weights: str | None
    most_bytes: int
    most_error: float

    @property
    def recipe(self) -> Path:
        """Its options."""
        return ROOT / "recipes" / f"{self.name}.yaml"

    def options(self) -> dict[str, Any]:
        """The recipe's options."""
        content: dict[str, Any] = yaml.safe_load(self.recipe.read_text(encoding="utf-8"))
        return content


TARGETS = (
    Target("lenet_300_100-mnist-noloss", "mnist", None, 6_000, 1.64),
    Target("lenet_300_100-mnist-small", "mnist", None, 3_500, 1.64),
    Target("lenet5_caffe-mnist-noloss", "mnist", None, 2_700, 0.80),
    Target("lenet5_caffe-mnist-small", "mnist", None, 1_500, 0.96),
    Target("resnet20-cifar10-noloss", "cifar10", "resnet20-cifar10.safetensors", 40_000, 8.27),
    Target("resnet20-cifar10-small", "cifar10", "resnet20-cifar10.safetensors", 34_000, 8.80),
    Target("resnet56-cifar10-noloss", "cifar10", "resnet56-cifar10.safetensors", 100_000, 6.61),
)


def published(options: dict[str, Any], epochs: int) -> dict[str, Any]:
    """The same size in so many epochs by the method as published."""
    left = {
        name: value
        for name, value in options.items()
        if name not in PAPER and name not in records_peers.OF_LEVERS
    }
    return {**left, "paper": True, "epochs": epochs}


def without(options: dict[str, Any], variant: str) -> dict[str, Any]:
    """A recipe's options without the lever that a variant names, in as many epochs."""
    lever = variant.removeprefix("without-").replace("-", "_")
    epochs = options["epochs"]
    idle = [name for name, (other, _) in NEEDS.items() if other == lever]
    found = {**{name: value for name, value in options.items() if name not in idle}, lever: PAPER[lever]}
    if lever == "level_epochs":
        epochs += options.get(lever, 0)
    if lever == "rungs":  # what is searched anew is searched for a rung
        epochs += (options.get("rungs", 1) - 1) * options.get("rung_epochs", 0)
        found["search_again"] = False
    return {**found, "epochs": epochs}


@dataclass(frozen=True)
class Unit:
    """One target, variant and seed; `epochs` of the last round and `threads` of a worker instead of the recipe's."""

    target: Target
    variant: str
    seed: int
    epochs: int | None = None
    threads: int | None = None

    @property
    def stem(self) -> Path:
        """Where its JSON and file lie, without suffix."""
        return UNITS / f"{named(self.target, self.variant, self.epochs, '-')}-seed{self.seed}"

    @property
    def result(self) -> dict[str, Any] | None:
        """What was measured with the settings of now, if it was."""
        path = self.stem.with_suffix(".json")
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        fits = agree(found["config"], self.options()) and found.get("of") == self.of()
        return found if fits else None

    def besides_weights(self) -> int:
        """Bytes of its file that are not a layer's weights."""
        found = json.loads(self.stem.with_suffix(".json").read_text(encoding="utf-8"))
        layers = {one["layer"] for one in found["plan"]}
        return packing.other_bytes_of(self.stem.with_suffix(".clq").read_bytes(), layers)

    def options(self) -> dict[str, Any]:
        """Its settings by now; `SystemExit` where they follow from what `ours` was made in, and it was not."""
        options = {**self.recipe(), "seed": self.seed}
        if self.variant == "ours":
            return options
        if self.variant in WITHOUT:
            return without(options, self.variant)
        ours = self.ours()
        if self.variant == "paper":
            return published(options, ours["epochs"])
        return records_peers.left(options, ours["epochs"])

    def recipe(self) -> dict[str, Any]:
        """The target's options, with the epochs and threads that are asked for."""
        asked = {"epochs": self.epochs, "threads_per_worker": self.threads}
        return self.target.options() | {name: value for name, value in asked.items() if value}

    def ours(self) -> dict[str, Any]:
        """The unit `ours` of this seed."""
        found = Unit(self.target, "ours", self.seed, self.epochs).result
        if found is None:
            raise SystemExit(
                f"{self.stem.name}: expected the unit 'ours' of this seed before it, got none; make it first (--variants ours)"
            )
        return found

    def of(self) -> str | None:
        """The hash of the file whose size and plan a peer takes, so that another one makes it anew."""
        if self.variant not in PEERS:
            return None
        return hashlib.sha256(
            Unit(self.target, "ours", self.seed, self.epochs).stem.with_suffix(".clq").read_bytes()
        ).hexdigest()

    def make(self, shared: Path, storage: Path, extra: list[str]) -> None:
        """Measure it, unless it was."""
        if self.result is not None:
            return
        print(f"{self.stem.name}", flush=True)
        if self.variant not in PEERS:
            found, file = self._job(shared, storage, extra)
        else:
            options = {**self.options(), "data": data_of(self.target, shared), "engine": "local"}
            if self.target.weights is not None:
                options["weights"] = str(shared / "weights" / self.target.weights)
            found, file = records_peers.peer(self.variant, options, self.recipe(), self.ours(), storage)
            found["of"] = self.of()
        self.stem.parent.mkdir(parents=True, exist_ok=True)
        made = self.stem.with_suffix(".made.clq")  # what was there before stays until this one is verified
        made.write_bytes(file)
        top1, images = verified(made, data_of(self.target, shared))
        document = {
            "target": self.target.name, "variant": self.variant, "seed": self.seed, "bytes": len(file), "test_top1_percent": top1,
            "test_error_percent": round(100 - top1, 4), "test_images": images, **found, "commit": commit(), "machine": machine(), "versions": identity.versions(),
        }  # fmt: skip
        partial = self.stem.with_suffix(".part")
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        made.replace(self.stem.with_suffix(".clq"))
        partial.replace(self.stem.with_suffix(".json"))

    def _job(self, shared: Path, storage: Path, extra: list[str]) -> tuple[dict[str, Any], bytes]:
        """The ordinary job; what its manifest says, and its file."""
        name, options = self.stem.name, self.options()
        recipe = self.target.recipe
        if options != {**self.target.options(), "seed": self.seed}:
            storage.mkdir(parents=True, exist_ok=True)
            recipe = storage / f"{name}.yaml"
            recipe.write_text(yaml.safe_dump(options), encoding="utf-8")
        command = [
            sys.executable, str(ROOT / "jobs" / "compress.py"), "--config", str(recipe), "--name", name, "--seed", str(self.seed),
            "--data", data_of(self.target, shared), "--storage", str(storage), *extra,
        ]  # fmt: skip
        if self.target.weights is not None:
            command += ["--weights", str(shared / "weights" / self.target.weights)]
        code = processes.code_of(command)
        store = newest(storage / f"model={name}", options)
        document = manifest.read_manifest(store) if store else None
        # 1 says that the promise was not kept, or that the job failed: then what lies there is from another time
        if store is None or document is None or code != int(not document["promise"]["kept"]):
            raise SystemExit(f"{name}: the job ended with {code}; run again to continue")
        return told(document, store, storage), store.read("model.clq")


def named(target: Target, variant: str, epochs: int | None, between: str) -> str:
    """What a variant is called, in files and in the table."""
    beside = [f"{epochs}-epochs"] if epochs else []
    return between.join([target.name, *beside, *([variant] if variant != "ours" else [])])


def newest(folder: Path, asked: dict[str, Any]) -> Store | None:
    """The run in `folder` that was committed last, of those with the options that were asked for: other recipes may have left theirs there."""
    for path in sorted(folder.glob("run=*/manifest.json"), key=lambda one: -one.stat().st_mtime):
        if agree(manifest.read_manifest(Store(path.parent))["config"], asked):
            return Store(path.parent)
    return None


def agree(config: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Whether a configuration has the options that are asked for, wherever things lay and on however many threads."""
    apart = (*PLACES, "threads_per_worker")
    return all(config.get(name) == value for name, value in asked.items() if name not in apart)


def data_of(target: Target, shared: Path) -> str:
    """The target's data set."""
    return str(shared / "data" / target.data)


def verified(file: Path, data: str) -> tuple[float, int]:
    """Top-1 of a file [%] and the number of images, as `jobs/evaluate.py` says them."""
    command = [sys.executable, str(ROOT / "jobs" / "evaluate.py"), str(file), "--data", data]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"top-1 +([0-9.]+) % on ([0-9,]+) test images", said)
    if found is None:
        raise SystemExit(f"expected a top-1 on test images of {file}, got {said!r}")
    return float(found[1]), int(found[2].replace(",", ""))


def told(document: dict[str, Any], store: Store, storage: Path) -> dict[str, Any]:
    """What a unit keeps of its run: settings, plan, scores, the time of its stages, whoever made them."""
    metrics, promise = document["metrics"], document["promise"]
    layers = tables.from_bytes(store.read("layers.parquet")).to_pylist()
    return {
        "ratio": metrics["ratio"], "kept": promise["kept"], "original_top1_percent": metrics["test"]["original"]["top1_percent"],
        "validation_top1_percent": metrics["validation"]["compressed"]["top1_percent"], "dead_units": metrics["dead_units"],
        "epochs": promise["rounds"][promise["round"] - 1]["epochs"], "rounds": promise["rounds"],
        "plan": [{name: one[name] for name in ("layer", "p", "bits", "nonzeros", "bytes", "coder")} for one in layers],
        "seconds": round(sum(seconds_of(storage, one) for one in document["stages"]), 1), "config": without_places(document["config"]),
        "stages": [{name: one[name] for name in ("stage", "key")} for one in document["stages"]],
    }  # fmt: skip


def without_places(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what says where things lay."""
    return {name: value for name, value in config.items() if name not in PLACES}


def seconds_of(storage: Path, stage: dict[str, Any]) -> float:
    """The time of a stage's epochs or evaluations, also where another attempt made them."""
    folder = storage / "_stages" / f"{stage['stage']}-{stage['key']}"
    curve = folder / "curve.json"
    if curve.exists():
        return float(sum(one["seconds"] for one in json.loads(curve.read_text())["curve"]))
    trials = (json.loads(path.read_text()) for path in folder.glob("group-*.json"))
    return float(sum(one["seconds"] for group in trials for one in group))


def those_of(
    target: Target, variant: str, seeds: Iterable[int], epochs: int | None = None
) -> list[dict[str, Any]]:
    """What was measured of those of the seeds that are there."""
    return [result for seed in seeds if (result := there(target, variant, seed, epochs)) is not None]


def there(target: Target, variant: str, seed: int, epochs: int | None = None) -> dict[str, Any] | None:
    """What was measured of a unit, where `ours` of its seed was too."""
    if variant != "ours" and Unit(target, "ours", seed, epochs).result is None:
        return None
    return Unit(target, variant, seed, epochs).result
