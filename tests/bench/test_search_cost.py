"""The simulated makespan is that of handing out the longest layer first."""

from __future__ import annotations

import pytest

from bench.search_cost import makespan, simulated


@pytest.mark.parametrize(("workers", "end"), [(1, 12.0), (2, 6.0), (3, 5.0), (9, 5.0)])
def test_every_worker_takes_the_longest_layer_left(workers: int, end: float) -> None:
    assert makespan([1.0, 5.0, 3.0, 2.0, 1.0], workers) == end


def test_the_rows_hold_critical_paths_and_efficiency() -> None:
    rows = {row.name: row.value for row in simulated("x", [2.0] * 16)}
    assert rows["x/makespan/1"] == 16.0
    assert rows["x/makespan/256"] == 1.0
    assert (rows["x/efficiency/16"], rows["x/efficiency/32"]) == (1.0, 0.5)
