"""Decoded images in memory.

Batches are cut with numpy in the calling thread: on small images that is faster than waking a pool, and the training loop keeps its
threads. The fingerprint hashes every pixel and label. Not covered: images of different sizes in one split (`encoded`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipq_ray.data.augment import crop_and_flip, crop_box, draws
from clipq_ray.data.preprocessing import WRONG_SIZE, Preprocessing
from clipq_ray.data.split import Labels, Split, content_hash, subset_hash
from clipq_ray.errors import DataError

Images = NDArray[np.uint8]
_RESIZED = 1 << 26
"""Values of resized images that are held at once, before they are cropped: 256 MiB, since they are resized as float32."""


class TensorSplit(Split):
    """uint8 images (n, c, h, w) and labels int64 (n,)."""

    def __init__(
        self,
        images: Images,
        labels: Labels,
        preprocessing: Preprocessing,
        *,
        padding: int | None = None,
    ) -> None:
        """`padding`: the largest random shift in pixels where images are not resized; None takes height // 8. Gray ones, digits mostly, are not mirrored."""
        size = tuple(images.shape[2:])
        if preprocessing.resize is None and size != preprocessing.input_shape[1:]:
            raise DataError(
                f"expected images of {preprocessing.input_shape[1:]} pixels, got {size}; {WRONG_SIZE}"
            )
        self.images = with_channels(images, preprocessing.input_shape[0])
        self.mirrored = preprocessing.input_shape[0] == images.shape[1] == 3
        self.labels = labels
        self.fingerprint = content_hash("pixels", images, labels)
        self.preprocessing = preprocessing
        self.padding = preprocessing.input_shape[1] // 8 if padding is None else padding
        self._rows: NDArray[np.int64] | None = None

    @property
    def pixels(self) -> Images:
        """All images, uint8 (n, c, h, w); copied where this is a subset."""
        return self.images if self._rows is None else self.images[self._rows]

    @property
    def nbytes(self) -> int:
        """Bytes of all images, with as many channels as the network takes."""
        return len(self) * math.prod(self.images.shape[1:])

    def batch(self, indices: Tensor, augment: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """As `Split.batch`: crop with padding, and for colour images a flip; where images are resized, random resized crops."""
        chosen = indices.numpy()
        images: Images = self.images[chosen if self._rows is None else self._rows[chosen]]
        labels = torch.from_numpy(self.labels[chosen])
        if (resize := self.preprocessing.resize) is not None:
            return self.preprocessing.apply(self._resized(images, resize, augment)), labels
        if augment is not None:
            images = crop_and_flip(images, self.padding, self.mirrored, augment)
        return self.preprocessing.apply(torch.from_numpy(images)), labels

    def _resized(self, images: Images, resize: int, augment: torch.Generator | None) -> Tensor:
        """uint8 (B, c, any, any) -> uint8 (B, c, h, w)."""
        # two seconds of every worker's start
        from torchvision.transforms import InterpolationMode, functional

        _, height, width = self.preprocessing.input_shape
        mode = InterpolationMode(self.preprocessing.interpolation)
        tensor = torch.from_numpy(np.ascontiguousarray(images))
        if augment is None:
            tensor = _without_far_ends(tensor, resize)
            # in pieces: a file may state a `resize` whose squares are many thousand times what is cropped from them
            return torch.cat(
                [
                    functional.center_crop(
                        functional.resize(part, [resize], mode, antialias=True), [height, width]
                    )
                    for part in tensor.split(resized_at_once(tensor.shape[1:], resize))
                ]
            )
        crops = []
        for image, numbers in zip(tensor, draws(len(tensor), augment), strict=True):
            (left, top, right, bottom), mirrored = crop_box(numbers, image.shape[1], image.shape[2])
            part = image[:, top:bottom, left:right]
            crop = functional.resize(part, [height, width], mode, antialias=True)
            crops.append(crop.flip(-1) if mirrored and self.mirrored else crop)
        return torch.stack(crops) if crops else tensor.new_empty((0, *self.preprocessing.input_shape))

    def subset(self, indices: Tensor) -> TensorSplit:
        """As `Split.subset`; the pixels are shared."""
        chosen = indices.numpy().astype(np.int64, copy=True)
        part = TensorSplit.__new__(TensorSplit)
        part.__dict__.update(self.__dict__)
        part.labels = self.labels[chosen]
        part.fingerprint = subset_hash(self.fingerprint, chosen)
        part._rows = chosen if self._rows is None else self._rows[chosen]
        return part


def resized_at_once(shape: Sequence[int], resize: int) -> int:
    """How many images of `shape` (c, h, w) are resized together, 1 at least; `resize`: pixels of the shorter side then."""
    return max(1, _RESIZED // _values_resized(shape, resize))


def _values_resized(shape: Sequence[int], resize: int) -> int:
    channels, height, width = shape
    return channels * resize * (resize * max(height, width) // max(1, min(height, width)))


def _without_far_ends(images: Tensor, resize: int) -> Tensor:
    """The middle (n, c, any, any) of images so oblong that one of them would become more than `_RESIZED` values: a view."""
    height, width = images.shape[2:]
    # the crop is a square of the shorter side at most; what lies close beside it counts for its borders
    most = 4 * min(height, width) + 8
    if _values_resized(images.shape[1:], resize) <= _RESIZED:
        return images
    top, left = (max(0, side - most) // 2 for side in (height, width))
    return images[:, :, top : height - top, left : width - left]


def with_channels(images: Images, channels: int) -> Images:
    """Gray images repeated for every channel (a view), colour images as luma (ITU-R 601, as Pillow's mode L), others as they are."""
    if images.shape[1] == channels:
        return images
    if images.shape[1] == 1:
        return np.broadcast_to(images, (len(images), channels, *images.shape[2:]))
    weights = np.array([19595, 38470, 7471], dtype=np.uint32)  # 0.299, 0.587, 0.114 in 1/65536
    luma = np.empty((len(images), 1, *images.shape[2:]), dtype=np.uint8)
    for start in range(0, len(images), 1024):  # in parts: the products need four bytes per pixel
        part = images[start : start + 1024]
        luma[start : start + 1024, 0] = (np.einsum("nchw,c->nhw", part, weights) + 0x8000) >> 16
    return luma
