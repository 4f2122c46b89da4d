"""What SPEC.md promises about the header, hostile files, and golden files of every version."""

from __future__ import annotations

import hashlib
import struct
import zlib
from pathlib import Path
from typing import Any

import make_golden
import numpy as np
import pytest
from crafted import crafted, one_tensor

from clipq_ray import codec, models
from clipq_ray.codec import header, layers, static
from clipq_ray.codec.dictionaries import DICTIONARIES
from clipq_ray.errors import ArtifactError

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SHA256 = {
    "v1-small.clq": "31451774bd5ee918784c9be27f3bc454bc629a4b133e496c29d36e85cc89a461",
    "v2-every-coder.clq": "c6683d7816437fc356edd51c49485966b223083fb14a5ab40f702a12163cd22e",
    "v2-trimmed.clq": "2a1ce7d314a41ea6e923cc8d63243816a5ae8db928824e85b1c00b2ad6e7feb1",
    "v3-every-coder.clq": "2778a4bbb97d25ff0acab8389640c9b7891816d1786b048227a247d8be3179b6",
    "v3-pixels.clq": "76831d6617e1c63e5400bf68a352d12f29f279e5942a11f442ab3fde6a7852c8",
    "v3-trimmed.clq": "a1fea42968404945ba73db897d299519b2650425891f371a6ae09ecb316c8254",
}
CONSTANT = bytes((1, 1)) + struct.pack("<2f", -1, 1) + b"\x00\x80\x80\x01"
"""A coder-q blob in which every code is 0."""


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800"])
def test_metadata_that_no_header_can_hold_is_named(value: object) -> None:
    with pytest.raises(ArtifactError, match="expected metadata of finite numbers and text, got "):
        codec.encode(codec.Packed({"own": value}, {"w": np.ones(3, np.float32)}))


@pytest.mark.parametrize("version", [1, 2, 3])
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
        ([1], ["q"], CONSTANT),
        ([1], "f2", b"\0"),
        ([1], "b1", b"\7"),
        ([0], "q", bytes(3)),
        ([0], "a", bytes(3)),
        ([0], "m", bytes(3)),
        ([4], "qt", bytes((1, 1)) + struct.pack("<2f", -1, 1) + b"\5\x80\x80\x01"),
        ([4], "qt", bytes((1, 1)) + struct.pack("<2f", -1, 1)),
        ([4, 4], "qt", bytes((1, 1)) + struct.pack("<2f", -1, 1) + b"\1"),
        ([4, 4], "qt", bytes((1, 1)) + struct.pack("<2f", -1, 1) + b"\xff" * 9 + b"\x80\x80\x01"),
        ([4], "q", CONSTANT + b"x"),
        ([4], "q", b""),
        ([2**34, 2], "q", CONSTANT),
    ],
)
def test_a_hostile_entry_with_right_checksums_is_a_named_error(
    shape: Any, coder: Any, blob: bytes, version: int
) -> None:
    with pytest.raises(ArtifactError, match="; "):  # what to do
        codec.decode(one_tensor(shape, coder, blob, version))


def test_what_the_entries_are_made_of_is_accepted() -> None:
    for version in (1, 2, 3):
        assert codec.arrays(one_tensor([4], "q", CONSTANT, version))["w"].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("table", [5, None, {}, [["w"]], [[1, [1], "f2", 2]], [["w", [1], "f2", -4]], [7]])
def test_a_table_that_is_none_is_a_named_error(table: Any) -> None:
    with pytest.raises(ArtifactError):
        codec.decode(crafted({"t": table, "m": {}}, version=1))


@pytest.mark.parametrize(
    "changed",
    [
        *({key: value} for key in ("n", "s", "c", "b", "v", "needs") for value in (5, None, {}, "w")),
        {"n": [1]},
        {"n": []},
        {"c": [["q"]]},
        {"b": [["w"]]},
        {"b": [[1, 1]]},
        {"v": [["x", 1]]},
        {"v": ["xy"]},
        {"k": 5},
        {"m": []},
    ],
)
def test_lists_that_are_none_are_a_named_error(changed: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="; "):
        codec.decode(crafted({"n": ["w"], "s": [[4]], "c": ["q"], "m": {}, **changed}, CONSTANT))


