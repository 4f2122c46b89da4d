"""Plans of reading for decoders elsewhere: the same batches, every group once, bounded memory; and what an epoch's ranks read."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import folder, number_of, numbered, parquet, png, write
from hypothesis import given, settings
from hypothesis import strategies as st

from clipq_ray.data import open_data
from clipq_ray.data.decoding import Decoded
from clipq_ray.data.encoded import EncodedSplit
from clipq_ray.data.reading import Reading, _by_group, assembled, reading
from clipq_ray.errors import DataError

PLAIN = {"input_shape": (3, 8, 8), "mean": (0.0,) * 3, "std": (1.0,) * 3}
IMAGE_BYTES = 3 * 8 * 8


def opened(uri: str, **options: Any) -> EncodedSplit:
    split = open_data(uri, **{**PLAIN, "memory_limit_bytes": 20_000, **options}).train
    assert isinstance(split, EncodedSplit)
    return split


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def read(split: EncodedSplit, plan: Reading) -> Iterator[Decoded]:
    """All pieces as a decoder in another process makes them."""
    there = pickle.loads(pickle.dumps(split.unbuffered()))
    for piece in range(plan.pieces):
        for part in plan.decoded(there, piece, 7):
            yield from part


@pytest.fixture(params=["parquet", "large", "folder"])
def split(request: pytest.FixtureRequest, tmp_path: Path) -> EncodedSplit:
    """300 images in row groups of 10; with larger images that are cropped at random; as files of their own."""
    if request.param == "folder":
        folder(tmp_path, "train", 120)
        return opened(str(tmp_path), memory_limit_bytes=1000)
    size = (20, 30) if request.param == "large" else (8, 8)
    return opened(
        write(tmp_path, {"a/train-0.parquet": numbered(0, 150, size), "a/train-1.parquet": numbered(150, 150, size)})
    )  # fmt: skip


@pytest.mark.parametrize("augmented", [True, False], ids=["augmented", "plain"])
@pytest.mark.parametrize("waiting", [10**6, 40 * IMAGE_BYTES, 1], ids=["all", "some", "one"])
def test_batches_of_decoded_pieces_are_those_of_the_split_bit_by_bit(
    split: EncodedSplit, augmented: bool, waiting: int
) -> None:
    given_batches = split.index_batches(seeded(3), 16)

    def generators(number: int) -> torch.Generator | None:
        return seeded(100 + number) if augmented else None

    seeds = [100 + number if augmented else None for number in range(len(given_batches))]
    plan = reading(split, given_batches, seeds, waiting_bytes=waiting, piece_bytes=25 * IMAGE_BYTES)
    found = list(assembled(split, plan, read(split, plan), generators))
    assert len(found) == len(given_batches)
    for number, (indices, (images, labels)) in enumerate(zip(given_batches, found, strict=True)):
        expected = split.batch(indices, generators(number))
        assert torch.equal(images, expected[0])
        assert torch.equal(labels, expected[1])


def test_with_room_for_a_window_every_row_group_is_read_once_and_by_one_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = opened(write(tmp_path, {"train.parquet": numbered(0, 300)}))
    source = split.source.unbuffered()
    split.source = source
    whole, reads = type(source)._read_group, []
    monkeypatch.setattr(
        type(source), "_read_group", lambda self, group: reads.append(group) or whole(self, group)
    )
    given_batches = split.index_batches(seeded(0), 16)
    plan = reading(
        split, given_batches, [None] * len(given_batches), waiting_bytes=200 * IMAGE_BYTES, piece_bytes=1
    )
    there = split.unbuffered()
    for piece in range(plan.pieces):
        list(plan.decoded(there, piece, 4))
    assert len(reads) == len(set(reads)) == plan.pieces


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(1, 70))
def test_the_order_of_reading_has_each_place_once_and_keeps_it_near(groups: list[int], most: int) -> None:
    order, first = _by_group(np.array(groups), most)
    assert sorted(order.tolist()) == list(range(len(groups)))
    arrived = np.maximum.accumulate(order)
    assert (arrived - np.arange(len(groups)) < most).all()  # so many wait at most
    turned = np.array(groups)[order]
    assert first[0]
    assert all(first[1:][np.diff(turned) != 0])
    if most >= len(groups):
        assert first.sum() == len(set(groups))


def test_pieces_are_cut_between_groups_and_have_the_size_that_was_asked_for(tmp_path: Path) -> None:
    split = opened(write(tmp_path, {"train.parquet": numbered(0, 300)}), validation_images=30)
    order = split.index_batches(seeded(0), 270)
    plan = reading(split, order, [None], waiting_bytes=10**6, piece_bytes=25 * IMAGE_BYTES)
    sizes = np.diff(plan.cuts)
    assert sizes[:-1].min() >= 25
    assert sizes.max() < 35
    groups = split.source.groups[split.rows[plan.indices[plan.order]]]
    assert all(groups[cut - 1] != groups[cut] for cut in plan.cuts[1:-1])


def test_unreadable_images_are_counted_and_replaced_as_in_the_split_itself(tmp_path: Path) -> None:
    images: list[bytes | None] = [png(number) for number in range(60)]
    images[5] = images[6] = images[40] = b"no image"
    uri = write(tmp_path, {"train.parquet": parquet(images, [n % 3 for n in range(60)])})

    def made(make: Callable[[EncodedSplit, list[torch.Tensor]], list[Any]]) -> tuple[list[int], Any]:
        split = opened(uri, memory_limit_bytes=1000, bad_image_limit=3, validation_images=3)
        found = make(split, split.index_batches(seeded(1), 19))
        return [number_of(image * 255) for batch, _ in found for image in batch.numpy()], split.unreadable

    def by_plan(split: EncodedSplit, order: list[torch.Tensor]) -> list[Any]:
        plan = reading(split, order, [None] * len(order), waiting_bytes=1000, piece_bytes=1000)
        return list(assembled(split, plan, read(split, plan), lambda _: None))

    expected = made(lambda split, order: [split.batch(indices, None) for indices in order])
    assert made(by_plan) == expected
    assert expected[1]


def test_images_that_end_too_early_are_an_error(split: EncodedSplit) -> None:
    order = split.index_batches(seeded(3), 16)
    plan = reading(split, order, [None] * len(order), waiting_bytes=10**6, piece_bytes=1)
    with pytest.raises(ValueError, match="shorter"):
        list(assembled(split, plan, list(read(split, plan))[:-1], lambda _: None))


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_ranks_train_on_images_of_their_own_in_equally_many_steps(split: EncodedSplit, world: int) -> None:
    size = 17
    shares = [split.index_batches(seeded(5), size, rank, world) for rank in range(world)]
    steps = len(split) // size
    assert [len(share) for share in shares] == [steps] * world
    for step in range(steps):
        assert sum(len(share[step]) for share in shares) == size
        assert [len(share[step]) for share in shares] == [
            len(range(rank, size, world)) for rank in range(world)
        ]
    flat = torch.cat([batch for share in shares for batch in share])
    assert len(set(flat.tolist())) == len(flat) == steps * size
    if split.source.groups is not None:
        groups = split.source.groups[split.rows]
        readers = sum(len(set(groups[torch.cat(share).numpy()])) for share in shares)
        assert readers <= len(set(groups)) + world - 1
    alone = split.order(seeded(5))[: steps * size].split(size)
    assert world > 1 or all(torch.equal(*pair) for pair in zip(shares[0], alone, strict=True))


def test_fewer_images_than_a_batch_are_one_step(tmp_path: Path) -> None:
    split = opened(write(tmp_path, {"train.parquet": numbered(0, 30)}), memory_limit_bytes=1000)
    parts = [split.index_batches(seeded(0), 500, rank, 2) for rank in range(2)]
    assert [[len(batch) for batch in part] for part in parts] == [[14], [13]]


def test_a_vanished_file_is_named(tmp_path: Path) -> None:
    split = opened(write(tmp_path, {"train.parquet": numbered(0, 300)}))
    order = split.index_batches(seeded(0), 16)
    plan = reading(split, order, [None] * len(order), waiting_bytes=10**6, piece_bytes=1)
    (tmp_path / "train.parquet").unlink()
    with pytest.raises(DataError, match=r"cannot read .*train\.parquet"):
        list(read(split, plan))
