"""Codes of one layer by adaptive binary models, one context each, into a range coder: coder "a" in SPEC.md, which defines every number.

A code is a few yes-or-no decisions (zero? positive? magnitude above 1? 3? ...). The context of the first and of magnitudes is the
magnitude to be expected here, from the means of the row, the input channel and the place, and from the neighbours in the kernel. One
counter per context and no mixing: a tenth of the time of "m" for about 5 % more bytes. All arithmetic is on integers. `encode` and `decode`
are mirrors. Importing this module imports numba; `coders` does so only where it is needed. Not covered: levels (`layers`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from clipq_ray.codec import adaptive_kernels as kernels
from clipq_ray.codec import codes as common
from clipq_ray.errors import ArtifactError

_AHEAD = 3  # words that the decoder reads before the first decision


def encode(codes: npt.NDArray[np.int16], negative: int, positive: int) -> bytes:
    """The bytes of `codes`, each in -negative .. positive (at most 255); no bytes where there are no codes."""
    if codes.dtype != np.int16:
        common.check_codes(codes, negative, positive)
    flat = codes.astype(np.int16, order="C", copy=False).reshape(-1)
    least, greatest, used, total = kernels.survey(flat)
    if (
        least < -negative
        or greatest > positive
        or max(negative, positive) > common.SIDE_MOST
        or not common.fits(codes.shape)
    ):
        common.check_codes(codes, negative, positive)  # names what is wrong
    if not codes.size:
        return b""
    # as common.start, which goes over the codes more often
    head = min(256 * used // codes.size, 255), total // used if used else 1
    words = kernels.write(flat, (*common.geometry(codes.shape), negative, positive), *head)
    packed: bytes = words.astype("<u2", copy=False).tobytes()
    return bytes(head) + packed


def decode(blob: bytes, shape: tuple[int, ...], negative: int, positive: int) -> npt.NDArray[np.int16]:
    """The mirror of `encode`; `ArtifactError` where no encoder writes `blob` for such a shape and such sides."""
    head = common.open_blob(blob, shape, negative, positive)
    if head is None:
        return np.zeros(shape, np.int16)
    words = (len(blob) - common.HEAD) // 2
    data = np.zeros(words + _AHEAD + kernels.SLACK, np.uint16)
    data[:words] = np.frombuffer(blob, "<u2", words, common.HEAD)
    codes = np.empty(shape, np.int16)
    read = kernels.read(codes.reshape(-1), data, (*common.geometry(shape), negative, positive), *head)
    # the encoder ends with one word, none where it would be 0; the decoder is three words ahead
    ended = words == read - _AHEAD or (words == read - _AHEAD + 1 and data[words - 1] > 0)
    if len(blob) % 2 or not ended:
        raise ArtifactError("coded weights are damaged, cut off or leave bytes over")
    return codes
