"""A run in the making, and the stages that several parts of the pipeline need: training, evaluation.

A stage is a function from inputs to stored outputs, in `_stages/{stage}-{key}`, keyed by a hash of everything that decides it; a job that
is run again continues behind the last finished one. Not covered: the order of the stages (`pipeline`), and rounds (`rounds`).
"""

from __future__ import annotations

import contextlib
import datetime
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from clipq_ray import identity, models, sharing
from clipq_ray.claims import Claim
from clipq_ray.cluster.engine import Engine
from clipq_ray.config import Config
from clipq_ray.data import Data, Split
from clipq_ray.errors import ClipqError, RunError, StageHeldError, StorageError
from clipq_ray.evaluate import Evaluation, evaluate
from clipq_ray.optimizers import Schedule
from clipq_ray.places import Costs
from clipq_ray.plan import Plan
from clipq_ray.progress import Reporter
from clipq_ray.rates import Ramp
from clipq_ray.redaction import redacted, redacted_json
from clipq_ray.source import Source
from clipq_ray.states import read_state
from clipq_ray.storage import USES, Store, stage_store
from clipq_ray.training import Size, TrainTask
from clipq_ray.work import CURVE, prepare_process, read_record

DEADLINE_SHARES = {"baseline": 0.25, "search": 0.4, "control": 0.4, "finetune": 0.7, "levels": 0.5}
"""Of what is left before a deadline when a stage begins; a first fine-tuning leaves something for further rounds."""
_TAIL_SECONDS = 60.0  # kept free before a deadline for packing, verification and commit, at least
_SCORING_SHARE = 1.2  # of the time that the original's images took, which the file is scored on in the end


_MAKING: dict[str, threading.Lock] = {}
"""The stages that were begun in this process, by URI."""


