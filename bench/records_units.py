"""Units of `make bench-records`: one (target, variant, seed) each, what it is asked for, made by and keeps.

A unit counts as not there if its configuration is not the one that the recipe makes by now, if it is for the size of another `ours` than the one that is there,
or if it is damaged or its file is not the one that its JSON was written for.

Variants: `ours` (the recipe), `paper` (with --paper), `two-stage` and `uniform` (`records_peers`: pruned first and quantized then, and one (p, b) for all
layers). All are made in as many epochs as `ours` of their seed, so it comes first. The last two are for the size of its file, and `two-stage` takes its plan; `paper` is asked
for the target's size, as the recipe is. `without-LEVER`: the recipe with one option as --paper has it, in as many epochs as the recipe takes without levels of fixed codes.

`epochs` (`--epochs N`) gives all variants, `ours` too, a last round of N epochs: what takes a GPU in full is so compared on a CPU. Such units stand beside the row, and in no record.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench import processes, records_peers
from bench.record import RESULTS, ROOT, commit, machine
from clipq_ray import identity, manifest, packing, tables
from clipq_ray.config import Config, make
from clipq_ray.consistency import NEEDS, PAPER
from clipq_ray.errors import ConfigError, RunError, StorageError
from clipq_ray.stages import rung_epochs
from clipq_ray.storage import Store

UNITS = RESULTS / "records-units"
PEERS = ("two-stage", "uniform")
VARIANTS = ("ours", "paper", *PEERS)
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
    lever = lever_of(variant)
    config = make(**options)
    epochs = options["epochs"]
    idle = [name for name, (other, _) in NEEDS.items() if other == lever]
    found = {**{name: value for name, value in options.items() if name not in idle}, lever: PAPER[lever]}
    if lever == "level_epochs":
        epochs += options.get(lever, 0)
    if lever == "rungs":  # what is searched anew is searched for a rung
        epochs += (config.rungs - 1) * rung_epochs(config)
        found["search_again"] = False
    return {**found, "epochs": epochs}


def lever_of(variant: str) -> str:
    """The option that `without-LEVER` names."""
    return variant.removeprefix("without-").replace("-", "_")


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
    def json_path(self) -> Path:
        """What was measured."""
        return self.stem.with_suffix(".json")

    @property
    def clq_path(self) -> Path:
        """What was made."""
        return self.stem.with_suffix(".clq")

    @property
    def result(self) -> dict[str, Any] | None:
        """What was measured with the settings of now, if it was; without `ours` of its seed nothing was."""
        found = stored(self.json_path, self.clq_path)
        if found is None or (self.variant != "ours" and self.ours_result is None):
            return None
        given = {"data": self.target.data, "weights": self.target.weights, "of": self.of()}
        try:
            fits = agree(found["config"], self.options())
        except ConfigError:  # a lever that the recipe has no more, or a recipe that is none
            return None
        return found if fits and given == {name: found.get(name) for name in given} else None

    @property
    def ours_result(self) -> dict[str, Any] | None:
        """What was measured of `ours` of this seed."""
        return Unit(self.target, "ours", self.seed, self.epochs).result

    def besides_weights(self) -> int:
        """Bytes of its file that are not a layer's weights."""
        layers = {one["layer"] for one in json.loads(self.json_path.read_text(encoding="utf-8"))["plan"]}
        return packing.other_bytes_of(self.clq_path.read_bytes(), layers)

    def options(self) -> dict[str, Any]:
        """Its settings by now; `ConfigError` where they follow from what `ours` was made in, and it was not."""
        options = {**self.recipe(), "seed": self.seed}
        if self.variant == "ours":
            return options
        if self.variant in WITHOUT:
            lever = lever_of(self.variant)
            if getattr(make(**options), lever) == PAPER[lever]:
                raise ConfigError(
                    f"{self.stem.name}: expected a recipe with --{lever.replace('_', '-')}, got one without; it is 'ours'"
                )
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
        found = self.ours_result
        if found is None:
            raise ConfigError(
                f"{self.stem.name}: expected the unit 'ours' of this seed before it, got none; make it first (--variants ours)"
            )
        return found

    def of(self) -> str | None:
        """The hash of the file whose size and plan a peer takes, so that another one makes it anew."""
        if self.variant not in PEERS:
            return None
        return sha256(Unit(self.target, "ours", self.seed, self.epochs).clq_path.read_bytes())

    def make(self, shared: Path, storage: Path, extra: list[str]) -> None:
        """Measure it, unless it was."""
        if self.result is not None:
            return
        self.options()  # or why there are none
        print(f"{self.stem.name}", flush=True)
        with alone(storage / f"{self._works_in}.lock"):
            if self.variant not in PEERS:
                found, file = self._job(shared, storage, extra)
            else:
                options = {**self.options(), "data": data_of(self.target, shared), "engine": "local"}
                if self.target.weights is not None:
                    options["weights"] = str(shared / "weights" / self.target.weights)
                ours, of = self.ours(), self.of()
                found, file = records_peers.peer(self.variant, options, self.recipe(), ours, storage)
                found["of"] = of
            self._store(found, file, data_of(self.target, shared))

    @property
    def _works_in(self) -> str:
        """What is made in one place of a storage: a job has its own, all peers of a seed share one."""
        return f"{self.target.name}-peers-seed{self.seed}" if self.variant in PEERS else self.stem.name

    def _store(self, found: dict[str, Any], file: bytes, data: str) -> None:
        """Keep what was made, once it is verified: what was there before stays until then."""
        self.stem.parent.mkdir(parents=True, exist_ok=True)
        made, said = (self.stem.with_suffix(f".{os.getpid()}.{end}") for end in ("clq", "part"))
        try:
            made.write_bytes(file)
            top1, images = verified(made, data)
            document = {
                "target": self.target.name, "variant": self.variant, "seed": self.seed, "bytes": len(file), "sha256": sha256(file), "test_top1_percent": top1,
                "test_error_percent": round(100 - top1, 4), "test_images": images, "of": None, **found, "data": self.target.data, "weights": self.target.weights,
                "commit": commit(), "machine": machine(), "versions": found.get("versions", identity.versions()),
            }  # fmt: skip
            said.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            made.replace(self.clq_path)  # a JSON of another file counts as none, so it may come behind
            said.replace(self.json_path)
        finally:
            for left in (made, said):
                left.unlink(missing_ok=True)

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
        runs: list[str] = []
        code = processes.code_of(command, lambda line: runs.extend(re.findall(r"^run: (.+)$", line)))
        if code == ConfigError.exit_code:
            raise ConfigError(f"{name}: the job refused its input, as it says above")
        if not runs:  # 1 says that the promise was not kept, or that the job failed: then it names no run
            raise RunError(f"{name}: the job ended with {code}; run again to continue")
        store = Store(runs[-1])
        return told(manifest.read_manifest(store), store, storage), store.read("model.clq")


