"""The .clq file: mirrors, sizes, and damage."""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

import numpy as np
import pytest
import spec_coders
from hypothesis import given, settings
from hypothesis import strategies as st

from clipq_ray import codec
from clipq_ray.codec import layers
from clipq_ray.errors import ArtifactError

META = {"architecture": {"name": "lenet5", "kwargs": {"num_classes": 10}}, "classes": 10}


def layer(shape: tuple[int, ...], negative: int, positive: int, zeros: float, seed: int) -> codec.CodedLayer:
    rng = np.random.default_rng(seed)
    codes = rng.integers(-negative, positive + 1, size=shape).astype(np.int16)
    codes[rng.random(shape) < zeros] = 0
    levels = (
        np.concatenate([-np.arange(negative, 0, -1), [0.0], np.arange(1, positive + 1)]).astype(np.float32)
        * 0.1
    )
    return codec.CodedLayer.from_quantized(codes, levels, negative)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 7), min_size=1, max_size=4).map(tuple),
    negative=st.integers(0, 127),
    positive=st.integers(0, 127),
    zeros=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    seed=st.integers(0, 2**31),
    profile=st.sampled_from(["fast", "small"]),
)
def test_codes_and_levels_come_back_exactly(
    shape: tuple[int, ...], negative: int, positive: int, zeros: float, seed: int, profile: Any
) -> None:
    before = layer(shape, negative, positive, zeros, seed)
    packed = codec.encode(codec.Packed(META, {"w": before}), profile)
    after = codec.decode(packed).tensors["w"]
    assert isinstance(after, codec.CodedLayer)
    np.testing.assert_array_equal(after.codes, before.codes)
    np.testing.assert_array_equal(after.levels, before.levels)
    assert after.negative == before.negative
    assert codec.entries(packed)[0].bytes == codec.layer_bytes(before, profile)


@pytest.mark.parametrize("seed", range(8))
def test_an_independent_decoder_in_integers_reads_the_same_codes(seed: int) -> None:
    before = layer((50, 40), 1 + seed, 2 + 3 * seed, 0.1 * seed, seed)
    sides = (before.negative, before.positive)
    blob = layers.write(before)[2 + 4 * sum(sides) :]
    assert spec_coders.codes("q", blob, (50, 40), sides) == before.codes.reshape(-1).tolist()


@pytest.mark.parametrize("profile", ["fast", "small"])
def test_a_layer_that_was_encoded_before_is_not_encoded_again(profile: Any) -> None:
    packed = codec.Packed(META, {name: layer((40, 30), 3, 4, 0.7, seed) for seed, name in enumerate("ab")})
    ready = {name: codec.smallest(one, profile) for name, one in packed.tensors.items()}  # type: ignore[arg-type]
    assert codec.encode(packed, profile, ready) == codec.encode(packed, profile)
    # the blob that is given is the one that is written
    other = codec.encode(packed, profile, {"b": ready["a"]})
    found = codec.decode(other).tensors
    np.testing.assert_array_equal(found["b"].codes, found["a"].codes)  # type: ignore[union-attr]


def images(random: np.random.Generator, units: int, side: int) -> codec.CodedLayer:
    """A layer on images whose units look at a spot each."""
    y, x = np.mgrid[:side, :side]
    where = random.uniform(4, side - 4, (units, 2, 1, 1))
    away = (y - where[:, 0]) ** 2 + (x - where[:, 1]) ** 2
    codes = (random.random((units, side, side)) < 0.5 * np.exp(-away / 12)) * random.integers(
        1, 3, (units, side, side)
    )
    return codec.CodedLayer(
        codes.reshape(units, -1).astype(np.int16), np.array([0, 0.25, 0.5], np.float32), 0
    )


def test_columns_that_are_pixels_are_coded_as_images() -> None:
    before = images(np.random.default_rng(0), 120, 28)
    coder, blob = codec.smallest(before)
    assert coder == "akh"
    assert len(blob) < len(layers.write(before, "ah"))
    after = layers.read(blob, before.shape, coder)
    np.testing.assert_array_equal(after.codes, before.codes)


def test_columns_that_are_pixels_are_coded_as_images_by_either_profile_and_where_a_layer_is_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = images(np.random.default_rng(0), 60, 28)
    assert layers.smallest(before, "small")[0] == "mkh"
    monkeypatch.setattr(layers, "_LARGE", 20000)
    assert layers.smallest(before, "small")[0] == "mkh"


@pytest.mark.parametrize("shape", [(0, 784), (1, 4), (3, 0), (0, 0), (2, 9)])
def test_matrices_of_few_or_no_rows_are_coded(shape: tuple[int, int]) -> None:
    before = codec.CodedLayer(np.ones(shape, np.int16), np.array([0, 0.5], np.float32), 0)
    coder, blob = codec.smallest(before)
    np.testing.assert_array_equal(layers.read(blob, shape, coder).codes, before.codes)


def test_columns_in_no_order_are_not_tried_as_images() -> None:
    before = images(np.random.default_rng(0), 120, 28)
    order = np.random.default_rng(1).permutation(784)
    shuffled = codec.CodedLayer(before.codes[:, order], before.levels, 0)
    assert "k" not in codec.smallest(shuffled)[0]


