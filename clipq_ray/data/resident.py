"""Decoded images that lie on the device that computes with them.

Only index numbers and random draws travel to it with a batch; cropping, mirroring and normalising happen there, with the draws and the bits of
`TensorSplit`, so that where images lie changes no result. Not covered: images that are resized, and sets that are too large for the device.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from clipq_ray.data.augment import shifts_and_mirrors
from clipq_ray.data.preprocessing import tables
from clipq_ray.data.split import Split
from clipq_ray.data.tensors import TensorSplit
from clipq_ray.sending import sent

SHARE = 0.25
"""Of a device's free memory that images may take; what a training needs is not known yet then."""


class ResidentSplit(Split):
    """The images of a `TensorSplit` on `device`, as uint8; batches come from there, labels stay on the CPU."""

    threaded = False  # the device works ahead by itself

    def __init__(self, split: TensorSplit, device: torch.device) -> None:
        if split.preprocessing.resize is not None:
            raise ValueError("expected images that are not resized")
        self._of, self._device = split, device
        self.labels, self.fingerprint = split.labels, split.fingerprint
        self._images = torch.from_numpy(np.ascontiguousarray(split.pixels)).to(device)
        given = split.preprocessing
        self._tables = torch.from_numpy(tables(given.mean, given.std)).to(device)

    def batch(self, indices: Tensor, augment: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """As `TensorSplit.batch`, images on the device."""
        images = self._images[sent(indices, self._device)]
        if augment is not None:
            images = self._crop_and_flip(images, augment)
        channels = torch.arange(images.shape[1], device=self._device)[:, None, None]
        # a table of all 256 values gives the bits that the CPU has, whatever the device makes of a division
        return self._tables[channels, images.long()], torch.from_numpy(self.labels[indices.numpy()])

    def _crop_and_flip(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """uint8 (B, c, h, w) -> uint8 (B, c, h, w), as `augment.crop_and_flip`."""
        count, channels, height, width = images.shape
        padding = self._of.padding
        drawn = shifts_and_mirrors(count, padding, generator)
        shifts, mirrored = (sent(one, self._device) for one in drawn)
        rows = shifts[0][:, None] + torch.arange(height, device=self._device)
        columns = shifts[1][:, None] + torch.arange(width, device=self._device)
        if self._of.mirrored:
            columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        padded = torch.nn.functional.pad(images, (padding,) * 4)
        numbers = torch.arange(count, device=self._device)[:, None, None, None]
        kept = torch.arange(channels, device=self._device)[:, None, None]
        return padded[numbers, kept, rows[:, None, :, None], columns[:, None, None, :]]

    def subset(self, indices: Tensor) -> Split:
        """As `Split.subset`, on the CPU."""
        return self._of.subset(indices)


def placed(split: Split, device: torch.device, free_bytes: int | None = None) -> Split:
    """`split`, on `device` where that is a GPU and the images fit into a part of its `free_bytes` (default: asked); else as it is."""
    if not isinstance(split, TensorSplit) or split.preprocessing.resize is not None or device.type != "cuda":
        return split
    free = torch.cuda.mem_get_info(device)[0] if free_bytes is None else free_bytes
    return ResidentSplit(split, device) if split.nbytes <= SHARE * free else split
