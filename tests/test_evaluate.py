"""Scores against counts by hand, Wilson's interval against SciPy's, batch-norm statistics against the definition."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.stats
import torch
from data_files import partly_unreadable
from refusals import refused
from torch import Tensor, nn

from clipq_ray import models
from clipq_ray.data import Split, open_data
from clipq_ray.errors import DataError, ModelError, RunError
from clipq_ray.evaluate import Evaluation, evaluate, evaluating, logits, reestimate_batch_norm
from clipq_ray.intent import Drop


class Images(Split):
    """Pixels as they are; augmentation adds noise from the given generator."""

    def __init__(self, pixels: Tensor, labels: list[int]) -> None:
        self.pixels, self.labels = pixels, np.array(labels, dtype=np.int64)
        self.fingerprint = "0" * 64
        self.augmented: list[bool] = []
        self.made: list[Tensor] = []

    def batch(self, indices: Tensor, augment: torch.Generator | None) -> tuple[Tensor, Tensor]:
        images = self.pixels[indices]
        if augment is not None:
            images = images + torch.randn(images.shape, generator=augment)
        self.augmented.append(augment is not None)
        self.made.append(images)
        return images, torch.from_numpy(self.labels[indices.numpy()])

    def subset(self, indices: Tensor) -> Images:
        return Images(self.pixels[indices], self.labels[indices.numpy()].tolist())

    @property
    def sizes(self) -> list[int]:
        return [len(images) for images in self.made]


class Given(nn.Module):
    """The images are the scores."""

    def forward(self, images: Tensor) -> Any:
        return images.flatten(1)


def scores(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows)[:, :, None, None]


def with_norms() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 5)
    )


def colour(n: int) -> Images:
    torch.manual_seed(1)
    return Images(torch.randn(n, 3, 8, 8) * 3 + 1, [index % 5 for index in range(n)])


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


# Scores


@pytest.mark.parametrize("batch_size", [1, 2, 3, 50])
def test_scores_are_those_counted_by_hand(batch_size: int) -> None:
    rows = [[9.0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6], [5, 4, 9, 3, 2, 1, 0]]
    labels = [0, 2, 1, 2]
    result = evaluate(Given(), Images(scores(rows), labels), batch_size=batch_size)
    assert result.n == 4
    assert result.top1 == 2 / 4  # images 0 and 3
    assert result.top5 == 3 / 4  # image 1's label is fifth, image 2's sixth
    assert result.predictions.tolist() == [0, 6, 6, 2]
    assert result.predictions.dtype == np.int64
    losses = [np.log(np.exp(row).sum()) - row[label] for row, label in zip(rows, labels, strict=True)]
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-12)


def test_with_fewer_than_five_classes_top5_counts_all_of_them() -> None:
    result = evaluate(Given(), Images(scores([[1.0, 0, 0], [1, 0, 0]]), [0, 2]), batch_size=2)
    assert (result.top1, result.top5) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("correct", "n"), [(81, 263), (0, 10), (10, 10), (1, 1), (8, 40), (50, 100), (9173, 10_000)]
)
def test_the_interval_is_wilsons(correct: int, n: int) -> None:
    found = Evaluation(n, correct / n, 1.0, 0.0, *np.zeros((2, n), np.int64)).interval()
    other = scipy.stats.binomtest(correct, n).proportion_ci(0.95, method="wilson")
    assert found == pytest.approx((other.low, other.high), abs=1e-12)


def test_the_interval_lies_in_0_to_1_and_holds_the_estimate() -> None:
    for n in (1, 7, 10_000):
        for correct in (0, n // 2, n):
            low, high = Evaluation(n, correct / n, 1.0, 0.0, *np.zeros((2, n), np.int64)).interval()
            assert 0.0 <= low <= correct / n <= high <= 1.0


@pytest.mark.parametrize("row", [[math.nan, 1.0, 0.0], [math.nan] * 3, [5.0, math.nan, 0.0]])
def test_scores_that_are_no_numbers_are_never_right(row: list[float]) -> None:
    for label in range(3):
        result = evaluate(Given(), Images(scores([row, [0.0, 0.0, 1.0]]), [label, 2]), batch_size=2)
        assert (result.top1, result.top5) == (0.5, 0.5)
        assert result.predictions.tolist() == [-1, 2]
        # as wrong image by image as in the counts
        assert Drop.between(result.labels, result.predictions, result.labels).points == 50.0


class Banded(nn.Module):
    """Right about the images 0 to 29 of `data_files.numbered`, for others class 0."""

    def forward(self, images: Tensor) -> Tensor:
        number = (255 * images[:, 0, 4, 4]).round().long()
        return nn.functional.one_hot(torch.where(number < 30, number % 3, 0), 3).float()


def test_the_labels_of_an_evaluation_are_those_that_were_counted(tmp_path: Path) -> None:
    uri = partly_unreadable(tmp_path)
    split = open_data(
        uri,
        input_shape=(3, 8, 8),
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        memory_limit_bytes=1000,
        bad_image_limit=2,
    ).test
    assert split is not None
    result = evaluate(Banded(), split, batch_size=7)
    assert result.labels[4:8].tolist() == [1, 1, 1, 1]  # image 7 stands for 5 and 6, whose own are 2 and 0
    assert split.labels[4:8].tolist() == [1, 2, 0, 1]
    assert result.predictions[4:8].tolist() == [1, 1, 1, 1]
    assert (result.predictions == result.labels).mean() == result.top1 == 40 / 60


class Output(NamedTuple):
    aux_logits: Tensor | None
    logits: Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: Output(None, x),
        lambda x: {"aux": -x, "logits": x},
        lambda x: {"out": x, "aux": -x},
        lambda x: (x, -x),
        lambda x: [x],
    ],
    ids=["tensor", "namedtuple", "dict with logits", "dict", "tuple", "list"],
)
def test_class_scores_are_found_in_what_networks_return(wrap: Callable[[Tensor], object]) -> None:
    x = torch.randn(2, 3)
    assert logits(wrap(x)) is x


@pytest.mark.parametrize("output", [torch.zeros(2, 3, 4, 4), torch.zeros(3), None, (), {}, "text"])
def test_something_else_than_class_scores_is_refused(output: object) -> None:
    with refused(ModelError, match="expected class scores"):
        logits(output)


@pytest.mark.parametrize(("label", "batch_size"), [(3, 2), (-1, 2), (7, 1)])
def test_a_label_outside_the_outputs_is_refused_and_modes_come_back(label: int, batch_size: int) -> None:
    model = nn.Sequential(Given(), nn.Dropout()).train()
    model[0].eval()
    with refused(DataError, match=rf"3 outputs, got label {label};"):
        evaluate(model, Images(scores([[1.0, 0, 0]] * 4), [0, 1, 2, label]), batch_size=batch_size)
    assert modes(model) == [True, False, True]


def test_no_images_are_refused() -> None:
    with refused(DataError, match="at least one image"):
        evaluate(Given(), Images(torch.zeros(0, 3, 1, 1), []), batch_size=2)


# What evaluation does with a network


def test_evaluation_neither_augments_nor_changes_the_network() -> None:
    model, split = with_norms().train(), colour(10)
    model[1].eval()
    before, weights = modes(model), models.weights_sha256(model.state_dict())
    first = evaluate(model, split, batch_size=4)
    second = evaluate(model, split, batch_size=4)
    assert (first.loss, first.predictions.tolist()) == (second.loss, second.predictions.tolist())
    assert split.augmented == [False] * 6
    assert models.weights_sha256(model.state_dict()) == weights
    assert modes(model) == before


def test_modes_come_back_one_by_one_also_after_an_error() -> None:
    model = with_norms().train()
    model[1].eval()

    def fail() -> None:
        with evaluating(model):
            assert not any(modes(model))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert modes(model) == [True, True, False, True, True, True, True]


def test_progress_counts_up_to_all_images() -> None:
    seen: list[tuple[int, int]] = []
    evaluate(with_norms(), colour(10), batch_size=4, progress=lambda done, n: seen.append((done, n)))
    assert seen == [(4, 10), (8, 10), (10, 10)]


class Small(Given):
    """A device with room for `room` images."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.seen = room, list[int]()

    def forward(self, images: Tensor) -> Any:
        if len(images) > self.room:
            raise torch.OutOfMemoryError("out of memory")
        self.seen.append(len(images))
        return super().forward(images)


