"""`make bench-records`: small files at an accuracy, by the product's own command and the recipes of `recipes/`, from trained weights to a verified file.

One (target, variant, seed) is one unit: its JSON and its .clq are stored under `bench/results/records-units/` when it ends and are not made again; a unit that
was cut off goes on behind its last finished epoch. Bytes are those of the file, errors those of the decoded file on the test images, as `jobs/evaluate.py`
says them; the test set decides nothing. The file of the median seed lies under `bench/records/`. Not covered: what a unit is (`records_units`), the table's words (`records_table`).
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import processes, records_table, records_units
from bench.record import RESULTS, ROOT, Row, chosen, positive, row, write
from bench.records_units import TARGETS, VARIANTS, WITHOUT, Target, Unit, named, those_of
from clipq_ray import console
from clipq_ray.errors import ClipqError, ConfigError
from clipq_ray.storage import Store

RECORDS = ROOT / "bench" / "records"
SEEDS = 3  # of a row


def everything() -> Iterator[tuple[Target, int | None, str]]:
    """Target, number of epochs beside the recipe's own, and variant of all that there may be, in the table's order."""
    for target in TARGETS:
        for epochs in (None, *epochs_beside(target)):
            for variant in (*VARIANTS, *WITHOUT):
                yield target, epochs, variant


def rows_of(target: Target, variant: str, epochs: int | None = None) -> list[Row]:
    """Bytes and errors of the seeds that are there; goals for the recipe's own `ours`."""
    found = those_of(target, variant, epochs)
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
    for target, epochs, variant in everything():
        asked = f"{target.name}: at most {target.most_bytes:,} bytes"
        title = f"{asked}, {epochs} epochs" if epochs else f"{asked} at {target.most_error:.2f} %"
        units = those_of(target, variant, epochs)
        if units:
            found.setdefault(title, {})[variant] = [
                {**one, "besides_weights": Unit(target, variant, one["seed"], epochs).besides_weights()}
                for one in units
            ]
    return found


def outdated() -> list[str]:
    """The units that lie there and are in no row: of other settings than by now, damaged, or without `ours` of their seed."""
    current = {
        Unit(target, variant, one["seed"], epochs).stem.name
        for target, epochs, variant in everything()
        for one in those_of(target, variant, epochs)
    }
    return sorted({path.stem for path in records_units.UNITS.glob("*.json")} - current)


def epochs_beside(target: Target) -> list[int]:
    """Numbers of epochs that units of `target` were made in beside the recipe's own."""
    found = (
        re.match(rf"{target.name}-(\d+)-epochs-", path.name) for path in records_units.UNITS.glob("*.json")
    )
    return sorted({int(one[1]) for one in found if one})


def keep_median(target: Target) -> None:
    """The file of the median seed by test error, of two the worse, of equal ones the smallest; of fewer seeds than a row has, only where there is no file yet."""
    found = those_of(target, "ours")
    path = RECORDS / f"{target.name}.clq"
    if len(found) >= SEEDS or (found and not path.exists()):
        median = sorted(one["test_error_percent"] for one in found)[len(found) // 2]
        seed = min((one["bytes"], one["seed"]) for one in found if one["test_error_percent"] == median)[1]
        Store(str(RECORDS)).write(path.name, Unit(target, "ours", seed).clq_path.read_bytes())


def one_by_one(series: Sequence[tuple[Target, int]], given: argparse.Namespace) -> dict[str, int]:
    """The units of `series`, and the exit codes of those that failed; what is left of their target and seed is not tried then."""
    failed = {}
    for target, seed in series:
        try:
            for variant in given.variants:
                unit = Unit(target, variant, seed, given.epochs, given.threads)
                unit.make(given.shared.resolve(), given.storage.resolve(), ["--engine", given.engine])
        except (ClipqError, OSError) as error:  # a full disk, say
            print(error, file=sys.stderr, flush=True)
            failed[f"{target.name} seed {seed}"] = getattr(error, "exit_code", 1)
    return failed


def at_once(series: Sequence[tuple[Target, int]], given: argparse.Namespace) -> dict[str, int]:
    """As `one_by_one`, as many at a time as were asked for, each by a command of its own; the order is that of the list."""
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
    return {
        f"{target.name} seed {seed}": code for (target, seed), code in zip(series, codes, strict=True) if code
    }


def asked(words: list[str]) -> argparse.Namespace:
    """What the command line says."""
    parser = console.OneLineParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ and weights/")
    parser.add_argument("--only", nargs="+", default=[""], help="targets whose names begin so; default: all")
    parser.add_argument("--variants", nargs="+", choices=(*VARIANTS, *WITHOUT), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(SEEDS)))
    parser.add_argument(
        "--epochs", type=positive, help="of the last round of all variants; default: the recipe's"
    )
    parser.add_argument(
        "--threads",
        type=positive,
        help="of a worker; default: the recipe's. Beside other work one: threads wait for each other",
    )
    parser.add_argument("--storage", type=Path, default=ROOT / "runs" / "records", help="of the jobs")
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--table", action="store_true", help="only the table of what is there")
    only.add_argument("--no-table", action="store_true", help="only the units")
    parser.add_argument(
        "--parallel",
        type=positive,
        default=1,
        help="targets and seeds at once: on a GPU, most of which one small network leaves idle",
    )
    return parser.parse_args(words)


def write_table() -> None:
    """Rows, table and median files from the units that are there."""
    for target in TARGETS:
        keep_median(target)
    rows = [one for target, epochs, variant in everything() for one in rows_of(target, variant, epochs)]
    settings = {one.name: one.options() for one in TARGETS}
    print(f"stored in {write('records', rows, notes={'recipes': settings})}")
    Store(str(RESULTS)).write("records.md", records_table.document(sections()).encode())
    if found := outdated():
        print(
            f"in no row, since settings are others by now or a file is damaged: {', '.join(found)}; run again to make them, or remove them",
            file=sys.stderr,
        )


def main(words: list[str]) -> int:
    """Make what is not there yet, then the table."""
    given = asked(words)
    signal.signal(signal.SIGTERM, processes.end)
    wanted = chosen(given.only, [one.name for one in TARGETS])
    targets = [one for one in TARGETS if one.name in wanted]
    seeds = list(dict.fromkeys(given.seeds))
    series = [] if given.table else [(target, seed) for target in targets for seed in seeds]
    failed = (at_once if given.parallel > 1 else one_by_one)(series, given)
    if not given.no_table:
        write_table()
    if failed:
        print(
            f"{', '.join(failed)}: not made to the end, for what is said above; run again to continue",
            file=sys.stderr,
        )
    refused = ConfigError.exit_code
    return 0 if not failed else refused if set(failed.values()) == {refused} else 1


if __name__ == "__main__":
    sys.exit(console.run("records", main))
