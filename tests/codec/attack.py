"""The attacks on the .clq format: a case is one file, a pure function of family, number and seed, so what a failure prints makes it again.

Families are of three kinds: raw damage; forged headers and forged blobs, both with lengths and checksums made right, so that they pass the first
checks. Not covered: what is attacked (`attack_seeds`), what a reader may answer (`attack_oracle`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from random import Random

from attack_headers import HEADERS
from attack_seeds import RAW, Case, Seed, cut, filled, flipped, grown, random_bytes, seeds, spliced

from clipq_ray.codec import layers, static, varint


def _head(coder: str, blob: bytes) -> int:
    """Where the codes begin in a layer's blob, or in that of vectors (roughly); 0 for plain ones."""
    if coder in layers.CODERS:
        if len(blob) < 2:
            return 0
        pixels = 2 * ("k" in coder)  # two numbers of a byte each
        return min(2 + (2 if coder.endswith("h") else 4) * (blob[0] + blob[1]) + pixels, len(blob))
    return min(20, len(blob)) if coder.startswith("v") else 0


def _whole(rng: Random, coder: str, blob: bytes) -> bytes:
    """Anything anywhere in the blob."""
    return rng.choice((flipped, cut, grown, spliced, random_bytes, filled))(rng, blob)


def _codes(rng: Random, coder: str, blob: bytes) -> bytes:
    """The codes only: flipped, cut, longer, spliced, random, of one byte."""
    at = _head(coder, blob)
    return blob[:at] + rng.choice((flipped, flipped, cut, grown, spliced, random_bytes, filled))(
        rng, blob[at:]
    )


def _levels(rng: Random, coder: str, blob: bytes) -> bytes:
    """Other counts of levels, with as many level bytes or not; levels that are no numbers."""
    at, each = _head(coder, blob), 2 if coder.endswith("h") else 4
    sides = bytes(rng.choice((0, 1, 2, 3, 7, 8, 127, 128, 255)) for _ in range(2))
    if rng.random() < 0.3:
        sides = blob[:2]
    count = each * sum(sides) if rng.random() < 0.8 else at
    return sides + rng.choice((b"\xff" * count, bytes(count), rng.randbytes(count))) + blob[at:]


def _frequencies(rng: Random, coder: str, blob: bytes) -> bytes:
    """Coder q: another table, most often one that sums right."""
    symbols = rng.choice((1, 2, 3, 5, 40, 511))
    marks = sorted(rng.choice((0, static.TOTAL, rng.randrange(static.TOTAL + 1))) for _ in range(symbols - 1))
    table = [high - low for low, high in zip([0, *marks], marks, strict=False)]
    if table and rng.random() < 0.2:
        table[rng.randrange(len(table))] = rng.choice((0, 1, static.TOTAL, 2 * static.TOTAL - 1, 2**40))
    negative = rng.randrange(min(symbols, 256)) if symbols < 511 else 255
    levels = bytes((negative, symbols - 1 - negative)) + bytes(
        (2 if coder.endswith("h") else 4) * (symbols - 1)
    )
    words = rng.choice(
        (
            blob[-4:],
            blob[-8:],
            rng.randbytes(4 * rng.randrange(1, 9)),
            b"",
            bytes(4),
            b"\1\0\0\0",
            b"\xff" * 16,
        )
    )
    return levels + b"".join(map(varint.write, table)) + words


def _starts(rng: Random, coder: str, blob: bytes) -> bytes:
    """Coders a and m: density and typical magnitude."""
    at = _head(coder, blob)
    return blob[:at] + bytes((rng.choice((0, 1, 128, 255)), rng.choice((0, 1, 2, 200, 255)))) + blob[at + 2 :]


def _grids(rng: Random, coder: str, blob: bytes) -> bytes:
    """Vectors: steps, locations, of which a few are cut off or too large, and sides."""
    places = (b"\0", b"\x7f", b"\xff\xff\x3f", b"\x80\0", b"\x80\x80\0", b"\1", b"\xfe\xff\x3f")
    broken = (b"\xff\xff\x7f", b"\x80\x80\x80\0", b"\x80", b"")
    heads = b"".join(
        bytes((rng.choice((0, 3, 128, 255)),)) + rng.choice(places if rng.random() < 0.95 else broken)
        for _ in range(6)
    )
    sides = bytes(rng.choice((0, 1, 80, 255)) for _ in range(2))
    return heads + sides + rng.choice((blob[20:], rng.randbytes(30), b"\x80\x80\1", b"\0\1\0\0"))


def _swapped(rng: Random, coder: str, blob: bytes) -> bytes:
    """Another file's blob."""
    return rng.choice(rng.choice([seed for seed in seeds() if seed.blobs]).blobs)


BLOBS: dict[str, Callable[[Random, str, bytes], bytes]] = {
    "whole": _whole, "codes": _codes, "levels": _levels, "frequencies": _frequencies, "starts": _starts, "grids": _grids,
    "swapped": _swapped,
}  # fmt: skip
_FITS = {"frequencies": "q", "levels": "qam", "starts": "am", "grids": "v", "codes": "qamv"}
FAMILIES = (*RAW, *HEADERS, *BLOBS, "lies")


@cache
def _targets(letters: str) -> tuple[tuple[Seed, int], ...]:
    """The blobs whose coder begins with one of `letters`; all if there are none."""
    each = [(seed, at) for seed in seeds() for at in range(len(seed.blobs))]
    return tuple(one for one in each if not letters or one[0].coders[one[1]][:1] in letters)


def case(family: str, number: int, seed: int = 0) -> Case:
    """The hostile file of a family; the same for the same arguments."""
    rng = Random(f"{seed}/{family}/{number}")
    chosen = rng.choice(seeds())
    if family == "lies":
        return Case(family, chosen.data, chosen, False, 1 + rng.randrange(1 << 20))
    if family in RAW:
        return Case(family, RAW[family](rng, chosen.data), chosen, False)
    if family in HEADERS:
        draft = chosen.draft()
        HEADERS[family](rng, draft)
    else:
        chosen, at = rng.choice(_targets(_FITS.get(family, "")))
        draft = chosen.draft()
        draft.blobs[at] = BLOBS[family](rng, chosen.coders[at], draft.blobs[at])
    return Case(family, draft.bytes(), chosen, True)
