"""Writes tests/golden/v1-small.clq, the file that every later version must open.

`python tests/codec/make_golden.py` makes the same bytes each time: all values stand here, none are drawn. Run it only for a new version of
the format, under a new name; a golden file in the repository never changes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from clipq_ray import codec

PATH = Path(__file__).resolve().parents[1] / "golden" / "v1-small.clq"


def packed() -> codec.Packed:
    """Every coder once: a layer with codes, one constant, one empty, and all plain types."""
    steps = np.arange(600)
    codes = np.where(steps * 7919 % 11 < 7, 0, steps * 104729 % 5 - 2).astype(np.int16)
    levels = np.array([-0.5, -0.125, 0.0, 0.25, 0.75], np.float32)
    layer = codec.CodedLayer.from_quantized(codes.reshape(6, 4, 5, 5), levels, 2)
    constant = codec.CodedLayer(np.ones((3, 2), np.int16), np.array([0.0, 0.5], np.float32), 0)
    empty = codec.CodedLayer(np.zeros((0, 4), np.int16), np.zeros(1, np.float32), 0)
    plain = {
        "half": np.array([0.0, 0.5, -1.75], np.float32),
        "single": np.array([1e-30, 0.5], np.float32),
        "double": np.array(0.1),
        "truth": np.array([True, False]),
        **{kind: np.array([1, 2, 100], kind) for kind in ("i1", "i2", "i4", "i8", "u1")},
    }
    metadata = {"architecture": None, "classes": 3, "class_names": ["a", "b", "ü"]}
    return codec.Packed(metadata, {"layer": layer, "constant": constant, "empty": empty, **plain})


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_bytes(codec.encode(packed()))
    print(f"{PATH}: {PATH.stat().st_size} bytes")
