"""Codes of one layer by adaptive binary models, one context each, into a range coder: coder "a" in SPEC.md, which defines every number.

A code is a few yes-or-no decisions (zero? positive? magnitude above 1? 3? ...). The context of the first and of magnitudes is the
magnitude to be expected here, from the means of the row, the input channel and the place, and from the neighbours in the kernel. One
counter per context and no mixing: a tenth of the time of "m" for about 5 % more bytes. All arithmetic is on integers. `encode` and `decode`
are mirrors. Importing this module imports numba; `layers` does so only where it is needed. Not covered: levels (`layers`).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from clipq_ray.codec import adaptive_kernels as kernels
from clipq_ray.codec import codes as common
from clipq_ray.errors import FormatError

_WEIGHTS = (104, 35, 68, 60, 39, 10, 4, 17)
"""Of the means of row, place and channel, then of neighbours: left, up, two left, two up, and left in the kernel before. Fitted to
one-shot codes of ResNet-20 and ResNet-56 and to those of the trained ResNet-20."""
_BOUNDS = (
    3, 6, 10, 14, 19, 25, 32, 39, 48, 59, 72, 86, 103, 123, 146, 173, 204, 240, 283, 333, 391, 459, 537, 630, 737, 862, 1008,
)  # fmt: skip
"""An expected magnitude is in the bucket of as many bounds as it reaches; in 1/64 of the typical magnitude, about 4.5 buckets per octave."""
_BUCKETS = np.searchsorted(_BOUNDS, np.arange(1024), side="right").astype(np.uint8)
_STEPS = (655360 // (10 * np.arange(256) + 16)).astype(np.int32)
"""How far a counter moves at its n-th decision, in 1/65536."""
_AHEAD = 3  # words that the decoder reads before the first decision


def _models(
    head: tuple[int, int], shape: tuple[int, ...], negative: int, positive: int
) -> tuple[npt.NDArray[np.generic], ...]:
    """What `kernels` start with."""
    density, typical = head
    mean = (2 * density + 1) * typical >> 1
    counters = np.full(kernels.COUNTERS, 32768 << 16 | 1, np.uint32)
    counters[kernels.ZERO : kernels.SIGN] = (2 * density + 1) * 128 << 16 | 1
    return (
        np.array([*common.geometry(shape), negative, positive, mean], np.int64),
        np.array([(weight << 6) // typical for weight in _WEIGHTS], np.int64),
        counters,
        _STEPS,
        _BUCKETS,
    )


def encode(codes: npt.NDArray[np.int16], negative: int, positive: int) -> bytes:
    """The bytes of `codes`, each in -negative .. positive (at most 255); no bytes where there are no codes."""
    common.check_codes(codes, negative, positive)
    if not codes.size:
        return b""
    head = common.start(codes)
    flat = codes.astype(np.int16, order="C", copy=False).reshape(-1)
    words, size = kernels.FULL, codes.size // 2 + 64 + kernels.SLACK
    while words < 0:  # most layers take a bit or two per code
        data = np.zeros(size, np.uint16)
        words = kernels.write(flat, data, *_models(head, codes.shape, negative, positive))
        size *= 4
    return bytes(head) + data[:words].astype("<u2").tobytes()


def decode(blob: bytes, shape: tuple[int, ...], negative: int, positive: int) -> npt.NDArray[np.int16]:
    """The mirror of `encode`; `FormatError` where no encoder writes `blob` for such a shape and such sides."""
    head = common.open_blob(blob, shape, negative, positive)
    if head is None:
        return np.zeros(shape, np.int16)
    n = math.prod(shape)
    words = (len(blob) - common.HEAD) // 2
    data = np.zeros(words + _AHEAD + kernels.SLACK, np.uint16)
    data[:words] = np.frombuffer(blob, "<u2", words, common.HEAD)
    codes = np.empty(n, np.int16)
    read = kernels.read(codes, data, *_models(head, shape, negative, positive))
    # the encoder ends with one word, none where it would be 0; the decoder is three words ahead
    ended = words == read - _AHEAD or (words == read - _AHEAD + 1 and data[words - 1] > 0)
    if len(blob) % 2 or not ended:
        raise FormatError("coded weights are damaged, cut off or leave bytes over")
    return codes.reshape(shape)
