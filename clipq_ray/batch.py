"""Many networks in one job: all are prepared, searched together, and finished; one that fails stops no other.

Not covered: the stages of one network (`pipeline`), and what a fleet says about its networks (`fleet`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from clipq_ray.claims import Claim
from clipq_ray.cluster.engine import Engine
from clipq_ray.errors import ClipqError, RunError
from clipq_ray.pipeline import Prepared, Result, finish, prepare
from clipq_ray.progress import Reporter
from clipq_ray.searching import search_all
from clipq_ray.work import Source

log = logging.getLogger(__name__)
S = TypeVar("S")
T = TypeVar("T")


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
    sources: Sequence[Source], engine: Engine, reporter: Reporter, *, trainings: int = 1
) -> list[Result | ClipqError]:
    """Compress several networks, of different names: all are prepared, then searched together, then finished, so many trainings at a time.

    As `compress`; one that fails leaves its error in its place and does not stop the others. Only trainings overlap: what this process does itself, it
    does for one network at a time, since its seeds and threads are one.
    """
    turn, held = threading.Lock(), list[Claim]()
    own = [reporter.about(source.name) if len(sources) > 1 else reporter for source in sources]
    runs = list(zip(sources, own, strict=True))
    at_once = trainings if engine.parallel else 1
    try:
        ready = _each(lambda one: prepare(one[0], engine, one[1], turn, held), runs, turn, at_once)
        _say_failed(ready, own)
        ended = _searched_and_finished(ready, engine, reporter, turn, at_once)
        new = [one if one is not before else None for one, before in zip(ended, ready, strict=True)]
        _say_failed(new, own)
        return ended
    finally:
        for claim in held:
            claim.give_back()


def _say_failed(found: Sequence[Any], reporters: Sequence[Reporter]) -> None:
    """At once, since the others may take hours; the job says it again at its end."""
    for one, reporter in zip(found, reporters, strict=True):
        if isinstance(one, ClipqError) and len(found) > 1:
            reporter.say(f"failed: {one}")


def _searched_and_finished(
    ready: Sequence[Prepared | Result | ClipqError],
    engine: Engine,
    reporter: Reporter,
    turn: threading.Lock,
    at_once: int,
) -> list[Result | ClipqError]:
    waiting = [number for number, one in enumerate(ready) if isinstance(one, Prepared)]
    errors = search_all([one.search for one in ready if isinstance(one, Prepared)], engine, reporter)
    ended: list[Any] = list(ready)
    for number, error in zip(waiting, errors, strict=True):
        ended[number] = error or ready[number]
    searched = [number for number, one in enumerate(ended) if isinstance(one, Prepared)]
    finished = _each(finish, [ended[number] for number in searched], turn, at_once)
    for number, result in zip(searched, finished, strict=True):
        ended[number] = result
    return ended


def _each(
    step: Callable[[S], T], given: Sequence[S], turn: threading.Lock, at_once: int
) -> list[T | ClipqError]:
    """What `step` makes of each, or its error; `at_once` threads, of which one runs at a time unless it waits for a training."""

    def in_turn(one: S) -> T | ClipqError:
        with turn:
            try:
                return step(one)
            except ClipqError as error:
                return error
            except Exception as error:
                if len(given) == 1:
                    raise
                log.exception("unexpected, and no mistake of the input")
                return RunError(
                    f"unexpected {type(error).__name__}: {' '.join(str(error).split())[:300]}; please report it"
                )

    if at_once == 1 or len(given) < 2:
        return [in_turn(one) for one in given]
    pool = ThreadPoolExecutor(at_once)
    try:
        return list(pool.map(in_turn, given))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # an interrupt must not wait for trainings
