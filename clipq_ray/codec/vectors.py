"""Biases and folded batch norm: short float tensors on grids, all of a file in one blob.

A vector is whole numbers times a step; steps are quarters of an octave, so one byte says which. All whole numbers of a file, each less the
median of its vector, are coded as one row by the coder that takes fewest bytes. A folded batch norm is two vectors, scale and shift of
each channel; its mean is 0 and its variance 1. Not covered: which precision a network needs (`packing`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipq_ray.codec import coders, codes, varint
from clipq_ray.errors import ArtifactError

STEPS = 256
_OCTAVES_BELOW = 40  # the smallest step is 2^-40
_MANTISSAS = (8388608, 9975792, 11863283, 14107901)
"""2^23 times 2^(0/4) .. 2^(3/4), rounded: float32 holds every step exactly."""
_LOCATION_BITS = 20


@dataclass(frozen=True, eq=False)
class Vector:
    """`codes`: int32, any shape; `step`: the index of the step, 0 .. 255, in quarters of an octave above 2^-40."""

    codes: npt.NDArray[np.int32]
    step: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.codes.shape

    def values(self) -> npt.NDArray[np.float32]:
        """float32: each code times the step, rounded once."""
        return np.asarray(self.codes.astype(np.float32) * step_size(self.step))  # of a scalar, too


def step_size(index: int) -> np.float32:
    """The step of an index."""
    return np.float32(math.ldexp(_MANTISSAS[index & 3], (index >> 2) - _OCTAVES_BELOW - 23))


def on_grid(values: npt.NDArray[np.floating], unit: float, parts: float) -> Vector | None:
    """`values` rounded to the largest step that is at most `unit` / `parts`; None where a vector cannot hold them.

    A vector holds codes up to 255 steps away from their median.
    """
    if not np.isfinite(values).all() or not math.isfinite(unit):
        return None
    index = math.floor(4 * math.log2(unit / parts)) + 4 * _OCTAVES_BELOW if unit > 0 else 0
    if not 0 <= index < STEPS:
        return None
    scaled = np.rint(values.astype(np.float64) / float(step_size(index)))
    if scaled.size and np.abs(scaled).max() >= 1 << _LOCATION_BITS - 2:
        return None
    vector = Vector(np.asarray(scaled.astype(np.int32)), index)
    away = vector.codes.astype(np.int64) - location(vector)
    return vector if not away.size or np.abs(away).max() <= codes.SIDE_MOST else None


def location(vector: Vector) -> int:
    """The lower median of the codes; 0 without any."""
    flat = np.sort(vector.codes.reshape(-1))
    return int(flat[(len(flat) - 1) // 2]) if len(flat) else 0


def write(vectors: Sequence[Vector], profile: coders.Profile) -> tuple[str, bytes]:
    """The letter of the coder, and the blob of all `vectors` without checksum."""
    heads, rest = [], []
    for vector in vectors:
        middle = location(vector)
        heads.append(bytes((vector.step,)) + varint.write(varint.fold(middle)))
        rest.append(vector.codes.reshape(-1) - middle)
    row = np.concatenate(rest).astype(np.int16)[None]
    negative, positive = (int(max(side, 0)) for side in (-row.min(initial=0), row.max(initial=0)))
    letter, blob = coders.smallest(row, negative, positive, profile)
    return letter, b"".join((*heads, bytes((negative, positive)), blob))


def read(letter: str, blob: bytes, shapes: Sequence[tuple[int, ...]]) -> list[Vector]:
    """The mirror of `write`; `ArtifactError` where the blob cannot be one."""
    heads, at = [], 0
    for _ in shapes:
        if at >= len(blob):
            raise ArtifactError("a step is cut off")
        folded, following = varint.read(blob, at + 1, _LOCATION_BITS)
        heads.append((blob[at], varint.unfold(folded)))
        at = following
    if len(blob) < at + 2:
        raise ArtifactError("the sides of the vectors are cut off")
    sizes = [math.prod(shape) for shape in shapes]
    row = coders.decode(letter, blob[at + 2 :], (1, sum(sizes)), blob[at], blob[at + 1])[0]
    parts = np.split(row.astype(np.int32), np.cumsum(sizes)[:-1])
    return [
        Vector((part + middle).reshape(shape), step)
        for part, (step, middle), shape in zip(parts, heads, shapes, strict=True)
    ]
