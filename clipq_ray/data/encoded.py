"""Images that are decoded batch by batch, from files or from Parquet row groups.

`ImageRows` is what a source has to offer (`parquet.ParquetRows`, `folders.ImageFiles`); `EncodedSplit` turns rows of it into batches,
`decoded` turns all of it into a split in memory. An unreadable image that is met in a batch is counted, logged and replaced by the
next readable one of its split, with that one's label: batches keep their size, and so do the steps of an epoch on every rank. Not
covered: finding bad images of large sets in advance; that would read everything.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipq_ray.data.augment import crop_and_flip, draws
from clipq_ray.data.decoding import BadImages, Decoded, Encoded, Numbers, decode_many
from clipq_ray.data.preprocessing import Preprocessing
from clipq_ray.data.split import Labels, Split, subset_hash
from clipq_ray.data.tensors import TensorSplit
from clipq_ray.errors import DataError

Rows = NDArray[np.int64]
_DECODE_AT_ONCE = 2048


class ImageRows(Protocol):
    """A source of encoded images. `groups`: int64 (n,), which group each row is read with; None: rows are read one by one."""

    labels: Labels
    fingerprint: str
    groups: Rows | None

    def name(self, row: int) -> str:
        """What to call the image in a message."""
        ...

    def read(self, rows: Rows) -> Sequence[Encoded]:
        """The encoded images at `rows`; None where there are no bytes, or the reason why."""
        ...

    def shares(self, rows: Rows, counts: Sequence[int], generator: torch.Generator) -> list[Tensor]:
        """Shuffled positions 0..m-1 in `rows` (m,) for each rank, int64 (counts[rank],), in an order that is cheap to read; sum of `counts`: m."""
        ...

    def same_images(self, other: object) -> bool:
        """Whether `other` holds the same images, in whatever order."""
        ...

    def unbuffered(self) -> ImageRows:
        """The same source for a process that asks for each group once and has no use for a cache."""
        ...


class EncodedSplit(Split):
    """Rows of a source, decoded when they are asked for."""

    def __init__(
        self,
        source: ImageRows,
        rows: Rows,
        preprocessing: Preprocessing,
        bad: BadImages,
        padding: int | None = None,
    ) -> None:
        """The images `rows` int64 (n,) of `source`; unreadable ones are counted in `bad`; `padding` as for `tensors.TensorSplit`."""
        self.source = source
        self.preprocessing = preprocessing
        self.bad = bad
        self.padding = preprocessing.input_shape[1] // 8 if padding is None else padding
        self.rows = rows
        self._replaced: dict[str, None] = {}  # in the order in which they were met
        self.labels = source.labels[rows]
        self.fingerprint = subset_hash(source.fingerprint, rows)

    @property
    def groups(self) -> Rows | None:
        """As `Split.groups`."""
        return None if self.source.groups is None else self.source.groups[self.rows]

    def order(self, generator: torch.Generator) -> Tensor:
        """As `Split.order`; where rows are read in groups, shuffled groups first, then rows inside windows of groups."""
        return self.source.shares(self.rows, [len(self)], generator)[0]

    def index_batches(
        self, generator: torch.Generator, batch_size: int, rank: int = 0, world: int = 1
    ) -> list[Tensor]:
        """As `Split.index_batches`; where rows are read in groups, each group is read by one rank, but for those at the borders of two."""
        size = min(batch_size, len(self))
        steps = len(self) // size
        mine = [len(range(one, size, world)) for one in range(world)]
        counts = [steps * count for count in mine]
        counts[-1] += len(self) - steps * size  # left out of the last rank's, as of the only one's
        share = self.source.shares(self.rows, counts, generator)[rank]
        return list(share[: steps * mine[rank]].view(steps, mine[rank]))

    def batch(self, indices: Tensor, augment: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """As `Split.batch`; random resized crops and flips, or crops with padding where images already have the input's size."""
        numbers = self.numbers(len(indices), augment)
        return self.made(indices, self.decode(indices, numbers), numbers, augment)

    def numbers(self, count: int, augment: torch.Generator | None) -> Numbers | None:
        """What decoding `count` images of a batch needs of its generator: float64 (count, DRAWS), or nothing."""
        large = self.preprocessing.resize is not None
        return draws(count, augment) if large and augment is not None else None

    def decode(self, indices: Tensor, numbers: Numbers | None) -> list[Decoded]:
        """First half of `batch`: pixels uint8 (c, h, w) of each image, or the reason why it has none."""
        return decode_many(self.source.read(self.rows[indices.numpy()]), self.preprocessing, numbers)

    def made(
        self,
        indices: Tensor,
        images: Sequence[Decoded],
        numbers: Numbers | None,
        augment: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        """Second half of `batch`: what was decoded, perhaps elsewhere, as a batch; `numbers` and `augment` as in the first."""
        chosen = indices.numpy().astype(np.int64, copy=True)
        large = self.preprocessing.resize is not None
        pixels = np.empty((len(chosen), *self.preprocessing.input_shape), dtype=np.uint8)
        for position, image in enumerate(images):
            if isinstance(image, str):
                at = None if numbers is None else numbers[position : position + 1]
                chosen[position], image = self._instead(int(chosen[position]), image, at)
            pixels[position] = image
        if augment is not None and not large:
            pixels = crop_and_flip(pixels, self.padding, self.preprocessing.input_shape[0] == 3, augment)
        return self.preprocessing.apply(torch.from_numpy(pixels)), torch.from_numpy(self.labels[chosen])

    def _instead(self, index: int, reason: str, numbers: Numbers | None) -> tuple[int, NDArray[np.uint8]]:
        """The next index whose image can be read, and its pixels; every bad one on the way is counted."""
        for step in range(1, len(self)):
            name = self.source.name(int(self.rows[(index + step - 1) % len(self)]))
            self.bad.add(name, reason)
            self._replaced[name] = None
            candidate = (index + step) % len(self)
            image: Decoded = decode_many(
                self.source.read(self.rows[candidate : candidate + 1]), self.preprocessing, numbers
            )[0]
            if not isinstance(image, str):
                return candidate, image
            reason = image
        raise DataError(f"expected at least one readable image, found none among {len(self)}: {reason}")

    def unbuffered(self) -> EncodedSplit:
        """The same images for a process that decodes each once."""
        other = copy.copy(self)
        other.source = self.source.unbuffered()
        return other

    def subset(self, indices: Tensor) -> EncodedSplit:
        """As `Split.subset`; source and cache are shared."""
        chosen = indices.numpy().astype(np.int64, copy=True)
        part = copy.copy(self)
        part.labels = self.labels[chosen]
        part.rows = self.rows[chosen]
        part._replaced = {}
        part.fingerprint = subset_hash(self.fingerprint, chosen)
        return part

    @property
    def unreadable(self) -> tuple[str, ...]:
        """In this process."""
        return tuple(self._replaced)


def decoded(
    source: ImageRows, rows: Rows, preprocessing: Preprocessing, bad: BadImages, padding: int | None = None
) -> TensorSplit:
    """The images `rows` of `source`, which have the input's size, as a split in memory; unreadable ones are left out."""
    pixels = np.empty((len(rows), *preprocessing.input_shape), dtype=np.uint8)
    good = np.ones(len(rows), dtype=bool)
    left_out = ""
    for start in range(0, len(rows), _DECODE_AT_ONCE):
        part = rows[start : start + _DECODE_AT_ONCE]
        for position, image in enumerate(decode_many(source.read(part), preprocessing, None), start):
            if isinstance(image, str):
                good[position] = False
                left_out = source.name(int(rows[position]))
                bad.add(left_out, image)
            else:
                pixels[position] = image
    if left_out:
        pixels = pixels[good]
    if not len(pixels):
        raise DataError(f"expected readable images, found none among {len(rows)}: {left_out}")
    labels = source.labels[rows[good]]
    return TensorSplit(pixels, labels, preprocessing, padding=padding)
