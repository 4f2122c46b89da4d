"""Scores against closed forms; what a network is left like."""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clipq_ray.data import Preprocessing, Split
from clipq_ray.data.tensors import TensorSplit
from clipq_ray.errors import DataError, ModelError, RunError
from clipq_ray.evaluate import Evaluation, evaluate, logits, reestimate_batch_norm


def split(n: int, labels: list[int] | None = None, side: int = 2) -> Split:
    """Image i is filled with i; n <= 256."""
    images = np.arange(n, dtype=np.uint8)[:, None, None, None].repeat(side, 2).repeat(side, 3)
    chosen = np.array(labels if labels is not None else [0] * n, dtype=np.int64)
    return TensorSplit(images, chosen, Preprocessing((1, side, side), None, (0.0,), (1 / 255,)))


class Table(nn.Module):
    """Scores of image i are row i of a table."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows
        self.seen: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(len(images))
        return self.rows[images[:, 0, 0, 0].round().long()]


def test_top1_top5_loss_and_predictions_are_those_of_the_closed_form() -> None:
    # six classes; the label's rank per image is 1, 2, 5, 6
    rows = torch.tensor([[6.0, 5, 4, 3, 2, 1]]).repeat(4, 1)
    result = evaluate(Table(rows), split(4, [0, 1, 4, 5]), batch_size=3)
    total = np.log(np.exp([6.0, 5, 4, 3, 2, 1]).sum())
    assert (result.n, result.top1, result.top5) == (4, 0.25, 0.75)
    assert result.loss == pytest.approx(np.mean([total - score for score in (6, 5, 2, 1)]), rel=1e-12)
    assert result.predictions.tolist() == [0, 0, 0, 0]
    assert result.predictions.dtype == np.int64


def test_with_fewer_than_five_classes_every_label_is_in_the_top_five() -> None:
    result = evaluate(Table(torch.eye(3)), split(3, [1, 1, 1]), batch_size=2)
    assert (result.top1, result.top5) == (pytest.approx(1 / 3), 1.0)


def test_the_result_does_not_depend_on_the_batch_size() -> None:
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    results = [evaluate(Table(rows), split(50, [i % 8 for i in range(50)]), batch_size=b) for b in (1, 7, 64)]
    assert {(r.top1, r.top5, round(r.loss, 12), r.predictions.tobytes()) for r in results} == {
        (results[0].top1, results[0].top5, round(results[0].loss, 12), results[0].predictions.tobytes())
    }


@pytest.mark.parametrize(
    ("n", "top1", "low", "high"),
    [
        (10, 0.0, 0.0, 0.27753),
        (10, 1.0, 0.72247, 1.0),
        (100, 0.5, 0.40383, 0.59617),
        (40, 0.2, 0.10500, 0.34757),
    ],
)
def test_the_interval_is_wilsons(n: int, top1: float, low: float, high: float) -> None:
    result = Evaluation(n, top1, 1.0, 0.0, np.zeros(n, np.int64))
    assert result.interval() == (pytest.approx(low, abs=2e-5), pytest.approx(high, abs=2e-5))


def test_a_label_beyond_the_outputs_is_a_data_error_of_one_line() -> None:
    with pytest.raises(DataError, match="3 outputs, got label 3") as caught:
        evaluate(Table(torch.eye(3)), split(3, [0, 1, 3]), batch_size=1)
    assert "\n" not in str(caught.value)


def test_progress_is_told_after_every_batch() -> None:
    told: list[tuple[int, int]] = []
    evaluate(Table(torch.eye(5)), split(5), batch_size=2, progress=lambda done, n: told.append((done, n)))
    assert told == [(2, 5), (4, 5), (5, 5)]


def norms() -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4, 3))


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_evaluation_is_in_eval_mode_and_every_modules_mode_comes_back() -> None:
    model = norms().train()
    model[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = evaluate(model, split(8), batch_size=4)
    assert modes(model) == [True, False, True, True, True]
    assert evaluate(model, split(8), batch_size=4).loss == first.loss
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_modes_come_back_after_an_error() -> None:
    model = norms().train()
    with pytest.raises(DataError):
        evaluate(model, split(3, [9, 9, 9]), batch_size=1)
    assert all(modes(model))


class Narrow(Table):
    """Runs out of memory for more than `most` images."""

    def __init__(self, rows: Tensor, most: int) -> None:
        super().__init__(rows)
        self.most = most

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(images)


def test_batches_that_do_not_fit_are_halved_with_the_same_result(caplog: pytest.LogCaptureFixture) -> None:
    rows = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    labels = [i % 6 for i in range(100)]
    narrow = Narrow(rows, 7)
    with caplog.at_level(logging.WARNING):
        result = evaluate(narrow, split(100, labels), batch_size=40)
    whole = evaluate(Table(rows), split(100, labels), batch_size=40)
    assert (result.top1, result.top5) == (whole.top1, whole.top5)
    assert result.loss == pytest.approx(whole.loss, rel=1e-12)
    assert result.predictions.tolist() == whole.predictions.tolist()
    assert sum(narrow.seen) == 100
    assert len(caplog.records) == 1  # 40 -> 20 -> 10 -> 5, said once


def test_an_image_that_does_not_fit_alone_fails_the_run() -> None:
    with pytest.raises(RunError, match="one image does not fit"):
        evaluate(Narrow(torch.eye(4), 0), split(4), batch_size=4)


class Output(NamedTuple):
    logits: Tensor
    aux: Tensor | None


SCORES = torch.ones(2, 3)


@pytest.mark.parametrize(
    "output",
    [
        SCORES,
        Output(SCORES, None),
        (SCORES, torch.zeros(2, 3)),
        [SCORES],
        {"aux": torch.zeros(2, 3), "logits": SCORES},
        {"out": SCORES},
    ],
)
def test_scores_are_found_in_what_networks_return(output: object) -> None:
    assert logits(output) is SCORES


@pytest.mark.parametrize("output", [None, (), torch.zeros(2, 3, 4, 4), "scores"])
def test_a_network_without_class_scores_is_refused(output: object) -> None:
    with pytest.raises(ModelError, match="expected class scores") as caught:
        logits(output)
    assert "\n" not in str(caught.value)


def test_reestimated_statistics_are_the_mean_over_the_batches() -> None:
    images = split(24)
    model = norms()
    reestimate_batch_norm(model, images, images=24, batch_size=24, seed=1)
    norm = model[0]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    # side 2 has no padding and gray images no flip: the images are as they are; values 0..23, four pixels each
    values = np.arange(24.0).repeat(4)
    assert float(norm.running_mean) == pytest.approx(values.mean(), rel=1e-5)
    assert float(norm.running_var) == pytest.approx(values.var(ddof=1), rel=1e-5)

    recorded: list[Tensor] = []
    hook = norm.register_forward_pre_hook(lambda module, inputs: recorded.append(inputs[0].clone()))
    reestimate_batch_norm(model, images, images=20, batch_size=6, seed=1)
    hook.remove()
    assert [len(batch) for batch in recorded] == [5, 5, 5, 5]
    means = torch.stack([batch.mean() for batch in recorded])
    variances = torch.stack([batch.var() for batch in recorded])
    assert float(norm.running_mean) == pytest.approx(float(means.mean()), rel=1e-5)
    assert float(norm.running_var) == pytest.approx(float(variances.mean()), rel=1e-5)


def test_reestimation_restores_momenta_and_modes_and_touches_nothing_else() -> None:
    model = norms().train()
    model[1].eval()
    model[0].momentum = 0.3
    weight = model[3].weight.detach().clone()
    reestimate_batch_norm(model, split(16), images=16, batch_size=4, seed=0)
    assert model[0].momentum == 0.3
    assert modes(model) == [True, True, False, True, True]
    assert torch.equal(model[3].weight, weight)


def test_reestimation_restores_momenta_and_modes_after_an_error() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Linear(77, 2)).eval()
    with pytest.raises(RuntimeError):
        reestimate_batch_norm(model, split(16), images=16, batch_size=4, seed=0)
    assert model[0].momentum == 0.1
    assert not any(modes(model))


def test_reestimation_is_a_function_of_the_seed() -> None:
    def estimated(seed: int) -> float:
        model = norms()
        reestimate_batch_norm(model, split(64), images=10, batch_size=5, seed=seed)
        return float(model[0].running_mean)

    assert estimated(1) == estimated(1) != estimated(2)


def test_without_batch_norm_nothing_happens() -> None:
    model = Table(torch.eye(4))
    reestimate_batch_norm(model, split(4), images=4, batch_size=2, seed=0)
    assert model.seen == []


def test_too_few_images_leave_the_statistics_alone() -> None:
    model = norms()
    model[0].running_mean.fill_(5.0)
    with pytest.raises(DataError, match="at least 2 images"):
        reestimate_batch_norm(model, split(4), images=1, batch_size=4, seed=0)
    assert float(model[0].running_mean) == 5.0
