"""What lies at a URI: which kind of data, and which files are training, validation and test images.

Kinds, in the order in which they are looked for: a name (`builtin`), Parquet files, idx files, image folders. Files are told apart by
names (`_SPLITS`), of the file or of a folder above it. Not covered: reading images (`parquet`, `folders`, `idx`) and making splits (`opening`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from clipq_ray.data import builtin, idx
from clipq_ray.data.builtin import Images
from clipq_ray.data.folders import ENDINGS, ImageFiles, class_of
from clipq_ray.data.listing import Listing, few
from clipq_ray.data.parquet import ParquetRows, class_names
from clipq_ray.errors import DataError

Source = Images | ParquetRows | ImageFiles
_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
    "testing": "test",
}
_SPLIT = re.compile(rf"({'|'.join(sorted(_SPLITS, key=len, reverse=True))})(?![a-z])")


@dataclass(frozen=True)
class Found:
    """`sources`: by "train", "validation", "test", where there; `class_names`: empty if unknown."""

    sources: dict[str, Source]
    class_names: tuple[str, ...]
    description: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Expected:
    """What is known of the classes beforehand. `names`: those that folders of images must have, in their order; empty: sorted names decide. `count`: of
    classes without names, which folders may be called by the numbers of, and lack some; None: not known."""

    names: tuple[str, ...] = ()
    count: int | None = None

    def known(self, folders: Sequence[str]) -> list[str]:
        """The classes in their order, where `folders`, sorted, are there; `DataError` where they are called by numbers that nobody knows the order of."""
        if self.names or self.count is None or not all(map(str.isdecimal, folders)):
            return list(self.names or folders)
        numbers = [str(number) for number in range(self.count)]
        if set(folders) <= set(numbers):
            return numbers
        if in_number_order(folders):
            return list(folders)
        raise DataError(
            f"expected folders called 0 to {self.count - 1}, as the classes have no names, got {few(list(folders))}, in another order as numbers than as names; "
            "call each by the number of its class"
        )


def in_number_order(names: Sequence[str]) -> bool:
    """Whether names that are all numbers stand in the order of these."""
    return sorted(names, key=int) == list(names)


def find(uri: str, data_root: str, cache_bytes: int, expected: Expected | None = None) -> Found:
    """What lies at `uri`; files of no split count as "any". `cache_bytes`: for row groups."""
    name, _, folder = uri.partition(":")
    if name in builtin.NAMES and not folder.startswith("//"):
        here = f"for the folder here say ./{name}" if not folder and Path(name).is_dir() else ""
        named = _named(name, folder or data_root, here, uri)
        return replace(named, notes=(f"{name} is the data set of that name; {here}",)) if here else named
    if "/" not in uri and ":" not in uri and not Path(uri).exists():
        near = difflib.get_close_matches(uri, builtin.NAMES) or builtin.NAMES
        raise DataError(
            f"expected a data set's name or a URI, got {uri!r}, which is neither a name nor a directory here; did you mean {' or '.join(near)}?"
        )
    listing = Listing.of(uri)
    for kind, look in _KINDS.items():
        if found := look(listing, cache_bytes, expected or Expected()):
            return replace(found, notes=(*found.notes, *_passed_over(kind, listing)))
    raise DataError(
        f"expected Parquet files (train*.parquet), idx files or images (train/<class>/*.jpg) in {listing.store.uri}, "
        f"found {few(list(listing.sizes))}; check the URI"
    )


def _named(name: str, root: str, otherwise: str, uri: str) -> Found:
    """A set by name, as `uri` says it. `otherwise`: more advice where its files are not below `root`, or empty."""
    if name == "digits" and uri != name:
        raise DataError(
            f"expected digits alone, which has no files, got {uri}; leave out what is behind the name"
        )
    if name == "digits":
        names = tuple(str(digit) for digit in range(10))
        return Found({**builtin.digits()}, names, "digits (scikit-learn, 1,797 images enlarged to 28x28)")
    if "://" in root:
        raise DataError(
            f"expected a folder on this machine with the files of {name}, got {root}; copy them here, "
            "or give the URI itself, without a name, of Parquet files, idx files or image folders"
        )
    if name in ("mnist", "fashion_mnist"):
        # Both sets' files are called alike: the folder that torchvision calls by the name, then one with the idx files themselves.
        for folder in (f"{root}/{builtin.TORCHVISION[name]}/raw", root):
            if not any(Path(folder).glob("*-ubyte*")):
                continue
            found = _idx(Listing.of(folder, below=False), 0, Expected())
            if found and {"train", "test"} <= set(found.sources):
                return Found(found.sources, found.class_names, name)
    images, classes = builtin.torchvision_set(name, root, otherwise)
    return Found({**images}, classes, name)


def _passed_over(kind: str, listing: Listing) -> list[str]:
    """Notes of the files whose kind is looked for after `kind`, of `_KINDS`, which was found."""
    names = listing.sizes
    later: dict[str, list[str]] = {}
    if kind == "Parquet":
        bases = [base for pair in idx.NAMES.values() for base in pair]
        later["idx"] = sorted(name for base in bases for name in idx.places(base, names).values())
    if kind != "image":
        later["image"] = [name for name in names if name.lower().endswith(ENDINGS)]
    return [
        f"files of another kind beside the {kind} files are not used: {len(found)} {other} files, as {found[0]}"
        for other, found in later.items()
        if found
    ]


def _split_of(name: str) -> str:
    """From the file's name, else from the nearest folder that says so; "any" if none does."""
    for part in reversed(name.lower().split("/")):
        if match := _SPLIT.match(part):
            return _SPLITS[match.group(1)]
    return "any"


