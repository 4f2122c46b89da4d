"""A user's own data: map-style datasets of torch `DataLoader`s, with their own transforms and collate functions.

A dataset's transforms draw from the global random states of torch, Python and numpy; each item is read with these set from (the batch's
generator, its position), or from its index where no generator is given, and put back afterwards. So does a collate function, from one more
number of the generator, or from the indices of all items of the batch. So batches repeat exactly, and nothing is prepared in another
thread, which would disturb the network's own randomness. The transforms of the training dataset also apply to images held out of it.
The fingerprint hashes the datasets' types and lengths, all labels and 32 evenly spaced items, collated, read that way. Not covered:
iterable datasets, samplers (the training loop has its own order), the loaders' workers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from clipq_ray.data.preprocessing import Preprocessing
from clipq_ray.data.sampling import hold_out
from clipq_ray.data.split import CLASSES_MOST, Data, Labels, Split, content_hash, subset_hash, without_images
from clipq_ray.errors import DataError, brief
from clipq_ray.seeds import derive, drawn

SAMPLE_ITEMS = 32
_SEEDS = 2**32


class LoaderSplit(Split):
    """Items of a map-style dataset and what makes batches of them."""

    threaded = False

    def __init__(self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any]) -> None:
        """`dataset[i]` is (image, label); `collate` makes (images float32 (B, c, h, w), labels (B,)) of a list of items."""
        self.dataset = dataset
        self.collate = collate
        self._rows = np.arange(_length(dataset))
        self.labels = np.zeros(len(self._rows), dtype=np.int64)  # for the batches that follow
        self.labels = _labels(self)
        some = np.unique(np.linspace(0, len(self) - 1, SAMPLE_ITEMS).astype(int))
        images = self.batch(torch.from_numpy(some), None)[0].numpy()  # as the collate function makes them
        self.fingerprint = content_hash("loader", type(dataset).__qualname__, self.labels, images)
        self.content = content_hash("images", self.labels, images)  # whatever holds them

    def item(self, index: int, seed: int | None = None) -> Any:
        """`dataset[index]` with all global random states set from `seed`, by default one made from the index."""
        row = int(self._rows[index])
        with drawn(derive(0, "item", row) if seed is None else seed):
            return self.dataset[row]

    def batch(self, indices: Tensor, augment: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """As `Split.batch`, with the dataset's own transforms; without a generator each image is always prepared the same way, unless the collate function draws
        something, which is then the same for the same images together."""
        seeds: list[int | None] = [None] * len(indices)
        if augment is not None:
            seeds = [int(one) for one in torch.randint(_SEEDS, (len(indices),), generator=augment)]
        items = [self.item(int(index), seed) for index, seed in zip(indices, seeds, strict=True)]
        with drawn(self._collate_seed(indices, augment)):
            batch = self._collated(items)
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise DataError(
                f"expected a collate function that gives (images, labels), got {type(batch).__name__}; wrap the dataset"
            )
        images, labels = batch
        if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
            what = (
                f"{images.dtype} {tuple(images.shape)}"
                if isinstance(images, Tensor)
                else type(images).__name__
            )
            raise DataError(
                f"expected images as float tensors (B, c, h, w), got {what}; add ToTensor and normalisation"
            )
        return images.float().contiguous(), _class_numbers(labels, len(images))

    def _collated(self, items: list[Any]) -> Any:
        try:
            return self.collate(items)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"expected items that the loader's collate function makes a batch of, got {type(error).__name__}: {brief(error, 150)}; "
                "add ToTensor, one size for all images and normalisation to the dataset's transforms"
            ) from error

    def _collate_seed(self, indices: Tensor, augment: torch.Generator | None) -> int:
        if augment is not None:  # behind those of the items, which are what they would be without it
            return int(torch.randint(_SEEDS, (), generator=augment))
        return derive(0, "collate", *self._rows[indices.numpy()].tolist())

    def subset(self, indices: Tensor) -> LoaderSplit:
        """As `Split.subset`."""
        chosen = indices.numpy().astype(np.int64, copy=True)
        part = LoaderSplit.__new__(LoaderSplit)
        part.__dict__.update(self.__dict__)
        part._rows = self._rows[chosen]
        part.labels = self.labels[chosen]
        part.fingerprint = subset_hash(self.fingerprint, chosen)
        return part


def from_loaders(
    train_loader: DataLoader[Any],
    validation_loader: DataLoader[Any] | None = None,
    test_loader: DataLoader[Any] | None = None,
    *,
    seed: int = 0,
    validation_images: int | None = None,
) -> Data:
    """The datasets of a user's loaders as `Data`; without a validation loader, images are held out of the training dataset.

    Batch size, order and workers of the loaders are not used. Labels come from `targets` or `labels` of a dataset where its items
    agree with them, else every item is read once. `DataError` for iterable datasets and items that are no (image, label).
    """
    train = _split(train_loader, "training")
    validation = None if validation_loader is None else _split(validation_loader, "validation")
    test = None if test_loader is None else _split(test_loader, "test")
    for one, of, other, words in (
        (validation, "validation", test, "test images, got the same; the test set decides nothing"),
        (validation, "validation", train, "training images, got the same; a network knows those"),
        (test, "test", train, "training images, got the same; a network knows those"),
    ):
        if one is not None and other is not None and one.content == other.content:
            raise DataError(f"expected {of} images other than the {words}, give others")
    splits = [one for one in (train, validation, test) if one is not None]
    lowest = min(int(one.labels.min()) for one in splits)
    classes = 1 + max(int(one.labels.max()) for one in splits)
    if lowest < 0 or classes > CLASSES_MOST:
        raise DataError(
            f"expected labels in 0..classes - 1 (at most {CLASSES_MOST - 1:,}), got {lowest}..{classes - 1}; number the classes from 0"
        )
    names = getattr(train.dataset, "classes", None)
    if not isinstance(names, (list, tuple)) or len(names) < classes:
        names = range(classes)
    if len(names) < 2:
        raise DataError("expected at least two classes, got images of one; give images of all classes")
    images, _ = train.batch(torch.zeros(1, dtype=torch.int64), None)
    channels, height, width = (int(side) for side in images.shape[1:])
    notes = ["normalisation unknown: images come from the user's own transforms"]
    if test is None:
        notes.append("no test data: results are reported on validation images only")
    used: LoaderSplit = train
    if validation is None:
        rest, held = hold_out(train.labels, validation_images, seed)
        used, validation = train.subset(torch.from_numpy(rest)), train.subset(torch.from_numpy(held))
        notes.append(f"validation: {len(held)} of {len(train)} training images, stratified")
        notes.append("held-out images go through the training dataset's own transforms")
    elif validation_images is not None:
        notes.append(f"validation_images has nothing to do: {len(validation)} validation images are there")
    notes += without_images(used.labels, len(names), not isinstance(names, range))
    return Data(
        train=used,
        validation=validation,
        test=test,
        classes=len(names),
        class_names=tuple(str(name) for name in names),
        preprocessing=Preprocessing((channels, height, width), None, (0.0,) * channels, (1.0,) * channels),
        validation_held_out=used is not train,
        description=f"the user's own loaders ({type(train.dataset).__name__})",
        notes=tuple(notes),
    )


def _split(loader: DataLoader[Any], what: str) -> LoaderSplit:
    if not isinstance(loader, DataLoader):
        raise DataError(f"expected a torch DataLoader of {what} images, got {type(loader).__name__}")
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__getitem__"):
        raise DataError(
            f"expected a map-style dataset of {what} images (with __getitem__ and __len__), got the iterable "
            f"{type(loader.dataset).__name__}; give one whose images can be asked for by number"
        )
    return LoaderSplit(loader.dataset, loader.collate_fn)


def _length(dataset: Any) -> int:
    try:
        length = len(dataset)
    except TypeError as error:
        raise DataError(
            f"expected a dataset with a length, got {type(dataset).__name__}; add __len__"
        ) from error
    if length < 1:
        raise DataError(f"expected images, got an empty {type(dataset).__name__}")
    return length


def _labels(split: LoaderSplit) -> Labels:
    """Labels int64 (n,): the dataset's own list if some items agree with it, else from every item."""
    count = len(split)
    stated = _stated(split.dataset)
    some = np.unique(np.linspace(0, count - 1, 8).astype(int))
    if (
        stated is not None
        and len(stated) == count
        and all(stated[i] == _label(split.item(int(i))) for i in some)
    ):
        return stated
    return np.array([_label(split.item(index)) for index in range(count)], dtype=np.int64)


