"""The search as a stage: of the given weights for all networks of a job at once, so that one engine call packs their layers onto what there is; and again of a
network's weights between two rounds of fine-tuning.

Every network's trials lie in a store of its own, keyed by what decides them; a network that fails leaves the others alone. Not covered: what
one evaluation is (`search`), and where it runs (`cluster`).
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from clipq_ray import identity, models, search, sharing, stages
from clipq_ray.aim import Aim
from clipq_ray.cluster.engine import Done, Engine
from clipq_ray.data import Split
from clipq_ray.errors import ClipqError, HeldError, StorageError
from clipq_ray.groups import Group, work
from clipq_ray.network import Inventory
from clipq_ray.operator import bake
from clipq_ray.plan import Plan
from clipq_ray.progress import Reporter
from clipq_ray.stages import Run
from clipq_ray.states import put_state, read_state
from clipq_ray.storage import Store
from clipq_ray.work import SearchTask, fewest_of_late, read_record, read_trials, search_images

DONE = "done.json"
_Over = Callable[["Search", bool, ClipqError | None], None]
"""Told a search that has ended, whether it was made here, and the error that ended it, if one did."""


@dataclass(frozen=True)
class Searched:
    """What a search has measured: its trials, of which weights, how the other layers were compressed meanwhile (None: not), and the top-1 error of the
    network so on the same images."""

    trials: Mapping[str, list[search.Trial]]
    weights: Store
    plan: Plan | None
    error: float

    def add(self, trials: Mapping[str, Sequence[search.Trial]]) -> None:
        """Further points of the same groups, weights and images; those that are there already are left out."""
        for name, there in self.trials.items():
            known = {trial.theta for trial in there}
            new = (trial for trial in trials[name] if trial.theta not in known)
            there += [replace(trial, step=step) for step, trial in enumerate(new, len(there))]


@dataclass(eq=False)
class Search:
    """The search of one network: where its trials go, and what makes them; both change where another job makes it too (`beside`)."""

    run: Run
    key: str
    task: SearchTask

    @property
    def store(self) -> Store:
        """Where the trials go."""
        return Store(self.task.output)

    @property
    def finished(self) -> bool:
        """Whether all trials are there."""
        return self.store.exists(DONE) and not self.task.open_groups()

    def keep_deadline(self) -> None:
        """End by the run's deadline as it is now."""
        self.task = replace(self.task, deadline=stages.deadline_of(self.run, "search"))

    def move(self, key: str, store: Store) -> None:
        """Go to another place."""
        self.key, self.task = key, replace(self.task, output=store.uri)

    def trials(self) -> dict[str, list[search.Trial]]:
        """All groups' trials by name, in the order of the network; a note where the deadline cut them short."""
        found = read_trials(self.task)
        fewest = read_record(self.store, DONE)["late"]
        if fewest is True:  # what was recorded before says no more
            fewest = min(len(points) for points in found.values())
        if fewest:
            self.run.notes.append(
                f"search: shortened from {self.task.settings.evaluations} to {fewest} or more evaluations per layer or group by --deadline-hours"
            )
        return found


