"""One CLIP-Q layer as bytes: the level table, then the codes by the coder that takes fewest bytes among those of a profile.

Not covered: the coders (`coders`), and which tensors are layers (`container`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from clipq_ray.codec import coders, plain, varint
from clipq_ray.codec.coders import Profile
from clipq_ray.errors import ArtifactError
from clipq_ray.plan import Share
from clipq_ray.quantizer import Quantized

CODERS = tuple(letter + trim + half for letter in coders.LETTERS for trim in ("", "t") for half in ("", "h"))
"""With "t", rows and columns at the end that hold zeros only are left out; with "h", levels are float16."""
_SIDE_BITS = 48
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
    letter, codes = coders.smallest(layer.codes, layer.negative, layer.positive, profile)
    part = _trimmed(layer.codes)
    if part.size < layer.codes.size:
        other, rest = coders.smallest(part, layer.negative, layer.positive, profile)
        if len(_sides(part)) + len(rest) < len(codes):
            letter, codes = other + "t", _sides(part) + rest
    coder = letter + ("h" if _are_half(layer.levels) else "")
    return coder, _levels(layer, coder) + codes


def _trimmed(codes: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
    """The leading rows and columns (the first two dimensions) up to the last ones that hold anything but zeros."""
    used = codes != 0
    for axis in range(min(codes.ndim, 2)):
        found = np.flatnonzero(used.any(tuple(other for other in range(codes.ndim) if other != axis)))
        codes = np.take(codes, range(found[-1] + 1 if len(found) else 0), axis)
    return codes


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


def write(layer: CodedLayer, coder: str = "q") -> bytes:
    """The blob of `layer` by `coder`, one of `CODERS`, without checksum."""
    codes, sides = layer.codes, b""
    if "t" in coder:
        codes = _trimmed(codes)
        sides = _sides(codes)
    return _levels(layer, coder) + sides + coders.encode(coder[0], codes, layer.negative, layer.positive)


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
    part = list(shape)
    for axis in range(min(len(shape), 2) if "t" in coder else 0):
        part[axis], at = varint.read(blob, at, _SIDE_BITS)
        if part[axis] > shape[axis]:
            raise ArtifactError(
                f"expected at most {shape[axis]} of a layer's rows or columns, got {part[axis]}"
            )
    codes = coders.decode(coder[0], blob[at:], tuple(part), negative, positive)
    if tuple(part) != shape:
        whole = np.zeros(shape, np.int16)
        whole[tuple(slice(side) for side in part)] = codes
        codes = whole
    return CodedLayer(codes, levels, negative)