def test_two_tensors_of_one_name_are_a_named_error() -> None:
    one = ["w", [1], "f2", 2]
    norm = {"n": ["x.running_var"], "s": [[1]], "c": ["f2"], "b": [["x", 1]], "k": "q", "m": {}}
    for data in (
        crafted({"t": [one, one], "m": {}}, b"\0\0", b"\0\0", version=1),
        crafted({"n": ["w", "w"], "s": [[1], [1]], "c": ["f2", "f2"], "m": {}}, b"\0\0", b"\0\0"),
        crafted(norm, b"\0\0", bytes(6)),
    ):
        with pytest.raises(ArtifactError, match="not valid"):
            codec.decode(data)


@pytest.mark.parametrize(
    ("at", "byte", "word"), [(0, b"X", "CLQ"), (3, b"\4", "newer"), (3, b"\0", "version 1 to 3")]
)
def test_another_magic_or_version_is_named(at: int, byte: bytes, word: str) -> None:
    data = crafted({"m": {}})
    with pytest.raises(ArtifactError, match=word):
        codec.decode(data[:at] + byte + data[at + 1 :])


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"t":[],"m":{},"m":{}}', "a key .* stands twice"),
        ('{"t":[],"m":{"a":{"b":[{"c":1,"c":1}]}}}', "a key .* stands twice"),
        ('{"t":[],"m":{"a":NaN}}', "holds NaN, which is no JSON"),
        ('{"t":[],"m":{"a":[-Infinity]}}', "holds -Infinity, which is no JSON"),
        ('{"t":[],"m":{"a":1e999}}', "cannot be read"),
        ('{"t":[],"m":{"a":"\\ud800"}}', "cannot be read"),
        ('{"t":[]}', "cannot be read"),
        ("[]", "cannot be read"),
        (b"\xff", "cannot be read"),
    ],
)
def test_json_that_is_none_is_refused_by_name(content: str | bytes, message: str, version: int) -> None:
    with pytest.raises(ArtifactError, match=message):
        codec.metadata(crafted(content, version=version))


def test_what_a_file_needs_and_this_version_lacks_is_named() -> None:
    with pytest.raises(ArtifactError, match="this file needs 'colours', 'sound'; use a newer clipq_ray"):
        codec.metadata(
            crafted({"needs": ["colours", "sound"], "n": ["w"], "s": [[1]], "c": ["new"], "m": {}})
        )
    with pytest.raises(ArtifactError, match="tensor w: this file needs coder 'zz'; use a newer clipq_ray"):
        codec.decode(one_tensor([1], "zz", b"\0\0"))
    with pytest.raises(ArtifactError, match="this file needs coder 'zz'; use a newer clipq_ray"):
        codec.decode(crafted({"v": [["w", [1]]], "k": "zz", "m": {}}, bytes(4)))
    assert codec.metadata(crafted({"needs": [], "later": 5, "m": {"a": 1}})) == {"a": 1}


