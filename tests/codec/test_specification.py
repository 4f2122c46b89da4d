"""The package and an independent decoder, written from the prose of SPEC.md, read the same in every file, and refuse the same files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import make_golden
import numpy as np
import pytest
import spec_decoder
from crafted import crafted, one_tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from spec_coders import Refused

from clipq_ray import codec
from clipq_ray.codec import coders, layers, varint
from clipq_ray.codec.header import norm_names
from clipq_ray.errors import FormatError

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = sorted((ROOT / "tests" / "golden").glob("*.clq"))
BLOBS = {
    f"{coder} {one.shape}": (one.shape, coder, layers.write(one, coder, *kernel))
    for one, coder, *kernel in (
        *make_golden.coded().values(),
        *make_golden.trimmed().values(),
        *make_golden.pixels().values(),
    )
}
EDGES = [
    ((2, 1, 33, 33), 0, 1, "m"),
    ((1, 1024, 1, 1), 3, 3, "a"),
    ((70, 3, 2, 2), 1, 1, "a"),
    ((70, 3, 2, 2), 1, 1, "m"),
    ((3, 2, 32, 32), 1, 2, "a"),
    ((40, 12), 255, 255, "m"),
    ((40, 12), 255, 255, "a"),
    ((40, 12), 255, 255, "q"),
    ((500,), 0, 255, "mh"),
    ((2, 2, 2, 3, 4), 3, 3, "m"),
]


def same(data: bytes) -> None:
    """Both readers find the same in a file."""
    metadata, tensors = spec_decoder.decode(data)
    packed, arrays = codec.decode(data), codec.arrays(data)
    assert packed.metadata == metadata
    assert set(arrays) == set(tensors)
    for name, tensor in tensors.items():
        array, found = arrays[name], packed.tensors.get(name)
        assert array.shape == tensor.shape
        expected = np.array(tensor.values, array.dtype).reshape(tensor.shape)
        np.testing.assert_array_equal(array, expected)  # NaN is equal to NaN
        assert np.array_equal(np.signbit(array), np.signbit(expected)) or array.dtype.kind != "f"
        if isinstance(found, codec.CodedLayer):
            assert tensor.kind == "layer"
            assert found.codes.reshape(-1).tolist() == tensor.codes
            np.testing.assert_array_equal(found.levels, np.array(tensor.levels, np.float32))
        elif isinstance(found, codec.Vector):
            assert tensor.kind == "vector"
        else:
            assert tensor.kind == array.dtype.str[1:]


def same_verdict(data: bytes) -> bool:
    """Whether both readers accept a file; they agree on that, and on its content."""
    try:
        spec_decoder.decode(data)
    except Refused:
        with pytest.raises(FormatError):
            codec.decode(data)
        return False
    same(data)
    return True


def a_layer(
    shape: tuple[int, ...], negative: int, positive: int, zeros: float, seed: int
) -> codec.CodedLayer:
    """Codes of different spread by row, and levels of which float16 holds some layers'."""
    random = np.random.default_rng(seed)
    spread = random.gamma(2.0, size=(*shape[:1], *(1 for _ in shape[1:])))
    codes = np.rint(random.laplace(size=shape) * spread * (negative + positive) / 6)
    codes = np.clip(np.where(random.random(shape) < zeros, 0, codes), -negative, positive)
    levels = (np.arange(-negative, positive + 1) * random.choice([0.25, 0.1])).astype(np.float32)
    return codec.CodedLayer(np.asarray(codes).astype(np.int16), levels, negative)


SIDES = st.sampled_from([0, 1, 2, 3, 4, 7, 40, 255])
SHAPES = st.one_of(
    st.lists(st.integers(0, 5), max_size=5).map(tuple).filter(lambda shape: math.prod(shape) <= 400),
    st.sampled_from([(300,), (18, 14), (5, 4, 3, 3), (3, 2, 5, 5), (18, 3, 1, 1), (1, 1, 1030)]),
)
LAYERS = st.builds(a_layer, SHAPES, SIDES, SIDES, st.sampled_from([0.0, 0.5, 0.95]), st.integers(0, 2**31))
VECTORS = st.builds(
    lambda shape, step, middle, spread, seed: codec.Vector(
        (middle + np.random.default_rng(seed).integers(-spread, spread + 1, shape)).astype(np.int32), step
    ),
    st.lists(st.integers(0, 9), max_size=3).map(tuple),
    st.integers(0, 255),
    st.integers(-262000, 262000),
    st.integers(0, 120),
    st.integers(0, 2**31),
)
PLAIN = st.builds(
    lambda kind, shape, seed: np.random.default_rng(seed).integers(0, 255, shape).astype("u1").astype(kind),
    st.sampled_from(["f4", "f8", "i1", "i2", "i4", "i8", "u1", "?"]),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    st.integers(0, 2**31),
)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_golden_files(path: Path) -> None:
    same(path.read_bytes())


