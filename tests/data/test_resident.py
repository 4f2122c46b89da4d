"""Images that lie on a device: the batches of `TensorSplit`, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipq_ray.data import Preprocessing, Split
from clipq_ray.data.preprocessing import GRAY_MEAN, GRAY_STD, RGB_MEAN, RGB_STD
from clipq_ray.data.resident import ResidentSplit, placed
from clipq_ray.data.tensors import TensorSplit

CPU = torch.device("cpu")
GPU = torch.device("cuda")


def split(
    channels: int, stored: int | None = None, padding: int | None = None, resize: int | None = None
) -> TensorSplit:
    """60 images of noise, `stored` channels each, for a network of `channels`."""
    random = np.random.default_rng(channels)
    images = random.integers(0, 256, (60, stored or channels, 8, 12), dtype=np.uint8)
    mean, std = (GRAY_MEAN, GRAY_STD) if channels == 1 else (RGB_MEAN, RGB_STD)
    preprocessing = Preprocessing((channels, 8, 12), resize, mean, std)
    return TensorSplit(images, random.integers(0, 9, 60), preprocessing, padding=padding)


def pairs(one: Split, other: Split, indices: torch.Tensor, seed: int | None) -> None:
    """Both give the same batch."""
    batches = [
        each.batch(indices, None if seed is None else torch.Generator().manual_seed(seed))
        for each in (one, other)
    ]
    for a, b in zip(*batches, strict=True):
        assert (a.dtype, a.shape, True) == (b.dtype, b.shape, b.is_contiguous())
        assert torch.equal(a, b.cpu())


@pytest.mark.parametrize(("channels", "stored"), [(1, 1), (3, 3), (3, 1), (1, 3)])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_batches_are_those_of_the_split_bit_for_bit(channels: int, stored: int, seed: int | None) -> None:
    given = split(channels, stored)
    pairs(given, ResidentSplit(given, CPU), torch.tensor([5, 0, 59, 5, 17]), seed)


@pytest.mark.parametrize("padding", [0, 3])
def test_shifts_are_those_of_the_split(padding: int) -> None:
    given = split(3, padding=padding)
    pairs(given, ResidentSplit(given, CPU), torch.arange(60), 7)


def test_a_subset_and_its_subset_have_their_own_images() -> None:
    part = split(3).subset(torch.arange(10, 50))
    resident = ResidentSplit(part, CPU)
    assert (len(resident), resident.fingerprint) == (40, part.fingerprint)
    pairs(part, resident, torch.tensor([0, 39]), 3)
    pairs(
        part.subset(torch.tensor([7, 2])), resident.subset(torch.tensor([7, 2])), torch.tensor([1, 0]), None
    )


def test_no_image_is_an_empty_batch() -> None:
    given = split(3)
    pairs(given, ResidentSplit(given, CPU), torch.arange(0), 0)


def test_on_a_cpu_and_where_images_are_resized_nothing_moves() -> None:
    given, resized = split(3), split(3, resize=12)
    assert placed(given, CPU) is given
    assert placed(resized, GPU, free_bytes=10**9) is resized


def test_images_that_take_more_than_a_part_of_the_memory_stay_where_they_are() -> None:
    given = split(3)
    assert given.nbytes == 60 * 3 * 8 * 12
    assert placed(given, GPU, free_bytes=4 * given.nbytes - 4) is given


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu_batches_are_there_with_the_same_bits() -> None:
    given = split(3)
    resident = placed(given, GPU)
    assert isinstance(resident, ResidentSplit)
    assert resident.batch(torch.arange(4), None)[0].is_cuda
    pairs(given, resident, torch.arange(60), 5)