@pytest.mark.parametrize("first", [-1, 0, 2])
def test_layers_longer_than_a_piece_of_the_coder_come_back(
    first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(static, "_PIECE", 7)
    monkeypatch.setattr(layers, "_PIECE", 7)
    codes = np.full(100, -2, np.int16)
    codes[::13] = first
    codes[60:] = -2  # symbol 0 at the end takes no bits: the coder is empty before the codes are
    before = codec.CodedLayer.from_quantized(codes, np.array([-2, -1, 0, 1, 2], np.float32), 2)
    after = layers.read(layers.write(before), (100,))
    np.testing.assert_array_equal(after.codes, before.codes)
    np.testing.assert_array_equal(after.values(), codes.astype(np.float32))


@pytest.mark.parametrize(("network", "most"), [("lenet5", 130), ("lenet5_caffe", 75), ("lenet_300_100", 75)])
def test_a_header_with_all_its_metadata_is_small(network: str, most: int) -> None:
    blank = {
        name: tuple(value.shape)
        for name, value in models.build(models.Architecture(network, {"num_classes": 10}))
        .state_dict()
        .items()
    }
    weights = codec.CodedLayer.from_quantized
    tensors: dict[str, Any] = {
        name: weights(np.arange(np.prod(shape)).reshape(shape).astype(np.int16) % 2, np.arange(2, dtype=np.float32), 0)
        if len(shape) > 1
        else codec.Vector(np.ones(shape, np.int32), 100)
        for name, shape in blank.items()
    }  # fmt: skip
    metadata = {
        "architecture": {"name": network, "kwargs": {"num_classes": 10}},
        "classes": 10,
        "input": {"shape": [1, 28, 28], "resize": None, "mean": [0.1307], "std": [0.3081]},
        "source": hashlib.sha256(b"weights").hexdigest(),
    }
    data = codec.encode(codec.Packed(metadata, tensors))
    assert header.extent(data) < most
    assert codec.metadata(data) == metadata
    found = [name for entry in codec.entries(data) for name in entry.tensors]
    assert found == sorted(blank, key=lambda name: len(blank[name]) == 1)


def test_the_specification_holds_the_dictionaries() -> None:
    text = Path(header.__file__).with_name("SPEC.md").read_text()
    blocks = [block.replace("\n", "").encode("ascii") for block in text.split("```\n")[1::2]]
    assert blocks == [DICTIONARIES[version] for version in (3, 2, 1)]
    for block in blocks:
        assert f"{zlib.crc32(block):08x}" in text
        assert f"{len(block)} bytes of ASCII" in text


@pytest.mark.parametrize("name", sorted(SHA256))
def test_a_golden_file_never_changes(name: str) -> None:
    assert hashlib.sha256((GOLDEN / name).read_bytes()).hexdigest() == SHA256[name]


def take_equal(found: dict[str, Any], made: dict[str, tuple[codec.CodedLayer, str]]) -> None:
    """Take from `found` the layers of `made`, which it holds."""
    for name, (before, _) in made.items():
        one = found.pop(name)
        assert isinstance(one, codec.CodedLayer)
        assert one.negative == before.negative
        np.testing.assert_array_equal(one.codes, before.codes)
        np.testing.assert_array_equal(one.levels, before.levels)


@pytest.mark.parametrize("version", [2, 3])
def test_the_golden_files_of_trimmed_layers_open_forever(version: int) -> None:
    found = codec.decode((GOLDEN / f"v{version}-trimmed.clq").read_bytes()).tensors
    take_equal(found, make_golden.trimmed())
    assert not found


@pytest.mark.parametrize("version", [2, 3])
def test_the_golden_files_of_every_coder_open_forever(version: int) -> None:
    after = codec.decode((GOLDEN / f"v{version}-every-coder.clq").read_bytes())
    assert after.metadata == make_golden.METADATA
    assert after.norms == make_golden.NORMS
    take_equal(after.tensors, make_golden.coded())
    for name, vector in make_golden.grids().items():
        found = after.tensors.pop(name)
        assert isinstance(found, codec.Vector)
        np.testing.assert_array_equal(found.values(), vector.values())
    for name, array in make_golden.plain_tensors().items():
        np.testing.assert_array_equal(after.tensors.pop(name), array, strict=True)
    assert not after.tensors


def test_the_golden_file_of_pixels_opens_forever() -> None:
    found = codec.decode((GOLDEN / "v3-pixels.clq").read_bytes()).tensors
    take_equal(found, {name: (one, coder) for name, (one, coder, _) in make_golden.pixels().items()})
    assert not found


@pytest.mark.parametrize("name", [name for name in sorted(SHA256) if not name.startswith("v1")])
def test_the_golden_files_are_written_the_same_forever(name: str) -> None:
    """The blobs; how far zlib packs a header is its own affair."""
    data, again = (GOLDEN / name).read_bytes(), make_golden.FILES[f"v3{name[2:]}"]()
    assert again[header.extent(again) :] == data[header.extent(data) :]


def test_the_golden_files_hold_every_coder() -> None:
    found = {
        entry.coder for name in make_golden.FILES for entry in codec.entries((GOLDEN / name).read_bytes())
    }
    assert found >= {*layers.CODERS, "f2", "f4", "f8", "i8", "b1"}


def test_the_golden_file_of_version_1_opens_forever() -> None:
    data = (GOLDEN / "v1-small.clq").read_bytes()
    assert hashlib.sha256(data).hexdigest() == SHA256["v1-small.clq"]
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
