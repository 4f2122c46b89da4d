"""What all commands share: arguments that are wrong, named errors, an interrupt and a closed pipe each end in one line or none.

Exit codes: 0 all is well; 1 the run failed; 2 something in the input is wrong; 130 interrupted; 141 nobody reads the output; 143 stopped (SIGTERM, as by
`ray job stop`). A job that was submitted to Ray says its exit code in its last line, since `ray job submit` knows 0 and 1 only.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from clipq_ray.errors import ClipqError, ConfigError, RunError, brief
from clipq_ray.redaction import redacted

_STEERING = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that move a terminal's cursor, start its commands, turn the direction of text or cannot be written at all."""


def harmless(line: str) -> str:
    """`line` for a terminal: what would steer it is spelt out, since files and manifests come from anywhere."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), line)


def show(*lines: str) -> None:
    """Print lines, each `harmless` and without secrets; `RunError` where standard output does not take them."""
    try:
        print("\n".join(harmless(redacted(line)) for line in lines), flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_output()
        raise RunError(
            f"cannot write to standard output: {error.strerror or error}; what was done stays done, direct the output elsewhere"
        ) from error


def _drop_output() -> None:
    """Python flushes once more at exit, which must find an open end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Once(argparse.Action):
    """Takes an option's value, and refuses a second one."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        refuse_again(self.dest, self.dest in parser.given)
        parser.given.add(self.dest)
        setattr(namespace, self.dest, values)


def refuse_again(name: str, there: bool) -> None:
    """`ConfigError` where an option is `there` already."""
    if there:
        raise ConfigError(
            f"--{name.replace('_', '-')}: expected it once on the command line, got it again; leave one out"
        )


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are a `ConfigError`: one line instead of the usage; options are written out, and given once."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})
        self.given = set[str]()
        for action in (None, "store"):
            self.register("action", action, _Once)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, of one command line."""
        self.given.clear()
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise ConfigError(f"{message}; see --help")


def json_object(option: str, text: str) -> dict[str, Any]:
    """The JSON object that was given to `option`, such as `--model-args`; `ConfigError` for anything else."""
    try:
        value = json.loads(text, parse_constant=_refuse)  # NaN and infinities are no JSON
    except ValueError as error:
        raise ConfigError(
            f"{option}: expected JSON such as '{{\"transform_input\": true}}', got {text!r}"
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(f"{option}: expected names and values, got {text!r}; write '{{\"name\": value}}'")
    return value


def _refuse(text: str) -> NoReturn:
    raise ValueError(text)


_SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # by this Ray's job server tells the process what it is
_NO_OTHER_RAY = {"RAY_ENABLE_AUTO_CONNECT": "0", "TUNE_DISABLE_AUTO_INIT": "1"}
"""Else a call of Ray's from a thread that has outlived an interrupt starts a second Ray behind the end of the first. Ray reads the former when it is imported."""
_TERMINATED = threading.Event()
"""Whether an interrupt is a SIGTERM's. A class of exception of its own would not say it: an interrupt within `ray.get` comes out as a new KeyboardInterrupt."""


def run(program: str, main: Callable[[list[str]], int | None], arguments: list[str] | None = None) -> int:
    """The exit code of `main` on `arguments` (default: the process's); a named error is one line on stderr, any other one a traceback."""
    for name, value in _NO_OTHER_RAY.items():
        os.environ.setdefault(name, value)
    if isinstance(sys.stdout, io.TextIOWrapper):  # of any encoding, for names of any
        sys.stdout.reconfigure(errors="backslashreplace")
    with _stopping():
        try:
            code = _code(program, main, arguments)
        except Exception:
            # Python itself would print it with the secrets that are in it.
            print(redacted(traceback.format_exc()), end="", file=sys.stderr, flush=True)
            code = 1
    if submitted() and code != 128 + signal.SIGPIPE:
        print(f"{program}: exit code {code}", file=sys.stderr, flush=True)
    return code


def submitted() -> bool:
    """Whether this process is a job that was submitted to Ray."""
    return _SUBMITTED in os.environ


def leave(code: int) -> NoReturn:
    """End the process; where it was interrupted, at once: by then all that was begun is left whole, and a thread that still waits for a training would hold up
    the end for ever."""
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        with suppress(OSError, AttributeError):  # nobody reads, or it was closed from the start
            sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


@contextmanager
def _stopping() -> Iterator[None]:
    """SIGTERM ends a run as an interrupt does, so that claims are given back and what was begun is left whole; afterwards it does what it did before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _TERMINATED.clear()
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: Any) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # once is enough: what is being given back must not be interrupted
    _TERMINATED.set()
    raise KeyboardInterrupt


def _code(program: str, main: Callable[[list[str]], int | None], arguments: list[str] | None) -> int:
    try:
        code = main(sys.argv[1:] if arguments is None else arguments) or 0
        if sys.stdout is not None:  # which was closed from the start
            sys.stdout.flush()
    except ClipqError as error:
        print(harmless(redacted(f"{program}: {brief(error, None)}")), file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        word, code = ("stopped", signal.SIGTERM) if _TERMINATED.is_set() else ("interrupted", signal.SIGINT)
        print(f"{program}: {word}; run the same command again to continue", file=sys.stderr, flush=True)
        return 128 + code
    except BrokenPipeError:
        _drop_output()  # the reader has seen enough
        return 128 + signal.SIGPIPE
    return code