def planned(
    run: Run, model: nn.Module, weights: Store, inventory: Inventory, groups: Sequence[Group], images: Tensor,
    aim: Aim, plan: Plan | None = None, time_share: float = 1.0,
) -> Search:  # fmt: skip
    """What is to be searched; `images`: float32 (n, c, h, w), a few for the order of the groups; `aim`: where to look; `plan`: of the other layers; `time_share`: of the time that
    a search may take before a deadline."""
    config = run.config
    lambdas = (config.tradeoff,) if config.search_early_stop and config.tradeoff else aim.tradeoffs
    settings = search.Settings(
        config.search_evaluations, min(config.search_start, config.search_evaluations), lambdas, config.seed,
        config.search_stop_gain, config.search_loss_share, config.search_early_stop, plan is not None,
        aim.start,
    )  # fmt: skip
    inputs = {
        "architecture": identity.of_network(run.source),
        "weights": models.weights_sha256(read_state(weights)), "data": [run.data.train.fingerprint, run.data.preprocessing.to_json()], "settings": asdict(settings),
        "groups": [asdict(group) for group in groups], "images": images_of(run), "bytes": inventory.bytes_before,
        "batch": config.evaluation_batch_size, "deadline": config.deadline_hours, "profile": config.profile, "vectors": config.vectors,
        **({"plan": plan.to_json()} if plan else {}),
    }  # fmt: skip
    costs = work(model, groups, images)
    key, store = run.stage_store("search", inputs)
    task = SearchTask(
        run.source, weights.uri, tuple(groups), settings, images_of(run),
        inventory.bytes_before, store.uri, stages.deadline_of(run, "search", time_share), tuple(costs[group.name] for group in groups), plan,
        stages.DEADLINE_SHARES["search"] * time_share,
    )  # fmt: skip
    return Search(run, key, task)


def search_again(
    run: Run,
    weights: Store,
    plan: Plan,
    inventory: Inventory,
    groups: Sequence[Group],
    ratio: float,
    time_share: float,
) -> Searched:
    """Search a network that was fine-tuned by `plan` to full-precision `weights`, each group beside the others as `plan` has them, for a file `ratio` times
    smaller than the original.

    What is asked of a dense network in one shot says nothing about rates near 1; of one that is sparse already it does. And the full-precision
    weights of fine-tuning are no network of their own: what was trained are the quantized ones."""
    model = run.source.network()
    put_state(model, read_state(weights))
    one = planned(run, model, weights, inventory, groups, sample(run), Aim.again(ratio), plan, time_share)
    trials = _made(one)
    bake(model, plan)
    return Searched(trials, weights, plan, original_error(run, model))


def search_once_more(
    run: Run, searched: Searched, inventory: Inventory, groups: Sequence[Group], ratio: float
) -> None:
    """Search the same weights where a file `ratio` times smaller is decided, and add the points to those that `searched` has: which size a promised drop allows is
    not known before."""
    model = run.source.network()
    put_state(model, read_state(searched.weights))
    one = planned(run, model, searched.weights, inventory, groups, sample(run), Aim.at(ratio), time_share=0.5)
    searched.add(_made(one))


def _made(one: Search) -> dict[str, list[search.Trial]]:
    """The trials of a search that is made between two rounds, or was."""
    run, ended = one.run, list[ClipqError]()

    def done(number: int, error: ClipqError | None) -> None:
        ended.extend([error] if error is not None else [])

    with run.alone(one.store), run.away():
        search_all([one], run.engine, run.reporter, done)
    if ended:
        raise ended[0]
    return one.trials()


def search_all(
    searches: Sequence[Search],
    engine: Engine,
    reporter: Reporter,
    done: Done,
) -> None:
    """Make what is not there yet, all in one call of the engine, but for what other jobs make, which is waited for; `done` is told the number of each search as soon as its trials are there, or with the
    error that ended it."""
    numbers: dict[str, list[int]] = {}
    for number, one in enumerate(searches):  # networks that differ behind the search share it
        numbers.setdefault(one.task.output, []).append(number)
    waiting = [searches[found[0]] for found in numbers.values()]
    held: dict[str, sharing.Mine] = {}

    def over(one: Search, made: bool, error: ClipqError | None) -> None:
        if mine := held.pop(one.task.output, None):
            mine.give_back() if error else mine.finish()
        for number in numbers[one.task.output]:
            if error is None and not (made and number == numbers[one.task.output][0]):
                searches[number].run.reused("search", one.key, one.store)
            done(number, error)

    def over_own(one: Search, made: bool, error: ClipqError | None) -> None:
        over(one, made, error)
        with contextlib.suppress(StorageError):  # looked for once more in the end
            for other in [other for other in waiting if other.finished]:
                waiting[:] = [left for left in waiting if left is not other]
                over(other, False, None)

    def move(one: Search) -> None:
        """Away from what another job makes, with the searches of this job that share its trials: what a deadline cuts short must not take the place of what that one ends."""
        before, inputs = one.task.output, one.run.beside({"search": one.key})
        places = {number: searches[number].run.stage_store("search", inputs) for number in numbers[before]}
        for number, (key, store) in places.items():
            searches[number].move(key, store)
        numbers[one.task.output] = numbers.pop(before)

    began, said = time.monotonic(), set[str]()
    try:
        while waiting:
            waiting[:], own = _taken(_missing(waiting, over), held, said, over, move)
            late = time.monotonic() - began
            own = [replace(one, task=one.task.after(late)) for one in _missing(own, over)]
            if own:
                _make(own, engine, reporter, over_own)
            elif waiting:
                time.sleep(sharing.WAIT_SECONDS)
    finally:
        while held:
            held.popitem()[1].give_back()


