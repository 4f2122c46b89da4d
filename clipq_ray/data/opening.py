"""`open_data`: from a name or URI to training, validation and test images ready for one network.

Which images are the test set: files named `test*` if there, else `validation*`/`val*`. Validation images are the user's
(`validation_uri`, or validation files beside test files), else a stratified sample held out of the training images. Every such choice
is a note. Not covered: augmentation beyond the usual crop and flip; more than one label per image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from clipq_ray import logs
from clipq_ray.data.builtin import Images
from clipq_ray.data.decoding import BadImages, image_size
from clipq_ray.data.encoded import EncodedSplit, decoded
from clipq_ray.data.finding import Expected, Found, Source, find
from clipq_ray.data.folders import ImageFiles
from clipq_ray.data.listing import few
from clipq_ray.data.preprocessing import Interpolation, Preprocessing, usual_for
from clipq_ray.data.sampling import hold_out, stratified
from clipq_ray.data.split import CLASSES_MOST, Data, Split, without_images
from clipq_ray.data.tensors import TensorSplit
from clipq_ray.errors import ConfigError, DataError

_log = logs.logger(__name__)
LIMIT_SEED = 0
_UNNAMED = "files that name no split"
DEFAULT_MEMORY_LIMIT_BYTES = 2 * 10**9
Resize = int | None | Literal["auto"]
Chosen = dict[str, tuple[Source, NDArray[np.int64]]]


def open_data(
    uri: str,
    *,
    input_shape: tuple[int, int, int],
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    resize: Resize = "auto",
    interpolation: Interpolation | Literal["auto"] = "auto",
    usual: Preprocessing | None = None,
    validation_images: int | None = None,
    validation_uri: str | None = None,
    seed: int = 0,
    memory_limit_bytes: int = DEFAULT_MEMORY_LIMIT_BYTES,
    bad_image_limit: int = 0,
    limit_images: int | None = None,
    shift_pixels: int | None = None,
    data_root: str = "data",
) -> Data:
    """Open a data set for a network of `input_shape` (channels, height, width).

    `uri`: "digits"; "mnist", "fashion_mnist", "cifar10", "cifar100" with files under `data_root`, or NAME:FOLDER; or the URI of a directory of Parquet files,
    idx files or image folders. `resize`: pixels of the shorter side before the centre crop; None: images have the input's size; "auto": None if the first
    training image has it, else that of `usual`. `interpolation`: of images that are resized; "auto": that of `usual`. `usual`: what is not given of these; None:
    that of `preprocessing.usual_for`. `validation_images`: how many to hold out, by default 10 % of the training images and at most 5,000; not with
    `validation_uri`. `memory_limit_bytes`: encoded images of the input's size are decoded into memory if they fit, else half of it caches row groups.
    `bad_image_limit`: how many unreadable images are tolerated. `limit_images`: for trials, a stratified sample of that many training images instead of all,
    the same for every seed; row groups are then taken as few as possible. `shift_pixels`: the largest random shift of training images that have the input's
    size, by default an eighth of its height.
    Raises `DataError` and `ConfigError`.
    """
    _check_channels(input_shape)
    _check_options(memory_limit_bytes, bad_image_limit, validation_uri, validation_images)
    found = find(uri, data_root, memory_limit_bytes // 2)
    train, validation, test, notes = _assigned(found, uri, validation_uri is not None)
    if validation_uri is not None:
        replaces = validation is not None
        validation, more = _validation(validation_uri, data_root, memory_limit_bytes // 8, found, replaces)
        notes += more
    sources = {"train": train, "validation": validation, "test": test}
    present = {split: source for split, source in sources.items() if source is not None}
    names = _class_names(found.class_names, present)
    if len(names) < 2:
        raise DataError(
            f"expected at least two classes, got {names[0]} alone at {uri}; give the folder that holds the class folders, or images of all classes"
        )
    first, usual = _first_size(train), usual or usual_for(input_shape)
    preprocessing, more = _prepared(first, usual, mean, std, resize, interpolation, shift_pixels)
    notes += more
    chosen, more = _chosen(present, limit_images, validation_images, seed)
    notes += without_images(train.labels[chosen["train"][1]], len(names), bool(found.class_names))
    bad = BadImages(bad_image_limit)
    splits = _splits(chosen, preprocessing, memory_limit_bytes, bad, shift_pixels)
    _refuse_same(chosen, splits)
    return Data(
        train=splits["train"],
        validation=splits["validation"],
        test=splits.get("test"),
        classes=len(names),
        class_names=names,
        preprocessing=preprocessing,
        validation_held_out=validation is None,
        description=found.description,
        notes=(*found.notes, *notes, *more, *_bad_notes(bad)),
    )


def open_test(
    uri: str,
    preprocessing: Preprocessing,
    classes: int,
    class_names: Sequence[str] = (),
    *,
    memory_limit_bytes: int = DEFAULT_MEMORY_LIMIT_BYTES,
    bad_image_limit: int = 0,
    data_root: str = "data",
) -> tuple[Split, str]:
    """The images that judge a finished network of so many `classes`, and whether they are "test" or "validation" images: the test set of `open_data`, or
    where no training images lie beside them, all that there are; `bad_image_limit` of them at most may be unreadable: each is logged, and left out or replaced by the next one. `class_names`: the network's, in its order; empty where they are not known. `DataError`
    for images whose classes are numbered otherwise, and for training images alone: which of them the network has not seen, its file does not say. What lies at `uri` and is not used is logged. `ConfigError`
    for a network of other channels than 1 or 3."""
    _check_channels(preprocessing.input_shape)
    expected = Expected(tuple(class_names), classes)
    found = find(uri, data_root, memory_limit_bytes // 2, expected)
    _check_order(found, uri, classes, class_names)
    for note in found.notes:
        _log.warning(note)
    trained = "train" in found.sources
    kinds = ("test", "validation") if trained else ("test", "any", "validation")
    split = next((one for one in kinds if one in found.sources), None)
    if split is None:
        got = "training images only, which the network may have seen" if trained else "none"
        raise DataError(
            f"expected labelled test images at {uri}, got {got}; give the URI of images that it has not been trained on"
        )
    source = found.sources[split]
    _class_names(found.class_names, {"test": source})
    chosen: Chosen = {"test": (source, np.arange(len(source.labels)))}
    opened = _splits(chosen, preprocessing, memory_limit_bytes, BadImages(bad_image_limit), None)["test"]
    # beside training images alone they are the test set of a job too; without any, they may be what decided
    return opened, "validation" if split == "validation" and not trained else "test"


def _check_order(found: Found, uri: str, classes: int, class_names: Sequence[str]) -> None:
    """Refuse images whose class numbers are not those of a network: the same names in another order, folders that are not all of its classes."""
    names = found.class_names
    numbers = {name: number for number, name in enumerate(class_names)}
    if any(numbers.get(name, number) != number for number, name in enumerate(names)):
        raise DataError(
            f"expected the classes in the order {few(list(class_names))}, got {few(list(names))} at {uri}; give the data that the network was made with"
        )
    if (
        not class_names
        and any(isinstance(one, ImageFiles) for one in found.sources.values())
        and len(names) != classes
    ):
        raise DataError(
            f"expected a folder for each of {classes} classes at {uri}, got {len(names)}; give all of them"
        )


def _check_channels(input_shape: tuple[int, int, int]) -> None:
    if input_shape[0] not in (1, 3):
        raise ConfigError(
            f"expected a network of 1 or 3 channels for gray or colour images, got {input_shape[0]}; give it images from Python by loaders of your own"
        )


def _check_options(
    memory_limit_bytes: int, bad_image_limit: int, validation_uri: str | None, validation_images: int | None
) -> None:
    if memory_limit_bytes < 1 or bad_image_limit < 0:
        raise ConfigError(
            f"expected a memory limit above 0 and a bad-image limit of at least 0, got {memory_limit_bytes} and {bad_image_limit}"
        )
    if validation_uri is not None and validation_images is not None:
        raise ConfigError(
            "expected a number of validation images or a validation URI, got both; leave out one"
        )


def _assigned(found: Found, uri: str, others: bool) -> tuple[Source, Source | None, Source | None, list[str]]:
    """Training, validation and test images among what was found, and notes; `others`: validation images come from elsewhere."""
    given = found.sources
    if "train" not in given:
        names = [_UNNAMED if split == "any" else split for split in sorted(given)]
        raise DataError(
            f"expected training images (train*.parquet or train/<class>/*) at {uri}, found only "
            f"{' and '.join(names) or 'files without labels'}; rename the files or check the URI"
        )
    if "test" in given:
        return given["train"], given.get("validation"), given["test"], []
    if "validation" in given:
        note = "no test* data: the validation data is the test set"
        if not others:
            note += ", and validation images are held out of the training images"
        return given["train"], None, given["validation"], [note]
    return given["train"], None, None, ["no test data: results are reported on validation images only"]


def _validation(
    uri: str, data_root: str, cache_bytes: int, beside: Found, replaces: bool
) -> tuple[Source, list[str]]:
    """The user's own validation images for what was found `beside` them: of the splits at `uri` the first of validation, test, train, any."""
    highest = max(int(one.labels.max(initial=-1)) for one in beside.sources.values())
    expected = Expected(beside.class_names, 1 + highest)
    other = find(uri, data_root, cache_bytes, expected)
    if other.class_names and expected.names and other.class_names != expected.names:
        raise DataError(
            f"expected validation data with the classes of the training data, got other names or another order at {uri}; give matching data"
        )
    folders = any(isinstance(one, ImageFiles) for one in other.sources.values())
    if folders and not expected.names and len(other.class_names) < (expected.count or 0):
        raise DataError(
            f"expected a folder for each of {expected.count} classes at {uri}, got {len(other.class_names)}; give all of them"
        )
    split = next((one for one in ("validation", "test", "train", "any") if one in other.sources), None)
    if split is None:
        raise DataError(f"expected labelled validation images at {uri}, found none; check the URI")
    notes = [f"validation images: {'all' if split == 'any' else split} images at {uri}"]
    if replaces:
        notes.append("the data's own validation files are not used")
    return other.sources[split], [*notes, *other.notes]


