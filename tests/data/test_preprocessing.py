"""The value that says how images are normalised."""

from __future__ import annotations

import pytest
import torch

from clipq_ray.data import Preprocessing
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
    for one in (RGB, Preprocessing((1, 28, 28), 32, (0.5,), (1.0,))):
        assert Preprocessing.from_json(one.to_json()) == one


def test_json_that_is_no_preprocessing_is_a_format_error() -> None:
    good = RGB.to_json()
    for bad in ({}, {**good, "shape": [3, 4]}, {**good, "std": [0, 1, 1]}, {**good, "mean": None}):
        with pytest.raises(FormatError):
            Preprocessing.from_json(bad)


@pytest.mark.parametrize(
    "arguments",
    [
        ((2, 4, 4), None, (0.0, 0.0), (1.0, 1.0)),
        ((3, 4, 4), None, (0.0,), (1.0,)),
        ((1, 4, 4), 3, (0.0,), (1.0,)),
        ((1, 4, 4), None, (0.0,), (0.0,)),
        ((1, 4, 4), None, (float("nan"),), (1.0,)),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: tuple) -> None:
    with pytest.raises(ConfigError):
        Preprocessing(*arguments)
