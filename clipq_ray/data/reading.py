"""In which order the images of an epoch are read where others decode them, so that each group of rows is read once and memory stays bounded.

Batches mix images of several groups (Parquet row groups); reading goes group by group. `Reading` says in which order images are read,
in which pieces, and when a batch has all of its own; it is a function of the batches. `assembled` makes the batches of what comes in.
Not covered: who reads and decodes the pieces (`cluster.ray_data`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipq_ray.data.decoding import Decoded, Numbers
from clipq_ray.data.encoded import EncodedSplit

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Reading:
    """The images of `batches` (int64 (b,) each) in the order in which they are read.

    `indices`: int64 (n,), the images of all batches one behind the other; `seeds`: of each batch's augmentation, or None.
    `order`: int64 (n,), which of them is read first, second, ...; piece k is `order[cuts[k]:cuts[k + 1]]`.
    """

    indices: Indices
    starts: Indices
    seeds: tuple[int | None, ...]
    order: Indices
    cuts: Indices

    @property
    def pieces(self) -> int:
        """How many pieces there are."""
        return len(self.cuts) - 1

    def decoded(self, split: EncodedSplit, piece: int, at_once: int) -> Iterator[list[Decoded]]:
        """The images of one piece, as `EncodedSplit.decode` gives them in their batches, at most `at_once` and of one group at a time."""
        places = self.order[self.cuts[piece] : self.cuts[piece + 1]]
        groups = split.source.groups
        begins = {0}
        if groups is not None:
            begins |= set((np.flatnonzero(np.diff(groups[split.rows[self.indices[places]]])) + 1).tolist())
        start = 0
        for end in range(1, len(places) + 1):
            if end == len(places) or end in begins or end - start == at_once:
                part = places[start:end]
                indices = torch.from_numpy(self.indices[part])
                yield split.decode(indices, self._numbers(split, part))
                start = end

    def _numbers(self, split: EncodedSplit, places: Indices) -> Numbers | None:
        """Random numbers are drawn for a batch at once; each image has its row of them."""
        batch = np.searchsorted(self.starts, places, side="right") - 1
        rows = []
        for one in np.unique(batch).tolist():
            count = int(self.starts[one + 1] - self.starts[one])
            drawn = split.numbers(count, _generator(self.seeds[one]))
            if drawn is None:
                return None
            rows.append((batch == one, drawn))
        numbers = np.empty((len(places), rows[0][1].shape[1]))
        for mine, drawn in rows:
            numbers[mine] = drawn[places[mine] - self.starts[batch[mine]]]
        return numbers


def reading(
    split: EncodedSplit,
    batches: Sequence[Tensor],
    seeds: Sequence[int | None],
    *,
    waiting_bytes: int,
    piece_bytes: int,
) -> Reading:
    """Where to read what. `waiting_bytes`: decoded images that wait for their batch, at most about twice; `piece_bytes`: decoded images of a
    piece, if its last group is small. A group whose images do not fit into what may wait is read more than once."""
    indices = torch.cat(list(batches)).numpy()
    starts = np.cumsum([0, *[len(batch) for batch in batches]])
    groups = split.source.groups
    group = np.arange(len(indices)) if groups is None else groups[split.rows[indices]]
    image_bytes = int(np.prod(split.preprocessing.input_shape))
    order, first = _by_group(group, max(1, waiting_bytes // image_bytes))
    wanted = max(1, piece_bytes // image_bytes)
    cuts, start = [0], 0
    for end in [*np.flatnonzero(first)[1:].tolist(), len(order)]:
        if end - start >= wanted or end == len(order):
            cuts.append(end)
            start = end
    return Reading(indices, starts, tuple(seeds), order, np.array(cuts))


def assembled(
    split: EncodedSplit,
    plan: Reading,
    images: Iterable[Decoded],
    generators: Callable[[int], torch.Generator | None],
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, bit by bit those of `split.batch(indices, generators(number))`, from all images of the plan in the order of reading."""
    waiting: dict[int, Decoded] = {}
    arriving = zip(plan.order.tolist(), images, strict=True)
    for number, (start, end) in enumerate(
        zip(plan.starts[:-1].tolist(), plan.starts[1:].tolist(), strict=True)
    ):
        missing = sum(place not in waiting for place in range(start, end))
        while missing:
            place, image = next(arriving)
            waiting[place] = image
            missing -= start <= place < end
        chosen = [waiting.pop(place) for place in range(start, end)]
        augment = generators(number)
        indices = torch.from_numpy(plan.indices[start:end])
        yield split.made(indices, chosen, split.numbers(end - start, augment), augment)


def _generator(seed: int | None) -> torch.Generator | None:
    return None if seed is None else torch.Generator().manual_seed(seed)


def _by_group(group: Indices, most: int) -> tuple[Indices, NDArray[np.bool_]]:
    """Places 0..n-1 of a sequence whose groups are `group` (n,) in an order that has each group at once, and where in it a group begins.

    The sequence is cut into spans of at most `most` places, at a place that parts no group where there is one: nothing moves out of its span.
    """
    n = len(group)
    _, name = np.unique(group, return_inverse=True)
    last = np.zeros(int(name.max(initial=0)) + 1, dtype=np.int64)
    last[name] = np.arange(n)
    closed = np.flatnonzero(np.maximum.accumulate(last[name]) == np.arange(n)) + 1
    orders, begins, start = [], [], 0
    while start < n:
        within = int(np.searchsorted(closed, start + most, side="right"))
        end = int(closed[within - 1]) if within and closed[within - 1] > start else min(start + most, n)
        span = name[start:end]
        _, met, back = np.unique(span, return_index=True, return_inverse=True)
        turn = met[back]
        by_turn = np.argsort(turn, kind="stable")
        orders.append(start + by_turn)
        begins.append(np.diff(turn[by_turn], prepend=-1) != 0)
        start = end
    if not n:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool)
    return np.concatenate(orders), np.concatenate(begins)
