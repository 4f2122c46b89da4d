"""What a person sees while a job runs: bars on a terminal, lines in a log.

Always which stage runs, which layer or epoch, how far it is and how long it will take. Not covered: metrics for machines.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

from clipq_ray.console import harmless
from clipq_ray.redaction import redacted

_LINE_SECONDS = 10.0


class Reporter:
    """Writes to `stream` (stderr unless given); a terminal gets bars, anything else a line at most every ten seconds."""

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._terminal = self._stream.isatty()
        self._begun = time.monotonic()
        self._about = ""

    def about(self, name: str) -> Reporter:
        """The same reporter with `name` before every line, so that several networks can be told apart."""
        result = copy.copy(self)
        result._about = f"{name}: "
        return result

    def say(self, text: str) -> None:
        """One line."""
        if not self._quiet:
            clock = _clock(time.monotonic() - self._begun)
            tqdm.write(harmless(redacted(f"[{clock}] {self._about}{text}")), file=self._stream)
            self._stream.flush()

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """One stage; says how long it took."""
        current = Stage(self, name)
        started = time.monotonic()
        try:
            yield current
        finally:
            current.close()
        self.say(f"{name}: done in {_clock(time.monotonic() - started)}")


class Stage:
    """One stage's progress; call it with (done, total, words)."""

    def __init__(self, reporter: Reporter, name: str) -> None:
        self._reporter, self._name = reporter, name
        self._bar: tqdm[Any] | None = None
        self._first: tuple[float, int] | None = None
        self._shown = -_LINE_SECONDS

    def __call__(self, done: int, total: int, words: str) -> None:
        """`done` of `total` steps; `words` name the layer or epoch."""
        if self._reporter._quiet:
            return
        if self._reporter._terminal:
            if self._bar is None:
                self._bar = tqdm(
                    total=total, desc=harmless(self._name), file=self._reporter._stream, initial=done, leave=False,
                    postfix=harmless(words),
                )  # fmt: skip
            self._bar.total = total
            self._bar.set_postfix_str(harmless(words), refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if self._first is None:
            self._first = (now, done)
        if now - self._shown < _LINE_SECONDS:
            return
        self._shown = now
        started, already = self._first
        left = (now - started) / (done - already) * (total - done) if done > already else None
        rest = f", about {_clock(left)} left" if left is not None else ""
        self._reporter.say(
            f"{self._name}: {words}, {done:,} of {total:,} steps ({100 * done // max(total, 1)} %){rest}"
        )

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