def test_batches_that_do_not_fit_are_halved_once_for_all_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    split = Images(torch.randn(40, 6, 1, 1), [index % 6 for index in range(40)])
    model = Small(5)
    with caplog.at_level(logging.WARNING, "clipq_ray"):
        result = evaluate(model, split, batch_size=16)
    assert model.seen == [4] * 10
    assert [record.message for record in caplog.records] == [
        "evaluation: 16 images do not fit the device's memory; going on with less"
    ]
    whole = evaluate(Given(), split, batch_size=16)
    assert (result.top1, result.top5) == (whole.top1, whole.top5)
    assert result.loss == pytest.approx(whole.loss, rel=1e-12)
    assert result.predictions.tolist() == whole.predictions.tolist()


def test_one_image_that_does_not_fit_ends_the_run() -> None:
    with refused(RunError, match="one image does not fit"):
        evaluate(Small(0), colour(3), batch_size=2)


def test_the_thread_that_prepares_batches_ends_also_after_an_error() -> None:
    with pytest.raises(DataError):
        evaluate(Given(), Images(scores([[1.0, 0]] * 50), [5] * 50), batch_size=1)
    assert not any(thread.name == "clipq-batches" for thread in threading.enumerate())


class Viewing(nn.Module):
    """`view` on an activation works in the plain layout only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.seen: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.is_contiguous())
        x = self.conv(images)
        return x.view(len(x), -1)[:, :5]


def test_a_network_that_needs_the_plain_layout_gets_it_from_then_on() -> None:
    model, split = Viewing(), colour(10)
    result = evaluate(model, split, batch_size=4)
    with torch.no_grad():
        expected = model(split.pixels).argmax(1)
    assert result.predictions.tolist() == expected.tolist()
    assert model.seen == [False, True, True, True, True]


def test_the_layout_changes_no_prediction() -> None:
    model, split = with_norms().eval(), colour(40)
    with torch.no_grad():
        plain = model(split.pixels)
    result = evaluate(model, split, batch_size=7)
    assert result.predictions.tolist() == plain.argmax(1).tolist()
    labels = torch.from_numpy(split.labels)
    assert result.loss == pytest.approx(float(nn.functional.cross_entropy(plain, labels)), rel=1e-5)


# Batch-norm statistics anew


@pytest.mark.parametrize(
    ("images", "batch_size", "sizes"), [(10, 4, [4, 3, 3]), (20, 6, [5, 5, 5, 5]), (20, 20, [20])]
)
def test_new_statistics_are_the_mean_over_batches_of_augmented_images(
    images: int, batch_size: int, sizes: list[int]
) -> None:
    split = colour(20)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten())
    model[0].running_mean.fill_(77.0)
    model[0].num_batches_tracked.fill_(5)
    reestimate_batch_norm(model, split, images=images, batch_size=batch_size, seed=0)
    assert split.augmented == [True] * len(sizes)
    assert split.sizes == sizes  # nearly equal, since each counts alike
    means = torch.stack([made.mean((0, 2, 3)) for made in split.made])
    variances = torch.stack([made.var((0, 2, 3)) for made in split.made])
    torch.testing.assert_close(model[0].running_mean, means.mean(0))
    torch.testing.assert_close(model[0].running_var, variances.mean(0))


def test_re_estimation_is_a_function_of_the_seed_and_leaves_all_but_the_statistics() -> None:
    def run(seed: int) -> tuple[str, nn.Module]:
        model = with_norms().train()
        model[1].momentum = 0.3
        model[3].eval()
        reestimate_batch_norm(model, colour(24), images=16, batch_size=8, seed=seed)
        return models.weights_sha256(model.state_dict()), model

    (one, model), (two, _), (three, _) = run(0), run(0), run(1)
    assert one == two != three
    assert model[1].momentum == 0.3
    assert modes(model) == [True, True, True, True, False, True, True]
    fresh = with_norms().state_dict()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, fresh[name])]
    assert changed == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]


def test_statistics_of_a_network_that_draws_do_not_depend_on_what_was_drawn_before() -> None:
    def run(before: int) -> str:
        model = nn.Sequential(Drawing(), nn.BatchNorm1d(192)).train()
        torch.manual_seed(before)
        reestimate_batch_norm(model, colour(24), images=16, batch_size=8, seed=0)
        return models.weights_sha256(model.state_dict())

    assert run(1) == run(2)


def test_only_batch_norms_are_in_training_mode_meanwhile() -> None:
    seen: set[tuple[bool, ...]] = set()
    model = with_norms().train()
    model.register_forward_hook(lambda module, args, output: seen.add(tuple(modes(module))))
    reestimate_batch_norm(model, colour(8), images=8, batch_size=4, seed=0)
    assert seen == {(False, False, True, False, False, False, False)}


@pytest.mark.parametrize(
    ("images", "batch_size", "sizes"), [(5, 1, [3, 2]), (3, 2, [3]), (100, 4, [3, 3]), (9, 4, [3, 3])]
)
def test_no_batch_has_a_single_image_and_none_is_left_out(
    images: int, batch_size: int, sizes: list[int]
) -> None:
    model, split = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192)), colour(6)
    reestimate_batch_norm(model, split, images=images, batch_size=batch_size, seed=0)
    assert split.sizes == sizes


def test_too_few_images_are_refused_and_leave_the_statistics_alone() -> None:
    model = with_norms()
    before = models.weights_sha256(model.state_dict())
    with refused(DataError, match="at least 2 images"):
        reestimate_batch_norm(model, colour(4), images=1, batch_size=4, seed=0)
    assert models.weights_sha256(model.state_dict()) == before


def test_a_network_without_batch_norm_is_not_even_evaluated() -> None:
    split = colour(4)
    model = models.build(models.Architecture("lenet5"))
    assert not reestimate_batch_norm(model, split, images=4, batch_size=2, seed=0)
    assert split.sizes == []


def test_a_batch_norm_that_is_never_reached_keeps_its_statistics() -> None:
    model = with_norms()
    model.branch = nn.BatchNorm2d(4)
    model.branch.running_mean.fill_(3.0)
    model.forward = lambda images: model[5](model[4](model[2](model[1](model[0](images)))))  # type: ignore[method-assign]
    reestimate_batch_norm(model, colour(8), images=8, batch_size=4, seed=0)
    assert torch.equal(model.branch.running_mean, torch.full((4,), 3.0))
    assert model[1].num_batches_tracked == 2


@pytest.mark.parametrize("training", [True, False])
def test_statistics_momenta_and_modes_come_back_when_it_fails_on_the_way(training: bool) -> None:
    model = with_norms().train(training)
    before, weights = modes(model), models.weights_sha256(model.state_dict())

    def fail(module: nn.Module, args: Any, output: Any) -> None:
        if model[1].num_batches_tracked == 2:
            raise KeyError

    model.register_forward_hook(fail)
    with pytest.raises(KeyError):
        reestimate_batch_norm(model, colour(12), images=12, batch_size=4, seed=0)
    assert models.weights_sha256(model.state_dict()) == weights
    assert model[1].momentum == 0.1
    assert modes(model) == before


class Roomy(nn.BatchNorm2d):
    """A batch norm of a device with room for `room` images."""

    def __init__(self, room: int) -> None:
        super().__init__(3)
        self.room = room

    def forward(self, input: Tensor) -> Tensor:
        if len(input) > self.room:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(input)


@pytest.mark.parametrize(("room", "batch_size", "sizes"), [(5, 16, [5] * 4), (2, 20, [2] * 10)])
def test_a_re_estimation_that_does_not_fit_is_done_again_with_less_and_says_so_once(
    room: int, batch_size: int, sizes: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    model, split = nn.Sequential(Roomy(room), nn.Flatten()), colour(20)
    with caplog.at_level(logging.WARNING, "clipq_ray"):
        assert reestimate_batch_norm(model, split, images=20, batch_size=batch_size, seed=0)
    assert split.sizes[-len(sizes) :] == sizes
    assert len(caplog.records) == 1
    small, alone = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten()), colour(20)
    reestimate_batch_norm(small, alone, images=20, batch_size=sizes[0], seed=0)
    # nothing is left of the batches that came before the one that did not fit
    assert models.weights_sha256(model.state_dict()) == models.weights_sha256(small.state_dict())
    assert model[0].momentum == 0.1


@pytest.mark.parametrize(("images", "fewest"), [(8, 2), (3, 3)])
def test_where_the_fewest_images_for_batch_norm_do_not_fit_the_statistics_stay(
    images: int, fewest: int
) -> None:
    model = nn.Sequential(Roomy(1), nn.Flatten())
    before = models.weights_sha256(model.state_dict())
    with refused(RunError, match=f"^{fewest} images, the fewest for batch norm"):
        reestimate_batch_norm(model, colour(8), images=images, batch_size=8, seed=0)
    assert models.weights_sha256(model.state_dict()) == before


class Drawing(nn.Module):
    """Dropout in use too, as of Monte Carlo dropout."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.dropout(images.flatten(1), 0.5, training=True)


def test_a_network_that_draws_random_numbers_when_it_is_used_scores_the_same_every_time() -> None:
    split = Images(torch.randn(40, 5, 1, 1, generator=torch.Generator().manual_seed(0)), [0, 1, 2, 3] * 10)
    state = torch.random.get_rng_state()
    found = evaluate(Drawing(), split, batch_size=16, device=torch.device("cpu"))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(5)
    again = evaluate(Drawing(), split, batch_size=16, device=torch.device("cpu"))
    assert found.loss == again.loss
    assert torch.equal(torch.as_tensor(found.predictions), torch.as_tensor(again.predictions))
