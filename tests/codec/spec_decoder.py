"""A decoder of .clq files in plain Python, written from the prose of clipq_ray/codec/SPEC.md and from nothing else.

It is there to be compared with clipq_ray.codec and shares no line with it. Not covered: the coders of codes (`spec_coders`), speed.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spec_coders import CODERS, Cursor, Refused, demand
from spec_coders import codes as coded

SPEC = Path(__file__).resolve().parents[2] / "clipq_ray" / "codec" / "SPEC.md"
DICTIONARY_3, DICTIONARY_2, DICTIONARY_1 = (
    block.replace("\n", "").encode("ascii") for block in SPEC.read_text().split("```\n")[1::2]
)
PLAIN = {"f2": "e", "f4": "f", "f8": "d", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "b1": "B"}

LAYERS = {
    letter + view + trim + half
    for letter in CODERS
    for view in ("", "k")
    for trim in ("", "t")
    for half in ("", "h")
}


@dataclass
class Tensor:
    """A tensor; `kind` is "layer", "vector" or a plain type. Codes and levels (zero included) are those of a layer."""

    shape: tuple[int, ...]
    kind: str
    values: list[Any]
    codes: list[int] | None = None
    levels: list[float] | None = None


def decode(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a file."""
    demand(
        len(data) >= 12 and data[:3] == b"CLQ" and data[3] in (1, 2, 3), "not a .clq file of version 1 to 3"
    )
    size, checksum = struct.unpack("<II", data[4:12])
    cursor = Cursor(data)
    cursor.take(12)
    packed = cursor.take(size)
    demand(zlib.crc32(packed) == checksum, "checksum of the header")
    header, sizes = _header_1(packed, len(data)) if data[3] == 1 else _header(packed, data[3], len(data))
    _check(header, len(data))
    blobs = []
    for size in sizes:
        (checksum,) = struct.unpack("<I", cursor.take(4))
        blobs.append(cursor.take(size))
        demand(zlib.crc32(blobs[-1]) == checksum, "checksum of a blob")
    demand(cursor.at == len(data), "bytes behind the last blob")
    tensors = {
        name: _tensor(blob, tuple(shape), coder)
        for name, shape, coder, blob in zip(header["n"], header["s"], header["c"], blobs, strict=False)
    }
    if header["b"] or header["v"]:
        tensors |= _vectors(Cursor(blobs[-1]), header)
    return header["m"], tensors


