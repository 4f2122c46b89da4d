"""What every kind of data offers: labels, an order, batches, subsets.

Kinds: `tensors.TensorSplit` (decoded, in memory), `resident.ResidentSplit` (the same on a GPU), `encoded.EncodedSplit` (image files or Parquet, decoded batch by batch) and
`loaders.LoaderSplit` (a user's own dataset). Randomness comes only from the generators given. Not covered: sampling with weights.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipq_ray.data.preprocessing import Preprocessing

Labels = NDArray[np.int64]
_RUNS = 4  # of missing classes are named in a note


class Split(ABC):
    """Images with labels.

    `labels`: int64 (n,). `fingerprint`: SHA-256 in hex of what decides the content, the same in every process and on every
    machine; each kind says what it hashes.
    """

    labels: Labels
    fingerprint: str

    # Batches may be prepared in a background thread; False where that would touch the global random state.
    threaded: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    def order(self, generator: torch.Generator) -> Tensor:
        """A shuffled order of one epoch: int64 (n,), each index once."""
        return torch.randperm(len(self), generator=generator)

    def index_batches(
        self, generator: torch.Generator, batch_size: int, rank: int = 0, world: int = 1
    ) -> list[Tensor]:
        """What one of `world` ranks trains on in one epoch: its indices int64 (b,) of every step, each image in at most one of them.

        A step has `batch_size` images over all ranks, or all images where there are fewer; what is left at the end is left out. All
        ranks have as many steps; where `world` does not divide one, the first ranks have an image more. The same generator on every rank gives parts of one epoch.
        """
        order = self.order(generator)
        size = min(batch_size, len(order))
        whole = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
        return [batch[rank::world] for batch in whole]

    @abstractmethod
    def batch(self, indices: Tensor, augment: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Images float32 (B, C, H, W), normalised and contiguous, and labels int64 (B,), for `indices` int64 (B,).

        `augment`: the source of all randomness of the augmentation; None prepares images as for evaluation.
        """

    @abstractmethod
    def subset(self, indices: Tensor) -> Split:
        """The images at `indices` int64 (m,) in that order, without copying any."""

    @property
    def groups(self) -> NDArray[np.int64] | None:
        """int64 (n,): which images are read together, whole, however few of them are wanted; None: each by itself."""
        return None

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Names of the images that could not be read when batches were made, and for which others stood in (see `decoding.BadImages`)."""
        return ()


@dataclass(frozen=True)
class Data:
    """All that is known about one data set. `notes`: one line each for what was decided on the way."""

    train: Split
    validation: Split
    test: Split | None
    classes: int
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    validation_held_out: bool
    description: str
    notes: tuple[str, ...]


CLASSES_MOST = 1_000_000
"""More classes than that are no class numbers."""


def content_hash(*parts: bytes | NDArray[np.generic] | str) -> str:
    """SHA-256 in hex over the parts, each with its length, arrays also with type and shape."""
    total = hashlib.sha256()
    for part in parts:
        data: bytes | memoryview
        if isinstance(part, np.ndarray):
            total.update(f"{part.dtype.newbyteorder('<').str}{part.shape}".encode())
            data = np.ascontiguousarray(part, dtype=part.dtype.newbyteorder("<")).reshape(-1).data.cast("B")
        else:
            data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()


def subset_hash(fingerprint: str, indices: NDArray[np.int64]) -> str:
    """The fingerprint of a subset of what `fingerprint` stands for."""
    return content_hash("subset", fingerprint, indices)


def without_images(labels: Labels, classes: int, named: bool) -> list[str]:
    """A note on those of `classes` that `labels` int64 (n,) of training images lack, if any; where they are not `named`, numbers may begin elsewhere than at 0."""
    missing = np.flatnonzero(np.bincount(labels, minlength=classes) == 0)
    if not len(missing):
        return []
    runs = np.split(missing, np.flatnonzero(np.diff(missing) > 1) + 1)
    said = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs[:_RUNS]]
    more = sum(len(run) for run in runs[_RUNS:])
    which = ", ".join(said) + (f" and {more} more" if more else "")
    what = (
        f"class {which} has no training image"
        if len(missing) == 1
        else f"classes {which} have no training images"
    )
    return [what if named else f"{what}; are labels numbered from 0?"]
