"""What all commands share: arguments that are wrong, named errors, an interrupt and a closed pipe each end in one line or none.

Exit codes: 0 all is well; 1 the run failed; 2 something in the input is wrong; 130 interrupted; 141 nobody reads the output.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from clipq_ray.errors import ClipqError, ConfigError
from clipq_ray.redaction import redacted


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are a `ConfigError`: one line instead of the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise ConfigError(f"{message}; see --help")


def run(program: str, main: Callable[[list[str]], int | None], arguments: list[str] | None = None) -> int:
    """The exit code of `main` on `arguments` (default: the process's); a named error is one line on stderr."""
    try:
        code = main(sys.argv[1:] if arguments is None else arguments) or 0
        sys.stdout.flush()
    except ClipqError as error:
        print(redacted(f"{program}: {' '.join(str(error).split())}"), file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{program}: interrupted; run the same command again to continue", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:
        # The reader has seen enough. Python flushes once more at exit, which must find an open end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return code
