"""The table of the records is what the units say, and the README has its overview."""

from __future__ import annotations

import re
from typing import Any

import pytest

from bench import records, records_table, records_units
from bench.record import RESULTS, ROOT


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1413.0], "1,413"),
        ([4834.0, 4797.0, 4825.0], "4,825 (4,797 to 4,834)"),
        ([2548.0, 2520.0], "2,534 (2,520 to 2,548)"),
        ([12.0, 12.0, 12.0], "12"),
    ],
)
def test_a_cell_is_the_median_and_where_they_differ_the_least_and_the_most(
    values: list[float], said: str
) -> None:
    assert records_table.spread(values, ",.0f") == said


def unit(size: int, error: float, commit: str, seed: int = 0) -> dict[str, Any]:
    return {
        "seed": seed,
        "bytes": size,
        "besides_weights": size - 4_000,
        "test_error_percent": error,
        "validation_top1_percent": 98.5,
        "epochs": 61,
        "seconds": 150.4,
        "commit": commit,
        "machine": {"gpu": None, "cpu": "a CPU"},
    }


def test_a_row_states_n_and_everything_that_made_it() -> None:
    found = records_table.line("without-hold-size", [unit(4_683, 1.3, "aaa"), unit(4_909, 1.1, "bbb")])
    assert found == (
        "| the recipe without `--hold-size` | 2 | 4,796 (4,683 to 4,909) | 796 (683 to 909) | 1.20 (1.10 to 1.30) | 1.50 | 61 | 150 | aaa on a CPU; bbb on a CPU |"
    )


def test_the_overview_has_those_beside_whom_all_others_stand_of_the_same_seeds() -> None:
    whole = {
        variant: [unit(4_700, 1.5, "aaa", 1), unit(4_710, 1.7, "aaa", 2)] for variant in records_table.WORDS
    }
    sections = {
        "one: at most 5,000 bytes": {
            **whole, "ours": [unit(4_800, 1.2, "a"), unit(4_810, 1.0, "a", 1), unit(4_806, 1.1, "a", 2)], "paper": [*whole["paper"], unit(1, 99.0, "a")],
        },
        "two: alone": {"ours": whole["ours"]},
        "three: of other seeds": {**whole, "ours": [unit(4_800, 1.2, "a")]},
    }  # fmt: skip
    rows = records_table.beside(sections).splitlines()[2:]
    assert rows == [
        "| `one` | 2 | 61 | 1.05 (1.00 to 1.10) in 4,808 | 1.60 (1.50 to 1.70) in 4,705 | 1.60 (1.50 to 1.70) in 4,705 | 1.60 (1.50 to 1.70) in 4,705 |"
    ]


def test_the_committed_table_is_what_the_committed_units_say() -> None:
    assert (RESULTS / "records.md").read_text(encoding="utf-8") == records_table.document(records.sections())


def test_what_a_file_holds_besides_weights_is_what_its_run_said_of_the_layers_left_out() -> None:
    for target in records_units.TARGETS[:3]:
        for unit in (records_units.Unit(target, "ours", seed) for seed in range(3)):
            found = unit.result
            assert found is not None
            layers = sum(one["bytes"] for one in found["plan"])
            assert unit.besides_weights() == found["bytes"] - layers > 0


def test_the_readme_has_the_overview_and_the_rows_of_the_recipes() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert records_table.beside(records.sections()) in readme
    said = re.findall(r"^\| \S+, \w[\w-]+: at most ([0-9,]+) bytes at ([0-9.]+) % \| (.*)$", readme, re.M)
    assert len(said) == len(records_units.TARGETS)
    for size, error, cells in said:
        (target,) = [one for one in records_units.TARGETS if f"{one.most_bytes:,}" == size]
        units = records_units.those_of(target, "ours")
        assert float(error) == pytest.approx(target.most_error)
        assert cells.startswith(records_table.bytes_of(units).removesuffix(")"))
        median, _, all_of_them = records_table.errors_of(units).partition(" ")
        assert f"| {median} % {all_of_them}" in cells