@dataclass
class Run:
    """One run in the making: what the stages know and add; `turn` is held by the run that works in this process, `work` is where
    unfinished things of the run lie, `claim` what makes it this job's, `until` when others of the job should have their time [s since the run began]; `late`: how long the job had gone on by then [s];
    `tail`: what is kept free before a deadline [s]."""

    source: Source
    engine: Engine
    reporter: Reporter
    storage: Store
    turn: threading.Lock
    work: Store | None = None
    claim: Claim | None = None
    until: float = math.inf
    late: float = 0.0
    tail: float = _TAIL_SECONDS
    notes: list[str] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    began: datetime.datetime = field(default_factory=lambda: datetime.datetime.now(datetime.UTC))
    _begun: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """How long the run has gone on; whatever this machine's clock says meanwhile."""
        return time.monotonic() - self._begun

    @property
    def config(self) -> Config:
        """The configuration."""
        return self.source.config

    @property
    def data(self) -> Data:
        """The images; of several networks one set at a time is held."""
        return self.source.data()

    @property
    def seconds_left(self) -> float | None:
        """Until trainings should have ended; None without a deadline."""
        hours = self.config.deadline_hours
        if hours is None:
            return None
        return min(self.until, 3600 * hours - self.tail - self.late) - self.seconds

    def share_time(self, others: int, at_once: int) -> None:
        """Of what is left before the deadline this run takes its share beside `others`, of which with it `at_once` are made at a time."""
        self.until = math.inf
        left = self.seconds_left
        if left is not None:
            self.until = self.seconds + max(0.0, left) * min(1.0, at_once / (1 + others))

    def stage(
        self, name: str, inputs: Mapping[str, Any], finished: str, make: Callable[[Store, Any], float | None]
    ) -> Store:
        """The store of a stage's outputs; `make` runs unless `finished` lies there already, and gives the seconds of its time that it waited. What another job
        makes is waited for; where it diverges there, it does here."""
        key, store = self.stage_store(name, inputs)
        said: set[str] = set()
        with self.alone(store):
            while not store.exists(finished):
                mine = self.take(name, store, said)
                if mine is None:
                    with self.away():
                        time.sleep(sharing.WAIT_SECONDS)
                    continue
                if mine.beside:  # what a deadline cuts short must not take the place of what its maker ends
                    return self.stage(name, self.beside(inputs), finished, make)
                if said and (error := mine.diverged()):
                    mine.give_back()
                    raise error
                with mine:
                    if not store.exists(finished):
                        self._made(name, key, store, make)
                        return store
            self.reused(name, key, store)
        return store

    def take(self, name: str, store: Store, said: set[str]) -> sharing.Mine | None:
        """The stage, if it is this run's to make; None while another job makes it, which is said where `said` does not hold it yet. Behind a deadline nobody waits
        any longer, and it is made `beside` that job's; `StageHeldError` with `--on-claim leave`."""
        if self.claim is None:
            return sharing.Mine()
        found = sharing.take(self.storage, store, self._maker())
        if isinstance(found, sharing.Mine):
            return found
        left = self.seconds_left
        if left is not None and left <= 0:
            return sharing.Mine(beside=True)
        words = f"{name}: is being made by another job ({found}) for a run of its own"
        if self.config.on_claim == "leave":
            raise StageHeldError(f"{words}; run again when it has ended, or with --on-claim wait")
        if words not in said:
            self.reporter.say(f"{words}; waiting for it, --on-claim leave would end here ({store.uri})")
            said.add(words)
        return None

    def beside(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of a stage that this run makes for itself alone."""
        return {**inputs, "beside": self._maker().work}

    def _maker(self) -> sharing.Maker:
        """What this run is called in the stages that it makes."""
        assert self.claim is not None
        assert self.work is not None
        return sharing.Maker.of(self.storage, self.work, self.claim.owner)

    @contextlib.contextmanager
    def alone(self, store: Store) -> Iterator[None]:
        """No other run of this process makes the same stage."""
        lock = _MAKING.setdefault(store.uri, threading.Lock())
        if not lock.acquire(blocking=False):
            with self.away():  # its maker needs this process to come to its end
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _made(self, name: str, key: str, store: Store, make: Callable[[Store, Any], float | None]) -> None:
        started = time.monotonic()
        with self.reporter.stage(name) as progress:
            waited = make(store, progress) or 0.0
        self.record(name, key, time.monotonic() - started - waited, reused=False)

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """While this run waits for other processes, another one may work in this one."""
        torch.cuda.empty_cache()  # a worker may run on the same GPU; nothing where there is none
        self.turn.release()
        try:
            yield
        finally:
            self.turn.acquire()
            prepare_process(self.config.threads_per_worker)

    def stage_store(self, name: str, inputs: Mapping[str, Any]) -> tuple[str, Store]:
        """The key and the store of what stage `name` makes of `inputs`; `HeldError` where another job has taken the run over."""
        if self.claim is not None:
            self.claim.check()
        key = identity.stage_key(name, self.config, inputs)
        if self.work is not None:
            self.work.write(f"{USES}/{name}-{key}", b"")  # `clipq prune` leaves it alone
        return key, stage_store(self.storage, name, key)

    def reused(self, name: str, key: str, store: Store) -> None:
        """Say and record that a stage's outputs were there."""
        sharing.clear(store)
        self.reporter.say(f"{name}: already there, reused ({store.uri})")
        if all((one["stage"], one["key"]) != (name, key) for one in self.stages):  # not made by this very job
            self.record(name, key, 0.0, reused=True)

    def record(self, name: str, key: str, seconds: float, *, reused: bool) -> None:
        """For the manifest: a stage and the time that it took."""
        self.stages.append({"stage": name, "key": key, "seconds": round(seconds, 1), "reused": reused})


def run_document(run: Run) -> dict[str, Any]:
    """What the manifest says about the run itself."""
    return {
        "created_utc": run.began.isoformat(timespec="seconds"),
        "versions": identity.versions(),
        "config": redacted_json(run.config.model_dump(mode="json")),
        "stages": run.stages,
        "notes": redacted_json(run.notes),
        "seconds": round(sum(one["seconds"] for one in run.stages), 1),
        "data": {
            "description": redacted(run.data.description),
            "train_images": len(run.data.train),
            "validation_images": len(run.data.validation),
            "test_images": len(run.data.test) if run.data.test else 0,
            "class_names": list(run.data.class_names),
            "validation_held_out": run.data.validation_held_out,
        },
    }


def splits(run: Run) -> dict[str, Split | None]:
    """The images that judge, by what they are for."""
    return {"validation": run.data.validation, "test": run.data.test}


def scored(run: Run, model: nn.Module, images: Split | None) -> Evaluation | None:
    """What `model` scores on `images`, None where there are none."""
    if images is None:
        return None
    device = run.source.device()
    return evaluate(model.to(device), images, batch_size=run.config.evaluation_batch_size, device=device)


def scored_all(run: Run, model: nn.Module) -> dict[str, Evaluation | None]:
    """What the original or its dense control scores on the images that judge; how long that takes is kept free at the end, when the file is scored on them."""
    started = time.monotonic()
    scores = {split: scored(run, model, images) for split, images in splits(run).items()}
    run.tail = max(run.tail, _SCORING_SHARE * (time.monotonic() - started))
    return scores


def refuse_bad_baseline(run: Run, scores: Mapping[str, Evaluation | None], origin: str) -> None:
    """`RunError` for a network near chance, or far from what the user expects: it is not worth hours. One that was trained here is noted only: a trial may be
    of one epoch."""
    found = scores["validation"]
    assert found is not None
    known = (
        scores["test"] or found
    )  # what the user knows is that of test images; nothing else is decided by them
    percent, expected = 100 * known.top1, run.config.expect_top1_percent
    run.reporter.say(f"baseline: top-1 {percent:.2f} % on {known.n:,} images")
    causes = "likely causes: labels in another order, other --mean/--std than in training, other --input-size, wrong --weights"
    if run.source.own_data is not None:
        causes = "likely causes: labels in another order, images that the loaders prepare otherwise than in training, wrong weights"
    low, high = known.interval()  # of a few images the right network may be further off by chance
    if expected is not None and abs(percent - expected) > 2.0 and not 100 * low <= expected <= 100 * high:
        raise RunError(
            f"expected a top-1 near {expected} % (--expect-top1-percent), got {percent:.2f} %; {causes}"
        )
    chance = 1.0 / max(run.data.classes, 1)
    # of a few images even a good network's interval holds chance
    near = found.interval()[0] <= chance and found.top1 <= (1 + chance) / 2
    if origin == "random" or run.data.classes < 2 or not near:
        return
    got = f"got top-1 {100 * found.top1:.2f} % on {found.n:,} validation images (chance is {100 * chance:.2f} %)"
    if origin != "train":
        raise RunError(f"expected a trained network, {got}; {causes}")
    note = f"expected the training to teach the network something, {got}; raise --baseline-epochs or lower --baseline-learning-rate"
    run.notes.append(note)
    run.reporter.say(f"baseline: {note}")


def schedule_of(config: Config, epochs: int, rate: float) -> Schedule:
    """A schedule of so many epochs up to this rate, the rest from the configuration."""
    return Schedule(
        epochs, config.batch_size, rate, min(config.warmup_epochs, epochs / 2), config.momentum, config.weight_decay,
        config.label_smoothing, config.cutout_pixels,
    )  # fmt: skip


def rung_epochs(config: Config) -> int:
    """Of a round on the way to a size."""
    return config.rung_epochs or math.ceil(config.epochs / 2)


def control_epochs(config: Config) -> int:
    """Of a dense control: those of the first round that is to keep the promise, and of all on the way to it."""
    return config.epochs + (config.rungs - 1) * rung_epochs(config)


def trained(
    run: Run,
    stage: str,
    schedule: Schedule,
    initial: Store | None,
    plan: Plan | None,
    work: Store,
    number: int = 1,
    ramp: Ramp | None = None,
    time_share: float = 1.0,
    size: Size | None = None,
    costs: Costs | None = None,
    free_codes: bool | None = None,
) -> Store:
    """Train with the operator (`plan`, `ramp`) or without, from `initial` weights or from the network's own start; the `number`-th of its kind.
    `time_share`: of the time that such a training may take before a deadline. `size`: what the file is held at; `costs`: what places are charged for; `free_codes`: what the weights have clipped stays clipped,
    and levels are trained, with the codes or without."""
    config = run.config
    inputs = {
        "architecture": identity.of_network(run.source),
        "weights": models.weights_sha256(read_state(initial)) if initial else identity.of_start(run.source),
        "data": identity.of_data(run.data), "plan": plan.to_json() if plan else None, "schedule": asdict(schedule),
        "seed": config.seed, "precision": config.precision, "deadline": config.deadline_hours,
        **({"ramp": asdict(ramp)} if ramp else {}),
        **({"bytes": size.bytes, "file": [config.profile, config.vectors, config.dead_units, config.unit_order, config.keep, str(size.precision), list(run.data.class_names)]} if size else {}),
        **({"costs": asdict(costs)} if costs else {}),
        **({"free_codes": free_codes} if free_codes is not None else {}),
        **({"shift_pixels": config.shift_pixels} if config.shift_pixels is not None else {}),
        **({"number": number} if number > 1 else {}),
        **({"frozen": run.source.frozen} if run.source.frozen else {}),
    }  # fmt: skip

    name = stage if number == 1 else f"{stage}-{number}"
    if free_codes is False:  # behind a round there may be one of free codes, too
        name += "-fixed"

    def make(store: Store, progress: Any) -> float:
        # checkpoints lie below the key too: of another plan's none is gone on from
        task = TrainTask(
            run.source, stage, initial.uri if initial else None, plan, schedule, store.uri,
            work.child(name, store.uri.rpartition("-")[2]).uri, deadline_of(run, stage, time_share), ramp, size,
            free_codes, costs, DEADLINE_SHARES[stage] * time_share, number,
        )  # fmt: skip
        with run.away():
            return run.engine.train(task, progress)

    store = run.stage(stage, inputs, CURVE, make)
    notes = read_record(store, CURVE)["notes"]
    run.notes += [note for note in notes if note not in run.notes]
    return store


def deadline_of(run: Run, stage: str, share: float = 1.0) -> float | None:
    """The time, by the clock of the storage [s since 1970], by which `stage` should end: its share of what is left before the deadline, or a part `share`
    of that where more of its kind are to come. That clock is the one that all nodes have, and that an attempt after a lost worker has too."""
    left = run.seconds_left
    return None if left is None else run.storage.now() + max(0.0, left) * DEADLINE_SHARES[stage] * share


@contextlib.contextmanager
def going_on(run: Run) -> Iterator[None]:
    """A store that fails when the run has begun is no mistake of the input: the run ends, and says what is kept."""
    try:
        yield
    except StorageError as error:
        raise stopped(run, error) from error


def stopped(run: Run, error: ClipqError) -> ClipqError:
    """The error that ends `run`; of a failed store with where the work is kept."""
    if not isinstance(error, StorageError):
        return error
    return RunError(
        f"{error}; what is finished is kept in {run.storage.uri}: the same command again goes on behind it"
    )
