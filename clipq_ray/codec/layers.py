"""One CLIP-Q layer as bytes: the level table, then the codes by the coder that takes fewest bytes among those of a profile.

Not covered: the coders (`coders`), and which tensors are layers (`container`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from clipq_ray.codec import coders, plain, varint
from clipq_ray.codec.coders import Profile
from clipq_ray.errors import ArtifactError

if TYPE_CHECKING:
    from clipq_ray.plan import Share
    from clipq_ray.quantizer import Quantized

CODERS = tuple(
    letter + view + trim + half
    for letter in coders.LETTERS
    for view in ("", "k")
    for trim in ("", "t")
    for half in ("", "h")
)
"""With "k", the columns of a matrix are pixels and coded as kernels; with "t", rows and columns at the end that hold zeros only are left out; with "h", levels are float16."""
_SIDE_BITS = 48
_WIDEST, _ROWS_LOOKED_AT, _ALIKE = 32, 256, 1.2
"""Columns are tried as square images of at most so many pixels a side, where in the first so many rows non-zeros that one line of pixels lies between are so much more frequent
than those at the usual distance up to there: 2.5 times in the first layer of a LeNet-300-100, which then takes 10 % less; 1.1 to 1.7 behind 4 x 4 pixels (up to 2 %)."""
_LARGE = 1 << 20
"""Of more codes coder "a" alone says how they are best seen, since "m" would take seconds for every way; so many are looked at to see whether columns are pixels."""
_PIECE = 1 << 15
"""Codes that become values at a time: their indices stay in the cache."""


@dataclass(frozen=True, eq=False)
class CodedLayer:
    """Codes and levels of one layer.

    `codes`: int16, the weight's shape; 0 is clipped, others count away from zero. `levels`: float32 (negative + 1 + positive,),
    ascending by code, `levels[negative]` = 0; every other level is used by some code.
    """

    codes: npt.NDArray[np.int16]
    levels: npt.NDArray[np.float32]
    negative: int

    @classmethod
    def from_quantized(
        cls, codes: npt.NDArray[np.int16], levels: npt.NDArray[np.float32], negative: int
    ) -> CodedLayer:
        """Levels that no code uses (empty intervals) are dropped and the others renumbered."""
        counts = np.bincount(codes.reshape(-1).astype(np.int64) + negative, minlength=len(levels))
        used = counts > 0
        used[negative] = True
        renumbered = np.cumsum(used) - 1
        below = int(renumbered[negative])
        table = (renumbered - below).astype(np.int16)
        return cls(table[codes.astype(np.int64) + negative], levels[used], below)

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return self.codes.shape

    @property
    def positive(self) -> int:
        """Levels above zero."""
        return len(self.levels) - 1 - self.negative

    def halved(self) -> CodedLayer:
        """The same with levels rounded to float16, where that keeps a relative error of 2^-10."""
        half = plain.halved(self.levels)
        return self if half is None else replace(self, levels=half.astype(np.float32))

    def values(self) -> npt.NDArray[np.float32]:
        """The weights: float32, the codes' shape."""
        result = np.empty(self.codes.size, np.float32)
        codes = self.codes.reshape(-1)
        for at in range(0, len(codes), _PIECE):  # indices of 8 bytes, for a piece only
            index = codes[at : at + _PIECE].astype(np.intp) + self.negative
            # "clip" does not clip anything here; it spares a copy of the piece
            np.take(self.levels, index, out=result[at : at + _PIECE], mode="clip")
        return result.reshape(self.codes.shape)


def coded(quantized: Quantized, share: Share) -> CodedLayer:
    """The codec's view of what the quantizer made with `share`."""
    codes, levels = quantized.codes.cpu().contiguous().numpy(), quantized.levels.cpu().numpy()
    return CodedLayer.from_quantized(codes, levels, share.negative)


def layer_bytes(layer: CodedLayer, profile: Profile = "fast") -> int:
    """The bytes that `encode` writes into the payload for this layer, checksum included."""
    return len(smallest(layer, profile)[1]) + 4


def smallest(layer: CodedLayer, profile: Profile = "fast") -> tuple[str, bytes]:
    """The coder that takes fewest bytes for `layer`, float16 levels where they are exact, and its blob without checksum."""

    def coded(view: _View, profile: Profile) -> tuple[str, bytes]:
        letter, data = coders.smallest(view.codes, layer.negative, layer.positive, profile)
        return letter + view.marks, view.numbers + data

    def size(made: tuple[str, bytes]) -> int:
        return len(made[1])

    views = list(_views(layer.codes))
    if layer.codes.size > _LARGE and profile != "fast":
        views = [min(views, key=lambda view: size(coded(view, "fast")))]
    coder, data = min((coded(view, profile) for view in views), key=size)
    coder += "h" if _are_half(layer.levels) else ""
    return coder, _levels(layer, coder) + data


class _View(NamedTuple):
    """What may be coded in place of a layer's codes: the marks behind the coder's letter, the numbers that say how they are seen, and these codes."""

    marks: str
    numbers: bytes
    codes: npt.NDArray[np.int16]


def _views(codes: npt.NDArray[np.int16]) -> Iterator[_View]:
    for kernel in ((), *_kernels(codes)):
        seen = _as_kernels(codes, kernel)
        marks, numbers = "k" if kernel else "", b"".join(map(varint.write, kernel))
        yield _View(marks, numbers, seen)
        part = _trimmed(seen)
        if part.size < seen.size:
            yield _View(marks + "t", numbers + _sides(part), part)


