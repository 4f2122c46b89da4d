"""Encoded images to pixels, by Pillow, in a small pool of threads.

The pool has as many threads as torch is given (`torch.get_num_threads()`), so that one configuration value rules both; results do not
depend on it. Images of a few KB are decoded in the calling thread: there the threads would only wait for each other. Grey images of more
than 8 bits a pixel count as unreadable. Not covered: colour profiles, orientation tags.
"""

from __future__ import annotations

import functools
import io
import math
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from clipq_ray import logs
from clipq_ray.data.augment import crop_box
from clipq_ray.data.listing import few
from clipq_ray.data.preprocessing import WRONG_SIZE, Preprocessing
from clipq_ray.errors import DataError

Pixels = NDArray[np.uint8]
Numbers = NDArray[np.float64]
Decoded = Pixels | str
Encoded = bytes | str | None
"""An image file's bytes, or the reason why there are none."""

# Below this mean size in bytes, two threads took 2.3 s for what one did in 1.3 s (10,000 CIFAR WebP images, 2 cores).
_WORTH_A_THREAD = 8192
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_MORE_BITS = ("I", "F")
_RESIZED = 1 << 22
"""Pixels that an image is resized to as a whole and then cropped, at most, unless the crop itself has a 16th of them: 16 MiB."""
_ADDRESS = re.compile(r" *<[^<>]* at 0x[0-9a-fA-F]+>")
_log = logs.logger(__name__)


class WrongSize(str):
    """The reason of an image that can be read and has another size than the input."""


class BadImages:
    """The images that could not be read, of one data set, each counted once; more than `limit` of them are an error."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._reasons: dict[str, str] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """In the order in which they were met."""
        return tuple(self._reasons)

    def add(self, name: str, reason: str) -> None:
        """Count one and log it; `DataError` beyond the limit."""
        if name in self._reasons:
            return
        self._reasons[name] = reason
        if len(self._reasons) > self.limit:
            advice = (
                WRONG_SIZE if isinstance(reason, WrongSize) else "replace them or raise --bad-image-limit"
            )
            raise DataError(
                f"expected at most {self.limit} unreadable images, found {len(self._reasons)}: {few(self.names)} "
                f"(the last: {reason}); {advice}"
            )
        _log.warning(
            "unreadable image %s: %s (%d of at most %d)", name, reason, len(self._reasons), self.limit
        )


def decode(data: Encoded, preprocessing: Preprocessing, numbers: Numbers | None) -> Decoded:
    """Pixels uint8 (c, h, w) of one image, or the reason why there are none.

    `numbers` float64 (DRAWS,): of a random resized crop; None: the shorter side to `resize`, then the centre. Without a `resize`
    the image must have the input's size.
    """
    if isinstance(data, str):
        return data
    if not data:
        return "no bytes"
    try:
        with Image.open(io.BytesIO(data)) as file:
            if file.mode in _MORE_BITS or file.mode.startswith("I;"):  # Pillow would make most of it white
                return f"more than 8 bits a pixel (Pillow's mode {file.mode}); convert it to 8"
            image: Image.Image = file.convert("L" if preprocessing.input_shape[0] == 1 else "RGB")
    except Exception as error:  # Pillow's readers raise whatever a damaged file leads them to
        # where its bytes lay in memory is of no use, and another every time
        return " ".join(_ADDRESS.sub("", f"{type(error).__name__}: {error}").split())[:120]
    return _fitted(image, preprocessing, numbers)


def _fitted(image: Image.Image, preprocessing: Preprocessing, numbers: Numbers | None) -> Decoded:
    channels, height, width = preprocessing.input_shape
    mirrored, resampling = False, _RESAMPLING[preprocessing.interpolation]
    if preprocessing.resize is None:
        if image.size != (width, height):
            return WrongSize(f"expected {width}x{height} pixels, got {image.width}x{image.height}")
    elif numbers is None:
        image = _centre(image, preprocessing.resize, (width, height), resampling)
    else:
        box, mirrored = crop_box(numbers, image.height, image.width)
        image = image.resize((width, height), resampling, box=box)
    pixels = np.asarray(image, dtype=np.uint8).reshape(height, width, channels)
    return (pixels[:, ::-1] if mirrored and channels == 3 else pixels).transpose(2, 0, 1)


def _centre(
    image: Image.Image, resize: int, size: tuple[int, int], resampling: Image.Resampling
) -> Image.Image:
    """`image` with its shorter side scaled to `resize`, then the middle of `size` (width, height) [pixels]."""
    shorter = min(image.size)
    whole = (resize * image.width // shorter, resize * image.height // shorter)  # as torchvision rounds
    left, top = round((whole[0] - size[0]) / 2), round((whole[1] - size[1]) / 2)
    right, bottom = left + size[0], top + size[1]
    if math.prod(whole) <= max(_RESIZED, 16 * math.prod(size)):
        return image.resize(whole, resampling).crop((left, top, right, bottom))
    # Of 3,000 x 1 pixels, which are 83 bytes as PNG, the whole would be 768,000 x 256. Pillow resizes a box of an image as if it
    # cropped afterwards, but for rounding; so others keep the bits that they always had.
    wide, high = image.width / whole[0], image.height / whole[1]
    box = left * wide, top * high, min(right * wide, image.width), min(bottom * high, image.height)
    return image.resize(size, resampling, box=box)


def decode_many(
    encoded: Sequence[Encoded], preprocessing: Preprocessing, numbers: Numbers | None
) -> list[Decoded]:
    """`decode` for each, in order; `numbers` float64 (n, DRAWS) or None."""

    def one(position: int) -> Decoded:
        return decode(encoded[position], preprocessing, None if numbers is None else numbers[position])

    threads = torch.get_num_threads()
    if threads == 1 or sum(len(data or b"") for data in encoded) < _WORTH_A_THREAD * len(encoded):
        return [one(position) for position in range(len(encoded))]
    return list(_pool(threads).map(one, range(len(encoded))))


def image_size(data: Encoded) -> tuple[int, int] | None:
    """(height, width) from the header; None if it cannot be read."""
    try:
        with Image.open(io.BytesIO(data if isinstance(data, bytes) else b"")) as image:
            return image.height, image.width
    except Exception:  # as in `decode`
        return None


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="clipq-decode")


# A forked child has no threads; it makes its own pool.
os.register_at_fork(after_in_child=_pool.cache_clear)