def _taken(
    missing: Sequence[Search], held: dict[str, sharing.Mine], said: set[str], over: _Over, move: Callable[[Search], None],
) -> tuple[list[Search], list[Search]]:  # fmt: skip
    """Those of `missing` that other jobs make, and those that are this job's, which `held` holds then; `over` is told of those that are not to be waited for, `move`
    of those that it makes beside another job."""
    waiting, own = [], []
    for one in missing:
        try:
            mine = one.run.take("search", one.store, said)
            if mine is not None and mine.beside:
                move(one)
        except HeldError as left:
            over(one, False, left)
            continue
        if mine is None:
            waiting.append(one)
        else:
            held[one.task.output] = mine
            own.append(one)
    return waiting, own


def _missing(searches: Sequence[Search], over: _Over) -> list[Search]:
    """Those of `searches` that are not there yet; `over` is told of the others."""
    missing = []
    for one in searches:
        if one.finished:
            over(one, False, None)
        else:
            missing.append(one)
    return missing


def _make(missing: Sequence[Search], engine: Engine, reporter: Reporter, over: _Over) -> None:
    """Search `missing`, in one call of the engine."""
    started = time.monotonic()

    def ended(number: int, error: ClipqError | None) -> None:
        one = missing[number]
        if error is None:
            own = (time.monotonic() - started) if len(missing) == 1 else None
            error = _recorded(one, own)
        over(one, True, error if error is None else stages.stopped(one.run, error))

    if missing:
        with reporter.stage("search") as progress:
            engine.search([one.task for one in missing], progress, ended)


def _recorded(one: Search, seconds: float | None) -> ClipqError | None:
    """Store that a search is finished, and record its time: `seconds`, or that of its evaluations; the error of the storage, if there was one."""
    try:
        one.store.write(DONE, json.dumps({"late": fewest_of_late(one.task)}).encode())
        if seconds is None:
            seconds = sum(trial.seconds for points in read_trials(one.task).values() for trial in points)
    except ClipqError as failed:
        return failed
    one.run.record("search", one.key, seconds, reused=False)
    return None


def scoring_images(run: Run) -> Split:
    """The training images that score the search."""
    return search_images(run.data.train, images_of(run), run.config.seed)


def images_of(run: Run) -> int:
    """How many images score the search: `--search-images`, where there are so many."""
    return min(run.config.search_images, len(run.data.train))


def original_error(run: Run, model: nn.Module) -> float:
    """Top-1 error of the network before a search on the images that score the search."""
    found = stages.scored(run, model, scoring_images(run))
    assert found is not None
    return 1.0 - found.top1


def sample(run: Run) -> Tensor:
    """The first training images, two where there are so many, float32 (2, c, h, w): networks that squeeze fail on one."""
    return run.data.train.batch(torch.arange(min(2, len(run.data.train))), None)[0]
