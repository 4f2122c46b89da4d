"""Encoded images in Parquet files: columns `image` struct<bytes, path> and `label`, as Hugging Face's data sets have them.

Opening reads footers and label columns; row groups are read when a batch needs them and kept, least recently used first out, while they
fit `cache_bytes`. An epoch shuffles row groups, deals them to the ranks, and shuffles images inside windows of half the cache, so that
every row group is read about once per epoch and by one rank: more files than memory holds are no problem, but the order depends on
`cache_bytes`. The fingerprint hashes base
names, sizes, footers, all labels and 64 KiB from the middle of every file; a change of pixels that touches none of these is not seen.
Not covered: images given by `path` alone, nested or encrypted files, one row group larger than memory.
"""

from __future__ import annotations

import copy
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipq_ray.data.listing import Listing, reading
from clipq_ray.data.sampling import windowed_shares
from clipq_ray.data.split import Labels, content_hash
from clipq_ray.errors import DataError

Rows = NDArray[np.int64]
_TAIL_BYTES = SAMPLE_BYTES = 2**16
_AT_ONCE = 8  # requests under way while opening; object stores answer each in tens of milliseconds
_GROUPS_AT_ONCE = 4


@dataclass(frozen=True)
class File:
    """One Parquet file. `labels`: int64 (rows,); `names`: of the classes, empty if the file does not say."""

    name: str
    metadata: Any
    image_leaf: str
    labels: Labels
    names: tuple[str, ...]
    fingerprint: str
    content: str  # whatever the file is called


