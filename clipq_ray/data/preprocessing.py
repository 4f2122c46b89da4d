"""What happens to an image between its file and the network, apart from augmentation.

A value that travels in the `.clq` file, so that whoever loads a network can prepare images for it. Light: torch only. Not covered:
decoding and resizing (`decoding`, `tensors`) and augmentation (`augment`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipq_ray.errors import ConfigError, FormatError

GRAY_MEAN, GRAY_STD = (0.1307,), (0.3081,)  # MNIST's training images, as its examples use them
RGB_MEAN, RGB_STD = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # ImageNet's, as torchvision's weights use them
Interpolation = Literal["bilinear", "bicubic"]
WRONG_SIZE = (
    "give images of that size, or to jobs/compress.py --resize PIXELS, to which shorter sides are scaled"
)
_AT_ONCE = (
    2**16
)  # pixels of a channel that stay in a cache: 0.34 ms became 0.21 ms per image of 3 x 224 x 224 (CPU time of one thread)


@dataclass(frozen=True)
class Preprocessing:
    """Input size and normalisation of a network.

    `input_shape`: (channels, height, width) in pixels; of other channels than 1 or 3 only a caller's own loaders give images. `resize`: the shorter side in pixels before the centre crop to height x width;
    None: images already have that size. `mean`, `std`: one number per channel, for pixel values in 0..1. `interpolation`: of what is resized.
    """

    input_shape: tuple[int, int, int]
    resize: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        shape = self.input_shape
        if len(shape) != 3 or min(shape) < 1:
            raise ConfigError(f"expected an input shape of channels, height and width above 0, got {shape}")
        if len(self.mean) != shape[0] or len(self.std) != shape[0]:
            raise ConfigError(
                f"expected {shape[0]} numbers each for mean and std (one per channel), got {len(self.mean)} and {len(self.std)}"
            )
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0.0:
            raise ConfigError(
                f"expected finite means and std above 0, got mean {self.mean} and std {self.std}"
            )
        if self.resize is not None and self.resize < max(shape[1:]):
            raise ConfigError(
                f"expected resize of at least the input size {max(shape[1:])}, got {self.resize}; images are cropped after it"
            )
        if self.interpolation not in get_args(Interpolation):
            raise ConfigError(
                f"expected interpolation {' or '.join(get_args(Interpolation))}, got {self.interpolation!r}"
            )

    def to_json(self) -> dict[str, Any]:
        """A JSON object, as it stands under "input" in a `.clq` file; bilinear interpolation is not said."""
        return {
            "shape": list(self.input_shape),
            "resize": self.resize,
            "mean": list(self.mean),
            "std": list(self.std),
            **({"interpolation": self.interpolation} if self.interpolation != "bilinear" else {}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Preprocessing:
        """The mirror of `to_json`; `FormatError` if the object is no preprocessing."""
        try:
            channels, height, width = (int(side) for side in value["shape"])
            resize = None if value["resize"] is None else int(value["resize"])
            mean = tuple(float(number) for number in value["mean"])
            std = tuple(float(number) for number in value["std"])
            return cls((channels, height, width), resize, mean, std, value.get("interpolation", "bilinear"))
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            raise FormatError(f"expected shape, resize, mean and std of the input, got {error!r}") from error

    def apply(self, images: Tensor) -> Tensor:
        """uint8 (n, c, h, w) on the CPU -> float32 (n, c, h, w), contiguous: (x / 255 - mean) / std."""
        pixels = images.numpy()
        result = np.empty(pixels.shape, dtype=np.float32)
        # A table of all 256 values per channel gives the bits of the formula in one pass, without torch's threads: two teams of
        # them, the network's and the preparing thread's, stall each other (measured: 0.2 s became 5 s per 50,000 CIFAR images).
        at_once = max(1, _AT_ONCE // math.prod(pixels.shape[2:]))
        for start in range(0, len(pixels), at_once):
            part = slice(start, start + at_once)
            for channel, table in enumerate(tables(self.mean, self.std)):
                np.take(table, pixels[part, channel], out=result[part, channel], mode="clip")
        return torch.from_numpy(result)


@lru_cache(maxsize=8)
def tables(mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """float32 (c, 256): what each pixel value becomes."""
    values = torch.arange(256, dtype=torch.float32).div_(255.0)
    return values.sub(torch.tensor(mean)[:, None]).div_(torch.tensor(std)[:, None]).numpy()


def usual_for(input_shape: tuple[int, int, int]) -> Preprocessing:
    """Mean and std of MNIST for 1 channel or of ImageNet for 3; larger images are resized to 256/224 of the input."""
    mean, std = (GRAY_MEAN, GRAY_STD) if input_shape[0] == 1 else (RGB_MEAN, RGB_STD)
    return Preprocessing(input_shape, round(max(input_shape[1:]) * 256 / 224), mean, std)
