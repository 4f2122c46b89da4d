"""Named errors.

    ClipqError
    ├── UserError            something the user can mend: one line, exit code 2
    │   ├── ConfigError      an option is unknown, out of range or contradicts another
    │   ├── ModelError       unknown network, wrong weights, NaN in weights
    │   ├── DataError        missing, empty, unreadable or mislabelled data
    │   ├── StorageError     a URI cannot be read or written
    │   └── FormatError      a table or a manifest is damaged
    │       └── ArtifactError   a .clq file is damaged, or needs a newer version
    └── RunError             the run itself failed: exit code 1
        ├── HeldError        another job makes the run, and this one does not wait
        │   └── StageHeldError  ... a stage of it, for a run of its own
        └── DivergedError    a training diverged; a note where a file is there without it

A message says what was expected, what came and what to do, in one line. Foreign exceptions are translated once, where they enter
(`raise ... from error`).
"""

from __future__ import annotations

import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager


class ClipqError(Exception):
    """Everything that this package raises on purpose."""

    exit_code = 1


class UserError(ClipqError):
    """A mistake in the input; the message is one line and says what to do."""

    exit_code = 2


class ConfigError(UserError):
    """An option is unknown, out of range or contradicts another."""


class ModelError(UserError):
    """A network or its weights cannot be used."""


class DataError(UserError):
    """Data is missing, empty, unreadable or does not fit the network."""


class StorageError(UserError):
    """A URI cannot be read or written."""


class FormatError(UserError):
    """A stored file is damaged or of an unknown version."""


class ArtifactError(FormatError):
    """A .clq file is damaged, is none, or needs what this version lacks."""


class RunError(ClipqError):
    """The run failed for a reason that is no mistake of the input."""


class HeldError(RunError):
    """Another job makes the run, and this one was told not to wait for it."""


class StageHeldError(HeldError):
    """Another job makes a stage of the run for one of its own, and this one was told not to wait for it."""


class DivergedError(RunError):
    """A training's weights or its loss became NaN or infinite, as they would again."""


def brief(error: BaseException, most: int | None = 300) -> str:
    """What an error says, in one line of at most so many characters, None for all; of one that says nothing, and of code that ends the process, what it is."""
    if isinstance(error, SystemExit):
        return f"it ended the process with {error.code}; put what it runs below if __name__ == '__main__'"
    return " ".join(str(error).split())[:most] or type(error).__name__


def from_signal(error: BaseException) -> bool:
    """Whether a handler of a signal has raised it, as Ray's of SIGTERM raises `SystemExit`: it is nothing that the code did which was under way."""
    handlers = {
        getattr(signal.getsignal(number), "__code__", None) for number in (signal.SIGTERM, signal.SIGINT)
    }
    return any(frame.f_code in handlers for frame, _ in traceback.walk_tb(error.__traceback__))


@contextmanager
def advised(advice: str) -> Iterator[None]:
    """An `ArtifactError` that says what is wrong with bytes, and not what to do, says `advice` too."""
    try:
        yield
    except ArtifactError as error:
        if "; " in str(error):
            raise
        raise ArtifactError(f"{error}; {advice}") from error


def named(kind: str, message: str) -> ClipqError:
    """The error of the class called `kind`, which another process has raised; a `RunError` where there is none of that name."""
    found = globals().get(kind)
    if isinstance(found, type) and issubclass(found, ClipqError):
        return found(message)
    return RunError(message)
