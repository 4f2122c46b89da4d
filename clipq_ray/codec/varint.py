"""Unsigned integers of seven bits per byte, lowest first (LEB128), and signed ones folded into them. SPEC.md names both."""

from __future__ import annotations

from clipq_ray.errors import ArtifactError


def write(value: int) -> bytes:
    """The bytes of `value` >= 0."""
    result = bytearray()
    while value > 127:
        result.append(value & 127 | 128)
        value >>= 7
    return bytes([*result, value])


def read(blob: bytes, at: int, bits: int) -> tuple[int, int]:
    """The value at `at` and where the next begins; `ArtifactError` where it is cut off or has more than `bits` bits."""
    value = shift = 0
    while at < len(blob) and shift < bits:
        byte = blob[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            if value >> bits:
                break
            return value, at
    raise ArtifactError(f"a number of at most {bits} bits is cut off or too large")


def fold(value: int) -> int:
    """0, -1, 1, -2, 2 ... as 0, 1, 2, 3, 4 ..."""
    return 2 * value if value >= 0 else -2 * value - 1


def unfold(value: int) -> int:
    """The mirror of `fold`."""
    return value >> 1 if value % 2 == 0 else -(value + 1 >> 1)