class ParquetRows:
    """The rows of several files in the order given, as an `encoded.ImageRows`."""

    def __init__(self, listing: Listing, names: Sequence[str], cache_bytes: int) -> None:
        """Read footers and labels of `names`; `DataError` naming the file that is damaged or lacks a column."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            self.files = list(pool.map(lambda name: _open(listing, name), names))
        self.listing = listing
        self.cache_bytes = cache_bytes
        self.labels: Labels = np.concatenate([file.labels for file in self.files])
        if not len(self.labels):
            raise DataError(f"expected images in {listing.at(names[0])}, found no rows; check the files")
        self.fingerprint = content_hash("parquet", *[file.fingerprint for file in self.files])
        counts, sizes = [], []
        self._groups: list[tuple[int, int]] = []
        for position, file in enumerate(self.files):
            for group in range(file.metadata.num_row_groups):
                about = file.metadata.row_group(group)
                counts.append(about.num_rows)
                sizes.append(about.total_byte_size)
                self._groups.append((position, group))
        self.groups: Rows | None = np.repeat(np.arange(len(counts)), counts)
        self._group: Rows = self.groups
        self._group_bytes: Rows = np.array(sizes, dtype=np.int64)
        if (
            sum(sizes) > cache_bytes // 2
        ):  # then an epoch's order, and so what is trained, depends on the window
            self.fingerprint = content_hash(self.fingerprint, str(cache_bytes // 2))
        self._group_starts: Rows = np.cumsum([0, *counts])[:-1]
        self._cache: OrderedDict[int, Any] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, row: int) -> str:
        """FILE:ROW, the row counted from 0 in its file."""
        group = int(self._group[row])
        position, _ = self._groups[group]
        first = int(self._group_starts[self._groups.index((position, 0))])
        return f"{self.listing.at(self.files[position].name)}:{row - first}"

    def shares(self, rows: Rows, counts: Sequence[int], generator: torch.Generator) -> list[Tensor]:
        """Shuffled row groups, dealt to the ranks, then rows inside windows of them (`sampling.windowed_shares`)."""
        return windowed_shares(self._group[rows], self._group_bytes, self.cache_bytes // 2, counts, generator)

    def same_images(self, other: object) -> bool:
        """Whether these are the files of `other`, whatever they are called."""
        if not isinstance(other, ParquetRows):
            return False
        return sorted(file.content for file in self.files) == sorted(file.content for file in other.files)

    def unbuffered(self) -> ParquetRows:
        """The same rows for a process that asks for each row group once: none but the last is kept."""
        other = copy.copy(self)  # without the cache, as `__getstate__` says
        other.cache_bytes = 0
        return other

    def read(self, rows: Rows) -> list[bytes | None]:
        """The encoded images; row groups that are not cached are read, some at once."""
        result: list[bytes | None] = [None] * len(rows)
        groups = self._group[rows]
        needed = [int(group) for group in np.unique(groups)]
        with self._lock:
            # Cached ones first: reading the others may push them out.
            needed.sort(key=lambda group: group not in self._cache)
            for start in range(0, len(needed), _GROUPS_AT_ONCE):
                part = needed[start : start + _GROUPS_AT_ONCE]
                for group, images in zip(part, self._loaded(part), strict=True):
                    for position in np.flatnonzero(groups == group):
                        value = images[int(rows[position] - self._group_starts[group])]
                        result[position] = value.as_py()
        return result

    def _loaded(self, groups: list[int]) -> list[Any]:
        missing = [group for group in groups if group not in self._cache]
        if len(missing) > 1:
            with ThreadPoolExecutor(len(missing)) as pool:
                fresh = dict(zip(missing, pool.map(self._read_group, missing), strict=True))
        else:
            fresh = {group: self._read_group(group) for group in missing}
        images = []
        for group in groups:
            if group in fresh:
                self._cache[group] = fresh[group]
                self._cached_bytes += fresh[group].nbytes
            self._cache.move_to_end(group)
            images.append(self._cache[group])
        while self._cached_bytes > self.cache_bytes and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return images

    def _read_group(self, group: int) -> Any:
        """A `pyarrow.ChunkedArray` of bytes."""
        position, inside = self._groups[group]
        file = self.files[position]

        def read() -> Any:
            with self.listing.open(file.name) as source:
                reader = pq.ParquetFile(source, metadata=file.metadata)
                return reader.read_row_group(inside, columns=[file.image_leaf], use_threads=False).column(0)

        with reading(self.listing.at(file.name)):
            column = self.listing.store.patiently(read)
        return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict(), "_cached_bytes": 0, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


def class_names(files: Sequence[File], listing: Listing) -> tuple[str, ...]:
    """The names that `files` state for their label numbers, empty if none does; `DataError` where two state different ones."""
    stated = [file for file in files if file.names]
    for other in stated[1:]:
        one, two = stated[0].names, other.names
        if one != two:
            number = next((n for n, pair in enumerate(zip(one, two, strict=False)) if pair[0] != pair[1]), -1)
            # where one has all names of the other and more
            got = [
                f"class {number} is {name[number]}" if number >= 0 else f"{len(name)} classes"
                for name in (one, two)
            ]
            raise DataError(
                f"expected the same class names in all Parquet files, got: {got[0]} in {listing.at(stated[0].name)}, "
                f"{got[1]} in {listing.at(other.name)}; give files of one data set"
            )
    return stated[0].names if stated else ()


def _open(listing: Listing, name: str) -> File:
    with reading(listing.at(name)):
        return listing.store.patiently(lambda: _read(listing, name))


def _read(listing: Listing, name: str) -> File:
    at, size = listing.at(name), listing.sizes[name]
    with listing.open(name) as source:
        tail = source.read_at(min(size, _TAIL_BYTES), max(0, size - _TAIL_BYTES))
        footer = int.from_bytes(tail[-8:-4], "little") + 8
        if tail[-4:] != b"PAR1" or footer > size:
            raise DataError(f"expected a Parquet file, got a damaged or truncated one: {at}; fetch it again")
        if footer > len(tail):
            tail = source.read_at(footer, size - footer)
        # The end of the file is enough to read the footer, and saves a request.
        metadata = pq.read_metadata(pa.BufferReader(tail))
        schema = metadata.schema.to_arrow_schema()
        leaf = _image_leaf(schema, at)
        column = (
            pq.ParquetFile(source, metadata=metadata).read(columns=["label"], use_threads=False).column(0)
        )
        sample = source.read_at(min(size, SAMPLE_BYTES), max(0, size - SAMPLE_BYTES) // 2)
        if column.null_count:
            raise DataError(
                f"expected a label in every row, found {column.null_count} rows without: {at}; fill them in, or leave these rows out"
            )
        labels = np.asarray(column.cast(pa.int64()).to_numpy(), dtype=np.int64)
    base = name.rpartition("/")[2]
    parts = (str(size), tail[-footer:], labels, sample)
    mark, content = content_hash(base, *parts), content_hash("file", *parts)
    return File(name, metadata, leaf, labels, _class_names(schema, at), mark, content)


def _image_leaf(schema: Any, at: str) -> str:
    """The column to read, `image.bytes` or a binary `image`; `DataError` if the columns are others."""
    types = {field.name: field.type for field in schema}
    image, label = types.get("image"), types.get("label")
    wanted = "expected columns image (struct<bytes, path>) and label (integer)"
    if image is None or label is None:
        missing = " and ".join(name for name in ("image", "label") if name not in types)
        raise DataError(f"{wanted}, found no {missing} among {', '.join(types)}: {at}; rename the columns")
    if not pa.types.is_integer(label):
        raise DataError(f"{wanted}, got labels of type {label}: {at}; convert them to class numbers")
    if pa.types.is_struct(image) and image.get_field_index("bytes") >= 0:
        return "image.bytes"
    if pa.types.is_binary(image) or pa.types.is_large_binary(image):
        return "image"
    raise DataError(f"{wanted}, got images of type {image}: {at}; store encoded images (JPEG, PNG, WebP)")


def _class_names(schema: Any, at: str) -> tuple[str, ...]:
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return ()
    try:
        names = json.loads(text)["info"]["features"]["label"].get("names") or ()
        if isinstance(names, dict):  # by their numbers, as data set cards have them
            by_number = {int(number): name for number, name in names.items()}
            names = [by_number[number] for number in range(len(names))]
        return tuple(str(name) for name in names)
    except (ValueError, KeyError, TypeError, AttributeError):
        return ()  # other tools write other things under this key; names are a convenience