def test_a_large_layer_takes_at_most_one_percent_over_its_entropy() -> None:
    before = layer((512, 512), 3, 4, 0.8, 1)
    p = np.unique(before.codes, return_counts=True)[1] / before.codes.size
    entropy = -(p * np.log2(p)).sum() * before.codes.size / 8
    assert codec.layer_bytes(before) < 1.01 * entropy + 64


def test_other_tensors_come_back_at_the_stated_precision() -> None:
    rng = np.random.default_rng(0)
    plain = rng.normal(size=100).astype(np.float32)
    tiny = np.array([1e-30, 1.0], dtype=np.float32)
    integers = np.arange(5)
    packed = codec.encode(codec.Packed({}, {"a": plain, "tiny": tiny, "i": integers}))
    after = codec.decode(packed).tensors
    assert np.all(np.abs(after["a"] - plain) <= 2.0**-10 * np.abs(plain))
    np.testing.assert_array_equal(after["tiny"], tiny)
    np.testing.assert_array_equal(after["i"], integers)
    np.testing.assert_array_equal(codec.stored(plain), after["a"])


def test_a_single_number_goes_on_a_grid_and_comes_back() -> None:
    vector = codec.on_grid(np.array(-0.375), 0.5, 16)
    assert vector is not None
    assert isinstance(vector.codes, np.ndarray)
    assert vector.shape == ()
    file = codec.encode(
        codec.Packed({}, {"scale": vector, "other": codec.Vector(np.arange(3, dtype=np.int32), 120)})
    )
    for values in (vector.values(), codec.arrays(file)["scale"]):
        assert isinstance(values, np.ndarray)
        assert (values.shape, values.dtype) == ((), np.float32)
        assert float(values) == pytest.approx(-0.375, abs=0.5 / 32)
    assert codec.arrays(file)["scale"] == vector.values()


def small_file(profile: Any = "fast") -> bytes:
    tensors: dict[str, Any] = {
        "w": layer((4, 5), 1, 2, 0.5, 3),
        "b": np.ones(3, np.float32),
        "norm.weight": codec.Vector(np.array([40, 38], np.int32), 140),
        "norm.bias": codec.Vector(np.array([-3, 5], np.int32), 133),
        "v": codec.Vector(np.array([7, 7, -90], np.int32), 120),
    }
    return codec.encode(codec.Packed(META, tensors, ("norm",)), profile)


def test_every_truncation_is_a_named_error() -> None:
    data = small_file()
    for size in range(len(data)):
        with pytest.raises(ArtifactError):
            codec.decode(data[:size])


def test_every_flipped_byte_is_a_named_error() -> None:
    data = small_file()
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 0x55
        with pytest.raises(ArtifactError):
            codec.decode(bytes(damaged))


def test_a_header_that_promises_more_than_its_bytes_carry_allocates_nothing() -> None:
    blob = layers.write(layer((4, 5), 1, 2, 0.5, 3))
    with pytest.raises(ArtifactError, match="more codes"):
        layers.read(blob, (2**20, 2**13))


def test_some_tensors_are_decoded_alone() -> None:
    assert list(codec.decode(small_file(), ["b"]).tensors) == ["b"]
    assert list(codec.arrays(small_file(), ["norm.running_var"])) == ["norm.running_var"]
    with pytest.raises(ArtifactError, match="nope"):
        codec.decode(small_file(), ["nope"])


@pytest.mark.parametrize(
    ("profile", "sha256"),
    [
        ("fast", "173b365fc6e04a9a3c79442a357a5fb465f9d7027e43230b26a13f3623fe68c7"),
        ("small", "69faadb972b8d7eeccfe771bae05390f32b5f3af619ce37056497f0a7bf9c172"),
    ],
)
def test_the_same_content_gives_the_same_bytes_in_every_version_of_the_code(
    profile: Any, sha256: str
) -> None:
    """The golden bytes of version 3: they change only where a new coder takes fewer bytes (`test_promises`: old files open)."""
    data = small_file(profile)
    assert data[:4] == b"CLQ\x03"
    checksum = zlib.crc32(data[12 : 12 + int.from_bytes(data[4:8], "little")])
    assert checksum == int.from_bytes(data[8:12], "little")
    assert hashlib.sha256(data).hexdigest() == sha256


@pytest.mark.parametrize("shape", [(2000, 2500), (3000, 6000)])
def test_a_network_that_is_dead_nearly_everywhere_is_written_so_that_it_can_be_read(
    shape: tuple[int, int],
) -> None:
    """Without padding the file would be too small for the elements that it says it holds, which every reader refuses."""
    codes = np.zeros(shape, np.int16)
    codes[np.arange(40), np.arange(40)] = 1
    layer = codec.CodedLayer(codes, np.array([0.0, 0.5], np.float32), 0)
    data = codec.encode(codec.Packed({}, {"w": layer}))
    np.testing.assert_array_equal(codec.arrays(data)["w"], layer.values())
