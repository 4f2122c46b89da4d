"""The stages of a network, top to bottom: baseline, search, dense control, rounds of fine-tuning and packing, verification, commit.

Decisions use training and validation images only; the test set is looked at for the report. Sizes come from the file, accuracies from the
decoded file. A job that is run again continues behind the last finished stage (`stages`). Not covered: several networks (`batch`).
"""

from __future__ import annotations

import contextlib
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from clipq_ray import (
    claims,
    identity,
    loading,
    manifest,
    models,
    network,
    original,
    packing,
    results,
    rounds,
    stages,
    together,
)
from clipq_ray.aim import Aim
from clipq_ray.cluster.engine import Engine
from clipq_ray.consistency import idle
from clipq_ray.errors import FormatError, HeldError, RunError, StorageError
from clipq_ray.evaluate import Evaluation
from clipq_ray.groups import Group, grouped
from clipq_ray.making import Given, Round
from clipq_ray.operator import make_plan
from clipq_ray.progress import Reporter
from clipq_ray.searching import Search, Searched, original_error, planned, sample, scoring_images
from clipq_ray.source import Source
from clipq_ray.stages import Run, scored
from clipq_ray.states import put_state, read_state
from clipq_ray.storage import MANIFEST, WORK, Store, run_store
from clipq_ray.work import CURVE, prepare_process, read_record

_WAIT_SECONDS = 5.0  # between two looks at a run that another job makes


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


@dataclass(frozen=True)
class Own:
    """A run that is this job's to make; `wait`: whether it may wait for another job that takes the run over."""

    run_id: str
    target: Store
    claim: claims.Claim
    wait: bool


@dataclass(frozen=True)
class Taken:
    """A run that another job makes by now: to be asked for again."""


@dataclass(frozen=True)
class Prepared:
    """One network that is ready to be searched."""

    run: Run
    own: Own
    inputs: Mapping[str, Any]
    weights: Store
    baseline: Mapping[str, Evaluation | None]
    inventory: network.Inventory
    groups: tuple[Group, ...]
    search: Search

    @property
    def work(self) -> Store:
        """Where unfinished trainings keep their checkpoints."""
        return self.own.target.child(WORK)


def prepare(
    source: Source,
    engine: Engine,
    reporter: Reporter,
    turn: threading.Lock,
    held: list[claims.Claim],
    wait: bool = True,
    begin: Callable[[Run], None] = lambda run: None,
) -> Prepared | Result | Taken:
    """Everything before the search; the result of a run that is committed already. The claim on the run goes into `held`, and is the caller's to
    give back unless this fails. `wait`: for another job that makes the run; who holds claims of its own must not, since that job may wait for one of them. `begin` says
    what time the run has."""
    config = source.config
    storage = Store(config.storage)
    storage.check_writable()
    engine.reaches(storage)
    engine.check(config)
    source.device()  # refused before anything is written
    prepare_process(config.threads_per_worker)
    run = Run(source, engine, reporter, storage, turn)
    begin(run)
    run.notes += idle(config, source.weights_origin())
    for note in run.notes:
        reporter.say(f"options: {note}")
    if source.own_data is None:
        reporter.say(f"data: opening {config.data}")
    data = source.data()
    notes_on_data = [*data.notes, *source.check_fit()]
    run.notes += notes_on_data
    for words in (data.description, *notes_on_data):
        reporter.say(f"data: {words}")
    state_given, origin = original.given(source, run.notes)
    inputs = identity.of_run(source, data, state_given)
    notes = tuple(run.notes)
    with stages.going_on(run):
        while isinstance(own := _claimed(run, inputs, wait), Own):
            held.append(own.claim)
            try:
                return _ready(run, own, inputs, state_given, origin)
            except Exception as error:
                if not isinstance(error, HeldError) or config.on_claim == "leave":
                    held.remove(
                        own.claim
                    )  # others need not wait for the networks that this job makes beside it
                    own.claim.give_back()
                    raise
                reporter.say(str(error))  # asked for anew, like any run that another job makes
                run.notes[:] = notes
    return own