def _class_names(names: tuple[str, ...], sources: dict[str, Source]) -> tuple[str, ...]:
    """One name per class; numbers where the data has none. `DataError` for labels that no class has."""
    highest = 0
    for split, source in sources.items():
        if not len(source.labels):
            raise DataError(f"expected {split} images, found files without any; check the data")
        lowest, most = int(source.labels.min()), int(source.labels.max())
        if lowest < 0 or most >= (len(names) or CLASSES_MOST):
            raise DataError(
                f"expected {split} labels in 0..{len(names) - 1 if names else f'classes - 1 (at most {CLASSES_MOST - 1:,})'}, got {lowest}..{most}; correct the labels"
            )
        highest = max(highest, most)
    return names or tuple(str(number) for number in range(highest + 1))


def _size_notes(first: tuple[int, ...], preprocessing: Preprocessing) -> list[str]:
    """A network that was made for small images takes large ones as well, is wrong about them and slow."""
    _, height, width = preprocessing.input_shape
    if preprocessing.resize is None or min(first) >= min(height, width):
        return []
    return [
        f"images are enlarged: the first one has {first[0]} x {first[1]} pixels, the network's input {height} x {width}; --input-size says otherwise"
    ]


def _prepared(
    first: tuple[int, ...],
    usual: Preprocessing,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    resize: Resize,
    interpolation: Interpolation | Literal["auto"],
    shift_pixels: int | None,
) -> tuple[Preprocessing, list[str]]:
    """How images, the first of which has the size `first`, become the network's input, and notes on it."""
    if interpolation != "auto":
        usual = replace(usual, interpolation=interpolation)
    if (mean is None) != (std is None):
        raise ConfigError("expected mean and std together, got one of them; give both or none")
    if resize == "auto":
        resize = None if first == usual.input_shape[1:] else usual.resize
    if mean is not None and std is not None:
        usual = replace(usual, mean=mean, std=std)
    found = replace(usual, resize=resize, interpolation="bilinear" if resize is None else usual.interpolation)
    if shift_pixels is not None and resize is not None:
        _, height, width = found.input_shape
        raise ConfigError(
            f"expected images of {height} x {width} pixels with --shift-pixels, since others are cropped at random, got {first[0]} x {first[1]}; leave it out"
        )
    notes = _size_notes(first, found)
    if interpolation != "auto" and resize is None:
        notes.append("--interpolation has nothing to do: images have the size of the network's input")
    return found, notes


