"""What is attacked: small valid files of every coder, taken apart and put together again with right lengths and checksums; and raw damage."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from clipq_ray import codec
from clipq_ray.codec import coders, header, layers, plain, varint, vectors
from clipq_ray.codec.dictionaries import DICTIONARIES

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "v1-small.clq"


@dataclass
class Draft:
    """A file in parts, to be forged and then written with right lengths and checksums.

    `text`, `packed`, `tail`, `sizes`: what is written instead of what follows from `content` and `blobs`.
    """

    version: int
    content: Any
    blobs: list[bytes]
    source: bytes = b""
    text: bytes | None = None
    tail: bytes | None = None
    sizes: list[Any] | None = None
    packed: bytes | None = None

    def json(self) -> bytes:
        """The header's JSON; in version 1 with the sizes inside."""
        if self.text is None:
            if self.version == 1 and isinstance(self.content, dict):
                sizes = self.sizes if self.sizes is not None else [len(blob) for blob in self.blobs]
                rows = self.content.get("t")
                for row, size in zip(rows if isinstance(rows, list) else [], sizes, strict=False):
                    if isinstance(row, list) and len(row) == 4:
                        row[3] = size
            self.text = json.dumps(self.content).encode()
        return self.text

    def bytes(self) -> bytes:
        """The file."""
        tail = self.tail
        if tail is None:
            sizes = self.sizes if self.sizes is not None else [len(blob) for blob in self.blobs]
            tail = b"" if self.version == 1 else b"".join(map(varint.write, sizes)) + self.source
        packed = (self.packed or packed_header(self.json(), self.version)) + tail
        head = header.PREFIX.pack(b"CLQ", self.version, len(packed), zlib.crc32(packed)) + packed
        return head + b"".join(struct.pack("<I", zlib.crc32(blob)) + blob for blob in self.blobs)


@dataclass(frozen=True)
class Seed:
    """A valid file: its parts, and per blob the coder."""

    data: bytes
    version: int
    text: bytes
    source: bytes
    blobs: tuple[bytes, ...]
    coders: tuple[str, ...] = field(default=())

    def draft(self) -> Draft:
        """The same file in parts of its own."""
        return Draft(self.version, json.loads(self.text), list(self.blobs), self.source)


@dataclass(frozen=True)
class Case:
    """A hostile file; `mended` says that lengths and checksums are right again, `lie` how ranges are read wrongly."""

    family: str
    data: bytes
    seed: Seed
    mended: bool
    lie: int = 0


def packed_header(text: bytes, version: int) -> bytes:
    squeeze = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zdict=DICTIONARIES[version])
    return squeeze.compress(text) + squeeze.flush()


def parts(data: bytes) -> Seed:
    """A valid file taken apart."""
    found = header.parse(data, len(data))
    unpack = zlib.decompressobj(-15, zdict=DICTIONARIES[data[3]])
    text = unpack.decompress(data[12 : found.bytes])
    source = unpack.unused_data[-32:] if "source" in found.metadata and data[3] > 1 else b""
    blobs = tuple(data[entry.offset + 4 : entry.offset + entry.bytes] for entry in found.entries)
    return Seed(data, data[3], text, source, blobs, tuple(entry.coder for entry in found.entries))


def _layer(shape: tuple[int, ...], negative: int, positive: int, number: int) -> codec.CodedLayer:
    rng = np.random.default_rng(number)
    codes = np.where(rng.random(shape) < 0.4, 0, rng.integers(-negative, positive + 1, shape)).astype(
        np.int16
    )
    levels = np.arange(-negative, positive + 1).astype(np.float32) * np.float32(0.1)
    return codec.CodedLayer(codes, levels, negative)


def _file(
    tensors: dict[str, tuple[tuple[int, ...], str, bytes]], grids: str = "", metadata: dict[str, Any] | None = None, version: int = 3
) -> bytes:  # fmt: skip
    rows = [(name, shape, coder) for name, (shape, coder, _) in tensors.items()]
    blobs = [blob for _, _, blob in tensors.values()]
    metadata = metadata or {}
    if version == 1:
        table = [[*row, len(blob)] for row, blob in zip(rows, blobs, strict=True)]
        return Draft(1, {"t": table, "m": metadata}, blobs).bytes()
    norms, others = ((("bn", 3), ("", 2)), (("fc.bias", (2, 2)), ("none", (0,)))) if grids else ((), ())
    if grids:
        counts = ((3,), (2,), (3,), (2,), (2, 2), (0,))
        codes = [np.arange(np.prod(shape), dtype=np.int32).reshape(shape) - 40 for shape in counts]
        found = [codec.Vector(one * (index - 2), 130 + index) for index, one in enumerate(codes)]
        heads = b"".join(
            bytes((one.step,)) + varint.write(varint.fold(vectors.location(one))) for one in found
        )
        row = np.concatenate([one.codes.reshape(-1) - vectors.location(one) for one in found])[None]
        sides = int(-row.min()), int(row.max())
        blobs.append(heads + bytes(sides) + coders.encode(grids, row.astype(np.int16), *sides))
    table = header.Table(rows, norms, others, grids)
    if version == 2:
        return _of_version_2(table, metadata, blobs)
    head = header.build(metadata, table, map(len, blobs))
    return head + b"".join(struct.pack("<I", zlib.crc32(blob)) + blob for blob in blobs)


