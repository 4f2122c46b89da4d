"""Whose a log line is: what the package logs while it works on a network begins with the network's name.

A name holds in the thread that took it, and in threads whose work is `carried`. Not covered: progress lines (`progress`), which are given the name.
"""

from __future__ import annotations

import contextvars
import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from clipq_ray import errors
from clipq_ray.redaction import redacted

T = TypeVar("T")
_about = contextvars.ContextVar("about", default="")


@contextmanager
def about(name: str) -> Iterator[None]:
    """What this thread logs meanwhile is about `name`; nobody's where it is empty."""
    before = _about.set(name)
    try:
        yield
    finally:
        _about.reset(before)


def carried(work: Callable[[], T]) -> Callable[[], T]:
    """`work` for another thread, about what this one is about."""
    context = contextvars.copy_context()
    return lambda: context.run(work)


def logger(module: str) -> logging.Logger:
    """The logger of a module, whose lines say whose they are."""
    found = logging.getLogger(module)
    found.addFilter(_named)
    return found


def _named(record: logging.LogRecord) -> bool:
    if name := _about.get():
        record.msg, record.args = f"{name}: {record.getMessage()}", ()
    return True


def brief(error: BaseException) -> str:
    """What an error of somebody else's says, in one line without secrets."""
    return redacted(errors.brief(error, None))[:300]


def unexpected(error: BaseException) -> str:
    """Logs the traceback of an error that is no mistake of the input, and says it in one line; both without secrets."""
    logger(__name__).error("unexpected: %s", redacted("".join(traceback.format_exception(error))))
    return f"unexpected {type(error).__name__}: {brief(error)}; please report it"
