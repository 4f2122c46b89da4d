"""Folders of images, one folder per class: train/<class>/*.jpg.

Files are read one by one when a batch needs them, locally or from any URI. The fingerprint hashes all names and sizes and the content
of at most 64 files, evenly spaced over the sorted names. Not covered: labels in a separate file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipq_ray.connections import chain
from clipq_ray.data.decoding import Encoded
from clipq_ray.data.listing import Listing, few
from clipq_ray.data.split import Labels, content_hash
from clipq_ray.errors import DataError, StorageError

Rows = NDArray[np.int64]
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SAMPLE_FILES = 64
_AT_ONCE = 8
_FEW = 256

_T = TypeVar("_T")


class ImageFiles:
    """Image files in a directory, as an `encoded.ImageRows`; the label is the position of the file's folder in `classes`."""

    groups: Rows | None = None

    def __init__(self, listing: Listing, names: Sequence[str], folder: str, classes: Sequence[str]) -> None:
        """`names`: files `folder/<class>/...` of the listing (`folder` may be empty); `DataError` for a class not in `classes`."""
        self.listing = listing
        self.names = sorted(names)
        number = {name: position for position, name in enumerate(classes)}
        of = [class_of(name, folder) for name in self.names]
        unknown = sorted(set(of) - set(number))
        if unknown:
            raise DataError(
                f"expected the classes of the training images ({len(classes)}: {few(list(classes))}), "
                f"got {few(unknown)} in {listing.at(folder)}; rename or remove these folders"
            )
        self.labels: Labels = np.array([number[name] for name in of], dtype=np.int64)
        spaced = np.unique(np.linspace(0, len(self.names) - 1, SAMPLE_FILES).astype(int))
        below = f"{folder}/" if folder else ""  # the same images are the same, whichever folder was opened
        inside = "\n".join(f"{name.removeprefix(below)}\t{listing.sizes[name]}" for name in self.names)
        # classes that are numbers in their order and not in that of their names have other labels than they had when names alone decided
        order = (
            ["\n".join(classes)]
            if all(map(str.isdecimal, classes)) and list(classes) != sorted(classes)
            else []
        )
        self.fingerprint = content_hash("files", inside, *self._contents(spaced), *order)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, row: int) -> str:
        """The file's URI."""
        return self.listing.at(self.names[row])

    def read(self, rows: Rows) -> list[Encoded]:
        """The files' bytes, some read at once where they are not on this machine."""
        return self._each(self._bytes, rows)

    def _each(self, read: Callable[[str], _T], rows: Rows) -> list[_T]:
        names = [self.names[row] for row in rows]
        if self.listing.store.local is not None or len(names) < 2:
            return [read(name) for name in names]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(read, names))

    def _bytes(self, name: str) -> Encoded:
        """Of one file; why it has none where it may not be read, or has gone: that is a bad image like others."""
        try:
            return self.listing.read(name)
        except StorageError as error:
            if any(isinstance(one, FileNotFoundError | PermissionError) for one in chain(error)):
                return str(error)
            raise

    def shares(self, rows: Rows, counts: Sequence[int], generator: torch.Generator) -> list[Tensor]:
        """A plain permutation, cut."""
        return list(torch.randperm(len(rows), generator=generator).split(list(counts)))

    def same_images(self, other: object) -> bool:
        """Whether these are the files of `other`, whatever they are called: of as many bytes in each class, and the same where that tells them apart. Many files
        of one size (bitmaps) are told by their names too."""
        if not isinstance(other, ImageFiles) or len(self) != len(other):
            return False
        mine, theirs = self._by_size(), other._by_size()
        if {key: len(rows) for key, rows in mine.items()} != {key: len(rows) for key, rows in theirs.items()}:
            return False
        if len(self) <= _FEW:
            everything = np.arange(len(self))
            return sorted(map(bytes, self._contents(everything))) == sorted(
                map(bytes, other._contents(everything))
            )
        alone = sorted(key for key, rows in mine.items() if len(rows) == 1)
        if not alone:
            return self.fingerprint == other.fingerprint
        chosen = [alone[at] for at in np.unique(np.linspace(0, len(alone) - 1, SAMPLE_FILES).astype(int))]
        contents = (
            one._contents(np.array([rows[key][0] for key in chosen]))
            for one, rows in ((self, mine), (other, theirs))
        )
        return next(contents) == next(contents)

    def _by_size(self) -> dict[tuple[int, int], list[int]]:
        """The rows by label and bytes of the file."""
        found: dict[tuple[int, int], list[int]] = {}
        for row, name in enumerate(self.names):
            found.setdefault((int(self.labels[row]), self.listing.sizes[name]), []).append(row)
        return found

    def _contents(self, rows: Rows) -> list[bytes]:
        return list(self._each(self.listing.read, rows))

    def unbuffered(self) -> ImageFiles:
        """Itself: no file is kept."""
        return self


def class_of(name: str, folder: str) -> str:
    """The first folder below `folder`; "" for a file that lies in none."""
    inside = name.removeprefix(f"{folder}/") if folder else name
    return inside.partition("/")[0] if "/" in inside else ""
