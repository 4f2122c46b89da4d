"""One encoded image to pixels."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from clipq_ray.data import Preprocessing
from clipq_ray.data.decoding import decode
from clipq_ray.data.preprocessing import Interpolation

USUAL = Preprocessing((3, 224, 224), 256, (0.5,) * 3, (0.5,) * 3)
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def noise(width: int, height: int) -> tuple[Image.Image, bytes]:
    """An image of random pixels, and the same as a PNG."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    made, out = Image.fromarray(pixels), io.BytesIO()
    made.save(out, "PNG")
    return made, out.getvalue()


def cropped(image: Image.Image, interpolation: Interpolation = "bilinear") -> np.ndarray:
    """The whole image with its shorter side at 256, then its middle of 224 x 224, uint8 (3, 224, 224)."""
    shorter = min(image.size)
    size = (256 * image.width // shorter, 256 * image.height // shorter)
    left, top = round((size[0] - 224) / 2), round((size[1] - 224) / 2)
    middle = image.resize(size, RESAMPLING[interpolation]).crop((left, top, left + 224, top + 224))
    return np.asarray(middle).transpose(2, 0, 1)


@pytest.fixture
def resized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pixels each image was resized to."""
    pixels: list[int] = []
    resize = Image.Image.resize

    def watching(self: Image.Image, size: tuple[int, int], *given: object, **more: object) -> Image.Image:
        pixels.append(size[0] * size[1])
        return resize(self, size, *given, **more)

    monkeypatch.setattr(Image.Image, "resize", watching)
    return pixels


@pytest.mark.parametrize("size", [(3000, 1), (1, 3000)])
def test_of_an_oblong_image_only_what_the_crop_shows_is_resized(
    size: tuple[int, int], resized: list[int]
) -> None:
    image, data = noise(*size)
    found = decode(data, USUAL, None)
    assert max(resized) <= 16 * 224 * 224  # all of it would be 768,000 x 256
    left, top = (max(0, side // 2 - 10) for side in size)
    middle = image.crop((left, top, size[0] - left, size[1] - top))
    assert np.abs(np.asarray(found, dtype=int) - cropped(middle)).max() <= 1


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(500, 375), (40, 90), (2000, 100)])
def test_other_images_keep_the_bits_of_the_whole_image_resized_and_cropped(
    size: tuple[int, int], interpolation: Interpolation
) -> None:
    image, data = noise(*size)
    found = decode(data, replace(USUAL, interpolation=interpolation), None)
    assert np.array_equal(np.asarray(found), cropped(image, interpolation))


def test_why_an_image_cannot_be_read_is_said_without_an_address() -> None:
    assert decode(b"no image", USUAL, None) == "UnidentifiedImageError: cannot identify image file"
