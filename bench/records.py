"""`make bench-records`: small files at an accuracy, by the product's own command and the recipes of `recipes/`, from trained weights to a verified file.

One (target, variant, seed) is one unit: its JSON and its .clq are stored under `bench/results/records-units/` when it ends and are not made again; a unit that
was cut off goes on behind its last finished epoch. Bytes are those of the file, errors those of the decoded file on the test images, as `jobs/evaluate.py`
says them; the test set decides nothing. The file of the median seed lies under `bench/records/`. Not covered: what a unit is (`records_units`), the table's words (`records_table`).
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import processes, records_table, records_units
from bench.record import RESULTS, ROOT, Row, row, write
from bench.records_units import TARGETS, VARIANTS, WITHOUT, Target, Unit, named, those_of

RECORDS = ROOT / "bench" / "records"


def rows_of(target: Target, variant: str, seeds: Iterable[int], epochs: int | None = None) -> list[Row]:
    """Bytes and errors of the seeds that are there; goals for the recipe's own `ours`."""
    found = those_of(target, variant, seeds, epochs)
    if not found:
        return []
    place = f"records/{named(target, variant, epochs, '/')}"
    goals = (target.most_bytes, target.most_error) if variant == "ours" and not epochs else (None, None)
    return [
        row(f"{place}/bytes", [float(one["bytes"]) for one in found], "bytes", goal=goals[0]),
        row(f"{place}/test_error", [one["test_error_percent"] for one in found], "%", goal=goals[1]),
        row(f"{place}/seconds", [one["seconds"] for one in found], "s"),
    ]


def sections() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """All units that are there, by what they were asked for and by variant, with what their files hold besides weights."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for target in TARGETS:
        for epochs in (None, *epochs_beside(target)):
            asked = f"{target.name}: at most {target.most_bytes:,} bytes"
            title = f"{asked}, {epochs} epochs" if epochs else f"{asked} at {target.most_error:.2f} %"
            units = {
                variant: [
                    {**one, "besides_weights": Unit(target, variant, one["seed"], epochs).besides_weights()}
                    for one in those_of(target, variant, range(100), epochs)
                ]
                for variant in (*VARIANTS, *WITHOUT)
            }
            found[title] = {variant: those for variant, those in units.items() if those}
    return {title: units for title, units in found.items() if units}


def epochs_beside(target: Target) -> list[int]:
    """Numbers of epochs that units of `target` were made in beside the recipe's own."""
    found = (
        re.match(rf"{target.name}-(\d+)-epochs-", path.name) for path in records_units.UNITS.glob("*.json")
    )
    return sorted({int(one[1]) for one in found if one})


def keep_median(target: Target, seeds: Iterable[int]) -> None:
    """The file of the median seed by test error; of two the worse."""
    found = [
        (result["test_error_percent"], result["bytes"], seed)
        for seed in seeds
        if (result := Unit(target, "ours", seed).result)
    ]
    if found:
        seed = sorted(found)[len(found) // 2][2]
        RECORDS.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Unit(target, "ours", seed).stem.with_suffix(".clq"), RECORDS / f"{target.name}.clq")


def at_once(series: Sequence[tuple[Target, int]], given: argparse.Namespace) -> None:
    """As many of `series` at a time as were asked for, each by a command of its own; the order is that of the list."""
    commands = [
        [
            sys.executable, str(Path(__file__).resolve()), "--only", target.name, "--seeds", str(seed), "--variants", *given.variants,
            "--shared", str(given.shared), "--storage", str(given.storage), "--engine", given.engine, "--no-table",
            *(["--epochs", str(given.epochs)] if given.epochs else []),
            *(["--threads", str(given.threads)] if given.threads else []),
        ]
        for target, seed in series
    ]  # fmt: skip
    codes = processes.codes_of(commands, given.parallel)
    failed = [
        f"{target.name} seed {seed}" for (target, seed), code in zip(series, codes, strict=True) if code
    ]
    if failed:
        raise SystemExit(f"{', '.join(failed)}: not made to the end; run again to continue")


def main() -> int:
    """Make what is not there yet, then the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ and weights/")
    parser.add_argument("--only", nargs="+", default=[""], help="targets whose names begin so; default: all")
    parser.add_argument("--variants", nargs="+", choices=(*VARIANTS, *WITHOUT), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="of the last round of all variants; default: the recipe's")
    parser.add_argument(
        "--threads",
        type=int,
        help="of a worker; default: the recipe's. Beside other work one: threads wait for each other",
    )
    parser.add_argument("--storage", type=Path, default=ROOT / "runs" / "records", help="of the jobs")
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    parser.add_argument("--table", action="store_true", help="only the table of what is there")
    parser.add_argument("--no-table", action="store_true", help="only the units")
    parser.add_argument(
        "--parallel",
        type=int,
        default=1,
        help="targets and seeds at once: on a GPU, most of which one small network leaves idle",
    )
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, processes.end)
    wanted = [one for one in TARGETS if one.name.startswith(tuple(given.only))]
    series = [] if given.table else [(target, seed) for target in wanted for seed in given.seeds]
    if given.parallel > 1:
        at_once(series, given)
    else:
        for target, seed in series:
            for variant in given.variants:
                Unit(target, variant, seed, given.epochs, given.threads).make(
                    given.shared.resolve(), given.storage.resolve(), ["--engine", given.engine]
                )
    if given.no_table:
        return 0
    rows: list[Row] = []
    for target in TARGETS:
        keep_median(target, range(100))
        for epochs in (None, *epochs_beside(target)):
            for variant in (*VARIANTS, *WITHOUT):
                rows += rows_of(target, variant, range(100), epochs)
    settings = {one.name: one.options() for one in TARGETS if one.recipe.exists()}
    print(f"stored in {write('records', rows, notes={'recipes': settings})}")
    (RESULTS / "records.md").write_text(records_table.document(sections()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
