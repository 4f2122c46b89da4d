"""The container of a .clq file: prefix, checked header, one checked blob per tensor (one for all vectors), without holes.

`encode` and `decode` are mirrors; `arrays` gives what a network loads, and holds no more than the network and one layer per thread.
Blobs are independent, so they decode in parallel, and alone: everything reads through `Read`, so that a range of a remote object serves as
well as bytes. Every truncation and every flipped byte is an `ArtifactError`. Not covered: what stands inside a blob (`layers`,
`vectors`, `plain`) and in the header (`header`).
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from clipq_ray.codec import header, layers, plain, vectors
from clipq_ray.codec.coders import Profile
from clipq_ray.codec.header import CHECKSUM, Entry, Header, Table, norm_names
from clipq_ray.codec.layers import CodedLayer
from clipq_ray.codec.vectors import Vector
from clipq_ray.errors import ArtifactError, advised
from clipq_ray.problems import nearest

Array = npt.NDArray[np.generic]
Tensor = CodedLayer | Vector | Array
Read = Callable[[int, int], bytes]
"""`read(start, stop)`: the bytes of a file from `start` to below `stop`, fewer where it ends."""
_ALONE = 1 << 18
"""Fewer elements are decoded by one thread: starting others takes longer."""
_BEGINNING = 1 << 13
"""Bytes that are asked for first: most headers are smaller."""


@dataclass(frozen=True)
class Packed:
    """A compressed network: free JSON `metadata`, and tensors by name.

    `norms` names the modules of folded batch norms: their weight and bias are vectors among the tensors, their running mean is 0 and their
    running variance 1, which take no bytes.
    """

    metadata: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    norms: tuple[str, ...] = ()


def encode(
    packed: Packed, profile: Profile = "fast", made: Mapping[str, tuple[str, bytes]] = MappingProxyType({})
) -> bytes:
    """The bytes of a .clq file; the same bytes for the same content and profile. `made`: by name what `smallest` gave for layers before, which are not encoded again."""
    rows, blobs = [], []
    for name, tensor in packed.tensors.items():
        if isinstance(tensor, Vector):
            continue
        if isinstance(tensor, CodedLayer):
            coder, blob = made.get(name) or layers.smallest(tensor, profile)
        else:
            coder, blob = plain.write(tensor)
        rows.append((name, tuple(tensor.shape), coder))
        blobs.append(blob)
    table, grids = _grids(packed)
    letter = ""
    if grids:
        letter, blob = vectors.write(grids, profile)
        blobs.append(blob)
    table = Table(rows, table.norms, table.vectors, letter)
    sizes = [len(blob) for blob in blobs]
    head = header.build(packed.metadata, table, sizes)
    lacking = header.fewest_bytes(table) - len(head) - sum(size + CHECKSUM for size in sizes)
    if lacking > 0:
        head = header.build(packed.metadata, table, sizes, pad=lacking)
    parts = (struct.pack("<I", zlib.crc32(blob)) + blob for blob in blobs)
    data = b"".join((head, *parts))
    header.parse(head, len(data))  # what a reader would refuse is not written
    return data


def _grids(packed: Packed) -> tuple[Table, list[Vector]]:
    """Norms and vectors of a file in the order of their blob: all scales, all shifts, then the others."""
    pairs = [norm_names(module)[:2] for module in packed.norms]
    inside = {name for pair in pairs for name in pair}
    order = [scale for scale, _ in pairs] + [shift for _, shift in pairs]
    order += [name for name, t in packed.tensors.items() if isinstance(t, Vector) and name not in inside]
    grids = []
    for name in order:
        tensor = packed.tensors.get(name)
        if not isinstance(tensor, Vector) or (name in inside and tensor.codes.ndim != 1):
            raise ArtifactError(f"expected a vector for {name} of a folded batch norm, got something else")
        grids.append(tensor)
    norms = [
        (module, tensor.codes.size) for module, tensor in zip(packed.norms, grids[: len(pairs)], strict=True)
    ]
    others = [(name, packed.tensors[name].shape) for name in order[2 * len(pairs) :]]
    return Table((), norms, others), grids


def entries(data: bytes) -> list[Entry]:
    """The blobs of a file, from its header alone."""
    return header.parse(data, len(data)).entries


def metadata(data: bytes) -> dict[str, Any]:
    """The metadata of a file, from its header alone."""
    return header.parse(data, len(data)).metadata


def decode(data: bytes, names: Iterable[str] | None = None, threads: int | None = None) -> Packed:
    """The content of a .clq file, or of the blobs that hold the tensors in `names`; `ArtifactError` where anything is damaged.

    `threads`: at most so many blobs are decoded at a time; default: the CPUs of this process.
    """
    return _decode(_reader(data), header.parse(data, len(data)), names, threads, lambda tensor: tensor)


def arrays(data: bytes, names: Iterable[str] | None = None, threads: int | None = None) -> dict[str, Array]:
    """The tensors of a .clq file as a network loads them, by name; layers and vectors as float32."""
    return arrays_from(_reader(data), header.parse(data, len(data)), names, threads)


def arrays_from(
    read: Read, found: Header, names: Iterable[str] | None = None, threads: int | None = None
) -> dict[str, Array]:
    """As `arrays`, of a file whose header was `found` and of which only the blobs of `names` are read."""

    def dense(tensor: Tensor) -> Array:
        return tensor if isinstance(tensor, np.ndarray) else tensor.values()

    wanted = None if names is None else set(names)
    packed = _decode(read, found, wanted, threads, dense)
    result: dict[str, Any] = dict(packed.tensors)
    for module in packed.norms:
        scale, _, mean, variance = norm_names(module)
        channels = next(result[name] for name in (scale, norm_names(module)[1]) if name in result)
        result[mean], result[variance] = np.zeros_like(channels), np.ones_like(channels)
    return result if wanted is None else {name: result[name] for name in result if name in wanted}


def read_header(read: Read, file_bytes: int) -> Header:
    """The header of a file that is read in ranges."""
    beginning = read(0, min(_BEGINNING, file_bytes))
    end = header.extent(beginning)
    if end > len(beginning):
        beginning += read(len(beginning), min(end, file_bytes))
    return header.parse(beginning, file_bytes)


def _reader(data: bytes) -> Read:
    return lambda start, stop: data[start:stop]


def _decode(
    read: Read,
    found: Header,
    names: Iterable[str] | None,
    threads: int | None,
    finish: Callable[[Tensor], Tensor],
) -> Packed:
    wanted = None if names is None else set(names)
    known = {name for entry in found.entries for name in entry.tensors}
    if wanted is not None and (unknown := wanted - known):
        raise ArtifactError(
            f"expected names of tensors in the file, got {', '.join(sorted(unknown))}; {nearest(min(unknown), sorted(known))}"
        )
    chosen = [entry for entry in found.entries if wanted is None or wanted & set(entry.tensors)]

    def one(entry: Entry) -> dict[str, Tensor]:
        blob = _blob(read, entry)
        try:
            with advised(header.ADVICE):
                inside = (
                    _vectors(blob, entry, found.table)
                    if entry.members
                    else {entry.name: _tensor(blob, entry)}
                )
            return {name: finish(tensor) for name, tensor in inside.items()}
        except ArtifactError as error:
            raise ArtifactError(f"tensor {entry.name}: {error}") from error
        except MemoryError as error:
            raise ArtifactError(
                f"tensor {entry.name}: expected memory for {entry.elements} elements, got too little; use a larger machine"
            ) from error

    parts = _in_order(one, chosen, threads)
    tensors = {name: tensor for part in parts for name, tensor in part.items()}
    norms = tuple(module for module, _ in found.table.norms if norm_names(module)[0] in tensors)
    return Packed(found.metadata, tensors, norms)


def _in_order(
    work: Callable[[Entry], dict[str, Tensor]], chosen: list[Entry], threads: int | None
) -> list[dict[str, Tensor]]:
    """What `work` gives for each; the largest are begun first."""
    most = (
        threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) or 1
    )
    if most < 2 or len(chosen) < 2 or sum(entry.elements for entry in chosen) < _ALONE:
        return [work(entry) for entry in chosen]
    with ThreadPoolExecutor(min(most, len(chosen))) as pool:
        begun = sorted(range(len(chosen)), key=lambda index: -chosen[index].elements)
        futures = {index: pool.submit(work, chosen[index]) for index in begun}
        try:
            return [futures[index].result() for index in range(len(chosen))]
        finally:
            pool.shutdown(cancel_futures=True)


def _blob(read: Read, entry: Entry) -> bytes:
    data = read(entry.offset, entry.offset + entry.bytes)
    blob = data[CHECKSUM:]
    if len(data) != entry.bytes or zlib.crc32(blob) != int.from_bytes(data[:CHECKSUM], "little"):
        raise ArtifactError(
            f"tensor {entry.name} of the .clq file is damaged (checksum); fetch the file again"
        )
    return blob


def _tensor(blob: bytes, entry: Entry) -> Tensor:
    if entry.coder in layers.CODERS:
        return layers.read(blob, entry.shape, entry.coder)
    return plain.read(entry.coder, blob, entry.shape)


def _vectors(blob: bytes, entry: Entry, table: Table) -> dict[str, Tensor]:
    names: list[str] = []
    shapes: list[tuple[int, ...]] = []
    for which in (0, 1):
        names += [norm_names(module)[which] for module, _ in table.norms]
        shapes += [(channels,) for _, channels in table.norms]
    names += [name for name, _ in table.vectors]
    shapes += [shape for _, shape in table.vectors]
    return dict(zip(names, vectors.read(table.coder, blob, shapes), strict=True))
