"""What a reader may answer to an attack: refuse by `ArtifactError`, or give what the file says, in bounded time and memory."""

from __future__ import annotations

import gc
import json
import resource
import signal
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from attack_seeds import Case, cut, flipped, seeds

from clipq_ray import codec
from clipq_ray.codec import coders, header, vectors
from clipq_ray.errors import ArtifactError

MEBIBYTE = 1 << 20
SECONDS, SECONDS_PER_ELEMENT = 2.0, 1e-6
"""Each call takes at most so much CPU time of its thread; the elements are those that a readable header states."""
HANGS = 10
"""A call that takes so many times what it may is ended."""
HEADER_MEMORY, MEMORY, MEMORY_PER_ELEMENT = 256 * MEBIBYTE, 64 * MEBIBYTE, 16
"""A header takes at most the first (its JSON may have 16 MiB), as tracemalloc sees it; all of a file that, or the others where they are more."""
TRACED, RESIDENT = 32, 128 * MEBIBYTE
"""One case of a family in so many is traced (it takes five times as long). In all, where the process's memory reaches a new peak, that is
at most so much more than is allowed above what remains: compiled code allocates too."""
COMPARED = 1 << 16
"""Elements of a file up to which every value is compared."""


class Broken(AssertionError):
    """What a reader answered breaks a promise; the message makes the case again."""


def _highest() -> int:
    """The most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _resident() -> int:
    """The memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _expired(*_: Any) -> None:
    raise Broken("it takes too long")


@dataclass
class Oracle:
    """Says whether the readers' answer to a case is one of those that are allowed, and counts; to be entered before use.

    `seconds`: another limit for each call, where the kernels are not compiled.
    """

    seconds: float = SECONDS
    families: Counter[str] = field(default_factory=Counter)
    mended: int = 0
    coded: int = 0
    """Cases in which bytes, a shape or sides that no seed has reached the decoder of a letter."""
    opened: int = 0
    """Cases that were read, not refused."""
    peak: int = 0
    slowest: float = 0.0

    def __enter__(self) -> Oracle:
        self._honest: set[Any] = set()
        self._reached = False
        self._real = coders.decode
        coders.decode = self._counting
        self._values: dict[Any, list[bytes]] = {}
        for seed in seeds():
            found = codec.arrays(seed.data, threads=1)
            for entry in codec.entries(seed.data):
                self._values[_key(entry, seed.data)] = [found[name].tobytes() for name in entry.tensors]
        self._learning = False
        self._before = signal.signal(signal.SIGPROF, _expired)
        self._highest = _highest()
        # What thousands of tests before left in this process takes seconds to be looked through: no reader's time.
        gc.freeze()
        return self

    def __exit__(self, *_: object) -> None:
        gc.unfreeze()
        signal.signal(signal.SIGPROF, self._before)
        coders.decode = self._real

    _learning = True

    def _counting(self, letter: str, blob: bytes, *rest: Any) -> Any:
        if self._learning:
            self._honest.add((letter, blob, *rest))
        elif (letter, blob, *rest) not in self._honest:
            self._reached = True
        return self._real(letter, blob, *rest)

    def __str__(self) -> str:
        return (
            f"{self.families.total()} cases, {self.mended} with right checksums, {self.coded} to an entropy decoder, {self.opened} read; "
            f"at most {self.peak / MEBIBYTE:.0f} MiB, {self.slowest:.2f} s; {dict(sorted(self.families.items()))}"
        )

    def check(self, one: Case, origin: str = "") -> None:
        """Raises `Broken` where the readers do anything but refuse by `ArtifactError` or read what the header says."""
        self._traced = self.families[one.family] % TRACED == 0
        self.families[one.family] += 1
        self.mended += one.mended
        self._reached = False
        try:
            opened = self._lied(one) if one.lie else self._read(one)
            if not one.mended and not one.lie and opened != (one.data == one.seed.data):
                raise Broken("damage is not seen" if opened else "a valid file is refused")
        except Exception as error:
            raise Broken(f"{origin} ({len(one.data)} bytes): {type(error).__name__}: {error}") from error
        self.opened += opened
        self.coded += self._reached

    def _call(self, work: Callable[[], Any], elements: int, memory: int) -> Any:
        """What `work` gives; None where it refuses. Its time and memory are bounded."""
        allowed = self.seconds + SECONDS_PER_ELEMENT * elements
        if self._traced:
            tracemalloc.start()
        begun, result = time.thread_time(), None
        signal.setitimer(signal.ITIMER_PROF, HANGS * allowed)
        try:
            result = work()
        except ArtifactError:
            pass
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            taken = time.thread_time() - begun
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        self.slowest, self.peak = max(self.slowest, taken), max(self.peak, peak)
        highest = _highest()
        grown = highest - _resident() if highest > self._highest else 0
        self._highest = highest
        if peak > memory or grown > memory + RESIDENT or taken > allowed:
            mebibytes = f"{peak / MEBIBYTE:.0f} MiB ({grown / MEBIBYTE:.0f} resident)"
            raise Broken(f"it takes {mebibytes} and {taken:.1f} s for {elements} elements")
        return result

    def _read(self, one: Case) -> bool:
        data = one.data
        entries = self._call(lambda: codec.entries(data), 0, HEADER_MEMORY)
        metadata = self._call(lambda: codec.metadata(data), 0, HEADER_MEMORY)
        elements = sum(entry.elements for entry in entries or ())
        if elements > (1 << 22) + 4096 * len(data):  # as SPEC.md says
            raise Broken(f"{elements} elements are allowed")
        memory = max(HEADER_MEMORY, MEMORY + MEMORY_PER_ELEMENT * elements)
        packed = self._call(lambda: codec.decode(data, threads=1), elements, memory)
        arrays = self._call(lambda: codec.arrays(data, threads=1), elements, memory)
        if (entries is None) != (metadata is None) or (packed is None) != (arrays is None):
            raise Broken("one reader refuses what another reads")
        if packed is None:
            return False
        if entries is None or packed.metadata != metadata:
            raise Broken("what is read is not what the header says")
        json.dumps(metadata, allow_nan=False, indent=1).encode()
        _consistent(entries, packed, arrays, elements <= COMPARED)
        for entry in entries:
            values = self._values.get(_key(entry, data))
            if values is not None and values != [arrays[name].tobytes() for name in entry.tensors]:
                raise Broken(f"{entry.name} has other values than before, by the same bytes")
        return True

    def _lied(self, one: Case) -> bool:
        """A file in ranges of which some come short, long or wrong."""
        lying, size = _Liar(one), len(one.data)
        found = header.parse(one.data, size)
        read = self._call(lambda: codec.read_header(lying, size + lying.more), 0, HEADER_MEMORY)
        if read is not None and read != found:
            raise Broken("a header is read wrongly")
        lying.lied = False
        arrays = self._call(lambda: codec.arrays_from(lying, found, threads=1), 0, HEADER_MEMORY)
        if lying.lied and arrays is not None:
            raise Broken("a range that is wrong is not seen")
        return arrays is not None


