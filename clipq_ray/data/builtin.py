"""Data sets by name: `digits`, which comes with scikit-learn, and torchvision's MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100.

torchvision's sets are read from files that are already there; nothing is downloaded. Not covered: torchvision's other sets (use a
folder or Parquet).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from clipq_ray.data.listing import reading
from clipq_ray.data.sampling import stratified
from clipq_ray.data.split import Labels
from clipq_ray.errors import DataError

TORCHVISION = {
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}
NAMES = ("digits", *TORCHVISION)
DIGITS_TEST_IMAGES = 360
DIGITS_SIZE = 28
DIGITS_SHIFT = 2


@dataclass(frozen=True)
class Images:
    """Decoded images uint8 (n, c, h, w) with labels int64 (n,); `padding`: as `tensors.TensorSplit`."""

    pixels: NDArray[np.uint8]
    labels: Labels
    padding: int | None = None


def digits() -> dict[str, Images]:
    """1,797 handwritten digits, 8x8 with values 0..16, enlarged to 28x28 with values 0..255; 360 fixed ones are the test set."""
    from sklearn.datasets import load_digits

    found = load_digits()
    small = torch.from_numpy(np.asarray(found.images, dtype=np.float32)).mul_(255.0 / 16.0)
    large = interpolate(small[:, None], size=(DIGITS_SIZE, DIGITS_SIZE), mode="bilinear", align_corners=False)
    pixels = large.round_().clamp_(0.0, 255.0).to(torch.uint8).numpy()
    labels = np.asarray(found.target, dtype=np.int64)
    test = stratified(labels, DIGITS_TEST_IMAGES, 0, "digits")
    train = np.setdiff1d(np.arange(len(labels)), test)
    return {
        "train": Images(pixels[train], labels[train], DIGITS_SHIFT),
        "test": Images(pixels[test], labels[test], DIGITS_SHIFT),
    }


def torchvision_set(name: str, root: str, otherwise: str = "") -> tuple[dict[str, Images], tuple[str, ...]]:
    """Train and test images and the class names; `DataError` if the files are not under `root`, which ends with what to do `otherwise`."""
    from torchvision import datasets

    kind = getattr(datasets, TORCHVISION[name])
    found: dict[str, Images] = {}
    classes: tuple[str, ...] = ()
    for split in ("train", "test"):
        try:
            dataset = kind(root, train=split == "train", download=False)
        except RuntimeError as error:
            raise DataError(
                f"expected the files of {name} under {Path(root).absolute()}, as torchvision stores them, found none, or damaged ones; "
                f"put them there or give {name}:FOLDER{otherwise and f'; {otherwise}'}"
            ) from error
        with reading(f"{name} under {root}"):
            pixels = np.asarray(dataset.data)
            # MNIST's are (n, h, w), CIFAR's (n, h, w, 3).
            pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
            labels = np.asarray(dataset.targets, dtype=np.int64)
            found[split] = Images(np.ascontiguousarray(pixels), labels)
            classes = tuple(str(one) for one in dataset.classes)
    return found, classes