def _json(packed: bytes, dictionary: bytes, length: int) -> tuple[dict[str, Any], bytes]:
    """The JSON of a header and the bytes behind its stream."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        demand(len(dict(items)) == len(items), "a repeated key")
        return dict(items)

    def number(text: str) -> float:
        demand(math.isfinite(float(text)), f"{text} is no number")
        return float(text)

    def whole(text: str) -> int:
        demand(len(text) <= 32, "a number too long")
        return int(text)

    stream = zlib.decompressobj(-15, zdict=dictionary)
    try:
        text = stream.decompress(packed, (1 << 24) + 1)
        demand(stream.eof and len(text) <= 1 << 24, "header's stream too long or cut off")
        demand(sum(text.count(mark) for mark in b"[{,") <= (1 << 17) + length, "too many values")
        header = json.loads(
            text.decode(), object_pairs_hook=pairs, parse_constant=number, parse_float=number, parse_int=whole
        )
        demand(_depth(header) <= 64, "nested too deep")
        json.dumps(header, ensure_ascii=False).encode()  # refuses half a surrogate pair
    except (zlib.error, ValueError, RecursionError) as error:
        raise Refused(f"header: {error}") from None
    demand(isinstance(header, dict) and isinstance(header.get("m"), dict), "header without metadata")
    return header, stream.unused_data


def _depth(value: Any) -> int:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inside is None else 1 + max(map(_depth, inside), default=0)


def _header_1(packed: bytes, length: int) -> tuple[dict[str, Any], list[int]]:
    header, behind = _json(packed, DICTIONARY_1, length)
    table: Any = header.get("t")
    demand(not behind, "bytes behind the header's stream")
    demand(isinstance(table, list) and all(isinstance(row, list) and len(row) == 4 for row in table), "t")
    names, shapes, coders, sizes = ([row[column] for row in table] for column in range(4))
    demand(all(type(size) is int and 0 <= size < 1 << 48 for size in sizes), "sizes")
    return {"n": names, "s": shapes, "c": coders, "b": [], "v": [], "k": "", "m": header["m"]}, sizes


def _header(packed: bytes, version: int, length: int) -> tuple[dict[str, Any], list[int]]:
    header, behind = _json(packed, DICTIONARY_2 if version == 2 else DICTIONARY_3, length)
    header = {"n": [], "s": [], "c": [], "b": [], "v": [], "needs": [], "k": ""} | header
    demand(all(isinstance(header[key], list) for key in ("n", "s", "c", "b", "v", "needs")), "no lists")
    demand(not header["needs"], f"needs {header['needs']}")
    demand(isinstance(header["k"], str), "k is no letter")
    demand(len(header["n"]) == len(header["s"]) == len(header["c"]), "lists of different lengths")
    demand(all(isinstance(row, list) and len(row) == 2 for row in header["b"] + header["v"]), "b or v")
    cursor = Cursor(behind)
    sizes = [cursor.leb128(48) for _ in range(len(header["n"]) + bool(header["b"] or header["v"]))]
    source = cursor.rest()
    demand(len(source) in (0, 32), "bytes behind the sizes")
    if source:
        demand("source" not in header["m"], "source twice")
        header["m"]["source"] = source.hex()
    return header, sizes


def _check(header: dict[str, Any], length: int) -> None:
    """Names, shapes, coders and the number of elements, before anything is allocated."""
    shapes = header["s"] + [shape for _, shape in header["v"]]
    for shape in shapes + [[channels] for _, channels in header["b"]]:
        demand(isinstance(shape, list) and len(shape) <= 32, "a shape")
        demand(all(type(side) is int and side >= 0 for side in shape), "a side")
        demand(math.prod(side for side in shape if side) < 1 << 48, "a shape too large")
    names = header["n"] + [module for module, _ in header["b"]] + [name for name, _ in header["v"]]
    demand(all(isinstance(name, str) for name in names), "a name that is no text")
    names = header["n"] + [name for name, _ in header["v"]]
    names += [_of(module, tensor) for module, _ in header["b"] for tensor in NORM]
    demand(len(set(names)) == len(names), "two tensors of one name")
    odd = any(ord(sign) < 32 or 127 <= ord(sign) < 160 for name in names for sign in name)
    demand(not odd, "a name with control characters")
    _check_metadata(header["m"], set(names))
    for coder in header["c"]:
        known = isinstance(coder, str) and coder in {*PLAIN, *LAYERS}
        demand(known, f"coder {coder!r} is unknown")
    demand(header["k"] in CODERS or not (header["b"] or header["v"]), f"coder {header['k']!r} is unknown")
    elements = sum(map(math.prod, shapes)) + 4 * sum(channels for _, channels in header["b"])
    demand(elements <= (1 << 22) + 4096 * length, "too many elements")


def _check_metadata(about: dict[str, Any], names: set[str]) -> None:
    """The keys that the project writes have the kinds that the prose gives them."""
    network = about.get("architecture")
    demand(network is None or isinstance(network, dict), "architecture")
    if network is not None:
        demand(isinstance(network.get("name"), str), "the architecture's name")
        demand(isinstance(network.get("kwargs", {}), dict), "the architecture's kwargs")
    demand(type(about.get("classes", 0)) is int and about.get("classes", 0) >= 0, "classes")
    for key in ("class_names", "dropped"):
        texts = about.get(key, [])
        demand(isinstance(texts, list) and all(isinstance(text, str) for text in texts), key)
    demand(isinstance(about.get("source", ""), str), "source")
    if "input" in about:
        _check_input(about["input"])
    ties = about.get("ties", {})
    demand(isinstance(ties, dict), "ties")
    demand(all(isinstance(name, str) and name in names for name in ties.values()), "a tie to nothing")
    demand(not any(alias in names for alias in ties), "a tie of a tensor that is there")


def _whole(value: Any, least: int) -> bool:
    return type(value) is int and least <= value <= 8192


def _check_input(images: Any) -> None:
    """Shape, resize, mean and std of `input` are as the prose says."""
    demand(isinstance(images, dict), "input")
    demand(all(key in images for key in ("shape", "resize", "mean", "std")), "what input lacks")
    shape = images["shape"]
    demand(isinstance(shape, list) and len(shape) == 3, "the input's shape")
    demand(all(_whole(side, 1) for side in shape) and math.prod(shape) <= 2**26, "the input's sides")
    demand(images["resize"] is None or _whole(images["resize"], max(shape[1], shape[2])), "resize")
    for key in ("mean", "std"):
        numbers = images[key]
        demand(isinstance(numbers, list) and len(numbers) == shape[0], key)
        demand(all(type(number) in (int, float) for number in numbers), key)
    demand(all(number > 0 for number in images["std"]), "std")
    demand(isinstance(images.get("interpolation", ""), str), "interpolation")


def _tensor(blob: bytes, shape: tuple[int, ...], coder: str) -> Tensor:
    """A layer or a plain tensor."""
    count = math.prod(shape)
    if coder in PLAIN:
        kind = f"<{count}{PLAIN[coder]}"
        demand(len(blob) == struct.calcsize(kind), "size of a plain blob")
        values: list[Any] = list(struct.unpack(kind, blob))
        if coder == "b1":
            demand(set(values) <= {0, 1}, "a truth value that is neither 0 nor 1")
            values = [value == 1 for value in values]
        return Tensor(shape, "f4" if coder == "f2" else coder, values)
    cursor = Cursor(blob)
    negative, positive = cursor.take(2)
    kind = f"<{negative + positive}{'e' if coder.endswith('h') else 'f'}"
    found = list(struct.unpack(kind, cursor.take(struct.calcsize(kind))))
    levels = [*found[:negative], 0.0, *found[negative:]]
    seen = _as_pixels(cursor, shape) if "k" in coder else shape
    if "t" in coder:
        there = tuple(cursor.leb128(48) for _ in seen[:2])
        demand(
            all(side <= whole for side, whole in zip(there, seen, strict=False)),
            "more rows or columns than the layer has",
        )
        codes = _widened(coded(coder[0], cursor.rest(), there + seen[2:], (negative, positive)), there, seen)
    else:
        codes = coded(coder[0], cursor.rest(), seen, (negative, positive))
    return Tensor(shape, "layer", [levels[code + negative] for code in codes], codes, levels)


def _as_pixels(cursor: Cursor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a matrix of pixels is coded in."""
    height, width = cursor.leb128(48), cursor.leb128(48)
    demand(len(shape) == 2 and height * width > 0, "pixels of what is no matrix, or none")
    rows, columns = shape
    demand(height * width <= max(columns, 1) and columns % (height * width) == 0, "pixels that do not fit")
    return rows, columns // (height * width), height, width


