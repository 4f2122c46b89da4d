"""Threads that call Ray beside those that wait for them, and their end before Ray is shut down.

A call that is under way while Ray is shut down ends the process, with an exit code of its own. Not covered: threads that Ray keeps waiting for a whole training;
they hear of the end from Ray.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from clipq_ray import console, logs

_POLL_SECONDS = 0.5
_LEAVE_SECONDS = 10.0
_LEAVE_SUBMITTED_SECONDS = 2.0  # `ray job stop` gives a job three, where the cluster says nothing else


class Left(BaseException):
    """Nobody waits any more for what this thread does; no `Exception`, since libraries catch those and tidy up at length."""


class Apart:
    """The threads of one engine. What they do asks `check` between two calls of Ray."""

    def __init__(self) -> None:
        self._left = threading.Event()
        self._under_way: set[threading.Event] = set()

    def check(self, seconds: float = 0.0) -> None:
        """Wait for so long; `Left` once nobody waits any more."""
        if self._left.wait(seconds):
            raise Left

    def begin(self, work: Callable[[], None], name: str) -> threading.Event:
        """`work` in a thread of its own; what says that it has ended."""
        ended = threading.Event()

        def whole() -> None:
            try:
                work()
            except Left:
                pass
            finally:
                self._under_way.discard(ended)
                ended.set()

        thread = threading.Thread(target=logs.carried(whole), daemon=True, name=name)
        self._under_way.add(ended)
        thread.start()
        return ended

    def run(self, work: Callable[[], None], name: str) -> None:
        """`work` in a thread of its own, to its end or to this thread's interrupt: Tune takes many seconds to end its actors, longer than `ray job stop` waits
        before it kills."""
        raised: list[BaseException] = []

        def heard() -> None:
            try:
                work()
            except BaseException as error:  # raised again where it is waited for
                raised.append(error)

        # an event, since a thread whose `join` was interrupted passes for ended (Python 3.11)
        ended = self.begin(heard, name)
        while not ended.wait(_POLL_SECONDS):
            pass
        if raised:
            raise raised[0]

    def leave(self) -> None:
        """Tell all threads, and wait a moment for them."""
        self._left.set()
        until = time.monotonic() + (_LEAVE_SUBMITTED_SECONDS if console.submitted() else _LEAVE_SECONDS)
        for ended in tuple(self._under_way):
            ended.wait(max(0.0, until - time.monotonic()))