def _parquet(listing: Listing, cache_bytes: int, _: Expected) -> Found | None:
    groups: dict[str, list[str]] = {}
    for name in listing.sizes:
        if name.endswith(".parquet"):
            groups.setdefault(_split_of(name), []).append(name)
    if not groups:
        return None
    notes: list[str] = []
    # Training reads in shuffled windows and has most to gain from the cache; the others are read in order.
    shares = {"train": 2, "any": 2}
    sources: dict[str, ParquetRows] = {}
    # what is trained on names the classes, where it does
    for split, files in sorted(groups.items(), key=lambda group: (group[0] != "train", group[0])):
        rows = ParquetRows(listing, files, cache_bytes * shares.get(split, 1) // 4)
        if split != "train" and (rows.labels == -1).all():
            notes.append(f"the {split} files have no labels (all -1) and are not used")
            continue
        sources[split] = rows
    names = class_names([file for rows in sources.values() for file in rows.files], listing)
    if len(sources) > 1 and "any" in sources:
        unnamed = groups["any"]
        notes.append(f"{len(unnamed)} Parquet files whose names name no split are not used, as {unnamed[0]}")
    return Found({**sources}, names, f"Parquet at {listing.store.uri}", tuple(notes))


def _idx(listing: Listing, _: int, __: Expected) -> Found | None:
    sources: dict[str, Source] = {}
    for split, (images, labels) in idx.NAMES.items():
        places = {base: idx.places(base, listing.sizes) for base in (images, labels)}
        if not places[images]:
            continue
        for base, there in places.items():
            if len(there) > 1:
                raise DataError(
                    f"expected {base} in one folder, got {few(list(there.values()))} in {listing.store.uri}; give the folder of one data set"
                )
        ((folder, name),) = places[images].items()
        beside = places[labels].get(folder)
        if beside is None:
            raise DataError(f"expected {labels} beside {listing.at(name)}, found none; fetch it too")
        pixels = idx.parse(listing.read(name), 3, listing.at(name))
        numbers = idx.parse(listing.read(beside), 1, listing.at(beside)).astype(np.int64)
        if len(pixels) != len(numbers):
            raise DataError(
                f"expected a label for each of {len(pixels)} images, got {len(numbers)} in {listing.at(beside)}"
            )
        sources[split] = Images(pixels[:, None], numbers)
    return Found(sources, (), f"idx files at {listing.store.uri}") if sources else None


def _folders(listing: Listing, _: int, expected: Expected) -> Found | None:
    groups: dict[tuple[str, str], list[str]] = {}
    images = [name for name in listing.sizes if name.lower().endswith(ENDINGS)]
    for name in images:
        top = name.partition("/")[0]
        split = _SPLITS.get(top.lower()) if "/" in name else None
        groups.setdefault((split, top) if split else ("any", ""), []).append(name)
    if not images:
        return None
    notes = []
    if len(groups) > 1 and (beside := groups.pop(("any", ""), None)):
        notes.append(f"{len(beside)} images beside the folders of splits are not used, as {beside[0]}")
    if others := [name for name in listing.sizes if "/" in name and not name.lower().endswith(ENDINGS)]:
        notes.append(f"{len(others)} files that are not called as images are not used, as {others[0]}")
    for split in {split for split, _ in groups}:
        if len(same := [top for one, top in groups if one == split]) > 1:
            raise DataError(
                f"expected one folder of {split} images, got {few(sorted(same))} in {listing.store.uri}; rename or remove the others"
            )
    sources: dict[str, Source] = {}
    notes += _without_unlabelled(groups, listing)
    first = next((key for key in groups if key[0] in ("train", "any")), next(iter(groups)))
    known = expected.known(sorted({class_of(name, first[1]) for name in groups[first]}))
    for (split, folder), names in groups.items():
        sources[split] = ImageFiles(listing, names, folder, known)
    return Found(sources, tuple(known), f"image folders at {listing.store.uri}", tuple(notes))


def _without_unlabelled(groups: dict[tuple[str, str], list[str]], listing: Listing) -> list[str]:
    """Takes test images without a class folder from `groups`, names by (split, folder), as ImageNet's are published, beside others with some; notes. `DataError`
    for other images in none: those of ImageNet's validation set have labels that must not be missed."""
    loose = {key: [name for name in names if not class_of(name, key[1])] for key, names in groups.items()}
    some = any(len(names) < len(groups[key]) for key, names in loose.items())
    notes = []
    for key, names in loose.items():
        split, folder = key
        if split == "test" and len(names) == len(groups[key]) and some:
            notes.append("the test images lie in no class folders, so they have no labels and are not used")
            del groups[key]
        elif names:
            raise DataError(
                f"expected images in a folder per class ({folder or listing.store.uri}/<class>/*.jpg), "
                f"found {len(names)} in none, as {listing.at(names[0])}; sort them into class folders"
            )
    return notes


_KINDS = {"Parquet": _parquet, "idx": _idx, "image": _folders}
