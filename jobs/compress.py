"""Compress trained networks: `python jobs/compress.py --model resnet20 --weights URI --data URI --storage URI`.

Everything that was finished is in the storage, so the same command run again
continues. Exit code 0: all committed; 1: a run failed (the others are finished), a file does not keep the promise of its intent, or an
ensemble could not be scored; 2: something in the input is wrong.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # a checkout runs without being installed, as in a Ray job's working directory
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clipq_ray import connections, console, options
from clipq_ray.api import make_engine
from clipq_ray.batch import compress_all
from clipq_ray.errors import ClipqError, HeldError
from clipq_ray.fleet import ensembles
from clipq_ray.fleet.results import write
from clipq_ray.manifest import refuse_newer
from clipq_ray.pipeline import Result
from clipq_ray.planning import dry_run
from clipq_ray.progress import Reporter
from clipq_ray.redaction import redacted
from clipq_ray.storage import Store, fleet_store
from clipq_ray.summary import ensemble_line, table


def main(arguments: list[str]) -> int:
    """The job, from its arguments to the table at its end."""
    fleet = options.parse_all(arguments, __doc__ or "")
    sources = fleet.sources()
    shared = fleet.configs[0]
    connections.patience()  # a slip in the environment is said before hours are spent
    if shared.dry_run:
        text, code = dry_run(sources, fleet.ensembles)
        console.show(*text.split("\n"))
        return code
    for source in sources:
        source.check()
    if fleet.name is not None:
        refuse_newer(fleet_store(Store(shared.storage), fleet.name))
    reporter = Reporter()
    if shared.engine == "ray":
        reporter.say(
            f"ray: {'joining the cluster' if os.environ.get('RAY_ADDRESS') else 'starting on this machine'}"
        )
    with make_engine(shared) as engine:
        found = compress_all(sources, engine, reporter, fleet.ensembles)
    together = ensembles.all_scored(fleet.ensembles, sources, found, reporter)
    if fleet.name is not None and any(isinstance(one, HeldError) for one in found):
        print(
            "fleet: not written, since another job makes some of its runs or their stages; submit it again when that has ended",
            file=sys.stderr,
        )
    elif fleet.name is not None:
        store = write(Store(shared.storage), fleet.name, sources, found, together)
        print(redacted(f"fleet: {store.uri}"), file=sys.stderr)
    failed = [one for one in found if isinstance(one, ClipqError)]
    if len(found) == 1 and failed:
        raise failed[0]
    results = [one for one in found if isinstance(one, Result)]
    names = [source.name for source, one in zip(sources, found, strict=True) if isinstance(one, ClipqError)]
    console.show(*table([one.manifest for one in results], [one.uri for one in results], names).split("\n"))
    for ensemble in together:
        console.show(ensemble_line(ensemble))
    for source, one in zip(sources, found, strict=True):
        if isinstance(one, ClipqError):
            line = redacted(f"compress: {source.name}: {' '.join(str(one).split())}")
            print(console.harmless(line), file=sys.stderr)
    broken = [
        source.name
        for source, one in zip(sources, found, strict=True)
        if isinstance(one, Result) and not one.kept
    ]
    if len(found) > 1:
        console.show(
            f"{len(results)} of {len(found)} committed"
            + (f"; promises not kept: {', '.join(broken)}" if broken else "")
        )
    if failed:
        return max(error.exit_code for error in failed) if len(failed) == len(found) else 1
    unscored = any("error" in one for one in together)
    return 0 if all(one.kept for one in results) and not unscored else 1


if __name__ == "__main__":
    console.leave(console.run("compress", main))
