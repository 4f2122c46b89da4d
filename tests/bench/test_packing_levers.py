"""The bench of packing's levers packs a run's own weights: with all levers it makes the run's file again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import packing_levers
from bench.record import Row
from clipq_ray.batch import compress
from clipq_ray.cluster.engine import LocalEngine
from clipq_ray.config import make
from clipq_ray.errors import ConfigError
from clipq_ray.progress import Reporter
from clipq_ray.source import Source
from clipq_ray.storage import Store

QUICK: dict[str, Any] = {
    "engine": "local", "epochs": 4, "baseline_epochs": 1, "batch_size": 32, "search_evaluations": 4, "search_start": 4, "search_images": 100,
    "rounds": 1, "target_bytes": 3600, "profile": "small",
}  # fmt: skip


def committed(storage: Path, **options: Any) -> Path:
    config = make(**{**QUICK, "storage": str(storage), **options})
    return Path(compress(Source(config), LocalEngine(), Reporter(quiet=True)).uri)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return committed(tmp_path_factory.mktemp("packing_levers"), hold_size=True)


def test_with_all_levers_the_run_s_own_file_is_made_again(run: Path) -> None:
    made = packing_levers.Round.of(run, {}).packed({})
    assert made.file == Store(str(run)).read("model.clq")


def test_every_lever_is_a_row_and_a_file_without_it_is_larger(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: list[Row] = []
    monkeypatch.setattr(packing_levers, "write", lambda _, rows: stored.extend(rows))
    assert packing_levers.main([str(run)]) == 0
    found = {one.name.removeprefix("packing_levers/lenet5/"): one.value for one in stored}
    kinds = ("bytes", "validation_top1", "dead_units")
    assert set(found) == {f"{lever}/{kind}" for lever in packing_levers.LEVERS for kind in kinds}
    least = found["as-made/bytes"]
    assert least < min(found["without-vectors/bytes"], found["fast-profile/bytes"])
    assert least < min(found["without-unit-order/bytes"], found["without-dead-units/bytes"])
    assert found["as-made/dead_units"] > 0 == found["without-dead-units/dead_units"]
    assert least == found["without-folding/bytes"]  # it has no batch norm


@pytest.mark.slow
def test_batch_norm_that_is_not_folded_takes_more_than_on_grids_and_less_than_all_vectors_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {
        "weights": "random",
        "epochs": 1,
        "limit_images": 100,
        "search_images": 20,
        "target_bytes": 80_000,
    }
    there = committed(tmp_path, hold_size=True, model="resnet20", **small)
    stored: list[Row] = []
    monkeypatch.setattr(packing_levers, "write", lambda _, rows: stored.extend(rows))
    packing_levers.main([str(there)])
    whole, apart, exact = (
        next(one.value for one in stored if one.name.endswith(f"/{lever}/bytes"))
        for lever in ("as-made", "without-folding", "without-vectors")
    )
    channels = 16 * 7 + 32 * 6 + 64 * 6
    assert whole + 4 * channels < apart < exact


def test_a_run_that_was_not_held_at_a_size_is_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match="expected a run with --hold-size"):
        packing_levers.Round.of(committed(run.parents[1]), {})
