"""The idx files in which MNIST and its relatives are shipped (LeCun's format), plain or gzipped.

Bytes 0, 0, type, number of dimensions; then each dimension as a big-endian uint32; then the values. Only unsigned bytes (type 8) are
read. Not covered: writing, other types.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from clipq_ray.errors import DataError

NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def places(base: str, names: Iterable[str]) -> dict[str, str]:
    """By folder, "" for none, which of `names` is the idx file `base`; the plain one where it lies packed beside it, as torchvision leaves both."""
    found: dict[str, str] = {}
    for name in names:
        folder, _, last = name.rpartition("/")
        if last == base or last == f"{base}.gz":
            found[folder] = min(name, found.get(folder, name), key=len)
    return found


def parse(data: bytes, dimensions: int, origin: str) -> NDArray[np.uint8]:
    """The array in `data`, gzipped or not; `DataError` naming `origin` unless it is whole and has that many dimensions."""
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"cannot unpack {origin}: {error}; fetch it again") from error
    start = 4 + 4 * dimensions
    if len(data) < start or data[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(
            f"expected an idx file of unsigned bytes with {dimensions} dimensions, got another: {origin}; fetch it again"
        )
    shape = tuple(int(side) for side in np.frombuffer(data, ">u4", dimensions, 4))
    if len(data) - start != math.prod(shape):
        raise DataError(
            f"expected {math.prod(shape)} values of shape {shape}, got {len(data) - start}: {origin}; fetch it again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