def _kernels(codes: npt.NDArray[np.int16]) -> Iterator[tuple[int, int]]:
    """The height and width of the images that the columns of a matrix seem to be, if they do."""
    rows, columns = codes.shape if codes.ndim == 2 else (0, 0)
    sides = [side for side in range(2, _WIDEST + 1) if rows and columns and columns % (side * side) == 0]
    if not sides:
        return
    used = codes[: max(1, min(_ROWS_LOOKED_AT, _LARGE // columns))] != 0
    often = np.count_nonzero(used, axis=0)
    found = {}
    for distance in range(1, min(_WIDEST, columns - 1) + 1):
        together = np.count_nonzero(used[:, distance:] & used[:, :-distance])
        by_chance = int(often[distance:] @ often[:-distance])
        found[distance] = len(used) * together / max(by_chance, 1)
    best = max(sides, key=lambda side: found.get(side, 0.0))
    if found.get(best, 0.0) > _ALIKE * float(np.median(list(found.values()))):
        yield best, best


def _as_kernels(codes: npt.NDArray[np.int16], kernel: tuple[int, ...]) -> npt.NDArray[np.int16]:
    """A matrix (r, c) as (r, c / (h w), h, w); as it is without a kernel (h, w)."""
    return codes.reshape(len(codes), codes.shape[1] // math.prod(kernel), *kernel) if kernel else codes


def _trimmed(codes: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
    """The leading rows and columns (the first two dimensions) up to the last ones that hold anything but zeros."""
    if codes.ndim == 0:
        return codes
    used = (codes if codes.ndim < 3 else codes.any(axis=tuple(range(2, codes.ndim)))) != 0
    there = tuple(slice(_last(used, axis) + 1) for axis in range(used.ndim))
    return codes[there]


def _last(used: npt.NDArray[np.bool_], axis: int) -> int:
    """The last row (`axis` 0) or column with anything in it; -1 without one."""
    found = np.flatnonzero(used.any(tuple(other for other in range(used.ndim) if other != axis)))
    return int(found[-1]) if len(found) else -1


def _sides(part: npt.NDArray[np.int16]) -> bytes:
    """How many rows and columns are there."""
    return b"".join(varint.write(side) for side in part.shape[:2])


def _are_half(levels: npt.NDArray[np.float32]) -> bool:
    """Whether float16 holds every level exactly, and there is one besides zero."""
    with np.errstate(over="ignore"):
        return len(levels) > 1 and bool((levels.astype(np.float16).astype(np.float32) == levels).all())


def _levels(layer: CodedLayer, coder: str) -> bytes:
    """What stands before the codes: two counts and the levels."""
    values = np.delete(layer.levels, layer.negative).astype("<f2" if coder.endswith("h") else "<f4")
    return bytes((layer.negative, layer.positive)) + values.tobytes()


def write(layer: CodedLayer, coder: str = "q", kernel: tuple[int, int] = (1, 1)) -> bytes:
    """The blob of `layer` by `coder`, one of `CODERS`, without checksum; `kernel`: what the columns are with "k"."""
    codes, numbers = layer.codes, b""
    if "k" in coder:
        codes, numbers = _as_kernels(codes, kernel), b"".join(map(varint.write, kernel))
    if "t" in coder:
        codes = _trimmed(codes)
        numbers += _sides(codes)
    return _levels(layer, coder) + numbers + coders.encode(coder[0], codes, layer.negative, layer.positive)


def read(blob: bytes, shape: tuple[int, ...], coder: str = "q") -> CodedLayer:
    """What `smallest` wrote by `coder`; `ArtifactError` where the blob cannot be one."""
    if len(blob) < 2:
        raise ArtifactError("a level table is cut off")
    negative, positive = blob[0], blob[1]
    kind = "<f2" if coder.endswith("h") else "<f4"
    at = 2 + np.dtype(kind).itemsize * (negative + positive)
    if len(blob) < at:
        raise ArtifactError("a level table is cut off")
    levels = np.insert(np.frombuffer(blob[2:at], kind).astype(np.float32), negative, np.float32(0.0))
    seen, at = _seen(blob, at, shape) if "k" in coder else (shape, at)
    part = list(seen)
    for axis in range(min(len(seen), 2) if "t" in coder else 0):
        part[axis], at = varint.read(blob, at, _SIDE_BITS)
        if part[axis] > seen[axis]:
            raise ArtifactError(
                f"expected at most {seen[axis]} of a layer's rows or columns, got {part[axis]}"
            )
    codes = coders.decode(coder[0], blob[at:], tuple(part), negative, positive)
    if tuple(part) != seen:
        whole = np.zeros(seen, np.int16)
        whole[tuple(slice(side) for side in part)] = codes
        codes = whole
    return CodedLayer(codes.reshape(shape), levels, negative)


def _seen(blob: bytes, at: int, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """The shape that a matrix was coded in, as kernels, and where what follows begins."""
    height, at = varint.read(blob, at, _SIDE_BITS)
    width, at = varint.read(blob, at, _SIDE_BITS)
    pixels = height * width
    if len(shape) != 2 or not 0 < pixels <= max(shape[1], 1) or shape[1] % pixels:
        raise ArtifactError(f"expected a matrix of images of {height} x {width}, got the shape {list(shape)}")
    return (shape[0], shape[1] // pixels, height, width), at
