"""Random crops, flips and masks."""

from __future__ import annotations

import numpy as np
import torch

from clipq_ray.data.augment import crop_and_flip, crop_box, cut_out, draws


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_crop_is_a_window_of_the_padded_image_flipped_or_not() -> None:
    images = np.random.default_rng(0).integers(1, 256, (64, 3, 8, 6), dtype=np.uint8)
    padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)))
    seen = set()
    for number, crop in enumerate(crop_and_flip(images, 2, True, seeded())):
        matches = [
            (y, x, flip)
            for y in range(5)
            for x in range(5)
            for flip in (False, True)
            if np.array_equal(crop[..., ::-1] if flip else crop, padded[number, :, y : y + 8, x : x + 6])
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 25
    assert {flip for _, _, flip in seen} == {False, True}


def test_without_flip_and_padding_images_stay_as_they_are() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8), dtype=np.uint8)
    assert np.array_equal(crop_and_flip(images, 0, False, seeded()), images)


def test_the_same_generator_gives_the_same_crops_and_another_one_others() -> None:
    images = np.random.default_rng(0).integers(0, 256, (16, 3, 8, 8), dtype=np.uint8)
    first = crop_and_flip(images, 1, True, seeded(1))
    assert np.array_equal(first, crop_and_flip(images, 1, True, seeded(1)))
    assert not np.array_equal(first, crop_and_flip(images, 1, True, seeded(2)))


def test_random_boxes_lie_inside_and_keep_to_area_and_aspect_ratio() -> None:
    height, width = 300, 400
    areas, flips = [], 0
    for numbers in draws(500, seeded()):
        (left, top, right, bottom), mirrored = crop_box(numbers, height, width)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert 0.74 <= (right - left) / (bottom - top) <= 1.35
        areas.append((right - left) * (bottom - top) / (height * width))
        flips += mirrored
    assert 0.078 <= min(areas) < 0.15
    assert 0.85 < max(areas) <= 1.0
    assert 200 < flips < 300


def test_an_image_too_narrow_for_any_box_gives_its_centre() -> None:
    (left, top, right, bottom), _ = crop_box(np.full(41, 0.999), 1000, 10)
    assert (left, right) == (0, 10)
    assert abs((top + bottom) / 2 - 500) <= 1
    assert crop_box(np.full(41, 0.5), 1, 1)[0] == (0, 0, 1, 1)


def test_a_square_of_every_image_is_masked_and_the_rest_stays() -> None:
    images = torch.rand(200, 3, 9, 12, generator=seeded()) + 1
    masked = cut_out(images, 4, seeded())
    areas, centres = set(), set()
    for before, after in zip(images, masked, strict=True):
        gone = after == 0
        assert torch.equal(after[~gone], before[~gone])
        assert torch.equal(gone[0], gone[1])  # of all channels the same
        rows, columns = gone[0].any(1).nonzero(), gone[0].any(0).nonzero()
        height, width = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
        assert gone[0].sum() == height * width  # no holes in it
        assert max(height, width) <= 4
        areas.add(height * width)
        centres.add((int(rows.min()), int(columns.min())))
    assert max(areas) == 16  # whole inside
    assert min(areas) < 8  # cut off by a corner
    assert len(centres) > 50
    assert torch.equal(masked, cut_out(images, 4, seeded()))
    assert not torch.equal(masked, cut_out(images, 4, seeded(1)))
