"""The value that says how images are normalised."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import write
from PIL import Image
from refusals import refused
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from clipq_ray.data import Preprocessing, open_data, open_test, tensors
from clipq_ray.data.preprocessing import Interpolation
from clipq_ray.data.tensors import TensorSplit
from clipq_ray.errors import ConfigError, FormatError

RGB = Preprocessing((3, 4, 5), None, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_apply_gives_the_bits_of_the_formula_for_every_pixel_value() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3)[: 4 * 3 * 20].view(4, 3, 4, 5)
    mean, std = torch.tensor(RGB.mean).view(3, 1, 1), torch.tensor(RGB.std).view(3, 1, 1)
    out = RGB.apply(pixels)
    assert torch.equal(out, (pixels.float() / 255 - mean) / std)
    assert out.dtype == torch.float32
    assert out.is_contiguous()


def test_a_preprocessing_survives_json() -> None:
    bicubic = replace(RGB, interpolation="bicubic")
    for one in (RGB, Preprocessing((1, 28, 28), 32, (0.5,), (1.0,)), bicubic):
        assert Preprocessing.from_json(one.to_json()) == one
    assert "interpolation" not in RGB.to_json()  # older files do not say it


def test_json_that_is_no_preprocessing_is_a_format_error() -> None:
    good = RGB.to_json()
    for bad in (
        {},
        {**good, "shape": [3, 4]},
        {**good, "std": [0, 1, 1]},
        {**good, "mean": None},
        {**good, "interpolation": "cubic"},
    ):
        with pytest.raises(FormatError):
            Preprocessing.from_json(bad)


@pytest.mark.parametrize(
    "arguments",
    [
        ((0, 4, 4), None, (), ()),
        ((3, 4, 4), None, (0.0,), (1.0,)),
        ((1, 4, 4), 3, (0.0,), (1.0,)),
        ((1, 4, 4), None, (0.0,), (0.0,)),
        ((1, 4, 4), None, (float("nan"),), (1.0,)),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: tuple) -> None:
    with pytest.raises(ConfigError):
        Preprocessing(*arguments)


@pytest.mark.parametrize("channels", [2, 4])
def test_images_of_other_channels_than_gray_and_colour_are_refused_where_files_are_opened(
    channels: int,
) -> None:
    own = Preprocessing((channels, 28, 28), None, (0.0,) * channels, (1.0,) * channels)  # of loaders
    assert Preprocessing.from_json(own.to_json()) == own
    for opening in (
        lambda: open_data("digits", input_shape=own.input_shape, mean=own.mean, std=own.std),
        lambda: open_test("digits", own, 10),
    ):
        with refused(ConfigError, match=f"1 or 3 channels .*, got {channels}; .* loaders of your own"):
            opening()


# As torchvision prepares images


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(50, 41), (20, 26)])
def test_images_are_resized_cropped_and_normalised_as_torchvisions_weights_want_them(
    tmp_path: Path, interpolation: Interpolation, size: tuple[int, int]
) -> None:
    usual = Preprocessing((3, 24, 24), 28, (0.5, 0.4, 0.3), (0.5, 0.6, 0.7), interpolation)
    wanted = ImageClassification(
        crop_size=24, resize_size=28, mean=usual.mean, std=usual.std, interpolation=InterpolationMode(interpolation)
    )  # fmt: skip
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    files = {}
    for split, image in (("train", pixels[::-1]), ("test", pixels)):
        out = io.BytesIO()
        Image.fromarray(image).save(out, "PNG")
        files |= {f"{split}/{name}/{n}.png": out.getvalue() for name in "ab" for n in range(2)}
    uri = write(tmp_path, files)
    data = open_data(uri, input_shape=(3, 24, 24), usual=usual)
    assert data.preprocessing == usual
    assert data.test is not None
    torch.testing.assert_close(
        data.test.batch(torch.tensor([0]), None)[0][0], wanted(Image.fromarray(pixels))
    )
    # images in memory
    decoded = np.ascontiguousarray(pixels.transpose(2, 0, 1))[None]
    split = TensorSplit(decoded, np.zeros(1, dtype=np.int64), usual)
    torch.testing.assert_close(
        split.batch(torch.tensor([0]), None)[0][0], wanted(torch.from_numpy(decoded[0]))
    )


def test_images_in_memory_are_resized_in_pieces_of_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.transforms import functional

    assert tensors.resized_at_once((1, 28, 28), 8192) == 1  # 250 of them were 67 GB
    assert tensors.resized_at_once((3, 32, 32), 256) >= 250  # usual batches stay whole
    assert tensors.resized_at_once((1, 1, 28), 64) * 64 * 64 * 28 <= 1 << 26  # longer sides grow as well
    images = np.random.default_rng(0).integers(0, 256, (7, 1, 10, 12), dtype=np.uint8)
    split = TensorSplit(
        images, np.arange(7, dtype=np.int64), Preprocessing((1, 16, 16), 20, (0.5,), (0.5,), "bicubic")
    )
    whole, labels = split.batch(torch.arange(7), None)
    pieces: list[int] = []
    resize = functional.resize

    def watching(part: torch.Tensor, *given: object, **more: object) -> torch.Tensor:
        pieces.append(len(part))
        resized: torch.Tensor = resize(part, *given, **more)
        return resized

    monkeypatch.setattr(functional, "resize", watching)
    monkeypatch.setattr(tensors, "_RESIZED", 3 * 20 * 24)
    in_pieces, same_labels = split.batch(torch.arange(7), None)
    assert pieces == [3, 3, 1]
    assert torch.equal(in_pieces, whole)
    assert torch.equal(same_labels, labels)
    assert split.batch(torch.arange(0), None)[0].shape == (0, 1, 16, 16)


@pytest.mark.parametrize("shape", [(1, 300), (300, 1)])
def test_of_oblong_images_in_memory_the_middle_is_resized(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.transforms import functional

    images = np.random.default_rng(0).integers(0, 256, (2, 1, *shape), dtype=np.uint8)
    split = TensorSplit(
        images, np.arange(2, dtype=np.int64), Preprocessing((1, 14, 14), 16, (0.5,), (0.5,), "bicubic")
    )
    whole = split.batch(torch.arange(2), None)[0]
    resize, values = functional.resize, []

    def watching(part: torch.Tensor, *given: object, **more: object) -> torch.Tensor:
        resized: torch.Tensor = resize(part, *given, **more)
        values.append(resized.numel())
        return resized

    monkeypatch.setattr(functional, "resize", watching)
    monkeypatch.setattr(tensors, "_RESIZED", 1 << 12)
    assert torch.equal(split.batch(torch.arange(2), None)[0], whole)
    assert max(values) <= 1 << 12  # 16 x 4,800 of each image otherwise


def test_what_is_given_comes_over_what_is_usual() -> None:
    usual = Preprocessing((3, 32, 32), 36, (0.5,) * 3, (0.5,) * 3, "bicubic")
    given = open_data(
        "digits", input_shape=(3, 32, 32), usual=usual, mean=(0.1,) * 3, std=(0.2,) * 3, resize=40
    )
    assert given.preprocessing == Preprocessing((3, 32, 32), 40, (0.1,) * 3, (0.2,) * 3, "bicubic")
    same_size = replace(usual, input_shape=(3, 28, 28))
    assert open_data("digits", input_shape=(3, 28, 28), usual=same_size).preprocessing.resize is None
    for half in ({"mean": (0.1,) * 3}, {"std": (0.1,) * 3}):
        with pytest.raises(ConfigError, match="mean and std together"):
            open_data("digits", input_shape=(3, 32, 32), usual=usual, **half)
