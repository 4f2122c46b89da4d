"""Codes of one layer by one static model: coder "q" in SPEC.md, frequencies on constriction's ANS coder.

Frequencies are integers that sum to 2^14 and travel in the file, so the probabilities that reach the coder are exact in binary and
decoding does not depend on rounding. `encode` and `decode` are mirrors. Not covered: levels (`layers`).
"""

from __future__ import annotations

import math

import constriction
import numpy as np
import numpy.typing as npt

from clipq_ray.codec import varint
from clipq_ray.errors import ArtifactError

TOTAL_BITS = 14
TOTAL = 1 << TOTAL_BITS
_MOST_PER_BYTE = 1 << 22
"""A symbol costs at least log2(2^14 / (2^14 - 1)) = 0.000088 bits, so no byte of a blob can hold more codes than this."""
_PIECE = 1 << 20
"""Codes that the coder hands over at a time: what it allocates beside the result does not grow with the stated shape."""


def encode(codes: npt.NDArray[np.int16], negative: int, positive: int) -> bytes:
    """The bytes of `codes`, each in -negative .. positive; no bytes where there are no codes."""
    symbols = codes.reshape(-1).astype(np.int32) + negative
    counts = np.bincount(symbols, minlength=negative + positive + 1).astype(np.int64)
    if not len(symbols):
        return b""
    table = frequencies(counts)
    head = b"".join(varint.write(int(value)) for value in table[:-1])
    present = np.flatnonzero(table)
    if len(present) == 1:
        return head
    renumbered = np.zeros(len(table), dtype=np.int32)
    renumbered[present] = np.arange(len(present), dtype=np.int32)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(renumbered[symbols], _model(table[present]))
    return head + bytes(coder.get_compressed().astype("<u4").tobytes())


def decode(blob: bytes, shape: tuple[int, ...], negative: int, positive: int) -> npt.NDArray[np.int16]:
    """The mirror of `encode`; `ArtifactError` where the blob cannot be one."""
    n = math.prod(shape)
    if n == 0:
        _refuse_rest(blob, 0)
        return np.zeros(shape, np.int16)
    table, at = _read_table(blob, 0, negative + positive + 1)
    present = np.flatnonzero(table)
    if len(present) == 1:
        _refuse_rest(blob, at)
        return np.full(shape, present[0] - negative, dtype=np.int16)
    if n > _MOST_PER_BYTE * len(blob):
        raise ArtifactError("a layer holds more codes than its bytes can carry")
    return _read_codes(blob[at:], table[present], (present - negative).astype(np.int16), n).reshape(shape)


def frequencies(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Integer frequencies that sum to 2^14, at least 1 where a count is; (symbols,) of int64."""
    n = int(counts.sum())
    result = np.where(counts > 0, np.maximum(1, (counts * TOTAL + n // 2) // max(n, 1)), 0)
    order = np.argsort(-result, kind="stable")
    excess = int(result.sum()) - TOTAL
    at = 0
    while excess:  # the largest give or take; more than one round only where very many symbols are rare
        index = order[at % len(order)]
        change = -1 if excess > 0 else 1
        if result[index] + change >= 1 and counts[index] > 0:
            result[index] += change
            excess += change
        at += 1
    return result


def _model(table: npt.NDArray[np.int64]) -> constriction.stream.model.Categorical:
    # k / 2^14 is exact in binary and so is its fixed point form; `perfect` finds exactly k * 2^10 of 2^24 (tested against an independent decoder)
    return constriction.stream.model.Categorical(table.astype(np.float64) / TOTAL, perfect=True)


def _refuse_rest(blob: bytes, at: int) -> None:
    if len(blob) > at:
        raise ArtifactError("a layer leaves bytes over")


def _read_table(blob: bytes, at: int, symbols: int) -> tuple[npt.NDArray[np.int64], int]:
    table = np.zeros(symbols, dtype=np.int64)
    for index in range(symbols - 1):
        table[index], at = varint.read(blob, at, TOTAL_BITS + 1)
    table[-1] = TOTAL - table[:-1].sum()
    if table[-1] < 0 or int(table.sum()) != TOTAL:
        raise ArtifactError("a frequency table does not sum to its total")
    return table, at


def _read_codes(
    blob: bytes, table: npt.NDArray[np.int64], codes: npt.NDArray[np.int16], n: int
) -> npt.NDArray[np.int16]:
    """`n` of `codes`, whose frequencies are `table`."""
    if len(blob) % 4 or not blob:
        raise ArtifactError("coded weights are no whole number of words")
    try:
        coder = constriction.stream.stack.AnsCoder(np.frombuffer(blob, "<u4").astype(np.uint32))
        model = _model(table)
        # Once the state is 0 and no word is left, every further code is the first one: the coder need not say so.
        result = np.full(n, codes[0], dtype=np.int16)
        for at in range(0, n, _PIECE):
            if coder.is_empty():
                break
            result[at : at + _PIECE] = codes[coder.decode(model, min(_PIECE, n - at))]
    except (ValueError, AssertionError) as error:
        raise ArtifactError(f"coded weights cannot be decoded ({error})") from error
    if not coder.is_empty():
        raise ArtifactError("coded weights leave words over")
    return result
