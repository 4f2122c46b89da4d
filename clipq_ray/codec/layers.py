"""One CLIP-Q layer as bytes: the level table, then the codes by the static coder "q" or the adaptive coder "m" of SPEC.md.

Coder "q" is here: frequencies on constriction's ANS coder. They are integers that sum to 2^14 and travel in the file, so the
probabilities that reach the coder are exact in binary and decoding does not depend on rounding; every code of a layer has the same
model. Coder "m" is in `mixing`, which is imported when it is first needed. Not covered: which tensors are layers (`container`).
"""

from __future__ import annotations

from dataclasses import dataclass

import constriction
import numpy as np
import numpy.typing as npt

from clipq_ray.errors import FormatError
from clipq_ray.plan import Share
from clipq_ray.quantizer import Quantized

CODERS = ("q", "m")
MIXED_MOST = 1 << 20
"""Larger layers are written by "q" alone: "m" codes 2 to 4 million weights a second (measured), so each would take a second or more."""
TOTAL_BITS = 14
TOTAL = 1 << TOTAL_BITS
_MOST_PER_BYTE = 1 << 19
"""A symbol costs at least log2(2^14 / (2^14 - 1)) = 0.000088 bits, so no byte of a blob can hold more codes than this."""
_PIECE = 1 << 20
"""Codes that the coder hands over at a time: what it allocates beside the result does not grow with the stated shape."""


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

    def values(self) -> npt.NDArray[np.float32]:
        """The weights: float32, the codes' shape."""
        return self.levels[self.codes.astype(np.int64) + self.negative]


def coded(quantized: Quantized, share: Share) -> CodedLayer:
    """The codec's view of what the quantizer made with `share`."""
    codes, levels = quantized.codes.cpu().contiguous().numpy(), quantized.levels.cpu().numpy()
    return CodedLayer.from_quantized(codes, levels, share.negative)


def layer_bytes(layer: CodedLayer) -> int:
    """The bytes that `encode` writes into the payload for this layer, checksum included."""
    return len(smallest(layer)[1]) + 4


def smallest(layer: CodedLayer) -> tuple[str, bytes]:
    """The coder that takes fewer bytes for `layer`, "q" where both take the same, and its blob without checksum."""
    static = write(layer)
    if layer.codes.size > MIXED_MOST:
        return "q", static
    from clipq_ray.codec import mixing

    adaptive = _head(layer) + mixing.encode(layer.codes, layer.negative, _positive(layer))
    return ("m", adaptive) if len(adaptive) < len(static) else ("q", static)


def _positive(layer: CodedLayer) -> int:
    return len(layer.levels) - 1 - layer.negative


def _head(layer: CodedLayer) -> bytes:
    levels = np.delete(layer.levels, layer.negative).astype("<f4").tobytes()
    return bytes((layer.negative, _positive(layer))) + levels


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


def write(layer: CodedLayer) -> bytes:
    """The blob of `layer` by coder "q", without checksum."""
    symbols = layer.codes.reshape(-1).astype(np.int32) + layer.negative
    counts = np.bincount(symbols, minlength=len(layer.levels)).astype(np.int64)
    head = _head(layer)
    if not len(symbols):
        return head
    table = frequencies(counts)
    head += b"".join(_varint(int(value)) for value in table[:-1])
    present = np.flatnonzero(table)
    if len(present) == 1:
        return head
    renumbered = np.zeros(len(table), dtype=np.int32)
    renumbered[present] = np.arange(len(present), dtype=np.int32)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(renumbered[symbols], _model(table[present]))
    return head + bytes(coder.get_compressed().astype("<u4").tobytes())


def read(blob: bytes, shape: tuple[int, ...], coder: str = "q") -> CodedLayer:
    """The mirror of `write`, and of what `smallest` gives for its coder; `FormatError` where the blob cannot be one."""
    n = int(np.prod(shape, dtype=np.int64))
    if len(blob) < 2 or (coder == "q" and n > _MOST_PER_BYTE * len(blob) * 8 and not _constant(blob)):
        raise FormatError("a layer holds more codes than its bytes can carry")
    negative, positive = blob[0], blob[1]
    at = 2 + 4 * (negative + positive)
    if len(blob) < at:
        raise FormatError("a level table is cut off")
    levels = np.insert(np.frombuffer(blob[2:at], "<f4"), negative, 0.0).astype(np.float32)
    if coder == "m":
        from clipq_ray.codec import mixing

        return CodedLayer(mixing.decode(blob[at:], shape, negative, positive), levels, negative)
    if n == 0:
        _refuse_rest(blob, at)
        return CodedLayer(np.zeros(shape, np.int16), levels, negative)
    table, at = _read_table(blob, at, negative + positive + 1)
    present = np.flatnonzero(table)
    if len(present) == 1:
        _refuse_rest(blob, at)
        codes = np.full(n, present[0] - negative, dtype=np.int16)
    else:
        codes = _read_codes(blob[at:], table[present], (present - negative).astype(np.int16), n)
    return CodedLayer(codes.reshape(shape), levels, negative)


def _refuse_rest(blob: bytes, at: int) -> None:
    if len(blob) > at:
        raise FormatError("a layer leaves bytes over")


def _constant(blob: bytes) -> bool:
    """Whether all codes are equal, which needs no bits per code."""
    negative, positive = blob[0], blob[1]
    at = 2 + 4 * (negative + positive)
    table, _ = _read_table(blob, at, negative + positive + 1)
    return bool((table > 0).sum() == 1)


def _read_table(blob: bytes, at: int, symbols: int) -> tuple[npt.NDArray[np.int64], int]:
    table = np.zeros(symbols, dtype=np.int64)
    for index in range(symbols - 1):
        table[index], at = _read_varint(blob, at)
    table[-1] = TOTAL - table[:-1].sum()
    if table[-1] < 0 or int(table.sum()) != TOTAL:
        raise FormatError("a frequency table does not sum to its total")
    return table, at


def _read_codes(
    blob: bytes, table: npt.NDArray[np.int64], codes: npt.NDArray[np.int16], n: int
) -> npt.NDArray[np.int16]:
    """`n` of `codes`, whose frequencies are `table`."""
    if len(blob) % 4 or not blob:
        raise FormatError("coded weights are no whole number of words")
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
        raise FormatError(f"coded weights cannot be decoded ({error})") from error
    if not coder.is_empty():
        raise FormatError("coded weights leave words over")
    return result


def _varint(value: int) -> bytes:
    result = bytearray()
    while value > 127:
        result.append(value & 127 | 128)
        value >>= 7
    return bytes([*result, value])


def _read_varint(blob: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(blob) and shift <= 14:
        byte = blob[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise FormatError("a frequency is cut off")