def _of_version_2(table: header.Table, metadata: dict[str, Any], blobs: list[bytes]) -> bytes:
    names, shapes, kinds = zip(*table.tensors, strict=True)
    return Draft(2, {"m": metadata, "n": names, "s": shapes, "c": kinds}, blobs).bytes()


def files() -> list[bytes]:
    """Small valid files: every coder, every plain type, all versions, norms, vectors, a hash, borders."""
    shapes = (
        (3, 2, 3, 3),
        (5, 6),
        (4, 3, 2),
        (9,),
        (2, 2, 9),
        (7,),
        (3, 3, 2, 2),
        (6, 5),
        (4, 9),
        (2, 2, 2, 2, 2),
        (5, 4, 2),
        (7, 3),
    )
    found = []
    plain_views = [coder for coder in layers.CODERS if "k" not in coder]
    cases = [(coder, shape, (1, 1)) for coder, shape in zip(plain_views, shapes, strict=True)]
    cases += [
        (coder, (4, 8), (2, 1 + number % 2))
        for number, coder in enumerate(coder for coder in layers.CODERS if "k" in coder)
    ]
    for number, (coder, shape, kernel) in enumerate(cases):
        one = _layer(shape, number % 3, 2 + 5 * (number // 2), number)
        if "t" in coder:
            one.codes[-2:] = 0
        if coder.endswith("h"):
            one = one.halved()
        bias = (shape[:1], *plain.write(np.ones(shape[0], np.float32)))
        tensors = {"w": (shape, coder, layers.write(one, coder, kernel)), "b": bias}
        found += [_file(tensors, version=version, metadata={"classes": 3}) for version in DICTIONARIES]
    kinds = {kind: np.array([[1, 0]], kind) for kind in ("f4", "f8", "i1", "i2", "i4", "i8", "u1", "?")}
    kinds |= {"f2": np.array(0.5, np.float32), "f4": np.array([1e-30, 1], np.float32), "no": np.ones((0, 3))}
    found.append(_file({name: (one.shape, *plain.write(one)) for name, one in kinds.items()}))
    metadata = {"source": "ab" * 32, "architecture": None, "class_names": ["a", "\u00fc"], "ties": {"x": "w"}}
    for letter, (negative, positive) in zip(coders.LETTERS, ((255, 255), (9, 255), (30, 0)), strict=True):
        one = _layer((2, 3, 2, 2), negative, positive, 9)
        constant = codec.CodedLayer(np.ones((3, 2), np.int16), np.array([0, 0.5], np.float32), 0)
        both = {"w": (one.shape, letter, layers.write(one, letter))}
        both |= {
            "constant": ((3, 2), "qh", layers.write(constant, "qh")),
            "no": ((0, 4), letter, b"\1\0" + bytes(4)),
        }
        found.append(_file(both, letter, metadata))
        found.append(_file({}, letter, {"source": "ab" * 32}))
    return [*found, _file({}), GOLDEN.read_bytes()]


@cache
def seeds() -> tuple[Seed, ...]:
    """`files`, taken apart."""
    return tuple(map(parts, files()))


def _at(rng: Random, data: bytes) -> int:
    return rng.randrange(len(data) + 1)


def cut(rng: Random, data: bytes) -> bytes:
    return data[: _at(rng, data)]


def grown(rng: Random, data: bytes) -> bytes:
    return data + rng.choice((b"\0", b"\xff" * 4, data, rng.randbytes(1 + rng.randrange(40))))


def flipped(rng: Random, data: bytes) -> bytes:
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8)) if data else 0):
        result[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(result)


def spliced(rng: Random, data: bytes) -> bytes:
    start, stop, at = *sorted((_at(rng, data), _at(rng, data))), _at(rng, data)
    piece = rng.choice((data[start:stop], rng.randbytes(1 + rng.randrange(9)), b""))
    result = data[:at] + piece + data[at + rng.choice((0, len(piece), 1)) :]
    return result if result != data else flipped(rng, data)


def filled(rng: Random, data: bytes) -> bytes:
    return rng.choice((b"\0", b"\xff", b"\x80", b"\1")) * rng.choice(
        (0, 1, 2, 3, len(data), 2 * len(data), 64)
    )


def random_bytes(rng: Random, data: bytes) -> bytes:
    return rng.randbytes(rng.choice((len(data), rng.randrange(80))))


def _begun(rng: Random, data: bytes) -> bytes:
    """Another magic, version, size or checksum."""
    at = rng.randrange(12)
    return data[:at] + bytes((rng.choice((0, 1, 2, 3, 255, rng.randrange(256))),)) + data[at + 1 :]


RAW: dict[str, Callable[[Random, bytes], bytes]] = {
    "cut": cut, "grown": grown, "flipped": flipped, "spliced": spliced, "begun": _begun,
}  # fmt: skip
