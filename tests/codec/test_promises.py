"""What SPEC.md promises about the header, hostile files, and golden files of older versions."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipq_ray import codec, models
from clipq_ray.codec import container, layers
from clipq_ray.errors import ArtifactError

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "v1-small.clq"
GOLDEN_SHA256 = "31451774bd5ee918784c9be27f3bc454bc629a4b133e496c29d36e85cc89a461"
CONSTANT = bytes((1, 1)) + struct.pack("<2f", -1, 1) + b"\x00\x80\x80\x01"
"""A coder-q blob in which every code is 0."""


def crafted(table: Any, *blobs: bytes) -> bytes:
    """A file with right checksums around whatever the header says."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=container.DICTIONARY)
    header = squeeze.compress(json.dumps({"t": table, "m": {}}).encode()) + squeeze.flush()
    prefix = struct.pack("<3sBII", b"CLQ", 1, len(header), zlib.crc32(header))
    return prefix + header + b"".join(struct.pack("<I", zlib.crc32(blob)) + blob for blob in blobs)


@pytest.mark.parametrize(
    ("shape", "coder", "blob"),
    [
        ([1] * 65, "f2", b"\0\0"),
        ([1] * 65, "q", CONSTANT),
        ([2**33, 2**33, 0], "f2", b""),
        ([2**33, 2**33, 0], "q", bytes(2)),
        ([True], "f2", b"\0\0"),
        ([-1], "f2", b""),
        ([1.0], "f2", b"\0\0"),
        ("1", "f2", b"\0\0"),
        (None, "q", CONSTANT),
        ([1], "zz", b"\0\0"),
        ([1], "f2", b"\0"),
        ([1], "b1", b"\7"),
        ([0], "q", bytes(3)),
        ([4], "q", CONSTANT + b"x"),
        ([4], "q", b""),
        ([2**34, 2], "q", CONSTANT),
    ],
)
def test_a_hostile_entry_with_right_checksums_is_a_named_error(shape: Any, coder: str, blob: bytes) -> None:
    with pytest.raises(ArtifactError):
        codec.decode(crafted([["w", shape, coder, len(blob)]], blob))


@pytest.mark.parametrize("table", [5, None, [["w"]], [[1, [1], "f2", 2]], [["w", [1], "f2", -4]], [7]])
def test_a_table_that_is_none_is_a_named_error(table: Any) -> None:
    with pytest.raises(ArtifactError):
        codec.decode(crafted(table))


def test_two_tensors_of_one_name_are_a_named_error() -> None:
    with pytest.raises(ArtifactError, match="not valid"):
        codec.decode(crafted([["w", [1], "f2", 2]] * 2, b"\0\0", b"\0\0"))


@pytest.mark.parametrize(("at", "byte", "word"), [(0, b"X", "CLQ"), (3, b"\2", "newer")])
def test_another_magic_or_version_is_named(at: int, byte: bytes, word: str) -> None:
    data = crafted([])
    with pytest.raises(ArtifactError, match=word):
        codec.decode(data[:at] + byte + data[at + 1 :])


@pytest.mark.parametrize("first", [-1, 0, 2])
def test_layers_longer_than_a_piece_of_the_coder_come_back(
    first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_PIECE", 7)
    codes = np.full(100, -2, np.int16)
    codes[::13] = first
    codes[60:] = -2  # symbol 0 at the end takes no bits: the coder is empty before the codes are
    before = codec.CodedLayer.from_quantized(codes, np.array([-2, -1, 0, 1, 2], np.float32), 2)
    np.testing.assert_array_equal(layers.read(layers.write(before), (100,)).codes, before.codes)


def test_a_header_for_lenet5_with_all_its_metadata_is_below_250_bytes() -> None:
    blank = {
        name: tuple(value.shape)
        for name, value in models.build(models.Architecture("lenet5", {"num_classes": 10}))
        .state_dict()
        .items()
    }
    weights = codec.CodedLayer.from_quantized
    tensors: dict[str, Any] = {
        name: weights(np.arange(np.prod(shape)).reshape(shape).astype(np.int16) % 2, np.arange(2, dtype=np.float32), 0)
        if len(shape) > 1
        else np.ones(shape, np.float32)
        for name, shape in blank.items()
    }  # fmt: skip
    metadata = {
        "architecture": {"name": "lenet5", "kwargs": {"num_classes": 10}},
        "classes": 10,
        "input": {"shape": [1, 28, 28], "resize": None, "mean": [0.1307], "std": [0.3081]},
        "source": hashlib.sha256(b"weights").hexdigest(),
    }
    data = codec.encode(codec.Packed(metadata, tensors))
    assert 12 + int.from_bytes(data[4:8], "little") < 250
    assert codec.metadata(data) == metadata
    assert [entry.name for entry in codec.entries(data)] == list(blank)


def test_the_specification_holds_the_dictionary() -> None:
    text = Path(container.__file__).with_name("SPEC.md").read_text()
    block = text.split("```\n")[1]
    assert block.replace("\n", "").encode("ascii") == container.DICTIONARY
    assert f"{zlib.crc32(container.DICTIONARY):08x}" in text


def test_the_golden_file_of_version_1_opens_forever() -> None:
    data = GOLDEN.read_bytes()
    assert hashlib.sha256(data).hexdigest() == GOLDEN_SHA256
    after = codec.decode(data)
    assert after.metadata == {"architecture": None, "classes": 3, "class_names": ["a", "b", "ü"]}
    layer = after.tensors["layer"]
    assert isinstance(layer, codec.CodedLayer)
    assert layer.codes.shape == (6, 4, 5, 5)
    assert layer.levels.tolist() == [-0.5, -0.125, 0.0, 0.25, 0.75]
    steps = np.arange(600)
    expected = np.where(steps * 7919 % 11 < 7, 0, steps * 104729 % 5 - 2)
    np.testing.assert_array_equal(layer.codes.reshape(-1), expected)
    constant, empty = after.tensors["constant"], after.tensors["empty"]
    assert isinstance(constant, codec.CodedLayer)
    assert isinstance(empty, codec.CodedLayer)
    assert constant.values().tolist() == [[0.5, 0.5]] * 3
    assert empty.codes.shape == (0, 4)
    values = {name: after.tensors[name] for name in list(after.tensors)[3:]}
    assert all(isinstance(value, np.ndarray) for value in values.values())
    found = {name: (str(value.dtype), value.tolist()) for name, value in values.items()}  # type: ignore[union-attr]
    assert found == {
        "half": ("float32", [0.0, 0.5, -1.75]),
        "single": ("float32", [float(np.float32(1e-30)), 0.5]),
        "double": ("float64", 0.1),
        "truth": ("bool", [True, False]),
        "i1": ("int8", [1, 2, 100]),
        "i2": ("int16", [1, 2, 100]),
        "i4": ("int32", [1, 2, 100]),
        "i8": ("int64", [1, 2, 100]),
        "u1": ("uint8", [1, 2, 100]),
    }
