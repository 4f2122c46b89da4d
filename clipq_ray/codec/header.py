"""The header of a .clq file: which tensors lie where, and free metadata; of version 3, and of the versions before for reading.

The layout is in SPEC.md. Every damage is an `ArtifactError`, and nothing is promised that the file's size cannot carry. Not covered: blobs.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clipq_ray.codec import metadata, varint
from clipq_ray.codec.dictionaries import DICTIONARIES
from clipq_ray.errors import ArtifactError, advised, brief

MAGIC = b"CLQ"
VERSION = 3
FEATURES: frozenset[str] = frozenset()
"""What a file may ask for by `needs` beyond what the version has."""
JSON_LIMIT = 1 << 24
"""A header's JSON is at most 16 MiB when unpacked."""
MARKS_FREE, DEPTH_LIMIT, DIGITS_LIMIT = 1 << 17, 64, 32
"""In a file of n bytes, the JSON has at most MARKS_FREE + n of the bytes `[`, `{` and `,`: each may cost 200 bytes of memory. It is nested
at most DEPTH_LIMIT deep, so that the caller's stack does not decide what is read, and whole numbers have at most DIGITS_LIMIT digits."""
SIDES_LIMIT = 32
"""A tensor has at most so many dimensions; NumPy before 2 allows no more."""
ELEMENTS_FREE, ELEMENTS_PER_BYTE = 1 << 22, 1 << 12
"""A file of n bytes holds at most ELEMENTS_FREE + n ELEMENTS_PER_BYTE elements, so that a small file cannot ask for a large memory."""
PREFIX = struct.Struct("<3sBII")  # magic, version, bytes of the packed header, its CRC-32
CHECKSUM = 4
ADVICE = "fetch the file again, or make it anew"
"""Where a file says what cannot be."""
NORM = ("weight", "bias", "running_mean", "running_var")
"""The tensors of a folded batch norm; only the first two take bytes."""
_SIZE_BITS = 48
_SOURCE = re.compile(r"[0-9a-f]{64}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # could steer the terminal that a name is printed on


@dataclass(frozen=True)
class Entry:
    """One blob as the header states it; `offset` and `bytes` in the file, the CRC-32 of four bytes included.

    A blob is one tensor, but the last may be all vectors of the file: then `members` are their names and shapes.
    """

    name: str
    shape: tuple[int, ...]
    coder: str
    offset: int
    bytes: int
    members: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def elements(self) -> int:
        """The number of elements."""
        return sum(math.prod(shape) for _, shape in self.members) if self.members else math.prod(self.shape)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the tensors that the blob holds."""
        return tuple(name for name, _ in self.members) if self.members else (self.name,)


@dataclass(frozen=True)
class Table:
    """What is in a file, in the order of the blobs.

    `tensors`: name, shape, coder. `norms`: folded batch norms, module and channels. `vectors`: name and shape of further vectors. `coder`: the
    letter of the coder of the blob of norms and vectors.
    """

    tensors: Sequence[tuple[str, tuple[int, ...], str]]
    norms: Sequence[tuple[str, int]] = ()
    vectors: Sequence[tuple[str, tuple[int, ...]]] = ()
    coder: str = ""


@dataclass(frozen=True)
class Header:
    """What a file's beginning says: `bytes` are those of prefix and header."""

    metadata: dict[str, Any]
    entries: list[Entry]
    table: Table
    bytes: int


def norm_names(module: str) -> tuple[str, ...]:
    """The names of the four tensors of a batch norm."""
    return tuple(f"{module}.{name}" if module else name for name in NORM)


def fewest_bytes(table: Table) -> int:
    """The bytes that a file needs so that a reader believes what `table` says it holds."""
    shapes = [shape for _, shape, _ in table.tensors] + [shape for _, shape in table.vectors]
    elements = sum(map(math.prod, shapes)) + sum(len(NORM) * channels for _, channels in table.norms)
    return -(-(elements - ELEMENTS_FREE) // ELEMENTS_PER_BYTE)


def build(described: Mapping[str, Any], table: Table, sizes: Iterable[int], pad: int = 0) -> bytes:
    """Prefix and header; `described` is the metadata; `sizes` are those of the blobs without checksums; `pad`: at least so many bytes more, without meaning."""
    names, shapes, coders = zip(*table.tensors, strict=True) if table.tensors else ((), (), ())
    source = described.get("source")
    binary = isinstance(source, str) and bool(_SOURCE.fullmatch(source))
    content = {
        "n": names, "s": shapes, "c": coders, "b": table.norms, "v": table.vectors, "k": table.coder,
        "m": {key: value for key, value in described.items() if not (binary and key == "source")},
    }  # fmt: skip
    if pad:  # what no packer makes smaller than half a byte for each digit
        content["pad"] = hashlib.shake_256(b"").hexdigest(pad)
    kept = {key: value for key, value in content.items() if value or key == "m"}
    try:
        text = json.dumps(kept, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:  # NaN, infinities, halves of surrogate pairs
        raise ArtifactError(
            f"expected metadata of finite numbers and text, got {brief(error)}; change it"
        ) from error
    if len(text) > JSON_LIMIT:
        raise ArtifactError(
            f"expected a header of at most {JSON_LIMIT} bytes, got {len(text)}; shorten the metadata"
        )
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=DICTIONARIES[VERSION])
    tail = b"".join(map(varint.write, sizes)) + (bytes.fromhex(str(source)) if binary else b"")
    header = squeeze.compress(text) + squeeze.flush() + tail
    return PREFIX.pack(MAGIC, VERSION, len(header), zlib.crc32(header)) + header


def extent(beginning: bytes) -> int:
    """The bytes of prefix and header, from a file's first 12 bytes."""
    if len(beginning) < PREFIX.size:
        raise ArtifactError(f"expected a .clq file, got {len(beginning)} bytes; the file is cut off")
    magic, version, size, _ = PREFIX.unpack_from(beginning)
    if magic != MAGIC:
        raise ArtifactError("expected a .clq file (it begins with CLQ), got something else; check the URI")
    if not 1 <= version <= VERSION:
        raise ArtifactError(
            f"expected version 1 to {VERSION} of the .clq format, got {version}; use a newer clipq_ray"
        )
    return PREFIX.size + int(size)


@advised(ADVICE)
def parse(data: bytes, file_bytes: int) -> Header:
    """The header of a file of `file_bytes` bytes that begins with `data`, which holds all of it."""
    end = extent(data)
    _, version, _, crc = PREFIX.unpack_from(data)
    packed = data[PREFIX.size : end]
    if PREFIX.size + len(packed) != end or zlib.crc32(packed) != crc:
        raise ArtifactError("the header of the .clq file is damaged or cut off; fetch the file again")
    try:
        unpack = zlib.decompressobj(-15, zdict=DICTIONARIES[version])
        text = unpack.decompress(packed, JSON_LIMIT)
        if not unpack.eof:
            raise ArtifactError("the header of the .clq file does not end where it should")
        if sum(map(text.count, (b"[", b"{", b","))) > MARKS_FREE + file_bytes:
            raise ArtifactError("the header of the .clq file holds more values than its bytes can carry")
        content = json.loads(
            text.decode(), object_pairs_hook=_once, parse_constant=_refuse_constant, parse_int=_whole
        )
        _refuse_depth(content)
        # neither half a surrogate pair could be printed nor what overflows to infinity
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
        if not isinstance(content["m"], dict):
            raise ArtifactError("the metadata of the .clq file is no object")
        table, sizes = _version_1(content) if version == 1 else _since_2(content, unpack.unused_data)
        if version == 1 and unpack.unused_data:
            raise ArtifactError("the header of the .clq file does not end where it should")
    except (zlib.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"the header of the .clq file cannot be read ({error}); fetch the file again"
        ) from error
    found = _entries(table, sizes, end, file_bytes)
    metadata.check(content["m"], {name for entry in found for name in entry.tensors})
    return Header(content["m"], found, table, end)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ArtifactError("a key of the .clq file's header stands twice")
    return result


def _refuse_constant(word: str) -> float:
    raise ArtifactError(f"the header of the .clq file holds {word}, which is no JSON")


def _whole(digits: str) -> int:
    if len(digits) > DIGITS_LIMIT:
        raise ArtifactError(f"the header of the .clq file holds a number of {len(digits)} digits")
    return int(digits)


def _refuse_depth(content: Any) -> None:
    level = [content]
    for _ in range(DEPTH_LIMIT):
        inside = [value.values() if isinstance(value, dict) else value for value in level]
        level = [child for values in inside for child in values if isinstance(child, list | dict)]
        if not level:
            return
    raise ArtifactError(f"the header of the .clq file is nested more than {DEPTH_LIMIT} deep")


def _lists(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    raise ArtifactError(f"the header of the .clq file holds {value!r:.100} where a list belongs")


def _version_1(content: dict[str, Any]) -> tuple[Table, list[int]]:
    rows = [tuple(_lists(row)) for row in _lists(content["t"])]
    return Table([(name, _shape(shape), coder) for name, shape, coder, _ in rows]), [row[3] for row in rows]


def _since_2(content: dict[str, Any], tail: bytes) -> tuple[Table, list[int]]:
    needs = _lists(
        content.get("needs", [])
    )  # first: what else stands there may follow rules that are not known here
    if lacking := [name for name in needs if name not in FEATURES]:
        some = ", ".join(f"{name!r:.40}" for name in lacking[:5])
        raise ArtifactError(f"this file needs {some}; use a newer clipq_ray")
    n, s, c, b, v = (_lists(content.get(key, [])) for key in "nscbv")
    tensors = [(name, _shape(shape), coder) for name, shape, coder in zip(n, s, c, strict=True)]
    norms = [(module, channels) for module, channels in map(_lists, b)]
    vectors = [(name, _shape(shape)) for name, shape in map(_lists, v)]
    sizes, at = [], 0
    for _ in range(len(tensors) + bool(norms or vectors)):
        size, at = varint.read(tail, at, _SIZE_BITS)
        sizes.append(size)
    if len(rest := tail[at:]) not in (0, 32) or (rest and "source" in content["m"]):
        raise ArtifactError("the header of the .clq file does not end where it should")
    if rest:
        content["m"]["source"] = rest.hex()
    letter = content.get("k", "")
    if not isinstance(letter, str):
        raise ArtifactError(f"the coder of the vectors is {letter!r:.100}, which is no letter")
    for module, channels in norms:
        _shape([channels])
        if not isinstance(module, str):
            raise ArtifactError(f"the entry of batch norm {module!r:.100} is not valid")
    return Table(tensors, norms, vectors, letter), sizes


def _entries(table: Table, sizes: Sequence[Any], offset: int, file_bytes: int) -> list[Entry]:
    """All blobs, checked: names, coders, sizes, and that the file is just large enough."""
    blobs: list[tuple[str, tuple[int, ...], str, tuple[tuple[str, tuple[int, ...]], ...]]]
    blobs = [(name, shape, coder, ()) for name, shape, coder in table.tensors]
    if table.norms or table.vectors:
        members: list[tuple[str, tuple[int, ...]]]
        members = [(name, (channels,)) for module, channels in table.norms for name in norm_names(module)]
        members += table.vectors
        total = sum(math.prod(shape) for _, shape in members)
        blobs.append(("(vectors)", (total,), f"v{table.coder}", tuple(members)))
    result, names, elements = [], set[str](), 0
    for (name, shape, coder, inside), size in zip(blobs, sizes, strict=True):
        if (
            type(size) is not int or not 0 <= size < 1 << _SIZE_BITS or not isinstance(coder, str)
        ):  # true is an int
            raise ArtifactError(f"the entry of tensor {name!r:.100} is not valid")
        entry = Entry(name, shape, coder, offset, size + CHECKSUM, inside)
        for one in entry.tensors:
            if not isinstance(one, str) or one in names or _CONTROL.search(one):
                raise ArtifactError(f"the entry of tensor {one!r:.100} is not valid")
            names.add(one)
        elements += entry.elements
        result.append(entry)
        offset += entry.bytes
    if offset != file_bytes:
        raise ArtifactError(f"expected a .clq file of {offset} bytes, got {file_bytes}; fetch the file again")
    if elements > (most := ELEMENTS_FREE + ELEMENTS_PER_BYTE * file_bytes):
        raise ArtifactError(
            f"expected at most {most} elements in a file of {file_bytes} bytes, got {elements}"
        )
    return result


def _shape(shape: Any) -> tuple[int, ...]:
    """A shape that NumPy can hold; a zero among the sides must not hide the size of the others."""
    if (
        isinstance(shape, list)
        and len(shape) <= SIDES_LIMIT
        and all(type(side) is int and side >= 0 for side in shape)
        and math.prod(max(side, 1) for side in shape) < 1 << _SIZE_BITS
    ):
        return tuple(shape)
    raise ArtifactError(f"expected a shape of at most {SIDES_LIMIT} whole numbers, got {shape!r:.100}")