def named(target: Target, variant: str, epochs: int | None, between: str) -> str:
    """What a variant is called, in files and in the table."""
    beside = [f"{epochs}-epochs"] if epochs else []
    return between.join([target.name, *beside, *([variant] if variant != "ours" else [])])


def agree(config: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Whether a configuration is the one that `asked` makes by now, in all options that decide a result but threads; one that it does not know had its default."""
    now = make(**asked).model_dump(mode="json")
    idle = {name for name, (lever, off) in NEEDS.items() if now[lever] == off}
    counted = {"interpolation", "validation_data"}  # by the content that they lead to, elsewhere
    apart = {*identity.DECIDES_NOTHING, "threads_per_worker", *idle} - counted
    defaults = Config.model_construct().model_dump(mode="json")
    return all(config.get(name, defaults[name]) == value for name, value in now.items() if name not in apart)


def sha256(file: bytes) -> str:
    """Of a file's bytes, in hexadecimal digits."""
    return hashlib.sha256(file).hexdigest()


_SAID: set[Path] = set()
_NEEDED = ("seed", "bytes", "test_error_percent", "validation_top1_percent", "epochs", "seconds", "plan", "commit", "machine")  # fmt: skip


def stored(path: Path, file: Path) -> dict[str, Any] | None:
    """What the JSON of a unit says; None without one, and where it is damaged or was not written for the `file` beside it, which is said once."""
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        whole = isinstance(found["config"], dict) and all(name in found for name in _NEEDED)
        if whole and found["sha256"] == sha256(file.read_bytes()):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if path not in _SAID:
        _SAID.add(path)
        print(f"{path}: damaged, or not of the .clq beside it; it counts as not there", file=sys.stderr)
    return None


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Holds a unit while it is made; `RunError` where another process does."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = lock.open("w")
    except OSError as error:
        raise StorageError(
            f"expected a folder to write to, got {lock.parent} ({error.strerror}); give --storage another"
        ) from error
    with held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(
                f"{lock.stem}: expected to make it alone, another process does; wait for that one"
            ) from error
        yield


def data_of(target: Target, shared: Path) -> str:
    """The target's data set."""
    return str(shared / "data" / target.data)


def verified(file: Path, data: str) -> tuple[float, int]:
    """Top-1 of a file [%] and the number of images, as `jobs/evaluate.py` says them."""
    command = [sys.executable, str(ROOT / "jobs" / "evaluate.py"), str(file), "--data", data]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"top-1 +([0-9.]+) % on ([0-9,]+) test images", said.stdout)
    if found is None:
        raise RunError(
            f"{file.name}: expected its top-1 on test images, got {(said.stderr or said.stdout).strip()!r}"
        )
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
        "seconds": round(sum(seconds_of(storage, one) for one in document["stages"]), 1),
        "config": records_peers.without_places(document["config"]), "versions": document["versions"],
        "stages": [{name: one[name] for name in ("stage", "key")} for one in document["stages"]],
    }  # fmt: skip


def seconds_of(storage: Path, stage: dict[str, Any]) -> float:
    """The time of a stage's epochs or evaluations, also where another attempt made them."""
    folder = storage / "_stages" / f"{stage['stage']}-{stage['key']}"
    curve = folder / "curve.json"
    if curve.exists():
        return float(sum(one["seconds"] for one in json.loads(curve.read_text())["curve"]))
    trials = (json.loads(path.read_text()) for path in folder.glob("group-*.json"))
    return float(sum(one["seconds"] for group in trials for one in group))


def those_of(target: Target, variant: str, epochs: int | None = None) -> list[dict[str, Any]]:
    """What was measured of the units that are there, by seed."""
    name = named(target, variant, epochs, "-")
    seeds = (re.fullmatch(rf"{re.escape(name)}-seed(\d+)", path.stem) for path in UNITS.glob("*.json"))
    units = [Unit(target, variant, seed, epochs) for seed in sorted(int(one[1]) for one in seeds if one)]
    return [result for unit in units if (result := unit.result) is not None]
