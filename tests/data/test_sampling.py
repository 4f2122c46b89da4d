"""Stratified samples and windowed orders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipq_ray.data.sampling import hold_out, quotas, stratified, windowed_shares
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


def test_holding_out_leaves_each_class_an_image_while_others_have_more() -> None:
    labels = np.array([*range(20), *[20 + number % 10 for number in range(200)]])
    for count in (None, 100, 190):
        rest, held = hold_out(labels, count, 0)
        assert len(rest) + len(held) == 220
        assert set(labels[rest]) == set(range(30))
    assert len(hold_out(labels, 191, 0)[1]) == 191  # more than can be left
    assert len(hold_out(np.arange(6) % 2, None, 0)[1]) == 2
    assert len(hold_out(np.arange(2), None, 0)[1]) == 1
    with pytest.raises(ConfigError, match="expected at least 2 training images"):
        hold_out(np.zeros(1, dtype=np.int64), None, 0)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def windowed_order(groups: np.ndarray, group_bytes: np.ndarray, window_bytes: int, seed: int) -> torch.Tensor:
    (order,) = windowed_shares(groups, group_bytes, window_bytes, [len(groups)], seeded(seed))
    return order


def test_an_order_has_each_index_once_and_touches_few_groups_at_a_time() -> None:
    groups = np.repeat(np.arange(20), 10)
    order = windowed_order(groups, np.full(20, 100), 400, 0)
    assert sorted(order.tolist()) == list(range(200))
    windows = [set(groups[part.numpy()]) for part in order.split(40)]
    assert [len(window) for window in windows] == [4] * 5
    assert len(set(groups[order[:8].numpy()])) > 1
    assert windows[0] != {0, 1, 2, 3}


def test_groups_larger_than_a_window_are_taken_one_by_one_and_a_large_window_takes_all() -> None:
    groups = np.repeat(np.arange(5), 10)
    single = windowed_order(groups, np.full(5, 100), 1, 0)
    assert [len(set(groups[part.numpy()])) for part in single.split(10)] == [1] * 5
    whole = windowed_order(groups, np.full(5, 100), 10**6, 0)
    assert len(set(groups[whole[:10].numpy()])) > 2


def test_the_order_of_one_rank_is_pinned() -> None:
    order = windowed_order(np.repeat(np.arange(4), 3), np.full(4, 100), 200, 5)
    assert order.tolist() == [9, 4, 5, 10, 3, 11, 0, 2, 6, 7, 8, 1]  # as it was before there were ranks


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 5), st.integers(0, 99), st.data())
def test_ranks_part_the_images_and_share_groups_at_their_borders_only(
    sizes: list[int], world: int, seed: int, data: st.DataObject
) -> None:
    groups = np.repeat(np.arange(len(sizes)), sizes)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(groups)), min_size=world - 1, max_size=world - 1)))
    counts = np.diff([0, *cuts, len(groups)]).tolist()
    shares = windowed_shares(groups, np.array(sizes), 12, counts, seeded(seed))
    assert [len(share) for share in shares] == counts
    assert sorted(torch.cat(shares).tolist()) == list(range(len(groups)))
    readers = sum(len(set(groups[share.numpy()])) for share in shares)
    assert readers <= len(sizes) + world - 1
    again = windowed_shares(groups, np.array(sizes), 12, counts, seeded(seed))
    assert all(torch.equal(*pair) for pair in zip(shares, again, strict=True))
