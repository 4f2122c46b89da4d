"""`make bench-chaos`: a job on a three-node cluster of this machine whose workers, search actors, nodes and driver are killed at random moments.

Every run of the job draws the (kind, stage) pairs that were hit least so far, each at a random moment (`tests/cluster/kills.py`), and is compared with
one undisturbed run: the file, the table of layers with the plan, and the search's points must be the same bytes, nothing may be left over, and nothing that was
stored may be made again. A run is one unit, stored when it ends, with every kill: kind, stage, process, what was stored, and how long it took until the job went on.
Stages that a driver passes in milliseconds are missed now and then; only what hit something is counted.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "cluster"))

from kills import PAIRS, artifact, disturbed, left_over, orders, three_nodes

from bench.record import RESULTS, ROOT, Row, row, write

UNITS = RESULTS / "chaos-units"
PER_RUN, PAIR_GOAL = 16, 5


def undisturbed() -> dict[str, Any]:
    """The run that nothing disturbs: what it makes and how long its stages take [s]; made now unless it is stored for the package as it is."""
    package = subprocess.run(
        ["git", "rev-parse", "HEAD:clipq_ray"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    path = UNITS / f"undisturbed-{package[:12]}.json"
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder, three_nodes() as nodes:
            storage = Path(folder) / "s"
            ended = disturbed(nodes, storage, Path(folder) / "logs")
            _store(path, {"package": package, "artifact": artifact(storage), "stages": ended.stages})
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content


def disturbed_run(number: int, before: Sequence[dict[str, Any]], usual: dict[str, Any]) -> dict[str, Any]:
    """The `number`-th run with kills, stored."""
    chance = random.Random(number)
    hits = counted(before)
    pairs = sorted(PAIRS, key=lambda pair: (hits[pair], chance.random()))[:PER_RUN]
    started = time.time()
    with tempfile.TemporaryDirectory() as folder, three_nodes() as nodes:
        storage = Path(folder) / "s"
        given = orders(pairs, number, usual["stages"])
        unit: dict[str, Any] = {"run": number, "started": started, "package": usual["package"]}
        try:
            ended = disturbed(nodes, storage, Path(folder) / "logs", given, number)
            unit |= {
                "kills": [kill.to_json() for kill in ended.kills],
                "missed": [[order.kind, order.stage] for order in ended.missed],
                "artifact": artifact(storage), "same": artifact(storage) == usual["artifact"], "left_over": left_over(storage),
            }  # fmt: skip
        except AssertionError as failed:  # it is a result too
            unit |= {"kills": [], "missed": [], "same": False, "left_over": [], "failed": str(failed)}
    unit["seconds"] = round(time.time() - started, 1)
    _store(UNITS / f"run-{number:04d}.json", unit)
    return unit


def _store(path: Path, content: dict[str, Any]) -> None:
    UNITS.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def counted(units: Sequence[dict[str, Any]]) -> Counter[tuple[str, str]]:
    """How often every kind was hit in every stage."""
    return Counter((kill["kind"], kill["stage"]) for unit in units for kill in unit["kills"])


def stored() -> list[dict[str, Any]]:
    """All runs with kills so far."""
    return [json.loads(path.read_text("utf-8")) for path in sorted(UNITS.glob("run-*.json"))]


def rows(units: Sequence[dict[str, Any]], goal: int) -> list[Row]:
    """What all runs say together."""
    kills = [kill for unit in units for kill in unit["kills"]]
    hits, runs = counted(units), len(units)
    found = [
        Row("chaos/kills", len(kills), "kills", goal=goal, better="higher", n=runs),
        Row("chaos/least_hits_of_a_kind_in_a_stage", min(hits[pair] for pair in PAIRS), "kills", goal=PAIR_GOAL, better="higher", n=len(PAIRS)),
        Row("chaos/runs_that_failed", sum("failed" in unit for unit in units), "runs", goal=0, n=runs),
        Row("chaos/artifacts_that_differ", sum(not unit["same"] for unit in units), "runs", goal=0, n=runs),
        Row("chaos/left_over", sum(len(unit["left_over"]) for unit in units), "objects", goal=0, n=runs),
        Row("chaos/stored_but_made_again_at_most", max((kill["redone"] or 0 for kill in kills), default=0), "epochs or evaluations", goal=1, n=len(kills)),
        Row("chaos/missed", sum(len(unit["missed"]) for unit in units), "orders", n=runs),
        Row("chaos/run_seconds", statistics.median(unit["seconds"] for unit in units), "s", n=runs),
    ]  # fmt: skip
    for kind in dict.fromkeys(kind for kind, _ in PAIRS):
        seconds = [
            kill["recovered_seconds"] for kill in kills if kill["kind"] == kind and kill["recovered_seconds"]
        ]
        if seconds:
            found.append(row(f"chaos/{kind.replace(' ', '_')}/recovered", seconds, "s"))
    found += [
        Row(f"chaos/{kind.replace(' ', '_')}/{stage}", hits[kind, stage], "kills") for kind, stage in PAIRS
    ]
    return found


def main() -> int:
    """Runs until there are enough kills, and the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--kills", type=int, default=200, help="that hit something, in all (default: %(default)s)"
    )
    parser.add_argument("--runs", type=int, help="make at most so many runs now; 0: only write the result")
    given = parser.parse_args()
    units, made = stored(), 0
    while given.runs is None or made < given.runs:
        if sum(counted(units).values()) >= given.kills and min(
            counted(units)[p] for p in PAIRS
        ) >= min(PAIR_GOAL, given.kills):  # fmt: skip
            break
        unit = disturbed_run(len(units) + 1, units, undisturbed())
        units.append(unit)
        made += 1
        print(
            f"run {unit['run']}: {len(unit['kills'])} kills in {unit['seconds']} s, {'same' if unit['same'] else 'DIFFERS'}",
            flush=True,
        )
    if units:
        print(f"stored in {write('chaos', rows(units, given.kills))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
