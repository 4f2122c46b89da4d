"""The stages of one network, top to bottom: baseline, search, dense control, rounds of fine-tuning and packing, verification, commit.

Decisions use training and validation images only; the test set is looked at for the report. Sizes come from the file, accuracies from the
decoded file. A job that is run again continues behind the last finished stage (`stages`). Not covered: several networks in one job.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipq_ray import identity, loading, manifest, models, network, results, rounds, search, stages, together
from clipq_ray.cluster.engine import Engine
from clipq_ray.data import Split
from clipq_ray.errors import FormatError, RunError
from clipq_ray.evaluate import Evaluation
from clipq_ray.operator import make_plan
from clipq_ray.progress import Reporter
from clipq_ray.stages import Run, scored, splits
from clipq_ray.storage import MANIFEST, WORK, Store, run_store
from clipq_ray.work import (
    CURVE,
    WEIGHTS,
    SearchTask,
    Source,
    prepare_process,
    read_state,
    read_trials,
    search_images,
    write_state,
)


@dataclass(frozen=True)
class Result:
    """What a run gave: its URI, the manifest, and whether it was committed before."""

    uri: str
    manifest: dict[str, Any]
    reused: bool

    @property
    def kept(self) -> bool:
        """Whether the file keeps the promise that the intent makes."""
        return bool(self.manifest.get("promise", {}).get("kept", True))


def compress(source: Source, engine: Engine, reporter: Reporter) -> Result:
    """Compress one network and commit the run; a run that is committed already is returned as it is.

    `engine` must be entered. Raises the errors of `errors`; whatever was finished before stays in the storage for the next attempt. A
    promise that no round keeps is no error: the closest round is committed, and the manifest says so.
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
    trials = _search(run, weights, inventory)
    reference_error = _search_reference(run, model)
    control = _control(run, weights, work) if stages.wants_control(source) else None
    dense = _dense(run, control)
    reference = dense["validation"] or baseline["validation"]
    assert reference is not None
    sha256 = models.weights_sha256(read_state(weights))
    made = rounds.run_rounds(
        run, rounds.Given(trials, weights, inventory, reference_error, reference, sha256, work)
    )
    if not made.kept:
        run.notes.append(
            f"the promise ({made.intent.words()}) is not kept: this is the round that came closest"
        )
    files, document = _files(
        run, name, run_id, inputs, made, trials, weights, control, baseline, dense, reference_error
    )
    if target.exists(MANIFEST):  # the same job ran twice at the same time, and the other one was faster
        reporter.say(
            f"run {run_id} was committed by another job meanwhile; this one's result is the same and is dropped"
        )
        return Result(target.uri, manifest.read_manifest(target), True)
    manifest.commit(target, files, document)
    work.remove_tree()
    return Result(target.uri, manifest.read_manifest(target), False)


def _files(
    run: Run, name: str, run_id: str, inputs: Mapping[str, Any], made: rounds.Rounds,
    trials: Mapping[str, list[search.Trial]], weights: Store, control: Store | None,
    baseline: Mapping[str, Evaluation | None], dense: Mapping[str, Evaluation | None], reference_error: float,
) -> tuple[dict[str, bytes], dict[str, Any]]:  # fmt: skip
    """All files of the run, and the manifest without their list; the test images are looked at here."""
    best, inventory = made.best, made.inventory
    with run.reporter.stage("verify"):
        scores = _scores(run, best, baseline, dense)
    document = results.document(
        name=name, run_id=run_id, run=stages.run_document(run), identity=inputs, inventory=inventory, choice=best.choice,
        packed=best.packed, scores=scores, curves=_curves(best.tuned, control),
        promise=made.document("control" if control else "original"),
        together=_together(run, best, trials, weights, reference_error),
    )  # fmt: skip
    recovery = json.loads(best.tuned.read(CURVE))["recovery"]
    files = results.files(
        document, best.packed, inventory, best.plan, best.choice, trials, scores, reference_error, recovery
    )
    return files, document


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
        schedule = stages.schedule_of(config, config.baseline_epochs, config.baseline_learning_rate)
        store = stages.trained(run, "baseline", schedule, None, None, work)
    else:

        def make(store: Store, progress: Any) -> None:
            write_state(store, WEIGHTS, state)
            store.write(CURVE, json.dumps({"curve": [], "notes": []}).encode())

        store = run.stage("baseline", {"weights": models.weights_sha256(state)}, CURVE, make)
    model = run.source.network()
    model.load_state_dict(read_state(store))
    scores = {split: scored(run, model, images) for split, images in splits(run).items()}
    _refuse_bad_baseline(run, scores, origin)
    return store, scores


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