def _first_size(source: Source) -> tuple[int, ...]:
    """(height, width) of the first readable image."""
    if isinstance(source, Images):
        return source.pixels.shape[2:]
    for row in range(min(len(source), 100)):
        if size := image_size(source.read(np.array([row]))[0]):
            return size
    raise DataError(
        f"expected images, found none that can be read among the first 100, as {source.name(0)}; give encoded images (JPEG, PNG, WebP)"
    )


def _chosen(
    sources: dict[str, Source], limit_images: int | None, validation_images: int | None, seed: int
) -> tuple[Chosen, list[str]]:
    """Which rows of which source each split has; where there is no validation data, some training rows become it."""
    chosen = {split: (source, np.arange(len(source.labels))) for split, source in sources.items()}
    train, rows = chosen["train"]
    groups = None if isinstance(train, Images) else train.groups
    notes: list[str] = []
    if limit_images is not None and limit_images < len(rows):
        if limit_images < 2:
            raise ConfigError(f"expected a limit of at least 2 training images, got {limit_images}")
        notes.append(f"trial: {limit_images} of {len(rows)} training images")
        rows = stratified(train.labels, limit_images, LIMIT_SEED, "limit", groups)
    if "validation" not in chosen:
        rest, held = hold_out(
            train.labels[rows], validation_images, seed, None if groups is None else groups[rows]
        )
        notes.append(f"validation: {len(held)} of {len(rows)} training images, stratified")
        chosen["validation"] = train, rows[held]
        rows = rows[rest]
    elif validation_images is not None:
        notes.append(
            f"--validation-images has nothing to do: {len(chosen['validation'][1])} validation images are there"
        )
    chosen["train"] = train, rows
    return chosen, notes


