"""What the coders of codes share: how a layer's shape is walked, what starts their models, what bounds a blob.

`SPEC.md` defines every number here. Not covered: the coders themselves (`static`, `adaptive`, `mixing`).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from clipq_ray.errors import ArtifactError

MOST_PER_BYTE = 1 << 15
"""A code costs at least log2(65536 / 65520) = 0.00035 bits, so no byte of an adaptive blob can hold more codes than this."""
SIDE_MOST = 255
"""A side has at most so many levels."""
KERNEL_MOST = 1024
"""A larger kernel is coded as if each of its codes was an input channel."""
ROW_MOST = 1 << 20
"""A row has at most so many codes: the models keep up to 100 bytes for each place in it, and a small file must not ask for a large memory."""
HEAD = 2
"""Bytes that start the models, before the range coder's."""


def geometry(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Rows (output channels), columns (input channels), codes of a kernel, its width."""
    rows, columns = (*shape, 1, 1)[:2]
    kernel, width = math.prod(shape[2:]), shape[-1] if len(shape) > 2 else 1
    return (rows, columns * kernel, 1, 1) if kernel > KERNEL_MOST else (rows, columns, kernel, width)


def fits(shape: tuple[int, ...]) -> bool:
    """Whether a row is short enough for the adaptive coders."""
    _, columns, kernel, _ = geometry(shape)
    return columns * kernel <= ROW_MOST


def start(codes: npt.NDArray[np.int16]) -> tuple[int, int]:
    """Density (in 1/256, at most 255) and typical magnitude (at least 1) of `codes`, which has elements."""
    used = int(np.count_nonzero(codes))
    total = int(np.abs(codes).sum(dtype=np.int64))
    return min(256 * used // codes.size, 255), total // used if used else 1


def check_sides(negative: int, positive: int) -> None:
    """Whether a layer may have so many levels per side."""
    if not (0 <= negative <= SIDE_MOST and 0 <= positive <= SIDE_MOST):
        raise ArtifactError(f"expected sides of 0 .. {SIDE_MOST} levels, got {negative} and {positive}")


def check_codes(codes: npt.NDArray[np.int16], negative: int, positive: int) -> None:
    """Whether all `codes` are in -negative .. positive."""
    check_sides(negative, positive)
    if codes.size and not fits(codes.shape):
        raise ArtifactError(f"expected rows of at most {ROW_MOST} codes; use coder q")
    if codes.size and (codes.min() < -negative or codes.max() > positive):
        raise ArtifactError(
            f"expected codes in -{negative} .. {positive}, got {codes.min()} .. {codes.max()}"
        )


def open_blob(blob: bytes, shape: tuple[int, ...], negative: int, positive: int) -> tuple[int, int] | None:
    """Density and typical magnitude of an adaptive blob, None where the shape has no elements; refused before anything is allocated."""
    check_sides(negative, positive)
    count = math.prod(shape)
    if count == 0:
        if blob:
            raise ArtifactError("a layer leaves bytes over")
        return None
    if not fits(shape):
        raise ArtifactError(f"expected rows of at most {ROW_MOST} codes")
    if len(blob) < HEAD or count > MOST_PER_BYTE * len(blob):
        raise ArtifactError("a layer holds more codes than its bytes can carry")
    if blob[1] == 0:
        raise ArtifactError("a layer's typical magnitude is 0")
    return blob[0], blob[1]
