"""Stratified samples and windowed orders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipq_ray.data.sampling import hold_out, quotas, stratified, windowed_order
from clipq_ray.errors import ConfigError


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.data())
def test_a_sample_has_every_class_in_proportion_with_and_without_groups(
    labels: list[int], data: st.DataObject
) -> None:
    numbers = np.array(labels, dtype=np.int64)
    count = data.draw(st.integers(1, len(labels)))
    for groups in (None, np.arange(len(labels)) // 7):
        chosen = stratified(numbers, count, 3, "here", groups)
        assert len(np.unique(chosen)) == count
        assert np.array_equal(chosen, np.sort(chosen))
        exact = count * np.bincount(numbers) / len(labels)
        assert np.all(np.abs(np.bincount(numbers[chosen], minlength=len(exact)) - exact) < 1)


def test_a_sample_depends_on_seed_and_place_only() -> None:
    labels = np.arange(1000) % 10
    first = stratified(labels, 100, 1, "a")
    assert np.array_equal(first, stratified(labels.copy(), 100, 1, "a"))
    assert not np.array_equal(first, stratified(labels, 100, 2, "a"))
    assert not np.array_equal(first, stratified(labels, 100, 1, "b"))


def test_a_sample_reads_few_groups_where_classes_are_mixed_and_all_where_they_are_sorted() -> None:
    labels, groups = np.arange(10_000) % 10, np.arange(10_000) // 100
    mixed = stratified(labels, 200, 0, "x", groups)
    assert len(np.unique(groups[mixed])) == 2
    by_class = stratified(np.sort(labels), 200, 0, "x", groups)
    assert np.array_equal(np.bincount(np.sort(labels)[by_class]), np.full(10, 20))


def test_rare_classes_get_the_largest_remainders() -> None:
    assert quotas(np.array([0] * 97 + [1] * 3), 10).tolist() == [10, 0]
    assert quotas(np.array([0] * 50 + [1] * 30 + [2] * 20), 10).tolist() == [5, 3, 2]


def test_holding_out_parts_the_images_and_has_a_default() -> None:
    rest, held = hold_out(np.arange(200) % 4, None, 0)
    assert len(held) == 20
    assert np.array_equal(np.sort(np.concatenate([rest, held])), np.arange(200))
    assert len(hold_out(np.zeros(100_000, dtype=np.int64), None, 0)[1]) == 5000
    for count in (0, 200, 201):
        with pytest.raises(ConfigError, match="validation images"):
            hold_out(np.arange(200) % 4, count, 0)


def test_an_order_has_each_index_once_and_touches_few_groups_at_a_time() -> None:
    groups = np.repeat(np.arange(20), 10)
    order = windowed_order(groups, np.full(20, 100), 400, torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(200))
    windows = [set(groups[part.numpy()]) for part in order.split(40)]
    assert [len(window) for window in windows] == [4] * 5
    assert len(set(groups[order[:8].numpy()])) > 1
    assert windows[0] != {0, 1, 2, 3}


def test_groups_larger_than_a_window_are_taken_one_by_one_and_a_large_window_takes_all() -> None:
    groups = np.repeat(np.arange(5), 10)
    single = windowed_order(groups, np.full(5, 100), 1, torch.Generator().manual_seed(0))
    assert [len(set(groups[part.numpy()])) for part in single.split(10)] == [1] * 5
    whole = windowed_order(groups, np.full(5, 100), 10**6, torch.Generator().manual_seed(0))
    assert len(set(groups[whole[:10].numpy()])) > 2
