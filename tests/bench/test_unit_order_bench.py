"""The bench of unit orders says what a file's layers take, sorted or not."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from bench import unit_order

RECORDS = Path(__file__).parents[2] / "bench" / "records"


def test_a_file_whose_units_are_sorted_gains_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = RECORDS / "lenet5_caffe-mnist-small.clq"
    monkeypatch.setattr(sys, "argv", ["unit_order.py", str(file)])
    assert unit_order.main() == 0
    found = re.search(
        r"([\d,]+) bytes; layers ([\d,]+) as they stand, ([\d,]+) sorted", capsys.readouterr().out
    )
    assert found
    whole, given, ordered = (int(one.replace(",", "")) for one in found.groups())
    assert whole == file.stat().st_size
    assert ordered == given < whole