class _Liar:
    """Reads ranges of a case's file, some of them wrongly; `lied` says whether it has."""

    def __init__(self, one: Case) -> None:
        self._rng, self._data, self.lied = Random(one.lie), one.data, False
        self.more = self._rng.choice((0, 0, 0, 1, 100, 1 << 40))

    def __call__(self, start: int, stop: int) -> bytes:
        right, rng = self._data[start:stop], self._rng
        pieces = (
            right[:-1],
            b"",
            flipped(rng, right),
            right + b"\0",
            self._data[start + 1 : stop + 1],
            bytes(len(right)),
            cut(rng, right),
        )
        given = rng.choice((right, rng.choice(pieces)))
        self.lied |= given != right
        return given


def _key(entry: codec.Entry, data: bytes) -> Any:
    shapes = tuple(shape for _, shape in entry.members)
    return entry.coder, entry.shape, shapes, data[entry.offset : entry.offset + entry.bytes]


def _consistent(
    entries: list[codec.Entry], packed: codec.Packed, arrays: dict[str, Any], compared: bool
) -> None:
    """Whether everything read has the header's names and shapes, codes within their sides, and values that fit them."""
    shapes = {
        name: shape for entry in entries for name, shape in entry.members or ((entry.name, entry.shape),)
    }
    if {name: one.shape for name, one in arrays.items()} != shapes:
        raise Broken("names or shapes are not the header's")
    constant = {
        name: at - 2 for module in packed.norms for at, name in enumerate(codec.norm_names(module)) if at > 1
    }
    if set(packed.tensors) != set(shapes) - set(constant):
        raise Broken("tensors are not the header's")
    for name, value in constant.items() if compared else ():
        if (arrays[name] != value).any():
            raise Broken(f"{name} is not {value}")
    for name, one in packed.tensors.items():
        if one.shape != shapes[name]:
            raise Broken(f"{name} has shape {one.shape}")
        if compared:
            _fits(name, one, arrays[name])


def _fits(name: str, one: Any, array: Any) -> None:
    values = one
    if isinstance(one, codec.CodedLayer):
        if (
            len(one.levels) != one.negative + 1 + one.positive
            or one.negative < 0
            or one.levels[one.negative] != 0
        ):
            raise Broken(f"{name} has levels that do not fit")
        if one.codes.size and not (-one.negative <= one.codes.min() and one.codes.max() <= one.positive):
            raise Broken(f"{name} has codes beyond its sides")
        values = one.levels[one.codes.astype(np.int64) + one.negative]
    elif isinstance(one, codec.Vector):
        if not 0 <= one.step < vectors.STEPS:
            raise Broken(f"{name} has step {one.step}")
        values = (one.codes.astype(np.float64) * float(vectors.step_size(one.step))).astype(np.float32)
        if not np.isfinite(values).all():
            raise Broken(f"{name} is not finite")
    if values.dtype != array.dtype or values.tobytes() != array.tobytes():
        raise Broken(f"{name} has values beside its codes and levels")


def takes_long(one: Case) -> bool:
    """Whether a case states more codes of the coders that numba compiles than can be decoded without it."""
    try:
        entries = codec.entries(one.data)
    except ArtifactError:
        return False
    return any(entry.coder.lstrip("v")[:1] in ("a", "m") and entry.elements > 600 for entry in entries)
