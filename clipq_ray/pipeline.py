"""The stages of one network, top to bottom: baseline, search, fine-tuning, control, packing, verification, statistics, commit.

A stage is a function from inputs to stored outputs, in `_stages/{stage}-{key}`, keyed by a hash of everything that decides it; a job that
is run again continues behind the last finished one. Decisions use training and validation images only; the test set is looked at for
the report. Sizes come from the file, accuracies from the decoded file. Not covered: several networks in one job.
"""

from __future__ import annotations

import datetime
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipq_ray import identity, loading, manifest, models, network, packing, results, search
from clipq_ray.cluster.engine import Engine
from clipq_ray.config import Config
from clipq_ray.data import Data, Split
from clipq_ray.errors import FormatError, RunError
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
_DEADLINE_SHARES = {"baseline": 0.25, "search": 0.4}
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
        key = identity.stage_key(name, self.config, inputs)
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
    source.check_fit()
    run = Run(source, engine, reporter, storage, data, started, notes=list(data.notes))
    reporter.say(f"data: {data.description}")
    state_given, origin = _given(run)
    inputs = identity.of_run(source, data, state_given)
    run_id, committed = identity.run_id(storage, name, inputs, force=config.force)
    target = run_store(storage, name, run_id)
    if committed is not None:
        if problems := manifest.verify(target):
            raise FormatError(
                f"the committed run at {target.uri} is damaged: {problems[0]}; use --force for a new one"
            )
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
    schedule = _schedule(config, config.epochs, config.learning_rate)
    tuned = _train(run, "finetune", schedule, weights, plan, work)
    control = _train(run, "control", schedule, weights, None, work) if wants_control(run.source) else None
    with reporter.stage("pack and verify"):
        packed = packing.pack(run.source, tuned, plan, inventory, data, inputs["weights"])
        run.notes += packed.notes
        scores = _scores(run, packed.file, baseline, control)
    document = results.document(
        name=name, run_id=run_id, run=asdict_run(run), identity=inputs, inventory=inventory, choice=choice,
        packed=packed, scores=scores, curves=_curves(tuned, control, run),
    )  # fmt: skip
    recovery = json.loads(tuned.read(CURVE))["recovery"]
    files = results.files(
        document, packed, inventory, plan, choice, trials, scores, reference_error, recovery
    )
    if target.exists(MANIFEST):  # the same job ran twice at the same time, and the other one was faster
        reporter.say(
            f"run {run_id} was committed by another job meanwhile; this one's result is the same and is dropped"
        )
        return Result(target.uri, manifest.read_manifest(target), True)
    manifest.commit(target, files, document)
    work.remove_tree()
    return Result(target.uri, manifest.read_manifest(target), False)


def asdict_run(run: Run) -> dict[str, Any]:
    """What the manifest says about the run itself."""
    return {
        "created_utc": datetime.datetime.fromtimestamp(run.started, datetime.UTC).isoformat(
            timespec="seconds"
        ),
        "versions": identity.versions(),
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


# -- stages ------------------------------------------------------------------------------------------------------------------
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


def _baseline(
    run: Run, state: dict[str, Tensor] | None, origin: str, work: Store
) -> tuple[Store, dict[str, Evaluation | None]]:
    """Store the original's weights (trained first if there are none) and score them; stop near chance."""
    config = run.config
    if state is None:
        schedule = _schedule(config, config.baseline_epochs, config.baseline_learning_rate)
        store = _train(run, "baseline", schedule, None, None, work)
    else:

        def make(store: Store, progress: Any) -> None:
            write_state(store, WEIGHTS, state)
            store.write(CURVE, json.dumps({"curve": [], "notes": []}).encode())

        store = run.stage("baseline", {"weights": models.weights_sha256(state)}, CURVE, make)
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


def _schedule(config: Config, epochs: int, rate: float) -> Schedule:
    return Schedule(
        epochs, config.batch_size, rate, config.warmup_epochs, config.momentum, config.weight_decay,
        config.label_smoothing,
    )  # fmt: skip


def _search(
    run: Run, weights: Store, model: nn.Module, inventory: network.Inventory
) -> tuple[search.Choice, dict[str, list[search.Trial]]]:
    """Trials of every layer, and the point of every layer that serves the intent."""
    config = run.config
    tradeoffs = (config.tradeoff,) if config.tradeoff is not None else search.LADDER
    settings = search.Settings(config.search_evaluations, config.search_start, tradeoffs, config.seed)
    layers = tuple(layer.name for layer in inventory.layers)
    inputs = {
        "weights": models.weights_sha256(read_state(weights)), "data": identity.of_data(run.data), "settings": asdict(settings),
        "layers": layers, "images": config.search_images, "bytes": inventory.bytes_before,
        "batch": config.evaluation_batch_size, "deadline": config.deadline_hours, "profile": config.profile,
    }  # fmt: skip

    def task_at(store: Store) -> SearchTask:
        return SearchTask(
            run.source, weights.uri, layers, settings, min(config.search_images, len(run.data.train)),
            inventory.bytes_before, store.uri, _share(run, "search"),
        )  # fmt: skip

    def make(store: Store, progress: Any) -> None:
        run.engine.search(task_at(store), progress)
        store.write("done.json", b"{}")

    store = run.stage("search", inputs, "done.json", make)
    trials = read_trials(task_at(store))
    fewest = min(len(points) for points in trials.values())
    if fewest < settings.evaluations:
        run.notes.append(
            f"search: shortened from {settings.evaluations} to {fewest} or more evaluations per layer by --deadline-hours"
        )
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


def _train(
    run: Run, stage: str, schedule: Schedule, initial: Store | None, plan: Plan | None, work: Store
) -> Store:
    """Train with the operator (`plan`) or without, from `initial` weights or from the network's own start."""
    config, architecture = run.config, run.source.architecture()
    inputs = {
        "architecture": architecture.to_json() if architecture else repr(type(run.source.module)),
        "weights": models.weights_sha256(read_state(initial)) if initial else None,
        "data": identity.of_data(run.data), "plan": plan.to_json() if plan else None, "schedule": asdict(schedule),
        "seed": config.seed, "precision": config.precision, "deadline": config.deadline_hours,
    }  # fmt: skip

    def make(store: Store, progress: Any) -> None:
        task = TrainTask(
            run.source, stage, initial.uri if initial else None, plan, schedule, store.uri,
            work.child(stage).uri, _share(run, stage),
        )  # fmt: skip
        run.engine.train(task, progress)

    store = run.stage(stage, inputs, CURVE, make)
    run.notes += json.loads(store.read(CURVE))["notes"]
    return store


def _share(run: Run, stage: str) -> float | None:
    """The time of `time.time()` by which `stage` should end: its share of what is left before the deadline."""
    if run.deadline is None:
        return None
    control_comes = stage == "finetune" and wants_control(run.source)
    share = 0.5 if control_comes else _DEADLINE_SHARES.get(stage, 1.0)
    return time.time() + max(0.0, run.deadline - time.time()) * share


def wants_control(source: Source) -> bool:
    """Whether a dense control is trained: where the given network has seen the validation images, or always."""
    wanted = source.config.control
    seen = source.data().validation_held_out and source.weights_origin() not in ("train", "random")
    return wanted == "always" or (wanted == "auto" and seen)


def _scores(
    run: Run, file: bytes, baseline: Mapping[str, Evaluation | None], control: Store | None
) -> results.Scores:
    """Original, control and decoded file on validation and test images."""
    decoded = loading.from_bytes(file, factory=run.source.network)
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