def _search(run: Run, weights: Store, inventory: network.Inventory) -> dict[str, list[search.Trial]]:
    """Measured points of every layer."""
    config = run.config
    tradeoffs = (config.tradeoff,) if config.tradeoff is not None else search.LADDER
    settings = search.Settings(
        config.search_evaluations, min(config.search_start, config.search_evaluations), tradeoffs, config.seed,
        config.search_stop_gain, config.search_loss_share,
    )  # fmt: skip
    layers = tuple(layer.name for layer in inventory.layers)
    inputs = {
        "weights": models.weights_sha256(read_state(weights)), "data": identity.of_data(run.data), "settings": asdict(settings),
        "layers": layers, "images": config.search_images, "bytes": inventory.bytes_before,
        "batch": config.evaluation_batch_size, "deadline": config.deadline_hours, "profile": config.profile, "vectors": config.vectors,
    }  # fmt: skip

    def task_at(store: Store) -> SearchTask:
        return SearchTask(
            run.source, weights.uri, layers, settings, min(config.search_images, len(run.data.train)),
            inventory.bytes_before, store.uri, stages.deadline_of(run, "search"),
        )  # fmt: skip

    def make(store: Store, progress: Any) -> None:
        task = task_at(store)
        run.engine.search(task, progress)
        late = task.deadline is not None and time.time() > task.deadline
        store.write("done.json", json.dumps({"late": late}).encode())

    store = run.stage("search", inputs, "done.json", make)
    trials = read_trials(task_at(store))
    fewest = min(len(points) for points in trials.values())
    if json.loads(store.read("done.json"))["late"]:
        run.notes.append(
            f"search: shortened from {settings.evaluations} to {fewest} or more evaluations per layer by --deadline-hours"
        )
    return trials


def _search_split(run: Run) -> Split:
    count = min(run.config.search_images, len(run.data.train))
    return search_images(run.data.train, count, run.config.seed)


def _search_reference(run: Run, model: nn.Module) -> float:
    """Top-1 error of the original on the images that scored the search."""
    found = scored(run, model, _search_split(run))
    assert found is not None
    return 1.0 - found.top1


def _control(run: Run, weights: Store, work: Store) -> Store:
    """The dense control: the same schedule as the first round, without the operator."""
    schedule = stages.schedule_of(run.config, run.config.epochs, run.config.learning_rate)
    return stages.trained(run, "control", schedule, weights, None, work)


def _dense(run: Run, control: Store | None) -> dict[str, Evaluation | None]:
    if control is None:
        return {"validation": None, "test": None}
    model = run.source.network()
    model.load_state_dict(read_state(control))
    return {split: scored(run, model, images) for split, images in splits(run).items()}


def _scores(
    run: Run,
    best: rounds.Round,
    baseline: Mapping[str, Evaluation | None],
    dense: Mapping[str, Evaluation | None],
) -> results.Scores:
    """Original, control and decoded file on validation and test images."""
    decoded = loading.from_bytes(best.packed.file, factory=run.source.network)
    compressed = {"validation": best.packed.validation, "test": scored(run, decoded, run.data.test)}
    labels = {split: np.asarray(images.labels) for split, images in splits(run).items() if images is not None}
    return results.Scores(dict(baseline), dict(dense), compressed, labels)


def _together(
    run: Run, best: rounds.Round, trials: Mapping[str, list[search.Trial]], weights: Store, error: float
) -> dict[str, Any]:
    """The front of the whole network, and how far the layers' errors add up, from the original's weights."""
    model = run.source.network()
    model.load_state_dict(read_state(weights))
    plan = make_plan(model, {layer: trial.theta for layer, trial in best.choice.trials.items()})
    found = together.interaction(
        model, plan, best.choice, _search_split(run), error, batch_size=run.config.evaluation_batch_size,
        device=run.source.device(),
    )  # fmt: skip
    return together.document(together.front(trials, error), found)


def _curves(tuned: Store, control: Store | None) -> dict[str, Any]:
    def rows(store: Store | None) -> list[dict[str, Any]]:
        return json.loads(store.read(CURVE))["curve"] if store else []

    return {"finetune": rows(tuned), "control": rows(control)}
