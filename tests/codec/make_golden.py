"""Writes v3-every-coder.clq, v3-trimmed.clq and v3-pixels.clq in tests/golden, the files of version 3 that every later version must open.

`python tests/codec/make_golden.py` makes the same bytes each time: all values stand here or follow from integers, none are drawn. Run it
only for a new version of the format, under a new name; a golden file in the repository never changes. Those of version 2 hold the same; v1-small.clq
was written so by version 1. Nothing writes these versions any more; `test_promises` states their content.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipq_ray import codec
from clipq_ray.codec import header, layers, plain, vectors

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
WHOLE = ("q", "qh", "a", "ah", "m", "mh")
"""Coders that write all rows and columns."""
METADATA: dict[str, Any] = {
    "architecture": {"name": "lenet5", "kwargs": {"num_classes": 3}},
    "classes": 3,
    "class_names": ["a", "b", "ü"],
    "input": {"shape": [1, 28, 28], "resize": None, "mean": [0.1307], "std": [0.3081]},
    "ties": {"decoder.weight": "q"},
    "dropped": ["aux.weight", "\U0001f986"],
    "source": "0123456789abcdef" * 4,
}
NORMS = ("", "features.1")


def codes_of(shape: tuple[int, ...], negative: int, positive: int, zeros: int) -> npt.NDArray[np.int16]:
    """Codes of which about `zeros` of 16 are 0; the others of all magnitudes, small ones more often."""
    at = np.arange(int(np.prod(shape, dtype=np.int64)))
    mixed = at * at * 104729 + at * 7919 + 12345 >> 3
    sides = np.where(at * 31 % 7 < 3, -negative, positive)
    sizes = (mixed % 61 + 1) * (mixed // 61 % 53 + 1) * (np.abs(sides) + 1) // (61 * 53)
    codes = np.where(mixed // 4096 % 16 < zeros, 0, np.sign(sides) * np.maximum(sizes, 1) * (sides != 0))
    codes[-1:] = positive or -negative  # the largest magnitude occurs
    return codes.astype(np.int16).reshape(shape)


def layer(shape: tuple[int, ...], negative: int, positive: int, zeros: int, parts: int) -> codec.CodedLayer:
    """Levels are whole numbers over `parts`: float16 holds them where it is a power of two."""
    sizes = np.arange(-negative, positive + 1)
    levels = (sizes * (3 + sizes % 2) / parts).astype(np.float32)
    return codec.CodedLayer(codes_of(shape, negative, positive, zeros), np.sort(levels), negative)


def coded() -> dict[str, tuple[codec.CodedLayer, str]]:
    """Layers and their coders, by name: kernels of all kinds, one side only, magnitudes with bits below the first, constant, empty."""
    return {
        "q": (layer((6, 4, 3, 3), 2, 3, 8, 1000), "q"),
        "qh": (layer((12, 10), 0, 3, 6, 64), "qh"),
        "a": (layer((5, 3, 5, 5), 2, 2, 9, 1000), "a"),
        "ah": (layer((18, 5), 40, 38, 3, 64), "ah"),
        "m": (layer((8, 6, 3, 3), 1, 3, 8, 1000), "m"),
        "mh": (layer((9, 12), 17, 41, 4, 64), "mh"),
        "a, 1x1": (layer((20, 6, 1, 1), 1, 4, 6, 64), "ah"),
        "a, five sides": (layer((2, 3, 2, 2, 3), 3, 3, 4, 64), "ah"),
        "a, large kernel": (layer((1, 1, 33, 33), 2, 1, 12, 1000), "a"),
        "a, one side": (layer((40,), 0, 7, 4, 64), "ah"),
        "m, 5x5": (layer((3, 2, 5, 5), 0, 2, 8, 1000), "m"),
        "m, large kernel": (layer((1, 1, 33, 33), 1, 2, 12, 1000), "m"),
        "m, three sides": (layer((4, 3, 7), 2, 0, 8, 64), "mh"),
        "m, 140 levels": (layer((40,), 0, 140, 2, 8), "mh"),
        "m, no side": (layer((), 1, 1, 0, 64), "mh"),
        **{f"constant {coder}": (constant(), coder) for coder in WHOLE},
        **{f"empty {coder}": (layer((0, 4), 0, 0, 0, 1), coder) for coder in WHOLE[::2]},
        "nur Nullen ä": (layer((3, 4), 0, 0, 16, 1), "q"),
    }


def trimmed() -> dict[str, tuple[codec.CodedLayer, str]]:
    """Layers that end in zeros, and their coders, by name: rows, columns, both, neither, all."""
    whole = layer((7, 5, 3, 3), 2, 3, 8, 64)
    return {
        "rows": (ending(whole, 4, 5), "mth"),
        "columns": (ending(whole, 7, 2), "ath"),
        "both": (ending(whole, 3, 2), "qth"),
        "neither": (layer((6, 4, 3, 3), 1, 2, 4, 1000), "mt"),
        "a matrix": (ending(layer((300, 200), 2, 2, 9, 1000), 140, 130), "at"),
        "one side": (ending(layer((40,), 2, 2, 3, 1000), 9, 0), "qt"),
        "all": (ending(layer((3, 4), 0, 0, 16, 1), 0, 0), "qt"),
        "no side": (layer((), 1, 1, 0, 1000), "mt"),
    }


def pixels() -> dict[str, tuple[codec.CodedLayer, str, tuple[int, int]]]:
    """Matrices whose columns are pixels, their coders and the images' sides, by name."""
    matrix = layer((9, 48), 2, 3, 8, 64)
    return {
        "a, two channels": (matrix, "akh", (6, 4)),
        "m, two channels": (matrix, "mkh", (4, 6)),
        "q, one channel": (layer((5, 12), 1, 2, 4, 1000), "qk", (3, 4)),
        "a, a line": (layer((7, 30), 2, 2, 9, 1000), "ak", (1, 10)),
        "m, one pixel": (layer((7, 30), 2, 2, 9, 1000), "mk", (1, 1)),
        "m, a large image": (layer((2, 1089), 1, 2, 12, 1000), "mk", (33, 33)),
        "trimmed": (ending(matrix, 5, 24), "mkth", (4, 3)),
        "within an image": (ending(matrix, 9, 30), "akth", (4, 6)),
        "q, trimmed": (ending(matrix, 4, 16), "qkth", (2, 2)),
        "q, lines": (layer((6, 8), 2, 1, 3, 64), "qkh", (1, 4)),
        "q, trimmed lines": (ending(layer((6, 8), 2, 1, 3, 1000), 4, 4), "qkt", (1, 4)),
        "no rows": (layer((0, 8), 0, 0, 0, 1), "akt", (2, 2)),
        "no columns": (layer((3, 0), 0, 0, 0, 1), "mkt", (1, 1)),
    }


