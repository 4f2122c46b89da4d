"""Many networks in one job: all are prepared and searched together, each is finished as soon as it is searched; one that fails stops no other.

Not covered: the stages of one network (`pipeline`), and what a fleet says about its networks (`fleet`).
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from clipq_ray import logs
from clipq_ray.claims import Claim
from clipq_ray.cluster.engine import Done, Engine
from clipq_ray.errors import ClipqError, HeldError, RunError, StageHeldError
from clipq_ray.fleet.file import Ensemble
from clipq_ray.fleet.shares import Joining, as_members, finish_ensemble, without
from clipq_ray.pipeline import Prepared, Result, Taken, finish, prepare
from clipq_ray.progress import Reporter
from clipq_ray.searching import search_all
from clipq_ray.source import Source
from clipq_ray.stages import Run, stopped

log = logs.logger(__name__)


def compress(source: Source, engine: Engine, reporter: Reporter) -> Result:
    """Compress one network and commit the run; a run that is committed already is returned as it is.

    `engine` must be entered. Raises the errors of `errors`; whatever was finished before stays in the storage for the next attempt. A
    promise that no round keeps is no error: the closest round is committed, and the manifest says so.
    """
    (result,) = compress_all([source], engine, reporter)
    if isinstance(result, ClipqError):
        raise result
    return result


def compress_all(
    sources: Sequence[Source], engine: Engine, reporter: Reporter, ensembles: Sequence[Ensemble] = ()
) -> list[Result | ClipqError]:
    """Compress several networks, of different names: all are prepared and then searched together, and each is finished as soon as it is searched;
    members of one of `ensembles` with an intent as soon as all of them are.

    As `compress`; one that fails leaves its error in its place and does not stop the others. Only searches and trainings overlap: what this process
    does itself, it does for one network at a time, since its seeds and threads are one.
    """
    own = [reporter.about(source.name) if len(sources) > 1 else reporter for source in sources]
    job = _Job(sources, own, engine, [one for one in ensembles if one.wants])
    try:
        job.identify()
        job.prepare()
        aside = job.set_aside()
        job.drop_incomplete()
        job.make(reporter)
        while aside := aside + job.set_aside():  # those that other jobs have taken over meanwhile as well
            job.give_back()  # nothing is held here that the other job could wait for
            job.ask_again(aside.pop(0))
            job.drop_incomplete()
            job.make(reporter)
        return job.found
    finally:
        job.give_back()


class _Job:
    """The networks of a job on their way; `found` holds for each what it is by now."""

    def __init__(
        self,
        sources: Sequence[Source],
        reporters: Sequence[Reporter],
        engine: Engine,
        ensembles: Sequence[Ensemble],
    ) -> None:
        self._sources, self._reporters, self._engine = list(sources), reporters, engine
        self._turn = threading.Lock()
        self._begun = time.monotonic()
        self._alone = len(sources) == 1
        wanted = sources[0].config.trainings or engine.trainings([source.config for source in sources])
        self._at_once = engine.at_once = min(wanted, len(sources)) if engine.parallel else 1
        place = {source.name: number for number, source in enumerate(sources)}
        self._ensembles = {tuple(place[name] for name in one.members): one for one in ensembles}
        self.held: list[Claim] = []
        self.found: list[Any] = [None] * len(sources)

    def identify(self) -> None:
        """Of members of an ensemble with one intent all the others count too."""
        for numbers, ensemble in self._ensembles.items():
            joining: list[Joining] = []

            def step(source: Source, joining: list[Joining] = joining) -> None:
                joining.append(Joining.of(source))

            for number in numbers:
                self._in_turn(functools.partial(step, self._sources[number]), [number])
            self.drop_incomplete()
            if len(joining) == len(numbers):
                for number, member in zip(numbers, as_members(ensemble, joining), strict=True):
                    self._sources[number] = member

    def prepare(self) -> None:
        """Everything before the search, of what no other job makes."""
        numbers = [number for number, one in enumerate(self.found) if one is None]
        if self._at_once == 1:
            for number in numbers:
                self._prepare(number, wait=self._alone)
            return
        with self._threads() as pool:
            _wait([pool.submit(self._prepare, number, wait=False) for number in numbers])

    def _prepare(self, number: int, wait: bool) -> None:
        def made() -> dict[int, Any]:
            source, reporter = self._sources[number], self._reporters[number]
            others = sum(one is None for one in self.found) - 1

            def begin(run: Run) -> None:
                run.late = time.monotonic() - self._begun
                run.share_time(others, self._at_once)

            return {number: prepare(source, self._engine, reporter, self._turn, self.held, wait, begin)}

        self._in_turn(made, [number])

    def set_aside(self) -> list[tuple[int, ...]]:
        """The networks that another job makes by now, with the others of an ensemble that is made as one, whose claims are given back."""
        taken = [number for number, one in enumerate(self.found) if isinstance(one, Taken)]
        aside = dict.fromkeys(
            next((one for one in self._ensembles if number in one), (number,)) for number in taken
        )
        for number in (number for numbers in aside for number in numbers):
            one = self.found[number]
            if isinstance(one, Prepared):
                self.held.remove(one.own.claim)
                one.own.claim.give_back()
            if isinstance(one, Prepared | Taken):
                self.found[number] = None
        return list(aside)

    def ask_again(self, numbers: Sequence[int]) -> None:
        """Everything before the search of networks that were set aside; members of an ensemble by name, so that no two jobs wait for each other."""
        for number in sorted(numbers, key=lambda number: self._sources[number].name):
            if self.found[number] is None:
                self._prepare(number, wait=True)

    def give_back(self) -> None:
        """All claims: what was to be made under them is committed, or failed."""
        while self.held:
            self.held.pop().give_back()

    def make(self, reporter: Reporter) -> None:
        """Search and finish what is prepared."""
        waiting = self.waiting()
        if self._engine.parallel:
            self.search_and_finish(waiting, reporter)
            return
        for numbers in waiting:
            self.search_and_finish([numbers], self._reporters[numbers[0]])

    def drop_incomplete(self) -> None:
        """Give up members of an ensemble with one intent of which another one failed."""
        for numbers, ensemble in self._ensembles.items():
            failed = {
                self._sources[number].name: self.found[number]
                for number in numbers
                if isinstance(self.found[number], ClipqError)
            }
            for number in numbers if failed else ():
                if not isinstance(self.found[number], ClipqError | Result):
                    self._end(number, without(ensemble, failed))

    def waiting(self) -> list[tuple[int, ...]]:
        """The networks that are to be searched, in what is finished together: each by itself, or all members of an ensemble with one intent."""
        open_numbers = [number for number, one in enumerate(self.found) if isinstance(one, Prepared)]
        found: dict[tuple[int, ...], None] = {}
        for number in open_numbers:
            whole = next((one for one in self._ensembles if number in one), (number,))
            found.setdefault(tuple(one for one in whole if one in open_numbers))
        return list(found)

    def search_and_finish(self, units: Sequence[tuple[int, ...]], reporter: Reporter) -> None:
        """The search of these, and everything behind it; of those that are searched, the most urgent one is finished next."""
        numbers = [number for unit in units for number in unit]
        unit_of = {number: unit for unit in units for number in unit}
        left = {unit: set(unit) for unit in units}
        urgent: queue.PriorityQueue[tuple[int, tuple[int, ...]]] = queue.PriorityQueue()
        ended: list[Future[None]] = []

        def finish_next() -> None:
            unit = urgent.get()[1]
            self._share_time(unit)
            self._in_turn(lambda: self._finished(unit), unit)

        def searched(place: int, error: ClipqError | None) -> None:
            number = numbers[place]
            unit = unit_of[number]
            left[unit].discard(number)
            if error is not None:
                self._end(number, error)
            if left[unit]:
                return
            self.drop_incomplete()
            if any(isinstance(self.found[one], ClipqError) for one in unit):
                return
            urgent.put((-max(self._sources[one].priority for one in unit), unit))
            if pool is not None:
                ended.append(pool.submit(finish_next))

        if not self._engine.parallel:
            self._share_time(numbers)
        if len(units) == 1:  # nothing to do meanwhile: all in this thread
            pool = None
            self._search(left, reporter, searched)
            while not urgent.empty():
                finish_next()
            return
        with self._threads() as pool:
            self._search(left, reporter, searched)
            _wait(ended)

    def _search(self, left: Mapping[tuple[int, ...], set[int]], reporter: Reporter, searched: Done) -> None:
        """Search all units; what stops that is the error of those of which something is `left` then, and no other's."""
        numbers = [number for unit in left for number in unit]
        try:
            searches = [self.found[number].search for number in numbers]
            for one in searches:
                if self._engine.parallel:  # all at once: their groups share what time there is for all
                    one.run.share_time(0, 1)
                one.keep_deadline()
            search_all(searches, self._engine, reporter, searched)
        except Exception as error:
            told = error if isinstance(error, ClipqError) else self._unexpected(error)
            for number in (number for unit in left if left[unit] for number in unit):
                if isinstance(one := self.found[number], Prepared):
                    self._end(number, stopped(one.run, told))

    def _share_time(self, numbers: Sequence[int]) -> None:
        """Networks that begin leave others their share of the time before a deadline."""
        waiting = [number for number, one in enumerate(self.found) if isinstance(one, Prepared)]
        for number in numbers:
            self.found[number].run.share_time(len(set(waiting) - set(numbers)), self._at_once)

    def _finished(self, unit: tuple[int, ...]) -> Mapping[int, Result | Taken]:
        """Everything behind the search of what is finished together; `Taken` where another job has taken it over meanwhile."""
        whole = next((one for one in self._ensembles if set(unit) <= set(one)), None)
        try:
            if whole is None:
                return {number: finish(self.found[number]) for number in unit}
            members = [self.found[number] for number in whole]
            made = finish_ensemble(self._ensembles[whole], members, self._engine.parallel)
        except HeldError as lost:
            if self._alone or isinstance(lost, StageHeldError):
                raise
            self._reporters[unit[0]].say(f"{lost}; the other networks of this job come first")
            return dict.fromkeys(unit, Taken())
        return dict(zip(whole, made, strict=True))

    @contextmanager
    def _threads(self) -> Iterator[ThreadPoolExecutor]:
        pool = ThreadPoolExecutor(self._at_once)
        try:
            yield pool
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # an interrupt must not wait for trainings

    def _in_turn(self, step: Callable[[], Mapping[int, Any] | None], numbers: Sequence[int]) -> None:
        """Keep what `step` makes of networks, or its error for these; one thread at a time unless it waits for a training."""
        with self._turn, logs.about(self._whose(numbers)):
            try:
                ended: Mapping[int, Any] = step() or {}
            except ClipqError as error:
                ended = dict.fromkeys(numbers, error)
            except Exception as error:
                ended = dict.fromkeys(numbers, self._unexpected(error))
        for number, one in ended.items():
            self._end(number, one)

    def _unexpected(self, error: Exception) -> RunError:
        """What is told of an error that is no mistake of the input, beside its traceback; of a network alone the error itself is raised."""
        if self._alone:
            raise error
        return RunError(logs.unexpected(error))

    def _whose(self, numbers: Sequence[int]) -> str:
        """What log lines call these networks; empty where there is no other."""
        if self._alone:
            return ""
        if len(numbers) == 1:
            return self._sources[numbers[0]].name
        return next(f"ensemble {one.name}" for whole, one in self._ensembles.items() if numbers[0] in whole)

    def _end(self, number: int, ended: Prepared | Result | Taken | ClipqError) -> None:
        """Keep what a network is now, and say at once if it failed: the others may take hours, and the job says it again at its end. Who submits that
        network alone meanwhile need not wait for them either."""
        before, self.found[number] = self.found[number], ended
        if not isinstance(ended, ClipqError):
            return
        if isinstance(before, Prepared) and before.own.claim in self.held:
            self.held.remove(before.own.claim)
            before.own.claim.give_back()
        if not self._alone:
            self._reporters[number].say(f"failed: {ended}")


def _wait(ended: Sequence[Future[Any]]) -> None:
    """Until all have ended; raises what nobody expected."""
    for one in ended:
        one.result()
