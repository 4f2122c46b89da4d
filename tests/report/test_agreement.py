"""Counts and intervals of two networks on the same images."""

from __future__ import annotations

import numpy as np
import pytest

from clipq_ray.report.agreement import Agreement, compare, per_class


def test_the_four_cells_are_counted() -> None:
    label = np.array([0, 1, 2, 3, 4])
    reference = np.array([0, 1, 9, 9, 9])
    compressed = np.array([0, 9, 2, 9, 8])
    agreement = compare(label, reference, compressed)
    cells = (agreement.both_right, agreement.lost, agreement.won, agreement.both_wrong, agreement.same)
    assert cells == (1, 1, 1, 2, 2)
    assert agreement.n == 5
    assert agreement.same_percent == 40.0
    assert agreement.drop_points == 0.0


def counted(both_right: int, lost: int, won: int, both_wrong: int) -> Agreement:
    """The agreement on so many images of class 0."""
    reference = np.repeat([0, 0, 1, 1], [both_right, lost, won, both_wrong])
    compressed = np.repeat([0, 1, 0, 1], [both_right, lost, won, both_wrong])
    return compare(np.zeros_like(reference), reference, compressed)


def test_the_interval_is_agresti_and_mins() -> None:
    # By hand: n* = 102, (10.5 - 4.5) / 102 = 5.8824 points; sqrt(15 - 36/102) / 102 = 3.7521 points; times 1.95996.
    low, high = counted(both_right=80, lost=10, won=4, both_wrong=6).drop_interval()
    assert low == pytest.approx(5.88235 - 1.959964 * 3.75211, abs=2e-4)
    assert high == pytest.approx(5.88235 + 1.959964 * 3.75211, abs=2e-4)


def test_equal_networks_have_a_drop_of_zero_with_an_interval_around_it() -> None:
    low, high = counted(both_right=90, lost=0, won=0, both_wrong=10).drop_interval()
    assert low == -high
    assert high > 0


def test_classes_come_with_the_largest_drop_first_and_their_own_n() -> None:
    label = np.array([5, 2, 2, 5, 7, 7, 7])
    compressed = np.array([5, 0, 0, 0, 7, 7, 7])
    rows = per_class(label, label, compressed)
    assert [(name, row.n, row.drop_points) for name, row in rows] == [
        (2, 2, 100.0),
        (5, 2, 50.0),
        (7, 3, 0.0),
    ]