def _widened(codes: list[int], there: tuple[int, ...], shape: tuple[int, ...]) -> list[int]:
    """The codes of a layer of which the leading rows and columns are given."""
    inner = math.prod(shape[2:])
    rows, columns = (*shape, 1, 1)[:2]
    rows_there, columns_there = (*there, 1, 1)[:2]
    found = [0] * (rows * columns * inner)
    for row in range(rows_there):
        for column in range(columns_there):
            for place in range(inner):
                found[(row * columns + column) * inner + place] = codes[
                    (row * columns_there + column) * inner + place
                ]
    return found


NORM = ("weight", "bias", "running_mean", "running_var")


def _of(module: str, tensor: str) -> str:
    return f"{module}.{tensor}" if module else tensor


def _vectors(cursor: Cursor, header: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of norms, and the further vectors."""
    shapes = {_of(module, tensor): (channels,) for tensor in NORM[:2] for module, channels in header["b"]}
    shapes |= {name: tuple(shape) for name, shape in header["v"]}
    scales = []
    for _ in shapes:
        (size,) = cursor.take(1)
        folded = cursor.leb128(20)
        step = (8388608, 9975792, 11863283, 14107901)[size % 4] * 2.0 ** ((size >> 2) - 63)
        scales.append((step, -(folded + 1) // 2 if folded % 2 else folded // 2))
    negative, positive = cursor.take(2)
    counts = [math.prod(shape) for shape in shapes.values()]
    row = iter(coded(header["k"], cursor.rest(), (1, sum(counts)), (negative, positive)))
    tensors = {}
    for (name, shape), count, (step, location) in zip(shapes.items(), counts, scales, strict=True):
        values = [(code + location) * step for code in itertools.islice(row, count)]
        rounded = struct.unpack(f"<{count}f", struct.pack(f"<{count}f", *values))
        tensors[name] = Tensor(shape, "vector", list(rounded))
    for module, channels in header["b"]:
        tensors[_of(module, NORM[2])] = Tensor((channels,), "f4", [0.0] * channels)
        tensors[_of(module, NORM[3])] = Tensor((channels,), "f4", [1.0] * channels)
    return tensors
