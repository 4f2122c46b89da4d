"""Compress a trained network: `python jobs/compress.py --model resnet20 --weights URI --data URI --storage URI`.

Parse, build, call; the stages are in `clipq_ray.pipeline`. Everything that was finished is in the storage, so the same command run again
continues. Exit code 0: committed; 1: the run failed, or the file does not keep the promise of the intent; 2: something in the input is wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # a checkout runs without being installed, as in a Ray job's working directory
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clipq_ray import console, options
from clipq_ray.api import make_engine
from clipq_ray.pipeline import compress
from clipq_ray.planning import dry_run
from clipq_ray.progress import Reporter
from clipq_ray.summary import table
from clipq_ray.work import Source


def main(arguments: list[str]) -> int:
    """The job, from its arguments to the table at its end."""
    config = options.parse(arguments, __doc__ or "")
    reporter = Reporter()
    source = Source(config)
    if config.dry_run:
        print(dry_run(source))
        return 0
    source.check()
    with make_engine(config.engine) as engine:
        result = compress(source, engine, reporter)
    print(table([result.manifest], [result.uri]))
    return 0 if result.kept else 1


if __name__ == "__main__":
    sys.exit(console.run("compress", main))
