"""The stages of one network, top to bottom: baseline, search, fine-tuning, control, packing, verification, statistics, commit.

A stage is a function from inputs to stored outputs, in `_stages/{stage}-{key}`, keyed by a hash of everything that decides it; a job that
is run again continues behind the last finished one. Decisions use training and validation images only; the test set is looked at for
the report. Sizes come from the file, accuracies from the decoded file. Not covered: several networks in one job.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipq_ray import codec, loading, manifest, models, network, packing, results, search
from clipq_ray.cluster.engine import Engine
from clipq_ray.config import Config
from clipq_ray.data import Data, Split
from clipq_ray.errors import RunError, StorageError
from clipq_ray.evaluate import Evaluation, evaluate
from clipq_ray.finetune import Schedule
from clipq_ray.operator import make_plan
from clipq_ray.plan import Plan
from clipq_ray.progress import Reporter
from clipq_ray.storage import MANIFEST, WORK, Store, run_store, stage_store
from clipq_ray.work import (
    CURVE,
    WEIGHTS,
    SearchTask,
    Source,
    TrainTask,
    prepare_process,
    read_state,
    read_trials,
    search_images,
    write_state,
)

log = logging.getLogger(__name__)
STAGE_VERSIONS = {"baseline": 1, "search": 1, "finetune": 1, "control": 1}
"""Raised when a change of the code changes what a stage makes of the same inputs."""
_TAIL_SECONDS = 60.0  # kept free before a deadline for packing, verification and commit


@dataclass(frozen=True)
class Result:
    """What a run gave: its URI, the manifest, and whether it was committed before."""

    uri: str
    manifest: dict[str, Any]
    reused: bool


@dataclass
class Run:
    """One run in the making: what the stages know and add."""

    source: Source
    engine: Engine
    reporter: Reporter
    storage: Store
    data: Data
    started: float
    notes: list[str] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def config(self) -> Config:
        """The configuration."""
        return self.source.config

    @property
    def deadline(self) -> float | None:
        """The time of `time.time()` by which trainings should have ended."""
        hours = self.config.deadline_hours
        return None if hours is None else self.started + 3600 * hours - _TAIL_SECONDS

    def stage(
        self, name: str, inputs: Mapping[str, Any], finished: str, make: Callable[[Store, Any], None]
    ) -> Store:
        """The store of a stage's outputs; `make` runs unless `finished` lies there already."""
        key = _key({"stage": name, "version": STAGE_VERSIONS[name], **_platform(self.config), **inputs})
        store = stage_store(self.storage, name, key)
        started, reused = time.monotonic(), store.exists(finished)
        if reused:
            self.reporter.say(f"{name}: already there, reused ({store.uri})")
        else:
            with self.reporter.stage(name) as progress:
                make(store, progress)
        seconds = round(time.monotonic() - started, 1)
        self.stages.append({"stage": name, "key": key, "seconds": seconds, "reused": reused})
        return store


