"""The coders of codes by letter, and which of them a profile tries: "q" static, "a" adaptive, "m" mixed.

The last two are compiled by numba and imported when they are first needed. Not covered: levels (`layers`), grids (`vectors`).
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from clipq_ray.codec import codes as common
from clipq_ray.errors import ArtifactError

Profile = Literal["fast", "small"]
"""`fast` codes and decodes at the speed of "a"; `small` also tries "m", which takes 3 to 5 % less, encodes at a 25th of the speed and decodes at a 17th (`make bench-codec`)."""
_HOMES = {"q": "static", "a": "adaptive", "m": "mixing"}
LETTERS = tuple(_HOMES)


def smallest(
    codes: npt.NDArray[np.int16], negative: int, positive: int, profile: Profile
) -> tuple[str, bytes]:
    """The letter of the coder that takes fewest bytes for `codes` (of equals the fastest), and the bytes."""
    learnable = codes.size > 0 and (negative > 0 or positive > 0) and common.fits(codes.shape)
    letters = [
        "q"
    ]  # where there is something to learn it never took fewer bytes, however small the layer (bench/LOG.md)
    if learnable:
        letters = ["a", "m"] if profile == "small" else ["a"]
    blobs = {letter: encode(letter, codes, negative, positive) for letter in letters}
    return min(blobs.items(), key=lambda one: len(one[1]))


def encode(letter: str, codes: npt.NDArray[np.int16], negative: int, positive: int) -> bytes:
    """The bytes of `codes`, each in -negative .. positive, by one coder."""
    blob: bytes = _module(letter).encode(codes, negative, positive)
    return blob


def decode(
    letter: str, blob: bytes, shape: tuple[int, ...], negative: int, positive: int
) -> npt.NDArray[np.int16]:
    """The mirror of `encode`; `ArtifactError` where the blob cannot be one."""
    codes: npt.NDArray[np.int16] = _module(letter).decode(blob, shape, negative, positive)
    return codes


def _module(letter: str) -> Any:
    if letter not in _HOMES:
        raise ArtifactError(f"this file needs coder {letter!r:.40}; use a newer clipq_ray")
    return importlib.import_module(f"clipq_ray.codec.{_HOMES[letter]}")