def _claimed(run: Run, inputs: Mapping[str, Any], wait: bool) -> Own | Result | Taken:
    """The run that is to be made, or its result where it is committed already; waits for another job that makes it, or leaves it that."""
    name, said = run.source.name, ""
    while True:
        run_id, committed = identity.run_id(run.storage, name, inputs, force=run.config.force)
        target = run_store(run.storage, name, run_id)
        if committed is not None:
            if problems := manifest.damage(target):
                raise FormatError(f"the committed run is damaged, and left as it is: {problems[0]}")
            if claims.holder(target.child(WORK)) is None:  # of a job that was killed right behind its commit
                target.child(WORK).remove_tree()
            again = "" if said else "; --force makes a new one"
            run.reporter.say(f"run {run_id} is committed already at {target.uri}{again}")
            return Result(target.uri, committed, True)
        found = claims.claim(target.child(WORK))
        if isinstance(found, claims.Claim):
            if target.exists(MANIFEST):  # committed since it was looked for
                found.give_back()
                continue
            run.work, run.claim = target.child(WORK), found
            return Own(run_id, target, found, wait)
        words = f"run {run_id} is being made by another job ({found.words})"
        if run.config.on_claim == "leave":
            raise HeldError(f"{words}; run again when it has ended, or with --on-claim wait")
        if not wait:
            run.reporter.say(
                f"{words}; the other networks of this job come first, --on-claim leave would not wait for it"
            )
            return Taken()
        if words != said:
            run.reporter.say(f"{words}; waiting for it, --on-claim leave would end here")
        said = words
        with run.away():
            time.sleep(_WAIT_SECONDS)


def _ready(
    run: Run, own: Own, inputs: Mapping[str, Any], state_given: dict[str, Tensor] | None, origin: str
) -> Prepared:
    """Everything of this job's own run before the search."""
    source, config = run.source, run.config
    model = source.network()
    images = sample(run)
    inventory = network.inventory(model, images, config.keep)
    groups = grouped(model, [layer.name for layer in inventory.layers], config.groups)
    if config.groups and len(groups) == len(inventory.layers):
        run.notes.append(f"--groups {','.join(config.groups)}: no layers share one (p, b)")
    weights, baseline = original.baseline(run, state_given, origin, own.target.child(WORK))
    put_state(model, read_state(weights))
    run.notes += [note for note in inventory.notes if note not in run.notes]
    for note in packing.size_notes(source, model, inventory, run.data):
        run.notes.append(note)
        run.reporter.say(f"options: {note}")
    aim = Aim.of(config, inventory.bytes_before, source.smaller)
    search = planned(run, model, weights, inventory, groups, images, aim)
    return Prepared(run, own, inputs, weights, baseline, inventory, groups, search)


@dataclass(frozen=True)
class Opened:
    """One network between the search and its rounds."""

    prepared: Prepared
    control: Store | None
    dense: Mapping[str, Evaluation | None]
    given: Given

    @property
    def reference(self) -> Store:
        """The weights that the file is measured against: the dense control's, or the original's where none was made."""
        return self.control or self.prepared.weights


def finish(given: Prepared) -> Result:
    """Everything behind the search. Of a run that another job has taken over meanwhile that one's result, where this job may wait for it; else a `HeldError`."""
    notes = tuple(given.run.notes)
    with stages.going_on(given.run):
        try:
            return _finished(given)
        except HeldError as lost:
            if not given.own.wait or given.run.config.on_claim == "leave":
                raise
            given.run.reporter.say(str(lost))
            given.run.notes[:] = notes
            return _taken_over(given)


def _finished(given: Prepared) -> Result:
    opened = open_rounds(given)
    return close_rounds(opened, rounds.run_rounds(given.run, opened.given))


def _taken_over(given: Prepared) -> Result:
    """What another job makes of a run that it has taken over, or this one behind it where that one ends without a result."""
    found = _claimed(given.run, given.inputs, wait=True)
    if isinstance(found, Result):
        return found
    assert isinstance(found, Own)
    try:
        return _finished(replace(given, own=found))
    finally:
        found.claim.give_back()


def open_rounds(given: Prepared) -> Opened:
    """What the rounds start from; a dense control is trained here."""
    run, weights = given.run, given.weights
    prepare_process(run.config.threads_per_worker)
    trials = given.search.trials()
    model = run.source.network()
    put_state(model, read_state(weights))
    searched = Searched(trials, weights, None, original_error(run, model))
    control = original.control(run, weights, given.work) if run.source.wants_control() else None
    dense = original.dense(run, control)
    reference = dense["validation"] or given.baseline["validation"]
    assert reference is not None
    sha256 = models.weights_sha256(read_state(weights))
    return Opened(
        given, control, dense,
        Given(searched, given.groups, weights, given.inventory, reference, sha256, given.work),
    )  # fmt: skip


