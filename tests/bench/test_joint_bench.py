"""The bench of joint against two-stage shows what was measured with the settings that it was given."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import joint
from bench.record import RESULTS


def unit(variant: str, seed: int, data: Any, given: argparse.Namespace) -> dict[str, Any]:
    """As the bench's, without training."""
    measured = {"test_top1_percent": 90.0, "zeros_percent": 80.0, "clipped_first": 2, "recovered": 1}
    return {"variant": variant, "seed": seed, **joint.settings(given), **measured}


def test_units_of_other_settings_are_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, float, int]] = []

    def counting(variant: str, seed: int, data: Any, given: argparse.Namespace) -> dict[str, Any]:
        made.append((variant, given.learning_rate, given.batch_size))
        return unit(variant, seed, data, given)

    monkeypatch.setattr(joint, "RESULTS", tmp_path)
    monkeypatch.setattr(joint, "unit", counting)
    monkeypatch.setattr(joint, "write", lambda *given: tmp_path)
    monkeypatch.setattr(joint, "open_data", lambda *given, **more: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)

    def measured(*options: str) -> list[tuple[str, float, int]]:
        made.clear()
        monkeypatch.setattr(
            sys, "argv", ["joint.py", "--data", "d", "--weights", "w", "--seeds", "1", *options]
        )
        assert joint.main() == 0
        return list(made)

    assert measured() == [("joint", 0.03, 128), ("two-stage", 0.03, 128)]
    assert measured() == []
    assert measured("--learning-rate", "0.1") == [("joint", 0.1, 128), ("two-stage", 0.1, 128)]
    assert measured("--learning-rate", "0.1", "--batch-size", "64") == [
        ("joint", 0.1, 64),
        ("two-stage", 0.1, 64),
    ]
    assert measured("--learning-rate", "0.1", "--batch-size", "64") == []


def test_committed_units_which_say_no_batch_size_hold_for_the_default() -> None:
    path = RESULTS / "joint-units" / "joint-p0.8-b2-e6-seed0.json"
    given = argparse.Namespace(p=0.8, b=2, epochs=6, learning_rate=0.03, batch_size=joint.BATCH_SIZE)
    found = joint.stored(path, given)
    assert found is not None
    assert found.items() >= json.loads(path.read_text(encoding="utf-8")).items()
    given.batch_size = 64
    assert joint.stored(path, given) is None
