"""Random crops and flips, on whole batches of small images and as boxes for large ones.

Small images (MNIST, CIFAR): padding with black, a random crop of the original size, and a mirror image with probability 1/2, as in He et
al. 2016, section 4.2. Large ones: a random part of 8..100 % of the area with an aspect ratio of 3/4..4/3, as in Szegedy et al. 2015 and
torchvision's RandomResizedCrop. Both: a masked square, as in DeVries and Taylor 2017 (cutout). All numbers of a batch are drawn at once, so
threads cannot change them. Not covered: colour, mixing.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipq_ray.sending import sent

Images = NDArray[np.uint8]

ATTEMPTS = 10  # torchvision's number of tries before the centre is taken
AREA = (0.08, 1.0)
LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))
DRAWS = 4 * ATTEMPTS + 1


def crop_and_flip(images: Images, padding: int, flip: bool, generator: torch.Generator) -> Images:
    """uint8 (B, c, h, w) -> uint8 (B, c, h, w): each image shifted by up to `padding` pixels in each direction, and mirrored or not."""
    count, _, height, width = images.shape
    shifts, mirrored = (one.numpy() for one in shifts_and_mirrors(count, padding, generator))
    padded = np.zeros((*images.shape[:2], height + 2 * padding, width + 2 * padding), dtype=np.uint8)
    padded[:, :, padding : padding + height, padding : padding + width] = images
    # One strided copy per image; an index per pixel costs several times as much.
    crops = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    result: Images = crops[np.arange(count), :, shifts[0], shifts[1]]
    if flip:
        result[mirrored] = result[mirrored][..., ::-1]
    return result


def shifts_and_mirrors(
    count: int, padding: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The random choices of `crop_and_flip`: int64 (2, count), first row and column of each crop in 0..2 * padding, and bool (count,), whether to mirror."""
    shifts = torch.randint(0, 2 * padding + 1, (2, count), generator=generator)
    return shifts, torch.rand(count, generator=generator) < 0.5


def cut_out(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """float (B, c, h, w), normalised -> the same, in every image 0, the mean, in a square of `pixels` x `pixels` around a random pixel; what of it lies outside is
    lost, so images differ in how much they show. 0 `pixels`: the images themselves. The numbers are drawn on the CPU, wherever the images are."""
    if not pixels:
        return images
    count, _, height, width = images.shape

    def inside(side: int) -> Tensor:
        """bool (B, side): the rows or columns of the squares."""
        first = torch.randint(0, side, (count, 1), generator=generator) - pixels // 2
        offsets = torch.arange(side) - first
        return sent((offsets >= 0) & (offsets < pixels), images.device)

    rows, columns = inside(height), inside(width)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


def draws(count: int, generator: torch.Generator) -> NDArray[np.float64]:
    """The random numbers in 0..1 of `count` random resized crops: float64 (count, DRAWS)."""
    return torch.rand(count, DRAWS, generator=generator, dtype=torch.float64).numpy()


def crop_box(numbers: NDArray[np.float64], height: int, width: int) -> tuple[tuple[int, int, int, int], bool]:
    """(left, top, right, bottom) in pixels inside an image of height x width, and whether to mirror; from `numbers` float64 (DRAWS,)."""
    mirrored = bool(numbers[-1] < 0.5)
    for area, ratio, top, left in numbers[:-1].reshape(ATTEMPTS, 4):
        pixels = height * width * (AREA[0] + area * (AREA[1] - AREA[0]))
        aspect = math.exp(LOG_RATIO[0] + ratio * (LOG_RATIO[1] - LOG_RATIO[0]))
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            y, x = int(top * (height - h + 1)), int(left * (width - w + 1))
            return (x, y, x + w, y + h), mirrored
    ratio = min(max(width / height, 3 / 4), 4 / 3)
    w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    x, y = (width - w) // 2, (height - h) // 2
    return (x, y, x + w, y + h), mirrored
