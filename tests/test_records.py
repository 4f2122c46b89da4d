"""The records' targets and recipes fit together, and what the table says is what was stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import records
from clipq_ray.config import PAPER, make

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("target", records.TARGETS, ids=lambda target: target.name)
def test_every_target_has_a_recipe_of_its_size_and_a_published_twin(target: records.Target) -> None:
    options = target.options()
    config = make(**options)
    assert config.target_bytes is not None
    assert config.target_bytes <= target.most_bytes
    assert target.name.startswith(f"{config.model}-{config.data}-")
    twin = make(**records.published(options))
    assert twin.paper
    assert twin.target_bytes == config.target_bytes
    assert twin.epochs == config.epochs + config.level_epochs + (config.rungs - 1) * (config.rung_epochs or 0)
    assert all(getattr(twin, name) == value for name, value in PAPER.items())


def test_the_order_is_from_small_to_large_networks() -> None:
    assert [target.name.split("-")[0] for target in records.TARGETS] == [
        "lenet_300_100", "lenet5_caffe", "lenet5_caffe", "resnet20", "resnet20", "resnet56",
    ]  # fmt: skip


def test_rows_state_n_and_goals_and_the_median_seeds_file_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "UNITS", tmp_path / "units")
    monkeypatch.setattr(records, "RECORDS", tmp_path / "records")
    target = records.TARGETS[0]
    for seed, (size, error) in enumerate([(5900, 1.7), (5950, 1.5), (5800, 1.6)]):
        unit = records.Unit(target, "ours", seed)
        unit.stem.parent.mkdir(exist_ok=True)
        result: dict[str, Any] = {"bytes": size, "test_error_percent": error, "seconds": 60.0}
        unit.stem.with_suffix(".json").write_text(json.dumps(result))
        unit.stem.with_suffix(".clq").write_bytes(b"seed %d" % seed)
    size, error, _ = records.rows_of(target, "ours", range(100))
    assert (size.value, size.goal, size.n) == (5900, 6000, 3)
    assert (error.value, error.goal, error.n, error.met) == (1.6, 1.64, 3, True)
    assert records.rows_of(target, "paper", range(100)) == []
    records.keep_median(target, range(100))
    assert (tmp_path / "records" / f"{target.name}.clq").read_bytes() == b"seed 2"


def test_a_unit_that_is_there_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "UNITS", tmp_path)
    unit = records.Unit(records.TARGETS[0], "ours", 0)
    unit.stem.with_suffix(".json").write_text("{}")
    unit.make(tmp_path / "nothing here", tmp_path / "nothing here", [])
    assert not (tmp_path / "nothing here").exists()