def test_a_trained_network() -> None:
    same((ROOT / "tests" / "golden" / "v1-resnet20-cifar10.clq").read_bytes())
    # trimmed rows and columns, kernels, and a stream long enough for counters to settle
    same((ROOT / "bench" / "records" / "lenet_300_100-mnist-noloss.clq").read_bytes())
    same((ROOT / "bench" / "records" / "lenet5_caffe-mnist-noloss.clq").read_bytes())


@settings(max_examples=150, deadline=None)
@given(
    tensors=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs", "Cc"])), LAYERS | VECTORS | PLAIN, max_size=4
    ),
    channels=st.lists(st.integers(0, 6), max_size=2),
    profile=st.sampled_from(["fast", "small"]),
    source=st.none() | st.binary(min_size=32, max_size=32).map(bytes.hex),
    seed=st.integers(0, 2**31),
)
def test_files_of_all_kinds(
    tensors: dict[str, Any], channels: list[int], profile: Any, source: str | None, seed: int
) -> None:
    norms = {"norm.1": 0, "": 0}
    random = np.random.default_rng(seed)
    for module, count in zip(tuple(norms), channels, strict=False):
        for name in norm_names(module):
            tensors.pop(name, None)
        for name in norm_names(module)[:2]:
            tensors[name] = codec.Vector(
                random.integers(-90, 90, count).astype(np.int32), int(random.integers(256))
            )
    metadata = {"classes": 3} if source is None else {"classes": 3, "source": source}
    same(codec.encode(codec.Packed(metadata, tensors, tuple(norms)[: len(channels)]), profile))


@pytest.mark.parametrize(("shape", "negative", "positive", "coder"), EDGES)
def test_layers_at_the_edges_of_the_coders(
    shape: tuple[int, ...], negative: int, positive: int, coder: str
) -> None:
    before = a_layer(shape, negative, positive, 0.3, 1)
    same(one_tensor(shape, coder, layers.write(before, coder)))


@pytest.mark.parametrize("letter", coders.LETTERS)
def test_vectors_by_every_coder(letter: str) -> None:
    row = (np.arange(60) * 7919 % 23 - 11).astype(np.int16)[None]
    heads = [
        bytes((step,)) + varint.write(varint.fold(where))
        for step, where in ((0, 9), (255, -7), (130, 262143))
    ]
    blob = b"".join((*heads, b"\13\13", coders.encode(letter, row, 11, 11)))
    same(crafted({"b": [["", 25]], "v": [["ü", [2, 5]]], "k": letter, "m": {}}, blob))


@settings(max_examples=250, deadline=None)
@given(
    blob=st.sampled_from(sorted(BLOBS)),
    at=st.integers(0, 2**20),
    new=st.binary(max_size=3),
    replaced=st.integers(0, 3),
    from_the_end=st.booleans(),
)
def test_damage_under_a_right_checksum_is_refused_by_both_or_by_none(
    blob: str, at: int, new: bytes, replaced: int, from_the_end: bool
) -> None:
    shape, coder, data = BLOBS[blob]
    at = len(data) - at % min(len(data), 6) if from_the_end else at % len(data)
    same_verdict(one_tensor(shape, coder, data[:at] + new + data[at + replaced :]))


EMPTY, ZERO = b"\0\0", b"\0\0\0\0"
NAMED = {"n": ["w"], "s": [[1]], "c": ["q"], "m": {}}
NORM = {"b": [["", 1]], "k": "q", "m": {}}


