"""One CLIP-Q layer as bytes: the level table, then the codes by the coder that takes fewest bytes among those of a profile.

Coder "q" (`static`) has one model for all codes, "a" (`adaptive`) one learning model per context, "m" (`mixing`) several that are mixed. The
last two are compiled by numba and imported when they are first needed. Not covered: which tensors are layers (`container`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from clipq_ray.codec import static
from clipq_ray.errors import FormatError
from clipq_ray.plan import Share
from clipq_ray.quantizer import Quantized

Profile = Literal["fast", "small"]
CODERS = ("q", "qh", "a", "ah", "m", "mh")
"""With "h", levels are float16."""
STATIC_MOST = 1 << 16
"""Larger layers are not tried by "q": there, learning costs less than 0.1 % of what contexts save."""
MIXED_MOST = 1 << 20
"""Larger layers are not tried by "m": it codes 2.5 to 4 million weights a second (measured), a tenth of what "a" does."""
_PIECE = 1 << 20


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
    def positive(self) -> int:
        """Levels above zero."""
        return len(self.levels) - 1 - self.negative

    def values(self) -> npt.NDArray[np.float32]:
        """The weights: float32, the codes' shape."""
        result = np.empty(self.codes.size, np.float32)
        codes = self.codes.reshape(-1)
        for at in range(0, len(codes), _PIECE):  # indices of 8 bytes, for a piece only
            index = codes[at : at + _PIECE].astype(np.intp) + self.negative
            np.take(self.levels, index, out=result[at : at + _PIECE])
        return result.reshape(self.codes.shape)


def coded(quantized: Quantized, share: Share) -> CodedLayer:
    """The codec's view of what the quantizer made with `share`."""
    codes, levels = quantized.codes.cpu().contiguous().numpy(), quantized.levels.cpu().numpy()
    return CodedLayer.from_quantized(codes, levels, share.negative)


def layer_bytes(layer: CodedLayer, profile: Profile = "small") -> int:
    """The bytes that `encode` writes into the payload for this layer, checksum included."""
    return len(smallest(layer, profile)[1]) + 4


def smallest(layer: CodedLayer, profile: Profile = "small") -> tuple[str, bytes]:
    """The coder that takes fewest bytes for `layer` (of equals the fastest), and its blob without checksum."""
    n, sides = layer.codes.size, (layer.negative, layer.positive)
    coders = ["q"] if n <= STATIC_MOST or not any(sides) else []
    if n and any(sides):
        coders += ["a", "m"] if profile == "small" and n <= MIXED_MOST else ["a"]
    half = "h" if _are_half(layer.levels) else ""
    blobs = {coder + half: write(layer, coder + half) for coder in coders}
    return min(blobs.items(), key=lambda one: len(one[1]))


def _are_half(levels: npt.NDArray[np.float32]) -> bool:
    """Whether float16 holds every level exactly, and there is one besides zero."""
    with np.errstate(over="ignore"):
        return len(levels) > 1 and bool((levels.astype(np.float16).astype(np.float32) == levels).all())


def write(layer: CodedLayer, coder: str = "q") -> bytes:
    """The blob of `layer` by `coder`, one of `CODERS`, without checksum."""
    levels = np.delete(layer.levels, layer.negative).astype("<f2" if coder.endswith("h") else "<f4").tobytes()
    codes = _encoder(coder)(layer.codes, layer.negative, layer.positive)
    return bytes((layer.negative, layer.positive)) + levels + codes


def _encoder(coder: str) -> Callable[[npt.NDArray[np.int16], int, int], bytes]:
    if coder[0] == "q":
        return static.encode
    if coder[0] == "a":
        from clipq_ray.codec import adaptive

        return adaptive.encode
    from clipq_ray.codec import mixing

    return mixing.encode


def read(blob: bytes, shape: tuple[int, ...], coder: str = "q") -> CodedLayer:
    """What `smallest` wrote by `coder`; `FormatError` where the blob cannot be one."""
    if len(blob) < 2:
        raise FormatError("a level table is cut off")
    negative, positive = blob[0], blob[1]
    kind = "<f2" if coder.endswith("h") else "<f4"
    at = 2 + np.dtype(kind).itemsize * (negative + positive)
    if len(blob) < at:
        raise FormatError("a level table is cut off")
    levels = np.insert(np.frombuffer(blob[2:at], kind).astype(np.float32), negative, np.float32(0.0))
    return CodedLayer(_decode(coder[0], blob[at:], shape, negative, positive), levels, negative)


def _decode(
    coder: str, blob: bytes, shape: tuple[int, ...], negative: int, positive: int
) -> npt.NDArray[np.int16]:
    if coder == "q":
        return static.decode(blob, shape, negative, positive)
    if coder == "a":
        from clipq_ray.codec import adaptive

        return adaptive.decode(blob, shape, negative, positive)
    from clipq_ray.codec import mixing

    return mixing.decode(blob, shape, negative, positive)