def ending(one: codec.CodedLayer, rows: int, columns: int) -> codec.CodedLayer:
    """The same with zeros behind so many rows and columns."""
    codes = one.codes.copy()
    codes[rows:] = 0
    if codes.ndim > 1:
        codes[:, columns:] = 0
    return codec.CodedLayer(codes, one.levels, one.negative)


def constant() -> codec.CodedLayer:
    """Three by two times one level."""
    return codec.CodedLayer(np.ones((3, 2), np.int16), np.array([0.0, 0.5], np.float32), 0)


def plain_tensors() -> dict[str, npt.NDArray[Any]]:
    """Every plain type."""
    return {
        "half": np.array([0.0, 0.5, -1.75], np.float32),
        "single": np.array([1e-30, 0.5], np.float32),
        "double": np.array(0.1),
        "truth": np.array([[True], [False]]),
        "nothing": np.zeros((0, 3), np.float32),
        **{kind: np.array([-1, 2, 100]).astype(kind) for kind in ("i1", "i2", "i4", "i8", "u1")},
    }


def grids() -> dict[str, codec.Vector]:
    """Weights of the norms, their biases, further vectors; steps of all four mantissas, products that lie between two of float32."""
    return {
        "weight": codec.Vector(np.arange(5, dtype=np.int32) * 3 % 5 + 40, 4 * 33),
        "features.1.weight": codec.Vector(np.arange(3, dtype=np.int32) - 1, 255),
        "bias": codec.Vector(np.arange(5, dtype=np.int32) * 7 % 11 - 4, 4 * 32 + 2),
        "features.1.bias": codec.Vector(np.array([-7, 240, -250], np.int32), 3),
        "halfway": codec.Vector(np.arange(27, 54, dtype=np.int32), 4 * 30 + 1),
        "weit.weg": codec.Vector(np.array([[-262143, -262100], [-262143, -262001]], np.int32), 4 * 20 + 3),
    }


def build() -> bytes:
    """v3-every-coder.clq; `codec.encode` would choose the coders by size."""
    rows, blobs = _rows(coded())
    for name, array in plain_tensors().items():
        coder, blob = plain.write(array)
        rows.append((name, array.shape, coder))
        blobs.append(blob)
    vector = grids()
    letter, blob = vectors.write(list(vector.values()), "fast")
    names = [header.norm_names(module)[0] for module in NORMS]
    others = [(name, one.shape) for name, one in list(vector.items())[2 * len(NORMS) :]]
    norms = [(module, vector[name].codes.size) for module, name in zip(NORMS, names, strict=True)]
    return _file(METADATA, header.Table(rows, norms, others, letter), [*blobs, blob])


def build_trimmed() -> bytes:
    """v3-trimmed.clq."""
    rows, blobs = _rows(trimmed())
    return _file({}, header.Table(rows, [], [], ""), blobs)


def build_pixels() -> bytes:
    """v3-pixels.clq."""
    found = pixels()
    rows = [(name, one.shape, coder) for name, (one, coder, _) in found.items()]
    return _file({}, header.Table(rows, [], [], ""), [layers.write(*one) for one in found.values()])


def _rows(
    found: dict[str, tuple[codec.CodedLayer, str]],
) -> tuple[list[tuple[str, tuple[int, ...], str]], list[bytes]]:
    rows = [(name, one.shape, coder) for name, (one, coder) in found.items()]
    return rows, [layers.write(one, coder) for one, coder in found.values()]


def _file(metadata: dict[str, Any], table: header.Table, blobs: list[bytes]) -> bytes:
    checked = (struct.pack("<I", zlib.crc32(one)) + one for one in blobs)
    return header.build(metadata, table, map(len, blobs)) + b"".join(checked)


FILES = {"v3-every-coder.clq": build, "v3-trimmed.clq": build_trimmed, "v3-pixels.clq": build_pixels}

if __name__ == "__main__":
    for path, data in ((GOLDEN / name, make()) for name, make in FILES.items()):
        path.write_bytes(data)
        print(f"{path}: {len(data)} bytes")