def _stated(dataset: Any) -> Labels | None:
    if isinstance(dataset, Subset):
        whole = _stated(dataset.dataset)
        return None if whole is None else whole[np.asarray(dataset.indices, dtype=np.int64)]
    values = dataset.tensors[-1] if isinstance(dataset, TensorDataset) else None
    for name in ("targets", "labels"):
        values = getattr(dataset, name, None) if values is None else values
    try:
        labels = np.asarray(values)
    except (ValueError, TypeError):
        return None
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    return labels.astype(np.int64) if labels.ndim == 1 and labels.dtype.kind in "iu" else None


def _label(item: Any) -> int:
    try:
        _, label = item
        value = label.item() if hasattr(label, "item") else label  # of a tensor or an array of one value
        if (number := int(value)) != value and isinstance(value, float):
            raise ValueError(f"{value!r} is no whole number")
        return number
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DataError(
            f"expected items (image, class number), got {type(item).__name__}: {brief(error, 100)}; wrap the dataset"
        ) from error


def _class_numbers(labels: Any, count: int) -> Tensor:
    """int64 (count,) of the labels that a collate function gives, (count,) or a column (count, 1) of whole numbers; `DataError` for others."""
    try:
        values = torch.as_tensor(labels)
        numbers = values.long()
        whole, what = torch.equal(values, numbers.to(values.dtype)), f"{values.dtype} {tuple(values.shape)}"
    except (TypeError, ValueError, RuntimeError):
        whole, what = True, type(labels).__name__
        numbers = torch.empty(0)
    if not whole or numbers.shape not in ((count,), (count, 1)):
        raise DataError(
            f"expected labels as class numbers ({count},) for {count} images, got {what}{'' if whole else ', not all of them whole'}; correct the collate function"
        )
    return numbers.reshape(count)
