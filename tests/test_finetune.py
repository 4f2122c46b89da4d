"""The training loop: what was killed goes on as if it had not been; what does not fit is shortened, split or refused, and said."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refused
from torch import Tensor, nn

from clipq_ray import finetune, seeds
from clipq_ray.checkpoints import Checkpoints
from clipq_ray.data import Preprocessing
from clipq_ray.data.tensors import TensorSplit
from clipq_ray.errors import DataError, FormatError, RunError
from clipq_ray.finetune import Trainer
from clipq_ray.operator import bake, make_plan
from clipq_ray.optimizers import Schedule
from clipq_ray.places import Costs
from clipq_ray.plan import Plan, Theta
from clipq_ray.ranks import Rank
from clipq_ray.rates import Held, Ramp
from clipq_ray.storage import Store

PREPROCESSING = Preprocessing((1, 8, 8), None, (0.5,), (0.25,))
PLAN = {"conv.weight": Theta(0.4, 3), "head.weight": Theta(0.5, 2)}


class Killed(Exception):
    """Stands for the end of a process."""


class Network(nn.Module):
    """A convolution, batch norm (state besides weights) and dropout (randomness in the step)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(6 * 16, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(images)))
        out: Tensor = self.head(self.drop(nn.functional.max_pool2d(x, 2).flatten(1)))
        return out


class Small(Network):
    """Runs out of memory above `limit` images at a time, without batch norm, whose statistics micro-batches would change."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.norm, self.drop = nn.Identity(), nn.Identity()
        self.limit = limit

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(images)


class Pooled(Small):
    """With batch norm on maps of one pixel, which takes no single image."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.pooled = nn.BatchNorm1d(4)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.pooled(super().forward(images))
        return out


class Shared(nn.Module):
    """As `DistributedDataParallel` wraps a network, without other ranks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.model(images)
        return out


class TwoHeads(Network):
    """A second head that no loss here reads, as an auxiliary one."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(6 * 16, 4)


