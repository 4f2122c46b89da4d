"""No thread of an engine calls Ray when that is shut down."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from clipq_ray.cluster.apart import Apart, Left


def stepping(apart: Apart, gone: threading.Event, first: threading.Event) -> None:
    try:
        while True:
            time.sleep(0.3)  # a call of Ray's
            first.set()
            apart.check()
    finally:
        gone.set()


def test_an_interrupted_wait_leaves_the_thread_alone_and_leaving_waits_for_it() -> None:
    apart, gone, first = Apart(), threading.Event(), threading.Event()

    def interrupt() -> None:
        first.wait()
        time.sleep(0.1)  # the main thread waits
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        apart.run(lambda: stepping(apart, gone, first), "search")
    assert not gone.is_set()
    apart.leave()
    assert gone.is_set()


def test_what_is_raised_apart_is_raised_where_it_is_waited_for() -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Apart().run(fail, "search")


def test_nothing_begins_once_all_have_left() -> None:
    apart, began = Apart(), threading.Event()

    def work() -> None:
        apart.check()
        began.set()

    apart.leave()
    with pytest.raises(Left):
        apart.run(work, "search")
    assert not began.is_set()
