"""Which images: fixed stratified samples, and shuffled orders that read a few row groups at a time.

Images of large sets lie in groups (Parquet row groups) that are read whole. A sample therefore takes as few groups as give every class
its share, and an epoch shuffles groups, deals them to the ranks, and shuffles images inside windows of groups that fit a budget. Not
covered: weighted sampling.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipq_ray.errors import ConfigError
from clipq_ray.seeds import generator as seeded

MOST_VALIDATION_IMAGES = 5000
Indices = NDArray[np.int64]


def quotas(labels: Indices, count: int, left: int = 0) -> Indices:
    """How many of `count` images each class 0..max gets, in proportion to its size; the largest remainders get the rest. `left`: how many images
    each class keeps at least while others have more than that."""
    sizes = np.bincount(labels)
    share = np.minimum(_proportional(sizes, count), np.maximum(sizes - left, 0))
    while missing := count - int(share.sum()):
        spare = np.maximum(sizes - left - share, 0)
        share += _proportional(spare if spare.any() else sizes - share, missing)
    return share


def _proportional(sizes: Indices, count: int) -> Indices:
    """At most `count` and each size, in proportion."""
    count, whole = min(count, int(sizes.sum())), int(sizes.sum())
    exact = count * sizes  # in units of 1/n, so that no rounding decides
    share = exact // whole
    by_remainder = np.argsort(-(exact % whole), kind="stable")
    share[by_remainder[: count - int(share.sum())]] += 1
    return share


def stratified(
    labels: Indices, count: int, seed: int, place: str, groups: Indices | None = None, left: int = 0
) -> Indices:
    """Sorted indices int64 (count,) of a sample with every class in proportion.

    It depends on labels, groups, count, seed, place and `left` (`quotas`) only. With `groups` int64 (n,), all images come from the first groups of a
    shuffled list that can give every class its share: where images lie in no order of class, that is few of them.
    """
    if not 1 <= count <= len(labels):
        raise ConfigError(f"expected a sample of 1 to {len(labels)} images, got {count}")
    share = quotas(labels, count, left)
    draw = seeded(seed, "sample", place)
    eligible = np.arange(len(labels)) if groups is None else _first_groups(labels, share, groups, draw)
    shuffled = eligible[torch.randperm(len(eligible), generator=draw).numpy()]
    # Position of each image among those of its own class, in shuffled order: taken while below the class's share.
    by_class = np.argsort(labels[shuffled], kind="stable")
    ordered = labels[shuffled][by_class]
    position = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
    return np.sort(shuffled[by_class[position < share[ordered]]])


def hold_out(
    labels: Indices, count: int | None, seed: int, groups: Indices | None = None
) -> tuple[Indices, Indices]:
    """Sorted indices of the training images that stay, of each class one at least if that can be, and of a stratified sample of `count` that become validation images.

    `count` None: 10 %, at most 5,000 and at least two. The sample is a function of labels, groups, count and seed.
    """
    if len(labels) < 2:
        raise ConfigError(
            f"expected at least 2 training images to hold validation images out of, got {len(labels)}; give more, or validation images"
        )
    if count is None:
        count = min(max(2, len(labels) // 10), MOST_VALIDATION_IMAGES, len(labels) - 1)
    if not 1 <= count < len(labels):
        raise ConfigError(
            f"expected at most {len(labels) - 1} validation images out of {len(labels)} training images, got {count}"
        )
    held = stratified(labels, count, seed, "validation", groups, left=1)
    return np.setdiff1d(np.arange(len(labels)), held), held


def _first_groups(labels: Indices, share: Indices, groups: Indices, draw: torch.Generator) -> Indices:
    """The images of the shortest prefix of shuffled groups in which every class has at least its share."""
    names, group = np.unique(groups, return_inverse=True)
    rank = np.empty(len(names), dtype=np.int64)
    rank[torch.randperm(len(names), generator=draw).numpy()] = np.arange(len(names))
    when = rank[group]
    by_class = np.lexsort((when, labels))
    first = np.searchsorted(labels[by_class], np.arange(len(share)))
    wanted = share > 0
    last = when[by_class[(first + share - 1)[wanted]]].max()
    return np.flatnonzero(when <= last)


def windowed_shares(
    groups: Indices,
    group_bytes: Indices,
    window_bytes: int,
    counts: Sequence[int],
    generator: torch.Generator,
) -> list[Tensor]:
    """The images of each rank in a shuffled order: int64 (counts[rank],), each image 0..n-1 in one of them, n the sum of `counts`.

    `groups`: int64 (n,), the group of each image. Groups are shuffled and dealt to the ranks one behind the other, so that a rank reads
    its own ones only; of a group at the border of two ranks each has a random part. A rank's groups are cut into windows of at most
    `window_bytes` (at least one group each), and its images shuffled inside a window. One rank and one window give a plain permutation.
    """
    names, group = np.unique(groups, return_inverse=True)
    turns = torch.randperm(len(names), generator=generator).numpy()
    shuffled = torch.randperm(len(groups), generator=generator).numpy()
    turn, place = np.empty_like(turns), np.empty_like(shuffled)
    turn[turns], place[shuffled] = np.arange(len(turns)), np.arange(len(shuffled))
    dealt = np.lexsort((place, turn[group]))
    sizes = group_bytes[names[turns]]
    shares = []
    for part in np.split(dealt, np.cumsum(counts)[:-1]):
        its_turn = turn[group[part]]
        window = np.zeros(len(turns), dtype=np.int64)
        present = np.unique(its_turn)
        window[present] = _windows(sizes[present], window_bytes)
        shares.append(torch.from_numpy(part[np.lexsort((place[part], window[its_turn]))]))
    return shares


def _windows(sizes: Indices, most: int) -> Indices:
    """The number of the window of each group, in the order given: sums of `sizes` up to `most`, at least one group each."""
    window = np.empty(len(sizes), dtype=np.int64)
    used, current = 0, 0
    for position, size in enumerate(sizes.tolist()):
        if used and used + size > most:
            used, current = 0, current + 1
        used += size
        window[position] = current
    return window