def images(n: int, seed: int = 0) -> TensorSplit:
    """Four classes: which quarter of the picture is bright."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, n)
    pixels = random.integers(0, 100, (n, 1, 8, 8), dtype=np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[0, 4 * (label // 2) : 4 * (label // 2) + 4, 4 * (label % 2) : 4 * (label % 2) + 4] += 100
    return TensorSplit(pixels, labels.astype(np.int64), PREPROCESSING)


def network(kind: type[nn.Module] = Network, *arguments: Any) -> nn.Module:
    torch.manual_seed(7)
    return kind(*arguments)


def schedule(**changes: Any) -> Schedule:
    base: dict[str, Any] = {
        "epochs": 4, "batch_size": 20, "learning_rate": 0.05, "warmup_epochs": 0.5, "momentum": 0.9, "weight_decay": 1e-3,
        "label_smoothing": 0.1, "cutout_pixels": 2,
    }  # fmt: skip
    return Schedule(**{**base, **changes})


def trainer(
    folder: Path, model: nn.Module | None = None, plan: Plan | None = None, **changes: Any
) -> Trainer:
    model = model or network()
    given: dict[str, Any] = {
        "plan": plan, "schedule": schedule(), "seed": 3, "stage": "finetune", "rank": Rank(0, 1, torch.device("cpu")),
        "checkpoints": Checkpoints(Store(folder)), "evaluation_batch_size": 50,
    }  # fmt: skip
    return Trainer(model, images(110), images(40, 1), **{**given, **changes})


def run(made: Trainer, *, killed_after: int | None = None) -> list[dict[str, Any]]:
    """Train; `killed_after` epochs the process ends. The reported rows."""
    rows: list[dict[str, Any]] = []

    def report(row: dict[str, Any]) -> None:
        rows.append(row)
        if len(rows) == killed_after:
            raise Killed

    made.run(lambda done, total, words: None, report)
    return rows


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def kept(weights: Mapping[str, Tensor], plan: Plan) -> int:
    """Weights that are not zero, as if each were a byte."""
    model = network()
    model.load_state_dict(weights)
    return sum(int(one.values.count_nonzero()) for one in bake(model, plan).values())


@pytest.mark.parametrize(
    "how", ["with the operator", "with rising rates", "held at a size", "by rate and distortion", "plainly"]
)
@pytest.mark.parametrize("epochs_before", [1, 3])
def test_a_training_that_is_killed_goes_on_to_the_same_bits(
    how: str, epochs_before: int, tmp_path: Path
) -> None:
    plan = None if how == "plainly" else make_plan(network(), PLAN)
    ramp = Ramp((0.1, 0.2), 0.8) if how == "with rising rates" else None
    given: dict[str, Any] = {
        "plan": plan,
        "ramp": ramp,
        "held": Held(180, kept) if how == "held at a size" else None,
        "costs": Costs(0.5) if how == "by rate and distortion" else None,
    }
    whole = trainer(tmp_path / "whole", **given)
    run(whole)
    with pytest.raises(Killed):
        run(trainer(tmp_path / "cut", **given), killed_after=epochs_before)
    torch.manual_seed(999)  # the new process has another history
    resumed = trainer(tmp_path / "cut", **given)
    rows = run(resumed)
    assert [row["epoch"] for row in rows] == list(range(epochs_before + 1, 5))
    assert same(resumed.model, whole.model)
    assert [(row.loss, row.validation_top1_percent) for row in resumed.curve] == [
        (row.loss, row.validation_top1_percent) for row in whole.curve
    ]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    run(whole)
    with pytest.raises(Killed):
        run(trainer(tmp_path / "cut"), killed_after=3)
    store = Store(tmp_path / "cut")
    last = store.names("epoch-")[-1]
    store.write(last, store.read(last)[:1000])
    resumed = trainer(tmp_path / "cut")
    assert [row["epoch"] for row in run(resumed)] == [3, 4]
    assert same(resumed.model, whole.model)
    for name in store.names("epoch-"):
        store.write(name, store.read(name)[:1000])
    with refused(FormatError, match="got damaged ones .*; remove them, and the training begins anew"):
        run(trainer(tmp_path / "cut"))


def test_a_training_that_is_killed_within_an_epoch_repeats_that_epoch_only(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    run(whole)
    cut = trainer(tmp_path / "cut")

    def die(done: int, total: int, words: str) -> None:
        if done == 8:  # the third step of the second epoch
            raise Killed

    with pytest.raises(Killed):
        cut.run(die, lambda row: None)
    resumed = trainer(tmp_path / "cut")
    assert len(resumed.curve) == 1
    run(resumed)
    assert same(resumed.model, whole.model)


def test_a_finished_training_does_nothing_again(tmp_path: Path) -> None:
    first = trainer(tmp_path)
    run(first)
    again = trainer(tmp_path)
    assert run(again) == []
    assert same(again.model, first.model)


def test_two_checkpoints_are_kept(tmp_path: Path) -> None:
    run(trainer(tmp_path))
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "epoch-00003.safetensors",
        "epoch-00004.safetensors",
    ]


def test_the_parameters_hold_full_precision_after_training(tmp_path: Path) -> None:
    model = network()
    run(trainer(tmp_path, model, make_plan(model, PLAN)))
    assert len(model.get_parameter("conv.weight").unique()) > 8


def test_training_learns_with_and_without_the_operator(tmp_path: Path) -> None:
    for folder, plan in (("plain", None), ("planned", make_plan(network(), PLAN))):
        made = trainer(tmp_path / folder, plan=plan, schedule=schedule(epochs=6))
        rows = run(made)
        assert rows[-1]["validation_top1_percent"] > 80
        assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_seed_and_the_stage_decide_the_training(tmp_path: Path) -> None:
    models = []
    for index, changes in enumerate(({}, {}, {"seed": 4}, {"stage": "control"})):
        made = trainer(tmp_path / str(index), schedule=schedule(epochs=1), **changes)
        run(made)
        models.append(made.model)
    assert same(models[0], models[1])
    assert not same(models[0], models[2])
    assert not same(models[0], models[3])


def test_each_training_of_its_kind_shows_the_images_otherwise_and_the_first_as_ever(tmp_path: Path) -> None:
    made = [trainer(tmp_path / str(at), number=number) for at, number in enumerate((1, 2, 3))]
    first, second, third = (torch.cat(one._index_batches(1)) for one in made)
    plain = images(110).index_batches(seeds.generator(3, "finetune", "order", 1), 20)
    assert torch.equal(first, torch.cat(plain))
    assert not any(torch.equal(*pair) for pair in ((first, second), (first, third), (second, third)))
    # the same rows in the same places are augmented otherwise too
    for one in made:
        one._index_batches = lambda epoch: [torch.arange(20)]  # type: ignore[method-assign]
    shown = [next(iter(one._batches(1)))[0] for one in made]
    assert not torch.equal(shown[0], shown[1])


def test_each_training_of_its_kind_masks_and_drops_otherwise(tmp_path: Path) -> None:
    class Seeing(Network):
        def forward(self, images: Tensor) -> Tensor:
            if self.training:
                seen.append((images, torch.rand(4)))
            return super().forward(images)

    def same_images(split: TensorSplit, rows: Sequence[Tensor], *_: Any) -> Iterator[tuple[Tensor, Tensor]]:
        return (split.batch(torch.arange(len(one)), None) for one in rows)

    shown: list[tuple[Tensor, Tensor]] = []
    for at, number in enumerate((1, 1, 2)):
        seen: list[tuple[Tensor, Tensor]] = []
        given = {"schedule": schedule(epochs=1), "number": number, "feed": same_images}
        run(trainer(tmp_path / str(at), network(Seeing), **given))
        shown.append(seen[-1])
    first, again, other = shown
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


def test_the_rate_warms_up_then_falls_to_zero(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    rates: list[float] = []

    def keep(done: int, total: int, words: str) -> None:
        rates.append(made.optimizer.param_groups[0]["lr"])

    made.run(keep, lambda row: None)
    assert rates.index(max(rates)) == 3  # half an epoch of five steps
    assert max(rates) < 0.05
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] < 0.002


def test_progress_counts_every_step_of_every_epoch(tmp_path: Path) -> None:
    made, seen = trainer(tmp_path, schedule=schedule(epochs=2)), []
    made.run(lambda *shown: seen.append(shown), lambda row: None)
    assert [done for done, _, _ in seen] == list(range(1, 11))  # 110 images are five batches of 20
    assert {total for _, total, _ in seen} == {10}
    assert seen[-1][2] == "epoch 2 of 2"


def test_a_masked_square_is_another_one_in_every_step_and_none_where_it_is_not_asked_for(
    tmp_path: Path,
) -> None:
    class Seeing(Network):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if self.training:
                seen.append((images == 0).sum().item())
            return super().forward(images)

    masked = []
    for pixels in (0, 5):
        seen: list[float] = []
        run(
            trainer(
                tmp_path / str(pixels), network(Seeing), schedule=schedule(epochs=1, cutout_pixels=pixels)
            )
        )
        masked.append(seen[2:])  # the first ones try the layout and what fits the memory
    plain, squares = masked
    assert len(plain) == len(squares) == 5
    assert len(set(squares)) > 1
    for before, after in zip(plain, squares, strict=True):
        assert 20 * 3 * 3 <= after - before <= 20 * 5 * 5  # a corner has nine of its pixels at least


def test_a_deadline_shortens_the_schedule_and_says_so(tmp_path: Path) -> None:
    made = trainer(tmp_path, deadline=time.monotonic() - 1.0)
    rows = run(made)
    assert len(rows) == 1  # never less than an epoch
    assert made.notes == ["finetune: shortened from 4 to 1 epochs by --deadline-hours"]
    assert trainer(tmp_path).notes == made.notes  # the checkpoint knows


def test_a_deadline_that_is_far_changes_nothing(tmp_path: Path) -> None:
    free, bound = trainer(tmp_path / "free"), trainer(tmp_path / "bound", deadline=time.monotonic() + 3600.0)
    run(free)
    run(bound)
    assert bound.notes == []
    assert same(free.model, bound.model)


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def test_a_shortened_schedule_still_ends_at_a_small_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(finetune, "time", clock)
    made = trainer(tmp_path, schedule=schedule(epochs=50), deadline=clock.now + 35.0)
    rates: list[float] = []

    def two_seconds(done: int, total: int, words: str) -> None:
        clock.now += 2.0
        rates.append(made.optimizer.param_groups[0]["lr"])

    made.run(two_seconds, lambda row: None)
    assert len(made.curve) == 3  # epochs of ten seconds
    assert made.notes == ["finetune: shortened from 50 to 3 epochs by --deadline-hours"]
    assert rates[-1] < 0.15 * max(rates)


def test_out_of_memory_splits_the_batch_without_changing_the_gradient_and_says_so(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", network(Small, 20))
    split = trainer(tmp_path / "split", network(Small, 7))
    assert whole.notes == []
    assert split.micro_batch == 5
    (note,) = split.notes
    assert "micro-batches of 5" in note
    run(whole)
    run(split)
    for one, other in zip(whole.model.parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_micro_batches_are_as_even_as_can_be(tmp_path: Path) -> None:
    class Seeing(Small):
        def forward(self, images: Tensor) -> Tensor:
            if self.training:
                seen.append(len(images))
            return super().forward(images)

    seen: list[int] = []
    made = trainer(tmp_path, network(Seeing, 4), schedule=schedule(batch_size=13, epochs=1))
    assert made.micro_batch == 4
    seen.clear()
    run(made)
    assert seen == [4, 3, 3, 3] * 8  # none of a single image, which batch norm does not take


def test_no_micro_batch_is_a_single_image(tmp_path: Path) -> None:
    class Seeing(Pooled):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(len(images))
            return super().forward(images)

    seen: list[int] = []
    made = trainer(tmp_path / "fits", network(Seeing, 3), schedule=schedule(batch_size=7, epochs=1))
    assert made.micro_batch == 3
    seen.clear()
    made._step(*made.train_split.batch(torch.arange(7), None))
    assert seen == [3, 2, 2]
    with refused(RunError, match=r"^3 images at a time do not fit .* use a larger device"):
        trainer(tmp_path / "does not", network(Pooled, 2), schedule=schedule(batch_size=7))


@pytest.mark.parametrize("micro", [20, 2], ids=["whole", "in micro-batches"])
def test_ranks_with_an_image_more_or_less_train_on_the_mean_of_the_batch(micro: int, tmp_path: Path) -> None:
    made = trainer(tmp_path, network(Small, 20), schedule=schedule(batch_size=10))
    given, labels = made.train_split.batch(torch.arange(10), None)

    def found(part: slice) -> list[Tensor]:
        made.model.zero_grad()
        loss = made._backward(given[part], labels[part], micro)
        return [loss, *(one.grad.clone() for one in made.model.parameters() if one.grad is not None)]

    whole = found(slice(None))
    made.wrapped = Shared(made.model)  # type: ignore[assignment]
    made.rank = Rank(0, 4, torch.device("cpu"))
    shares = [found(slice(rank, None, 4)) for rank in range(4)]  # of 3, 3, 2 and 2 images
    for one, parts in zip(whole, zip(*shares, strict=True), strict=True):
        torch.testing.assert_close(torch.stack(parts).mean(0), one, rtol=1e-5, atol=1e-7)


def test_ranks_with_as_many_images_each_train_on_their_own_mean_to_the_bit(tmp_path: Path) -> None:
    made = trainer(tmp_path, network(Small, 20), schedule=schedule(batch_size=21))
    given, labels = made.train_split.batch(torch.arange(7), None)
    made.rank = Rank(0, 3, torch.device("cpu"))
    loss = made._loss(made.model, given, labels)
    loss.backward()
    plain = [one.grad.clone() for one in made.model.parameters() if one.grad is not None]
    made.model.zero_grad()
    assert made._backward(given, labels, 20) == loss.double()
    assert all(map(torch.equal, plain, (one.grad for one in made.model.parameters() if one.grad is not None)))


def test_fewer_images_than_workers_are_refused(tmp_path: Path) -> None:
    with refused(DataError, match="each of 4 workers in every step, got 3; lower --workers"):
        trainer(tmp_path, schedule=schedule(batch_size=3), rank=Rank(0, 4, torch.device("cpu")))


def test_a_training_goes_on_in_the_precision_that_it_began_in_wherever_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Killed):
        run(trainer(tmp_path, precision="bfloat16"), killed_after=1)
    monkeypatch.setattr(finetune, "autocast_dtype", lambda *_: torch.float32)  # as on another machine
    assert trainer(tmp_path, precision="auto").autocast == torch.bfloat16
    assert trainer(tmp_path / "new", precision="auto").autocast == torch.float32


def test_the_note_on_memory_stands_there_once_after_a_restart(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(trainer(tmp_path, network(Small, 7)), killed_after=1)
    assert len(trainer(tmp_path, network(Small, 7)).notes) == 1


def test_one_image_that_does_not_fit_is_an_error_of_one_line(tmp_path: Path) -> None:
    with refused(RunError, match="one image does not fit"):
        trainer(tmp_path, network(Small, 0))


def test_looking_for_the_micro_batch_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    model = network()
    trainer(tmp_path, model)
    assert same(model, network())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("planned", [True, False], ids=["with the operator", "plainly"])
def test_divergence_is_one_line_that_says_what_to_do(planned: bool, tmp_path: Path) -> None:
    model = network()
    plan = make_plan(model, PLAN) if planned else None
    made = trainer(tmp_path, model, plan, schedule=schedule(learning_rate=1e30))
    with refused(RunError, match=r"^finetune diverged in epoch 1.*lower --learning-rate"):
        run(made)
    assert not list(tmp_path.glob("epoch-*"))  # a diverged epoch is no checkpoint


def test_fewer_images_than_a_batch_are_one_batch(tmp_path: Path) -> None:
    made = trainer(tmp_path, schedule=schedule(batch_size=500, epochs=2))
    steps: list[int] = []
    made.run(lambda done, total, words: steps.append(done), lambda row: None)
    assert steps == [1, 2]
    assert all(math.isfinite(row.loss) for row in made.curve)


def test_the_ranks_of_a_batch_share_it_without_overlap(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    whole = made._index_batches(2)
    parts = []
    for rank in range(3):
        made.rank = Rank(rank, 3, torch.device("cpu"))
        parts.append(made._index_batches(2))
    for step, batch in enumerate(whole):
        together = torch.cat([part[step] for part in parts])
        assert torch.equal(together.sort().values, batch.sort().values)


def test_without_validation_images_there_is_no_score(tmp_path: Path) -> None:
    made = Trainer(
        network(), images(40), None, plan=None, schedule=schedule(epochs=1), seed=0, stage="baseline",
        rank=Rank(0, 1, torch.device("cpu")), checkpoints=Checkpoints(Store(tmp_path)), evaluation_batch_size=10,
    )  # fmt: skip
    assert run(made)[0]["validation_top1_percent"] is None


def test_bfloat16_trains_and_keeps_float32_weights(tmp_path: Path) -> None:
    made = trainer(tmp_path, plan=make_plan(network(), PLAN), precision="bfloat16")
    assert run(made)[-1]["validation_top1_percent"] > 60
    assert {parameter.dtype for parameter in made.model.parameters()} == {torch.float32}


def test_rising_rates_end_at_the_plans_and_make_another_network(tmp_path: Path) -> None:
    plan = make_plan(network(), PLAN)
    at_once, rising = (
        trainer(tmp_path / "a", plan=plan),
        trainer(tmp_path / "b", plan=plan, ramp=Ramp((0.0, 0.1), 0.6)),
    )
    assert rising.rates is not None
    assert rising.rates.now == [0.0, 0.1]
    for made in (at_once, rising):
        run(made)
    assert rising.rates.now == [layer.theta.p for layer in plan.layers]
    assert not same(at_once.model, rising.model)
    assert rising.curve[-1].validation_top1_percent is not None
    assert rising.curve[-1].validation_top1_percent > 90


@pytest.mark.parametrize("asked", [190, 260])
def test_a_training_ends_at_the_size_that_it_is_held_at(asked: int, tmp_path: Path) -> None:
    plan = make_plan(network(), PLAN)
    made = trainer(tmp_path, plan=plan, held=Held(asked, kept), schedule=schedule(epochs=16))
    run(made)
    assert made.rates is not None
    assert kept(made.model.state_dict(), plan) not in range(asked - 5, asked + 6), (
        "what the plan gives by itself"
    )
    assert kept(made.model.state_dict(), made.rates.plan) == pytest.approx(asked, abs=6)


def test_recovery_of_a_killed_training_is_that_of_an_undisturbed_one(tmp_path: Path) -> None:
    plan = make_plan(network(), PLAN)
    whole = trainer(tmp_path / "a", plan=plan)
    run(whole)
    with pytest.raises(Killed):
        run(trainer(tmp_path / "b", plan=plan), killed_after=2)
    again = trainer(tmp_path / "b", plan=plan)
    run(again)
    assert again.recovery == whole.recovery
    assert set(whole.recovery) == set(PLAN)