@pytest.mark.parametrize(
    ("accepted", "data"),
    [
        (True, crafted(NAMED, EMPTY)),
        (True, crafted(NORM, b"\0\0" + ZERO)),
        (True, crafted({"b": [["", 0]], "k": "a", "m": {}}, b"\0\0" + ZERO)),
        (True, crafted({"v": [["w", [1]]], "k": "q", "new": 5, "needs": [], "m": {}}, ZERO)),
        (True, crafted({**NAMED, "s": [[1] * 32]}, EMPTY)),
        (True, crafted(NAMED, EMPTY, sizes=b"\x82\x80\x80\x80\x80\x80\0")),
        (True, crafted({**NAMED, "m": {"ties": {"a": "w"}}}, EMPTY)),
        (False, crafted({**NAMED, "m": {"ties": {"w": "w"}}}, EMPTY)),
        (False, crafted({**NORM, "m": {"ties": {"running_var": "weight"}}}, b"\0\0" + ZERO)),
        (True, crafted({"m": {}}, tail=bytes(32))),
        (True, crafted({"t": [["w", [0], "mh", 2]], "needs": ["x"], "m": {}}, EMPTY, version=1)),
        (True, crafted('{"m":{"a":' + "[" * 62 + "]" * 62 + "}}")),
        (True, crafted('{"m":{"a":-' + "9" * 31 + "}}")),
        (False, crafted('{"m":{"a":' + "[" * 63 + "]" * 63 + "}}")),
        (False, crafted('{"m":{"a":-' + "9" * 32 + "}}")),
        (False, crafted('{"m":{"a":[' + "1," * 140000 + "1]}}")),
        (False, crafted('{"m":{"a":"\\ud800"}}')),
        (False, crafted('{"m":{"a":1e999}}')),
        (False, crafted("\ufeff" + '{"m":{}}')),
        (False, crafted('{"m":{}}'.encode("utf-16"))),
        (False, crafted({"m": {}}, tail=bytes(31))),
        (False, crafted({"m": {"source": ""}}, tail=bytes(32))),
        (False, crafted({"k": 5, "m": {}})),
        (False, crafted({**NAMED, "n": "w"}, EMPTY)),
        (False, crafted({**NAMED, "c": []}, EMPTY)),
        (False, crafted({**NAMED, "s": [[1] * 33]}, EMPTY)),
        (False, crafted({**NAMED, "s": [[0, 2**24, 2**24]]}, EMPTY)),
        (False, crafted({**NAMED, "s": [[2**25]]}, EMPTY)),
        (False, crafted(NAMED, EMPTY, sizes=b"\x82\x80\x80\x80\x80\x80\x80\0")),
        (False, crafted(NAMED, EMPTY, sizes=b"\x02\0")),
        (False, crafted({**NORM, "k": "qh"}, b"\0\0" + ZERO)),
        (False, crafted({"b": [["", 1]], "m": {}}, b"\0\0" + ZERO)),
        (False, crafted({**NORM, "b": [["", True]]}, b"\0\0" + ZERO)),
        (False, crafted({**NORM, "b": [[5, 1]]}, b"\0\0" + ZERO)),
        (False, crafted({**NORM, **NAMED, "n": ["running_var"]}, EMPTY, b"\0\0" + ZERO)),
        (False, crafted({"v": [["w", [1]]], "k": "q", "m": {}}, b"\0\x80\x80\x40\0\0")),
        (False, crafted({"t": [], "m": {}}, version=1, tail=b"x")),
        (True, one_tensor([3, 2], "ah", layers.write(make_golden.constant(), "ah"))),
        (False, one_tensor([3, 2], "ah", layers.write(make_golden.constant(), "ah") + b"\0\0")),
        (False, one_tensor([1, 2**20 + 1], "a", bytes((1, 1)) + bytes(8) + b"\1\1" + bytes(64))),
        (True, one_tensor([2, 6], "qk", EMPTY + b"\2\3")),
        (False, one_tensor([2, 6], "qk", EMPTY + b"\2\4")),
        (False, one_tensor([2, 6], "qk", EMPTY + b"\2\6")),
        (False, one_tensor([2, 6], "qk", EMPTY + b"\0\3")),
        (False, one_tensor([2, 6, 1], "qk", EMPTY + b"\2\3")),
        (False, one_tensor([12], "qk", EMPTY + b"\2\3")),
        (True, one_tensor([2, 0], "qk", EMPTY + b"\1\1")),
        (False, one_tensor([2, 0], "qk", EMPTY + b"\1\2")),
        (False, one_tensor([2, 0], "qk", EMPTY + b"\xff\xff\xff\xff\xff\xff\x3f" * 2)),
        (False, one_tensor([4], "q", b"\0\1" + bytes(4) + b"\x80\x40" + bytes(4))),
    ],
)  # fmt: skip
def test_both_readers_accept_and_refuse_the_same_headers(accepted: bool, data: bytes) -> None:
    assert same_verdict(data) == accepted