def _splits(
    chosen: Chosen, preprocessing: Preprocessing, memory_limit_bytes: int, bad: BadImages, shift: int | None
) -> dict[str, Split]:
    needed = sum(len(rows) for _, rows in chosen.values()) * math.prod(preprocessing.input_shape)
    in_memory = preprocessing.resize is None and needed <= memory_limit_bytes
    splits: dict[str, Split] = {}
    for split, (source, rows) in chosen.items():
        if isinstance(source, Images):
            padding = source.padding if shift is None else shift
            everything = TensorSplit(source.pixels, source.labels, preprocessing, padding=padding)
            splits[split] = everything.subset(torch.from_numpy(rows))
        elif in_memory:
            splits[split] = decoded(source, rows, preprocessing, bad, shift)
        else:
            splits[split] = EncodedSplit(source, rows, preprocessing, bad, shift)
    return splits


def _refuse_same(chosen: Chosen, splits: dict[str, Split]) -> None:
    """`DataError` where images that decide are those that train, or those that judge in the end, and where these are those that train."""
    if "test" in chosen and _same_sources(chosen["test"][0], chosen["train"][0]):
        raise DataError(
            "expected test images other than the training images, got the same; a network knows those, give others or none"
        )
    for split, why in (("test", "the test set decides nothing"), ("train", "a network knows those")):
        if split in splits and _same(split, chosen, splits):
            words = "training" if split == "train" else split
            raise DataError(
                f"expected validation images other than the {words} images, got the same; {why}, give others"
            )


def _same(split: str, chosen: Chosen, splits: dict[str, Split]) -> bool:
    """Whether the validation images are those of another split."""
    if splits["validation"].fingerprint == splits[split].fingerprint:
        return True
    (ours, rows), (others, _) = chosen["validation"], chosen[split]
    return len(rows) == len(ours.labels) and _same_sources(ours, others)  # a part is not the whole


def _same_sources(ours: Source, others: Source) -> bool:
    if isinstance(ours, Images) and isinstance(others, Images):
        return np.array_equal(ours.pixels, others.pixels)
    return not isinstance(ours, Images) and not isinstance(others, Images) and ours.same_images(others)


def _bad_notes(bad: BadImages) -> list[str]:
    return [f"{len(bad.names)} unreadable images left out: {', '.join(bad.names)}"] if bad.names else []
