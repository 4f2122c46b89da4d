"""The container of a .clq file: magic, version, checked header, one checked blob per tensor without holes.

The layout is in SPEC.md. Every truncation and every flipped byte is a `FormatError`. Not covered: what stands inside a blob
(`layers`, `plain`).
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from clipq_ray.codec import layers, plain
from clipq_ray.codec.layers import CodedLayer
from clipq_ray.errors import FormatError

MAGIC = b"CLQ"
VERSION = 1
HEADER_LIMIT = 1 << 24
"""A header is at most 16 MiB when unpacked."""
ELEMENTS_LIMIT = 1 << 34
"""A file holds at most so many elements."""
SIDES_LIMIT = 32
"""A tensor has at most so many dimensions; NumPy before 2 allows no more."""
_PREFIX = struct.Struct("<3sBII")  # magic, version, bytes of the packed header, its CRC-32

DICTIONARY = (
    b'{"t":[["features.classifier.downsample.0.weight","linear.weight",[64,64,3,3],"q",'
    b'["layer3.1.bn2.running_var",[32],"f2",["layer2.1.bn1.running_mean",[16],"f2",["conv2.weight",[16,6,5,5],"q",'
    b'["fc1.weight",[120,400],"q",["conv1.bias",[6],"f2",]],"m":{"architecture":{"name":"resnet","kwargs":{"num_classes":1000'
    b',"name":"lenet5","kwargs":{"num_classes":10}},"classes":10,"input":{"shape":[3,224,224],"resize":256,"mean":[0.485,0.456,0.406],'
    b'"std":[0.229,0.224,0.225]},"input":{"shape":[1,28,28],"resize":null,"mean":[0.1307],"std":[0.3081]},"source":"'
)
"""What headers have in common; part of the format, never changed within a version."""


@dataclass(frozen=True)
class Packed:
    """A compressed network: free JSON `metadata`, and tensors by name in the order of the state dict."""

    metadata: dict[str, Any]
    tensors: dict[str, CodedLayer | npt.NDArray[np.generic]] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One tensor as the header states it; `offset` and `bytes` in the file, the CRC-32 of four bytes included."""

    name: str
    shape: tuple[int, ...]
    coder: str
    offset: int
    bytes: int

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


def encode(packed: Packed) -> bytes:
    """The bytes of a .clq file; the same bytes for the same content."""
    table, blobs = [], []
    for name, tensor in packed.tensors.items():
        if isinstance(tensor, CodedLayer):
            coder, blob = layers.smallest(tensor)
            shape = tensor.codes.shape
        else:
            coder, blob = plain.write(tensor)
            shape = tensor.shape
        table.append([name, list(shape), coder, len(blob)])
        blobs.append(struct.pack("<I", zlib.crc32(blob)) + blob)
    text = json.dumps({"t": table, "m": packed.metadata}, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) > HEADER_LIMIT:
        raise FormatError(
            f"expected a header of at most {HEADER_LIMIT} bytes, got {len(text)}; shorten the metadata"
        )
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=DICTIONARY)
    header = squeeze.compress(text) + squeeze.flush()
    prefix = _PREFIX.pack(MAGIC, VERSION, len(header), zlib.crc32(header))
    return b"".join((prefix, header, *blobs))


def _header(data: bytes) -> tuple[dict[str, Any], list[Entry]]:
    if len(data) < _PREFIX.size:
        raise FormatError(f"expected a .clq file, got {len(data)} bytes; the file is cut off")
    magic, version, size, crc = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise FormatError("expected a .clq file (it begins with CLQ), got something else; check the URI")
    if version != VERSION:
        raise FormatError(
            f"expected version {VERSION} of the .clq format, got {version}; use a newer clipq_ray"
        )
    packed = data[_PREFIX.size : _PREFIX.size + size]
    if len(packed) != size or zlib.crc32(packed) != crc:
        raise FormatError("the header of the .clq file is damaged or cut off; fetch the file again")
    try:
        unpack = zlib.decompressobj(-15, zdict=DICTIONARY)
        text = unpack.decompress(packed, HEADER_LIMIT)
        if not unpack.eof or unpack.unused_data:
            raise FormatError("the header of the .clq file does not end where it should")
        content = json.loads(text)
        entries_ = _entries(content["t"], _PREFIX.size + size, len(data))
        if not isinstance(content["m"], Mapping):
            raise FormatError("the metadata of the .clq file is no object")
    except (zlib.error, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(
            f"the header of the .clq file cannot be read ({error}); fetch the file again"
        ) from error
    return dict(content["m"]), entries_


def _entries(table: list[Any], offset: int, end: int) -> list[Entry]:
    result, names, elements = [], set(), 0
    for name, shape, coder, size in table:
        valid = (
            isinstance(name, str)
            and name not in names
            and isinstance(coder, str)
            and type(size) is int  # JSON's true is an int to Python
            and size >= 0
        )
        if not valid or not _is_shape(shape):
            raise FormatError(f"the entry of tensor {name!r} is not valid")
        names.add(name)
        entry = Entry(name, tuple(shape), coder, offset, size + 4)
        elements += entry.elements
        result.append(entry)
        offset += size + 4
    if offset != end:
        raise FormatError(f"expected a .clq file of {offset} bytes, got {end}; fetch the file again")
    if elements > ELEMENTS_LIMIT:
        raise FormatError(f"expected at most {ELEMENTS_LIMIT} elements, got {elements}")
    return result


def _is_shape(shape: Any) -> bool:
    """Whether NumPy can hold this shape; a zero among the sides must not hide the size of the others."""
    return (
        isinstance(shape, list)
        and len(shape) <= SIDES_LIMIT
        and all(type(side) is int and side >= 0 for side in shape)
        and math.prod(max(side, 1) for side in shape) <= ELEMENTS_LIMIT
    )


def entries(data: bytes) -> list[Entry]:
    """The tensors that a file holds, from its header alone."""
    return _header(data)[1]


def metadata(data: bytes) -> dict[str, Any]:
    """The metadata of a file, from its header alone."""
    return _header(data)[0]


def decode(data: bytes, names: Iterable[str] | None = None) -> Packed:
    """The content of a .clq file, or of the tensors in `names` only; `FormatError` where anything is damaged."""
    content, table = _header(data)
    wanted = None if names is None else set(names)
    if wanted is not None and (unknown := wanted - {entry.name for entry in table}):
        raise FormatError(
            f"expected names of tensors in the file, got {', '.join(sorted(unknown))}; see clipq inspect"
        )
    tensors: dict[str, CodedLayer | npt.NDArray[np.generic]] = {}
    for entry in table:
        if wanted is None or entry.name in wanted:
            tensors[entry.name] = _tensor(data, entry)
    return Packed(content, tensors)


def _tensor(data: bytes, entry: Entry) -> CodedLayer | npt.NDArray[np.generic]:
    blob = data[entry.offset + 4 : entry.offset + entry.bytes]
    if zlib.crc32(blob) != int.from_bytes(data[entry.offset : entry.offset + 4], "little"):
        raise FormatError(f"tensor {entry.name} of the .clq file is damaged (checksum); fetch the file again")
    try:
        return (
            layers.read(blob, entry.shape, entry.coder)
            if entry.coder in layers.CODERS
            else plain.read(entry.coder, blob, entry.shape)
        )
    except FormatError as error:
        raise FormatError(f"tensor {entry.name}: {error}") from error
    except MemoryError as error:
        raise FormatError(
            f"tensor {entry.name}: expected memory for {entry.elements} elements, got too little; use a larger machine"
        ) from error
