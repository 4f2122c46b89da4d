"""Batches prepared in the background."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from torch import Tensor

from clipq_ray.data import Preprocessing, batches
from clipq_ray.data.tensors import TensorSplit
from clipq_ray.errors import DataError


class Counted(TensorSplit):
    """A split that says which thread made its batches and fails at an index."""

    def __init__(self, fails_at: int = -1) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), dtype=np.uint8)
        super().__init__(pixels, np.arange(40) % 4, Preprocessing((3, 8, 8), None, (0.0,) * 3, (1.0,) * 3))
        self.fails_at, self.made, self.threads = fails_at, 0, set()

    def batch(self, indices: Tensor, augment: torch.Generator | None) -> tuple[Tensor, Tensor]:
        self.made += 1
        self.threads.add(threading.current_thread().name)
        if self.fails_at in indices:
            raise DataError("a bad one")
        return super().batch(indices, augment)


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "clipq-batches"]


@pytest.mark.parametrize("prefetch", [1, 2, 7])
def test_prefetched_batches_are_those_of_a_plain_loop(prefetch: int) -> None:
    split = Counted()
    order = split.order(seeded(9)).split(7)
    plain = [split.batch(indices, seeded(number)) for number, indices in enumerate(order)]
    ahead = list(batches(split, order, seeded, prefetch))
    assert len(ahead) == len(plain) == 6
    for (images, labels), (same, labels_again) in zip(plain, ahead, strict=True):
        assert torch.equal(images, same)
        assert torch.equal(labels, labels_again)
    assert "clipq-batches" in split.threads
    assert not running()


def test_no_prefetch_means_no_thread() -> None:
    split = Counted()
    list(batches(split, torch.arange(40).split(8), lambda _: None, 0))
    assert split.threads == {threading.current_thread().name}


def test_an_exception_comes_out_where_its_batch_would_have_come() -> None:
    iterator = batches(Counted(fails_at=17), torch.arange(40).split(8), lambda _: None)
    assert len([next(iterator), next(iterator)]) == 2
    with pytest.raises(DataError, match="a bad one"):
        next(iterator)
    assert not running()


def test_closing_early_ends_the_thread_which_is_never_far_ahead() -> None:
    split = Counted()
    iterator = batches(split, torch.arange(40).split(1), lambda _: None, 2)
    next(iterator)
    for _ in range(100):
        if split.made >= 4:
            break
        time.sleep(0.01)
    iterator.close()  # type: ignore[attr-defined]
    assert split.made <= 4
    assert not running()


def test_an_iterator_that_is_never_asked_starts_nothing() -> None:
    split = Counted()
    batches(split, torch.arange(40).split(8), lambda _: None)
    assert not running()
    assert split.made == 0