def _key(inputs: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _platform(config: Config) -> dict[str, Any]:
    """What besides inputs decides bytes: versions, threads, world size."""
    return {
        "torch": torch.__version__,
        "threads": config.threads_per_worker,
        "workers": config.workers,
        "device": config.device,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    wanted = (
        "clipq_ray",
        "torch",
        "torchvision",
        "numpy",
        "constriction",
        "bayesian-optimization",
        "ray",
        "pyarrow",
    )
    found = {}
    for name in wanted:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def compress(source: Source, engine: Engine, reporter: Reporter) -> Result:
    """Compress one network and commit the run; a run that is committed already is returned as it is.

    `engine` must be entered. Raises the errors of `errors`; whatever was finished before stays in the storage for the next attempt.
    """
    config = source.config
    storage = Store(config.storage)
    storage.check_writable()
    prepare_process(config.threads_per_worker)
    started = time.time()
    name = config.name or config.model.replace(":", ".")
    reporter.say(f"data: opening {config.data}")
    data = source.data()
    run = Run(source, engine, reporter, storage, data, started, notes=list(data.notes))
    reporter.say(f"data: {data.description}")
    state_given, origin = _given(run)
    identity = _identity(run, state_given)
    run_id, committed = _run_id(storage, name, identity, force=config.force)
    target = run_store(storage, name, run_id)
    if committed is not None:
        reporter.say(f"run {run_id} is committed already at {target.uri}; --force makes a new one")
        return Result(target.uri, committed, True)
    work = target.child(WORK)
    weights, baseline = _baseline(run, state_given, origin, work)
    model = source.network()
    model.load_state_dict(read_state(weights))
    sample = data.train.batch(torch.arange(min(2, len(data.train))), None)[0]
    inventory = network.inventory(model, sample.to(source.device()), config.keep)
    run.notes += [note for note in inventory.notes if note not in run.notes]
    choice, trials = _search(run, weights, model, inventory)
    reference_error = _search_reference(run, model)
    plan = make_plan(model.cpu(), {layer: trial.theta for layer, trial in choice.trials.items()})
    tuned = _train(run, "finetune", weights, plan, work)
    control = _control(run, weights, work)
    with reporter.stage("pack and verify"):
        packed = packing.pack(run.source, tuned, plan, inventory, data, identity["weights"])
        run.notes += packed.notes
        scores = _scores(run, packed.file, baseline, control)
    document = results.document(
        name=name, run_id=run_id, run=asdict_run(run), identity=identity, inventory=inventory, choice=choice,
        packed=packed, scores=scores, curves=_curves(tuned, control, run),
    )  # fmt: skip
    files = results.files(document, packed, inventory, plan, choice, trials, scores, reference_error)
    manifest.commit(target, files, document)
    work.remove_tree()
    return Result(target.uri, manifest.read_manifest(target), False)


def asdict_run(run: Run) -> dict[str, Any]:
    """What the manifest says about the run itself."""
    return {
        "created_utc": datetime.datetime.fromtimestamp(run.started, datetime.UTC).isoformat(
            timespec="seconds"
        ),
        "versions": versions(),
        "config": run.config.model_dump(mode="json"),
        "stages": run.stages,
        "notes": run.notes,
        "seconds": round(time.time() - run.started, 1),
        "data": {
            "description": run.data.description,
            "train_images": len(run.data.train),
            "validation_images": len(run.data.validation),
            "test_images": len(run.data.test) if run.data.test else 0,
            "class_names": list(run.data.class_names),
            "validation_held_out": run.data.validation_held_out,
        },
    }


# -- identity ----------------------------------------------------------------------------------------------------------------
def _given(run: Run) -> tuple[dict[str, Tensor] | None, str]:
    """The state dict that the user gave (None: trained first) and where it is from."""
    origin = run.source.weights_origin()
    if origin == "train":
        return None, origin
    model = run.source.network()
    if origin not in ("random", "module"):
        state = models.read_weights(origin, run.source.architecture())
        run.notes += models.apply_weights(model, state, origin)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}, origin


def _identity(run: Run, state: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """What decides the run: weights, data, configuration without where and how fast."""
    config, source = run.config, run.source
    architecture = source.architecture()
    free = {"storage", "name", "force", "dry_run", "engine", "search_parallel", "max_failures", "data", "data_root", "weights",
            "validation_data", "memory_limit_gib", "expect_top1_percent"}  # fmt: skip
    return {
        "architecture": architecture.to_json()
        if architecture
        else {"name": None, "module": repr(type(source.module))},
        "weights": models.weights_sha256(state) if state is not None else "trained",
        "data": [
            run.data.train.fingerprint,
            run.data.validation.fingerprint,
            run.data.preprocessing.to_json(),
        ],
        "test": run.data.test.fingerprint if run.data.test else None,
        "config": {key: value for key, value in config.model_dump(mode="json").items() if key not in free},
        **_platform(config),
        "versions": STAGE_VERSIONS,
    }


def _run_id(
    storage: Store, name: str, identity: Mapping[str, Any], *, force: bool
) -> tuple[str, dict[str, Any] | None]:
    """The run's id, and its manifest if it is committed; with `force` the first id that is not."""
    base = "r-" + hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:12]
    for attempt in range(1, 10_000):
        run_id = base if attempt == 1 else f"{base}-{attempt}"
        store = run_store(storage, name, run_id)
        if not store.exists(MANIFEST):
            return run_id, None
        if not force:
            return run_id, manifest.read_manifest(store)
    raise StorageError(
        f"expected fewer than 10,000 forced runs of {base} in {storage.uri}; use another --storage"
    )


# -- stages ------------------------------------------------------------------------------------------------------------------
def _baseline(
    run: Run, state: dict[str, Tensor] | None, origin: str, work: Store
) -> tuple[Store, dict[str, Evaluation | None]]:
    """Store the original's weights (trained first if there are none) and score them; stop near chance."""
    config = run.config
    architecture = run.source.architecture()
    inputs: dict[str, Any] = {
        "architecture": architecture.to_json() if architecture else repr(type(run.source.module))
    }
    if state is not None:
        inputs["weights"] = models.weights_sha256(state)

        def make(store: Store, progress: Any) -> None:
            write_state(store, WEIGHTS, state)
            store.write(CURVE, json.dumps({"curve": [], "notes": []}).encode())
    else:
        schedule = _schedule(config, epochs=config.baseline_epochs, rate=config.baseline_learning_rate)
        inputs |= {
            "schedule": asdict(schedule),
            "data": _data_key(run),
            "seed": config.seed,
            "precision": config.precision,
            "deadline": config.deadline_hours,
        }

        def make(store: Store, progress: Any) -> None:
            task = TrainTask(
                run.source,
                "baseline",
                None,
                None,
                schedule,
                store.uri,
                work.child("baseline").uri,
                run.deadline,
            )
            run.engine.train(task, progress)

    store = run.stage("baseline", inputs, CURVE, make)
    run.notes += json.loads(store.read(CURVE))["notes"]
    model = run.source.network()
    model.load_state_dict(read_state(store))
    scores = {split: _evaluate(run, model, images) for split, images in _splits(run).items()}
    _refuse_bad_baseline(run, scores, origin)
    return store, scores


def _splits(run: Run) -> dict[str, Split | None]:
    return {"validation": run.data.validation, "test": run.data.test}


def _evaluate(run: Run, model: nn.Module, images: Split | None) -> Evaluation | None:
    if images is None:
        return None
    device = run.source.device()
    return evaluate(model.to(device), images, batch_size=run.config.evaluation_batch_size, device=device)


def _refuse_bad_baseline(run: Run, scores: Mapping[str, Evaluation | None], origin: str) -> None:
    """A network near chance, or far from what the user expects, is not worth hours."""
    found = scores["test"] or scores["validation"]
    assert found is not None
    percent, expected = 100 * found.top1, run.config.expect_top1_percent
    run.reporter.say(f"baseline: top-1 {percent:.2f} % on {found.n:,} images")
    causes = "likely causes: labels in another order, other --mean/--std than in training, other --input-size, wrong --weights"
    if expected is not None and abs(percent - expected) > 2.0:
        raise RunError(
            f"expected a top-1 near {expected} % (--expect-top1-percent), got {percent:.2f} %; {causes}"
        )
    chance = 1.0 / max(run.data.classes, 1)
    if origin not in ("random", "train") and run.data.classes > 1 and found.interval()[0] <= chance:
        raise RunError(
            f"expected a trained network, got top-1 {percent:.2f} % on {found.n:,} images (chance is {100 * chance:.2f} %); {causes}"
        )


def _data_key(run: Run) -> list[Any]:
    return [run.data.train.fingerprint, run.data.validation.fingerprint, run.data.preprocessing.to_json()]


def _schedule(config: Config, *, epochs: int, rate: float) -> Schedule:
    return Schedule(
        epochs=epochs,
        batch_size=config.batch_size,
        learning_rate=rate,
        warmup_epochs=config.warmup_epochs,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        label_smoothing=config.label_smoothing,
    )


def _search(
    run: Run, weights: Store, model: nn.Module, inventory: network.Inventory
) -> tuple[search.Choice, dict[str, list[search.Trial]]]:
    """Trials of every layer, and the point of every layer that serves the intent."""
    config = run.config
    tradeoffs = (config.tradeoff,) if config.tradeoff is not None else search.LADDER
    settings = search.Settings(config.search_evaluations, config.search_start, tradeoffs, config.seed)
    layers = tuple(layer.name for layer in inventory.layers)
    inputs = {
        "weights": models.weights_sha256(read_state(weights)), "data": _data_key(run), "settings": asdict(settings),
        "layers": layers, "images": config.search_images, "bytes": inventory.bytes_before,
        "batch": config.evaluation_batch_size,
    }  # fmt: skip

    def task_at(store: Store) -> SearchTask:
        return SearchTask(
            run.source, weights.uri, layers, settings, min(config.search_images, len(run.data.train)),
            inventory.bytes_before, store.uri,
        )  # fmt: skip

    def make(store: Store, progress: Any) -> None:
        run.engine.search(task_at(store), progress)
        store.write("done.json", b"{}")

    store = run.stage("search", inputs, "done.json", make)
    trials = read_trials(task_at(store))
    if config.tradeoff is not None:
        choice = search.choose(trials, config.tradeoff)
    else:
        choice = _choice_for_ratio(run, trials, model, inventory)
    predicted = choice.bytes + packing.other_bytes(run.source, model, inventory, run.data)
    run.reporter.say(
        f"search: lambda {choice.tradeoff:.4g}, predicted {predicted:,} bytes ({inventory.bytes_before / predicted:.1f}x)"
    )
    return choice, trials


def _search_reference(run: Run, model: nn.Module) -> float:
    """Top-1 error of the original on the images that scored the search."""
    images = search_images(
        run.data.train, min(run.config.search_images, len(run.data.train)), run.config.seed
    )
    found = _evaluate(run, model, images)
    assert found is not None
    return 1.0 - found.top1


def _choice_for_ratio(
    run: Run, trials: Mapping[str, list[search.Trial]], model: nn.Module, inventory: network.Inventory
) -> search.Choice:
    ratio = run.config.ratio_wanted
    assert ratio is not None
    budget = int(inventory.bytes_before / ratio) - packing.other_bytes(run.source, model, inventory, run.data)
    choice = search.choose_for_bytes(trials, budget)
    if choice.bytes > budget:
        note = f"--target-ratio {ratio} is beyond the measured points; the smallest of them were taken"
        run.notes.append(note)
        run.reporter.say(note)
    return choice


def _train(run: Run, stage: str, weights: Store, plan: Plan | None, work: Store) -> Store:
    """Fine-tune with the operator (`plan`) or without (the control)."""
    config = run.config
    schedule = _schedule(config, epochs=config.epochs, rate=config.learning_rate)
    inputs = {
        "weights": models.weights_sha256(read_state(weights)),
        "data": _data_key(run),
        "plan": plan.to_json() if plan else None,
        "schedule": asdict(schedule),
        "seed": config.seed,
        "precision": config.precision,
        "deadline": config.deadline_hours,
    }

    def make(store: Store, progress: Any) -> None:
        task = TrainTask(
            run.source,
            stage,
            weights.uri,
            plan,
            schedule,
            store.uri,
            work.child(stage).uri,
            _share(run, stage),
        )
        run.engine.train(task, progress)

    store = run.stage(stage, inputs, CURVE, make)
    run.notes += json.loads(store.read(CURVE))["notes"]
    return store


def _share(run: Run, stage: str) -> float | None:
    """The deadline of one training: fine-tuning leaves half of what is left to a control that is still to come."""
    if run.deadline is None or stage == "control" or not wants_control(run.source):
        return run.deadline
    return time.time() + (run.deadline - time.time()) / 2


def wants_control(source: Source) -> bool:
    """Whether a dense control is trained: where the given network has seen the validation images, or always."""
    wanted = source.config.control
    seen = source.data().validation_held_out and source.weights_origin() not in ("train", "random")
    return wanted == "always" or (wanted == "auto" and seen)


def _control(run: Run, weights: Store, work: Store) -> Store | None:
    return _train(run, "control", weights, None, work) if wants_control(run.source) else None


def _scores(
    run: Run, file: bytes, baseline: Mapping[str, Evaluation | None], control: Store | None
) -> results.Scores:
    """Original, control and decoded file on validation and test images."""
    decoded = loading.from_packed(codec.decode(file), factory=run.source.network)
    compressed = {split: _evaluate(run, decoded, images) for split, images in _splits(run).items()}
    dense: dict[str, Evaluation | None] = {"validation": None, "test": None}
    if control is not None:
        model = run.source.network()
        model.load_state_dict(read_state(control))
        dense = {split: _evaluate(run, model, images) for split, images in _splits(run).items()}
    labels = {
        split: np.asarray(images.labels) for split, images in _splits(run).items() if images is not None
    }
    return results.Scores(dict(baseline), dense, compressed, labels)


def _curves(tuned: Store, control: Store | None, run: Run) -> dict[str, Any]:
    def rows(store: Store | None) -> list[dict[str, Any]]:
        return json.loads(store.read(CURVE))["curve"] if store else []

    return {"finetune": rows(tuned), "control": rows(control)}
