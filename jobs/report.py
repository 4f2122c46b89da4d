"""Make the report of a committed run again, from its manifest and tables.

    python jobs/report.py RUN_URI [--output FILE]

`RUN_URI` is a run directory (`.../model=NAME/run=ID`, local or any fsspec URI). The page is written to `FILE`, by default
`./report-NAME-ID.html`, and never into a committed run: what is committed stays as it is. The tables are checked against the hashes of
the manifest first. Not covered: measuring anything anew (`jobs/evaluate.py` does).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a checkout runs without being installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyarrow as pa

from clipq_ray import console, tables
from clipq_ray.errors import ConfigError
from clipq_ray.manifest import checked, read_manifest, understood
from clipq_ray.outputs import output
from clipq_ray.report import render
from clipq_ray.storage import LAYERS, PREDICTIONS, TRIALS, Store


def main(arguments: list[str]) -> int:
    """Parse, make the page, say where it lies."""
    parser = console.OneLineParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "run_uri", metavar="RUN_URI", help="a committed run directory, local or any fsspec URI"
    )
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="local file (default: ./report-{model}-{run}.html)"
    )
    given = parser.parse_args(arguments)
    console.show(str(make(given.run_uri, given.output)))
    return 0


def make(run_uri: str, to: Path | None = None) -> Path:
    """Write the report of the run at `run_uri` and return the file's path."""
    run = Store(run_uri)
    manifest = read_manifest(run)
    if "run" not in manifest:
        raise ConfigError(
            f"expected a committed run, got the fleet {manifest.get('fleet', run.uri)}; give one of its runs"
        )
    found = _table(run, manifest, LAYERS), _trials(run, manifest), _predictions(run, manifest)
    with understood(run.uri):
        page = render(manifest, *found)
        path = to or Path(f"report-{_plain(manifest['model'])}-{_plain(manifest['run'])}.html")
    _write(path, page)
    return path


def _table(run: Store, manifest: dict[str, Any], name: str) -> pa.Table:
    """A table of the run; `FormatError` if it is not the one that was committed."""
    stated = (manifest.get("files") or {}).get(name, {})
    return tables.from_bytes(checked(run.read(name), stated, f"{run.uri}/{name}"))


def _trials(run: Store, manifest: dict[str, Any]) -> pa.Table:
    """The search's table; without rows if the run has none."""
    return (
        _table(run, manifest, TRIALS) if TRIALS in manifest.get("files", {}) else tables.TRIALS.empty_table()
    )


def _predictions(run: Store, manifest: dict[str, Any]) -> pa.Table | None:
    return _table(run, manifest, PREDICTIONS) if PREDICTIONS in manifest.get("files", {}) else None


def _plain(name: str) -> str:
    """A name that is safe in a file name."""
    return re.sub(r"[^\w.-]", "_", name)


def _write(path: Path, page: str) -> None:
    """Write a local file, in a folder that is there."""
    store, name = output(path.absolute(), "--output")
    if not path.parent.is_dir():
        raise ConfigError(f"expected --output in a folder that is there, got {path}: make the folder first")
    store.write(name, page.encode())


if __name__ == "__main__":
    sys.exit(console.run("report", main))
