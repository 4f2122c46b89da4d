"""Tensors that are not quantized by CLIP-Q: biases, batch norm, buffers, as plain little-endian numbers.

Floating point is stored as float16 where every element keeps a relative error of at most 2^-10 (zeros stay zero), else as float32; the
stated precision of the format. Other types are stored as they are. Not covered: vectors on grids (`vectors`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from clipq_ray.errors import ArtifactError

RELATIVE_ERROR = 2.0**-10
_TYPES = {
    "f2": "<f2",
    "f4": "<f4",
    "f8": "<f8",
    "i1": "i1",
    "i2": "<i2",
    "i4": "<i4",
    "i8": "<i8",
    "u1": "u1",
    "b1": "?",
}


def write(array: npt.NDArray[np.generic]) -> tuple[str, bytes]:
    """The coder's name (a NumPy type) and the bytes, row-major."""
    kind = array.dtype.str[1:]
    if kind == "f4" and (half := halved(array.astype(np.float32, copy=False))) is not None:
        array, kind = half, "f2"
    if kind not in _TYPES:
        raise ArtifactError(
            f"expected one of the types {', '.join(_TYPES)}, got {array.dtype}; convert the tensor"
        )
    return kind, np.ascontiguousarray(array).astype(_TYPES[kind]).tobytes()


def halved(array: npt.NDArray[np.float32]) -> npt.NDArray[np.float16] | None:
    """`array` as float16, None where an element would lose more than `RELATIVE_ERROR`."""
    with np.errstate(over="ignore", invalid="ignore"):
        half = array.astype(np.float16)
        exact = array.astype(np.float64)
        close = np.abs(half.astype(np.float64) - exact) <= RELATIVE_ERROR * np.abs(exact)
    return half if bool(close.all()) else None


def read(kind: str, blob: bytes, shape: tuple[int, ...]) -> npt.NDArray[np.generic]:
    """The mirror of `write`; float16 comes back as float32."""
    if kind not in _TYPES:
        raise ArtifactError(f"this file needs coder {kind!r:.40}; use a newer clipq_ray")
    dtype = np.dtype(_TYPES[kind])
    if len(blob) != int(np.prod(shape, dtype=np.int64)) * dtype.itemsize:
        raise ArtifactError("a tensor's bytes do not fit its shape")
    if kind == "b1" and blob.translate(None, b"\0\1"):
        raise ArtifactError("a truth value is neither 0 nor 1")
    array = np.frombuffer(blob, dtype).reshape(shape)
    return array.astype(np.float32) if kind == "f2" else array.astype(dtype.newbyteorder("="))


def stored(array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """What comes back when `array` is written and read."""
    kind, blob = write(array)
    return read(kind, blob, array.shape)
