"""Many networks in one job: all are prepared and searched together, each is finished as soon as it is searched; one that fails stops no other.

Not covered: the stages of one network (`pipeline`), and what a fleet says about its networks (`fleet`).
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from clipq_ray.claims import Claim
from clipq_ray.cluster.engine import Engine
from clipq_ray.errors import ClipqError, RunError
from clipq_ray.pipeline import Prepared, Result, finish, prepare
from clipq_ray.progress import Reporter
from clipq_ray.searching import search_all
from clipq_ray.work import Source

log = logging.getLogger(__name__)


def compress(source: Source, engine: Engine, reporter: Reporter) -> Result:
    """Compress one network and commit the run; a run that is committed already is returned as it is.

    `engine` must be entered. Raises the errors of `errors`; whatever was finished before stays in the storage for the next attempt. A
    promise that no round keeps is no error: the closest round is committed, and the manifest says so.
    """
    (result,) = compress_all([source], engine, reporter)
    if isinstance(result, ClipqError):
        raise result
    return result


def compress_all(sources: Sequence[Source], engine: Engine, reporter: Reporter) -> list[Result | ClipqError]:
    """Compress several networks, of different names: all are prepared and then searched together, and each is finished as soon as it is searched.

    As `compress`; one that fails leaves its error in its place and does not stop the others. Only searches and trainings overlap: what this process
    does itself, it does for one network at a time, since its seeds and threads are one.
    """
    own = [reporter.about(source.name) if len(sources) > 1 else reporter for source in sources]
    job = _Job(sources, own, engine)
    try:
        job.prepare()
        waiting = [number for number, one in enumerate(job.found) if isinstance(one, Prepared)]
        if engine.parallel:
            job.search_and_finish(waiting, reporter)
        else:
            for number in waiting:
                job.search_and_finish([number], own[number])
        return job.found
    finally:
        for claim in job.held:
            claim.give_back()


class _Job:
    """The networks of a job on their way; `found` holds for each what it is by now."""

    def __init__(self, sources: Sequence[Source], reporters: Sequence[Reporter], engine: Engine) -> None:
        self._sources, self._reporters, self._engine = sources, reporters, engine
        self._turn = threading.Lock()
        self._alone = len(sources) == 1
        wanted = sources[0].config.trainings or engine.trainings([source.config for source in sources])
        self._at_once = min(wanted, len(sources)) if engine.parallel else 1
        self.held: list[Claim] = []
        self.found: list[Any] = [None] * len(sources)

    def prepare(self) -> None:
        """Everything before the search."""

        def step(number: int) -> Prepared | Result:
            reporter = self._reporters[number]
            return prepare(self._sources[number], self._engine, reporter, self._turn, self.held)

        numbers = range(len(self._sources))
        if self._at_once == 1:
            for number in numbers:
                self._in_turn(step, number)
            return
        with self._threads() as pool:
            _wait([pool.submit(self._in_turn, step, number) for number in numbers])

    def search_and_finish(self, numbers: Sequence[int], reporter: Reporter) -> None:
        """The search of these, and everything behind it; of those that are searched, the most urgent one is finished next."""
        urgent: queue.PriorityQueue[tuple[int, int]] = queue.PriorityQueue()
        searches = [self.found[number].search for number in numbers]
        ended: list[Future[None]] = []

        def finish_next() -> None:
            self._in_turn(lambda number: finish(self.found[number]), urgent.get()[1])

        def searched(place: int, error: ClipqError | None) -> None:
            number = numbers[place]
            if error is not None:
                self._end(number, error)
                return
            urgent.put((-self._sources[number].priority, number))
            if pool is not None:
                ended.append(pool.submit(finish_next))

        if len(numbers) == 1:  # nothing to do meanwhile: all in this thread
            pool = None
            search_all(searches, self._engine, reporter, searched)
            while not urgent.empty():
                finish_next()
            return
        with self._threads() as pool:
            search_all(searches, self._engine, reporter, searched)
            _wait(ended)

    @contextmanager
    def _threads(self) -> Iterator[ThreadPoolExecutor]:
        pool = ThreadPoolExecutor(self._at_once)
        try:
            yield pool
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # an interrupt must not wait for trainings

    def _in_turn(self, step: Callable[[int], Prepared | Result], number: int) -> None:
        """What `step` makes of a network, or its error; one thread at a time unless it waits for a training."""
        with self._turn:
            try:
                ended: Prepared | Result | ClipqError = step(number)
            except ClipqError as error:
                ended = error
            except Exception as error:
                if self._alone:
                    raise
                log.exception("unexpected, and no mistake of the input")
                ended = RunError(
                    f"unexpected {type(error).__name__}: {' '.join(str(error).split())[:300]}; please report it"
                )
        self._end(number, ended)

    def _end(self, number: int, ended: Prepared | Result | ClipqError) -> None:
        """Keep what a network is now, and say at once if it failed: the others may take hours, and the job says it again at its end."""
        self.found[number] = ended
        if isinstance(ended, ClipqError) and not self._alone:
            self._reporters[number].say(f"failed: {ended}")


def _wait(ended: Sequence[Future[Any]]) -> None:
    """Until all have ended; raises what nobody expected."""
    for one in ended:
        one.result()
