"""Codes of one layer by adaptive binary models, mixed, into a range coder. Coder "m" in SPEC.md, which defines every number here.

A code is a few yes-or-no decisions (zero? positive? magnitude above 1? 3? ...). For each, counters under different contexts (its output
row, its input channel, its neighbours in the kernel and in the channels before, two linear predictions that learn) give probabilities;
a mixer that learns adds them as log-odds. All arithmetic is on integers, so every machine decodes the same codes. `encode` and `decode`
are mirrors. Importing this module imports numba; `coders` does so only where it is needed. Not covered: levels (`layers`).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from clipq_ray.codec import codes as common
from clipq_ray.codec import mixing_kernels as kernels
from clipq_ray.errors import ArtifactError

_KNOTS = (
    22, 36, 60, 98, 162, 267, 439, 720, 1179, 1921, 3108, 4971, 7812, 11955, 17625, 24743, 32768, 40793, 47911, 53581, 57724,
    60565, 62428, 63615, 64357, 64816, 65097, 65269, 65374, 65438, 65476, 65500, 65514,
)  # fmt: skip
_START = (
    (65536, 22000, 26000, 5000, 11000, 18000, 18000, 15000),
    (48000, -4000, 9000, 12000, 20000, 11000, 14000, 19000),
)
_START_NEAR, _START_MEAN = 2000, 15000


def _log_odds() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """`squash` by log-odds + 2048 (in 1/256) and `stretch` by probability in 1/4096."""
    at = np.arange(4096)
    knots = np.array(_KNOTS)
    left, part = knots[at >> 7], at & 127
    squash = np.clip(
        (left * (128 - part) + knots[(at >> 7) + 1] * part + 64) >> 7, kernels.LEAST, kernels.MOST
    )
    return squash, np.minimum(np.searchsorted(squash, at * 16 + 8), 4095) - 2048


_STEPS_OF = 655360 // (10 * np.arange(1024) + 16)
"""How far a counter moves at its n-th decision, in 1/65536."""
_LENGTH_OF = np.array([n.bit_length() for n in range(1024)])
_TABLES = np.concatenate([*_log_odds(), _STEPS_OF, _LENGTH_OF]).astype(np.int32)


def _neighbours(kernel: int, width: int) -> npt.NDArray[np.int64]:
    """How far before a code its neighbours lie: left, up, up-left, up-right, 2 left, 2 up, 1 and 2 channels; 0 where there is none."""
    k = np.arange(kernel)
    column, line = k % width, k // width
    back = [
        column > 0, width * (line > 0), (width + 1) * ((line > 0) & (column > 0)),
        (width - 1) * ((line > 0) & (column + 1 < width)), 2 * (column > 1), 2 * width * (line > 1),
        np.full(kernel, kernel), np.full(kernel, 2 * kernel),
    ]  # fmt: skip
    return np.stack(back, axis=1).astype(np.int64).reshape(-1)


def _run(
    codes: npt.NDArray[np.int16], data: npt.NDArray[np.uint8], shape: tuple[int, ...], head: bytes, negative: int, positive: int,
    *, decoding: bool,
) -> int:  # fmt: skip
    """The start of all that learns, then `kernels.layer`."""
    rows, columns, kernel, width = common.geometry(shape)
    density, typical = head
    counters = np.zeros((kernels.COLUMN + columns) * kernels.NODES, np.uint32)
    counters[1 : kernels.NODES] = 1 << 31 | 1
    counters[0] = 2 * density + 1 << 23 | 30
    work = np.zeros(kernels.STATE, np.int64)
    work[kernels.CONTEXTS + 1 :: kernels.INPUTS][:2] = kernels.ROW
    work[kernels.FLIPS : kernels.X] = 1
    work[kernels.WEIGHTS : kernels.MAPS] = np.ravel([_START[kind == 1] for kind in range(kernels.KINDS)])
    work[kernels.MAPS : kernels.LOW] = np.tile(
        _TABLES[np.minimum(np.arange(33) << 7, 4095)] << 6, kernels.KINDS
    )
    work[kernels.RANGE], work[kernels.AHEAD] = 1 << 32, int.from_bytes(bytes(data[:4]).ljust(4, b"\0"), "big")
    learned = np.array(
        [0] * kernels.EACH + [_START_NEAR] * kernels.NEIGHBOURS + [_START_MEAN] * kernels.AVERAGES, np.int64
    )
    mean = (2 * density + 1) * (2 * typical + 1)
    done = kernels.layer(
        codes, data, decoding, np.array([rows, columns, kernel, negative, positive, mean, typical], np.int64), work, counters,
        np.full(1024, 1 << 31 | 1, np.uint32), np.tile(learned, kernel), _neighbours(kernel, width),
        np.zeros(3 * (columns + 2) * kernel, np.int64), np.full(columns * (1 + kernel), mean, np.int64), _TABLES,
    )  # fmt: skip
    return int(done)


def encode(codes: npt.NDArray[np.int16], negative: int, positive: int) -> bytes:
    """The bytes of `codes`, each in -negative .. positive (at most 255); no bytes where there are no codes."""
    common.check_codes(codes, negative, positive)
    if not codes.size:
        return b""
    flat = codes.astype(np.int16, order="C").reshape(-1)
    head, size, done = bytes(common.start(codes)), codes.size + 64, kernels.FULL
    while done < 0:
        data = np.zeros(size, np.uint8)
        done = _run(flat, data, codes.shape, head, negative, positive, decoding=False)
        size *= 2
    return head + data[:done].tobytes()


def decode(blob: bytes, shape: tuple[int, ...], negative: int, positive: int) -> npt.NDArray[np.int16]:
    """The mirror of `encode`; `ArtifactError` where no encoder writes `blob` for such a shape and such sides."""
    head = common.open_blob(blob, shape, negative, positive)
    if head is None:
        return np.zeros(shape, np.int16)
    n = math.prod(shape)
    codes = np.zeros(n, np.int16)
    data = np.frombuffer(blob, np.uint8)[common.HEAD :].copy()
    if _run(codes, data, shape, bytes(head), negative, positive, decoding=True) < 0:
        raise ArtifactError("coded weights are damaged, cut off or leave bytes over")
    return codes.reshape(shape)