def close_rounds(opened: Opened, made: rounds.Rounds) -> Result:
    """Verify and commit what the rounds have made."""
    given = opened.prepared
    run, target = given.run, given.own.target
    if not made.kept:
        run.notes.append(f"the promise ({made.words}) is not kept: this is the round that came closest")
    files, document = _files(opened, made)
    if target.exists(MANIFEST):  # the same job ran twice at the same time, and the other one was faster
        return _of_another(given)
    given.own.claim.check()
    try:
        manifest.commit(target, files, document)
    except StorageError as error:
        if _is_there(target):
            return _of_another(given)
        raise _uncommitted(given, files, error) from error
    given.own.claim.finish()
    run.engine.committed(run.source.name, given.inventory.bytes_before, made.best.outcome.bytes)
    return Result(target.uri, manifest.read_manifest(target), False)


def _of_another(given: Prepared) -> Result:
    target = given.own.target
    given.own.claim.finish()
    given.run.reporter.say(
        f"run {given.own.run_id} was committed by another job meanwhile; this one's result is the same and is dropped"
    )
    return Result(target.uri, manifest.read_manifest(target), True)


def _is_there(target: Store) -> bool:
    try:
        return target.exists(MANIFEST)
    except StorageError:
        return False


def _uncommitted(given: Prepared, files: Mapping[str, bytes], error: StorageError) -> RunError:
    """The error of a run that its store does not take; its files are kept on this machine where the store is elsewhere, which may be gone."""
    kept = f"its stages are kept in {given.run.storage.uri}"
    if given.run.storage.local is None:
        place = Store(tempfile.gettempdir()).child("clipq-uncommitted", *given.own.target.uri.split("/")[-2:])
        with contextlib.suppress(StorageError):
            for name, data in files.items():
                place.write(name, data)
            kept += f", its files in {place.uri} on {platform.node()}"
    return RunError(
        f"the run cannot be committed: {error}; {kept}: the same command again commits it, and makes only the last step anew"
    )


def _files(opened: Opened, made: rounds.Rounds) -> tuple[dict[str, bytes], dict[str, Any]]:
    """All files of the run, and the manifest without their list; the test images are looked at here."""
    given, control = opened.prepared, opened.control
    run, best = given.run, made.best
    with run.reporter.stage("verify"):
        scores = _scores(run, best, given.baseline, opened.dense)
    document = results.document(
        name=run.source.name, run_id=given.own.run_id, run=stages.run_document(run), identity=given.inputs, source_sha256=opened.given.source_sha256, inventory=given.inventory,
        choice=best.choice, packed=best.packed, scores=scores, curves=_curves(best, control),
        promise=made.document("control" if control else "original"),
        together=_together(given, best),
    )  # fmt: skip
    recovery = read_record(best.tuned, CURVE)["recovery"]
    files = results.files(
        document, best.packed, given.inventory, best.plan, best.choice, given.groups, made.searches, best.searched, scores, recovery
    )  # fmt: skip
    return files, document


def _scores(
    run: Run,
    best: Round,
    baseline: Mapping[str, Evaluation | None],
    dense: Mapping[str, Evaluation | None],
) -> results.Scores:
    """Original, control and decoded file on validation and test images."""
    decoded = loading.from_bytes(best.packed.file, factory=run.source.network)
    compressed = {"validation": best.packed.validation, "test": scored(run, decoded, run.data.test)}
    return results.Scores(dict(baseline), dict(dense), compressed)


def _together(given: Prepared, best: Round) -> dict[str, Any]:
    """The front of the whole network, and how far the groups' errors add up, from the weights that were searched."""
    model, config, searched = given.run.source.network(), given.run.config, best.searched
    put_state(model, read_state(searched.weights))
    plan = make_plan(model, best.choice.thetas(given.groups))
    found = together.interaction(
        model, plan, best.choice, scoring_images(given.run), searched.error, batch_size=config.evaluation_batch_size,
        device=given.run.source.device(),
    )  # fmt: skip
    return together.document(together.front(searched.trials, searched.error), found)


def _curves(best: Round, control: Store | None) -> dict[str, Any]:
    def rows(store: Store | None) -> list[dict[str, Any]]:
        return read_record(store, CURVE)["curve"] if store else []

    return {"finetune": rows(best.tuned), "levels": rows(best.fitted), "control": rows(control)}
