"""A user's own loaders."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from refusals import refused
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from clipq_ray.data import batches, from_loaders
from clipq_ray.errors import DataError


class Noisy(Dataset):
    """Images whose transform draws from all three global random states."""

    def __init__(self, count: int = 60, first: int = 0) -> None:
        self.targets = [(first + number) % 3 for number in range(count)]
        self.first, self.reads = first, 0

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.reads += 1
        noise = random.random() + np.random.rand() + torch.rand(3, 4, 4)
        return self.first + index + noise, self.targets[index]


def loader(dataset: Dataset, **options) -> DataLoader:
    return DataLoader(dataset, batch_size=7, **options)


def test_images_are_held_out_and_labels_come_from_the_dataset() -> None:
    dataset = Noisy()
    data = from_loaders(loader(dataset), test_loader=loader(Noisy(9, 100)), validation_images=12)
    assert (len(data.train), len(data.validation), len(data.test or []), data.classes) == (48, 12, 9, 3)
    assert (data.validation_held_out, data.preprocessing.input_shape) == (True, (3, 4, 4))
    assert dataset.reads < 60
    images, labels = data.train.batch(torch.arange(5), torch.Generator().manual_seed(0))
    assert (images.shape, images.dtype, labels.tolist()) == (
        (5, 3, 4, 4),
        torch.float32,
        data.train.labels[:5].tolist(),
    )


def test_batches_are_a_function_of_the_generator_and_leave_the_global_states_alone() -> None:
    data = from_loaders(loader(Noisy()), loader(Noisy(20, 60)))
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    indices = torch.arange(6)
    one, again, other = (
        data.train.batch(indices, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(data.validation.batch(indices, None)[0], data.validation.batch(indices, None)[0])
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_an_image_without_augmentation_does_not_depend_on_its_batch_or_subset() -> None:
    data = from_loaders(loader(Noisy()), loader(Noisy(20, 60)))
    whole = data.train.batch(torch.arange(10), None)[0]
    assert torch.equal(whole[7], data.train.subset(torch.tensor([7])).batch(torch.arange(1), None)[0][0])


def test_fingerprints_repeat_although_transforms_are_random() -> None:
    first, second, other = (from_loaders(loader(Noisy(60, start))).train.fingerprint for start in (0, 0, 1))
    assert first == second != other


def test_nothing_is_prepared_in_another_thread() -> None:
    data = from_loaders(loader(Noisy()))
    torch.manual_seed(5)
    plain = torch.rand(3)
    torch.manual_seed(5)
    for _ in batches(
        data.train, torch.arange(20).split(4), lambda step: torch.Generator().manual_seed(step), 2
    ):
        pass
    assert torch.equal(torch.rand(3), plain)


def test_subsets_and_tensor_datasets_and_collate_functions_are_understood() -> None:
    tensors = TensorDataset(torch.rand(30, 1, 4, 4), torch.arange(30) % 5)
    data = from_loaders(loader(Subset(tensors, list(range(0, 30, 2)))))
    assert sorted(data.train.labels.tolist() + data.validation.labels.tolist()) == sorted(
        (torch.arange(0, 30, 2) % 5).tolist()
    )

    def doubled(items: list) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.stack([2 * image for image, _ in items]), torch.tensor([label for _, label in items])

    twice = from_loaders(loader(tensors, collate_fn=doubled), loader(tensors))
    assert torch.equal(
        twice.train.batch(torch.arange(3), None)[0], 2 * twice.validation.batch(torch.arange(3), None)[0]
    )


def negated(items: list) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([-image for image, _ in items]), torch.tensor([label for _, label in items])


def test_the_fingerprint_is_that_of_what_the_collate_function_makes() -> None:
    plain, again, other = (
        from_loaders(loader(Noisy(), **options)) for options in ({}, {}, {"collate_fn": negated})
    )
    for split in ("train", "validation"):
        assert getattr(plain, split).fingerprint == getattr(again, split).fingerprint
        assert getattr(plain, split).fingerprint != getattr(other, split).fingerprint


def jittered(items: list) -> tuple[torch.Tensor, torch.Tensor]:
    """As MixUp and the like: draws from all three global random states for a batch as a whole."""
    images, labels = negated(items)
    return images + random.random() + np.random.rand() + torch.rand(len(items), 1, 1, 1), labels


def test_a_collate_function_that_draws_repeats_and_leaves_the_global_states_alone() -> None:
    one, again = (from_loaders(loader(Noisy(), collate_fn=jittered)) for _ in range(2))
    assert one.train.fingerprint == again.train.fingerprint
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    indices = torch.arange(6)
    for seed in (None, 1, 2):
        generators = [None if seed is None else torch.Generator().manual_seed(seed) for _ in range(2)]
        first, second = (one.train.batch(indices, generator)[0] for generator in generators)
        assert torch.equal(first, second)
    drawn = {
        float(one.train.batch(indices, torch.Generator().manual_seed(seed))[0].sum()) for seed in range(5)
    }
    assert len(drawn) == 5
    # of the same images in a subset the same is made, and of others something else
    part = one.train.subset(torch.arange(10, 16))
    assert torch.equal(part.batch(indices, None)[0], one.train.batch(10 + indices, None)[0])
    noise = [one.train.batch(10 * k + indices, None)[0] for k in range(2)]
    assert not torch.equal(noise[0].diff(dim=0), noise[1].diff(dim=0))
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_a_collate_function_that_draws_nothing_changes_no_draw_of_the_items() -> None:
    plain, negative = (from_loaders(loader(Noisy(), **options)) for options in ({}, {"collate_fn": negated}))
    seeds = torch.randint(2**32, (4,), generator=torch.Generator().manual_seed(3)).tolist()
    items = [plain.train.item(index, seed)[0] for index, seed in enumerate(seeds)]
    for data, sign in ((plain, 1), (negative, -1)):
        found = data.train.batch(torch.arange(4), torch.Generator().manual_seed(3))[0]
        assert torch.equal(found, sign * torch.stack(items))


def test_images_that_decide_are_none_that_train_or_judge() -> None:
    with refused(DataError, match="other than the training images, got the same"):
        from_loaders(loader(Noisy()), loader(Noisy()))
    with refused(DataError, match="other than the test images, got the same"):
        from_loaders(loader(Noisy()), loader(Noisy(20, 60)), loader(Noisy(20, 60)))
    with refused(DataError, match="expected test images other than the training images, got the same"):
        from_loaders(loader(Noisy()), None, loader(Noisy()))
    with refused(DataError, match="expected validation images other than the training images, got the same"):
        from_loaders(loader(Noisy()), loader(Subset(Noisy(), range(len(Noisy())))))
    from_loaders(loader(Noisy()), loader(Noisy(20, 60)), loader(Noisy(20, 80)))


def test_stated_labels_that_items_contradict_are_not_believed() -> None:
    class Shifted(Noisy):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            image, label = super().__getitem__(index)
            return image, label + 1

    data = from_loaders(loader(Shifted()), loader(Noisy()))
    assert data.train.labels.tolist() == [number % 3 + 1 for number in range(60)]
    assert data.classes == 4
    assert "class 0 has no training image; are labels numbered from 0?" in data.notes


def test_a_column_of_labels_is_a_row_of_labels() -> None:
    images, numbers = torch.rand(30, 1, 4, 4), torch.arange(30) % 5
    row = from_loaders(loader(TensorDataset(images, numbers)))
    for column in (numbers[:, None], numbers[:, None].float()):
        data = from_loaders(loader(TensorDataset(images, column)))
        assert (data.classes, data.train.labels.tolist()) == (5, row.train.labels.tolist())
        labels = data.train.batch(torch.arange(7), None)[1]
        assert (labels.dtype, labels.tolist()) == (torch.int64, row.train.labels[:7].tolist())


@pytest.mark.parametrize("channels", [2, 4])
def test_images_may_have_any_number_of_channels(channels: int) -> None:
    data = from_loaders(loader(TensorDataset(torch.rand(30, channels, 4, 5), torch.arange(30) % 5)))
    assert data.preprocessing.input_shape == (channels, 4, 5)
    assert data.train.batch(torch.arange(3), None)[0].shape == (3, channels, 4, 5)


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.rand(3, 4, 4), 0


class Labelled(Dataset):
    def __init__(self, item: object) -> None:
        self.item = item

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> object:
        return self.item


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (loader(Stream()), "map-style dataset"),
        ([1, 2], "expected a torch DataLoader"),
        (loader(Labelled(torch.rand(3, 4, 4))), r"items \(image, class number\)"),
        (loader(Labelled((torch.rand(3, 4), 0))), "images as float tensors"),
        (loader(Labelled((torch.zeros(3, 4, 4, dtype=torch.uint8), 0))), "images as float tensors"),
        (loader(Labelled((torch.rand(3, 4, 4), -1))), r"labels in 0\.\.classes - 1 .*, got -1\.\.-1"),
        (loader(Labelled((torch.rand(3, 4, 4), 10**9))), r"at most 999,999\), got 1000000000\.\.1000000000"),
        (loader(Labelled((torch.rand(3, 4, 4), 0))), "at least two classes, got images of one"),
        (loader(Labelled((object(), 1))), "add ToTensor, one size for all images"),
        (loader(Labelled((torch.rand(3, 4, 4), 0.7))), r"class number\), got tuple: 0\.7 is no whole number"),
        (loader(Labelled((torch.rand(3, 4, 4), float("inf")))), r"items \(image, class number\)"),
        (loader(Labelled((torch.rand(3, 4, 4), "cat"))), "invalid literal for int"),
        (loader(Labelled((torch.rand(3, 4, 4), torch.zeros(2)))), r"items \(image, class number\)"),
        (loader(TensorDataset(torch.rand(9, 3, 4, 4), torch.rand(9))), "is no whole number"),
        (
            loader(Noisy(), collate_fn=lambda items: (torch.rand(len(items), 3, 4, 4), torch.zeros(2))),
            r"labels as class numbers \(32,\) for 32 images, got torch\.float32 \(2,\); correct the collate",
        ),
        (
            loader(Noisy(), collate_fn=lambda items: (torch.rand(len(items), 3, 4, 4), [0.5] * len(items))),
            r"got torch\.float32 \(32,\), not all of them whole",
        ),
        (
            loader(Noisy(), collate_fn=lambda items: (torch.rand(len(items), 3, 4, 4), ["a"] * len(items))),
            "as class numbers .*, got list",
        ),
        (loader(TensorDataset(torch.rand(0, 3, 4, 4), torch.zeros(0))), "empty TensorDataset"),
    ],
)
def test_what_is_no_set_of_labelled_images_is_refused_in_one_line(given, expected: str) -> None:
    with refused(DataError, match=expected):
        from_loaders(given)
