"""Levels and codes are fitted to the loss, while what is clipped stays clipped."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_finetune import PLAN, Killed, network, run, same, schedule, trainer
from test_packing import DIGITS, lenet
from test_rounds import run as compressed
from torch import nn

from clipq_ray import codec, fitting, levels, packing
from clipq_ray.config import make
from clipq_ray.errors import DivergedError, HeldError, RunError
from clipq_ray.levels import Levels
from clipq_ray.network import inventory
from clipq_ray.operator import bake, make_plan
from clipq_ray.plan import Plan, Theta
from clipq_ray.progress import Reporter
from clipq_ray.quantizer import Quantized
from clipq_ray.source import Source
from clipq_ray.states import WEIGHTS, write_state
from clipq_ray.storage import Store
from clipq_ray.work import CURVE

FITTING: dict[str, Any] = {
    "free_codes": True, "stage": "levels",
    "schedule": schedule(epochs=8, learning_rate=2e-2, warmup_epochs=0.0, weight_decay=0.0, label_smoothing=0.0),
}  # fmt: skip


def plan_of(model: nn.Module) -> Plan:
    return make_plan(model, PLAN)


def codes_of(model: nn.Module, plan: Plan) -> dict[str, Quantized]:
    """What `bake` makes of the weights in `model`, which stay."""
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    found = bake(model, plan)
    model.load_state_dict(kept)
    return found


def test_a_twin_gets_the_gradient_of_its_weight_and_of_its_level() -> None:
    model = network()
    plan = plan_of(model)
    quantized = codes_of(model, plan)["head.weight"]
    fixed = Levels(model, plan, True)
    inputs, wanted = torch.randn(20, 96), torch.randint(0, 4, (20,))
    table = quantized.levels.nan_to_num().requires_grad_()
    weight = table[quantized.codes.long() + plan.layers[1].share.negative]
    weight.retain_grad()
    nn.functional.cross_entropy(inputs @ weight.T, wanted).backward()
    head = model.get_parameter("head.weight")
    nn.functional.cross_entropy(inputs @ head.T, wanted).backward()
    assert table.grad is not None
    assert weight.grad is not None
    with fixed.full_precision():
        given = head.grad
        assert given is not None
        assert (given[quantized.codes == 0] == 0).all()
        for code in set(quantized.codes.unique().tolist()) - {0}:
            mask = quantized.codes == code
            of_level = table.grad[code + plan.layers[1].share.negative] / mask.sum().sqrt()
            torch.testing.assert_close(given[mask], weight.grad[mask] + of_level)


def test_weights_of_half_the_bits_are_trained_too() -> None:
    model = network().bfloat16()
    plan = plan_of(model)
    quantized = codes_of(model, plan)["head.weight"]
    trained = Levels(model, plan, True)
    head = model.get_parameter("head.weight")
    with torch.no_grad():
        assert head.dtype == torch.bfloat16
        assert torch.equal(head, quantized.values.to(head))
        head.grad = torch.ones_like(head)
        with trained.full_precision():
            head.sub_(1e-3)
    assert ((head != 0) == (quantized.codes != 0)).all()
    assert len(head.unique()) <= 1 + 2**2
    hashes = trained.code_hashes()
    with torch.no_grad():
        head.view(-1)[0] += 1
    assert {name for name, crc in trained.code_hashes().items() if crc != hashes[name]} == {"head.weight"}


def test_a_weight_goes_to_the_nearest_level_on_its_side_and_levels_are_the_means_of_their_twins() -> None:
    weight = torch.tensor([-0.9, -0.5, 0.0, 0.3, 0.35, 0.9])
    model = nn.ParameterDict({"w": nn.Parameter(weight.clone())})
    plan = make_plan(model, {"w": Theta(0.0, 2)})
    trained = Levels(model, plan, True)
    low, high = sorted(set(model["w"].detach().tolist()) - {0.0})[-2:]
    assert (low, high) == pytest.approx((0.325, 0.9))
    with trained.full_precision(), torch.no_grad():
        model["w"].copy_(torch.tensor([-0.9, 0.1, 5.0, 0.2, 0.7, 1.1]))
    found = model["w"].detach()
    torch.testing.assert_close(found[1:], torch.tensor([0.15, 0.0, 0.15, 0.9, 0.9]))
    with trained.reading_full_precision():
        torch.testing.assert_close(model["w"].detach()[1:4], torch.tensor([0.1, 5.0, 0.2]))
    assert torch.equal(model["w"].detach(), found)


INNER, OUTER = 0.4, 0.8  # twins whose next level is the inner or the outer one of 0.3 and 0.9


def outer_ones(*twins: tuple[float, int]) -> list[bool]:
    """Of a weight whose twin is moved to each of `twins` for so many steps: whether it had the outer level behind the last of these. Behind each the training goes on from a checkpoint."""
    found, kept, state = [], None, dict[str, torch.Tensor]()
    for twin, steps in twins:
        model = nn.ParameterDict({"w": nn.Parameter(torch.tensor([0.3] * 30 + [-0.5] + [0.9] * 30))})
        trained = Levels(model, make_plan(model, {"w": Theta(0.0, 2)}), True)
        if kept is not None:
            model["w"].data.copy_(kept)
            trained.load_state(state)
        for _ in range(steps):
            with trained.full_precision(), torch.no_grad():
                model["w"][0] = twin
        found.append(bool(model["w"][0] > 0.6))
        with trained.reading_full_precision():
            kept, state = model["w"].detach().clone(), trained.state()
    return found


@pytest.mark.parametrize(("usual", "other"), [(OUTER, INNER), (INNER, OUTER)])
def test_a_code_that_goes_to_and_fro_is_settled_where_its_twin_is_in_the_mean(
    usual: float, other: float
) -> None:
    there = usual == OUTER
    found = outer_ones((usual, 300), (other, 1), (usual, 1), (usual, 400), (other, 1000))
    assert found == [there, not there, there, there, there]


def test_not_the_twin_of_now_decides_where_a_code_is_settled() -> None:
    near = 0.55  # inner, and its mean with many of the outer ones is not
    found = outer_ones((OUTER, 300), (near, 75), (OUTER, 1), (near, 1), (near, 300))
    assert found == [True, False, True, True, True]


def test_a_code_that_changes_now_and_then_follows_its_twin() -> None:
    assert outer_ones((OUTER, 300), (INNER, 300), (OUTER, 300), (INNER, 300)) == [True, False, True, False]


def levels_of(bits: int) -> nn.ParameterDict:
    """One weight of -0.5, and some at each of as many places above zero as so many bits have levels there, from 0.3 on."""
    places = [0.3 * (1 + number) for number in range(2 ** (bits - 1)) for _ in range(30)]
    return nn.ParameterDict({"w": nn.Parameter(torch.tensor([*places, -0.5]))})


def test_a_code_that_goes_one_way_through_several_levels_is_not_settled() -> None:
    model = levels_of(3)
    trained = Levels(model, make_plan(model, {"w": Theta(0.0, 3)}), True)
    for step in range(60):
        with trained.full_precision(), torch.no_grad():
            model["w"][0] = 0.3 + 0.02 * step
    assert model["w"][0] == model["w"].max()


def test_levels_that_have_passed_each_other_have_the_weights_next_to_them() -> None:
    model = nn.ParameterDict({"w": nn.Parameter(torch.tensor([0.3, 0.3, *[0.9] * 30, -0.5]))})
    trained = Levels(model, make_plan(model, {"w": Theta(0.0, 2)}), True)
    for twin in (0.9, 0.3, 0.9, 0.3, 1.5):  # both of the inner level settle there, and take it along
        with trained.full_precision(), torch.no_grad():
            model["w"][:2] = twin
    with trained.full_precision(), torch.no_grad():
        model["w"][5] = 1.4
    assert model["w"][5] == model["w"][0] > 1.4


@pytest.mark.parametrize(("bits", "settled"), [(4, True), (5, False)])
def test_between_many_levels_codes_go_where_they_like(bits: int, settled: bool) -> None:
    model = levels_of(bits)
    trained = Levels(model, make_plan(model, {"w": Theta(0.0, bits)}), True)
    for twin in (0.3, 0.6, 0.3, 0.6, *[0.6] * 100):
        with trained.full_precision(), torch.no_grad():
            model["w"][0] = twin
    assert (model["w"][0] < 0.45) == settled


def test_a_settled_weight_moves_with_its_level_alone() -> None:
    model = levels_of(2)
    trained = Levels(model, make_plan(model, {"w": Theta(0.0, 2)}), True)
    for twin in (0.6, 0.3, 0.6, 0.3):
        with trained.full_precision(), torch.no_grad():
            model["w"][0] = twin
    for one in (0, 1):  # both of the inner level of 30, of which the first one is settled
        model["w"].grad = torch.zeros_like(model["w"])
        model["w"].grad[one] = 1.0
        with trained.full_precision():
            given = model["w"].grad[:30].clone()
        of_level = torch.full((30,), 30**-0.5)
        of_level[1] += one
        torch.testing.assert_close(given, of_level)


def test_a_level_of_a_layer_of_one_side_does_not_leave_it() -> None:
    model = nn.ParameterDict({"w": nn.Parameter(torch.tensor([0.3, 0.35, 0.9]))})
    plan = make_plan(model, {"w": Theta(0.0, 2)})
    trained = Levels(model, plan, True)
    with trained.full_precision(), torch.no_grad():
        model["w"].fill_(-1.0)
    assert (model["w"].detach() > 0).all()
    assert levels.read({"w": model["w"].detach()}, plan)["w"].codes.min() > 0


def test_clipped_weights_stay_zero_levels_stay_few_codes_change_and_the_loss_falls(tmp_path: Path) -> None:
    model = network()
    plan = plan_of(model)
    before = codes_of(model, plan)
    rows = run(trainer(tmp_path, model, plan, **FITTING))
    assert rows[-1]["loss"] < rows[0]["loss"]
    changed = 0
    for layer in plan.layers:
        one, after = before[layer.layer], model.get_parameter(layer.layer).detach()
        assert torch.equal(after == 0, one.codes == 0)
        now = levels.read({layer.layer: after}, Plan((layer,)))[layer.layer]
        assert torch.equal(now.values, after)
        assert torch.equal(now.levels.nan_to_num()[now.codes.long() + layer.share.negative], after)
        changed += int((now.codes != one.codes).sum())
    assert changed > 0
    assert not torch.equal(model.get_parameter("head.bias"), network().get_parameter("head.bias"))


def test_fixed_codes_stay_while_their_levels_are_trained(tmp_path: Path) -> None:
    model = network()
    plan = plan_of(model)
    before = codes_of(model, plan)
    rows = run(trainer(tmp_path, model, plan, **{**FITTING, "free_codes": False}))
    assert rows[-1]["loss"] < rows[0]["loss"]
    for layer in plan.layers:
        one, after = before[layer.layer], model.get_parameter(layer.layer).detach()
        for code in one.codes.unique():
            (level,) = after[one.codes == code].unique()
            assert (level == one.values[one.codes == code][0]) == (code == 0)


def test_a_layer_that_is_clipped_as_a_whole_stays_so(tmp_path: Path) -> None:
    model = network()
    with torch.no_grad():
        model.get_parameter("conv.weight").zero_()
    plan = plan_of(model)
    run(trainer(tmp_path, model, plan, **FITTING))
    assert not model.get_parameter("conv.weight").any()


@pytest.mark.parametrize("epochs_before", [1, 7])
def test_a_fitting_that_is_killed_goes_on_to_the_same_bits(epochs_before: int, tmp_path: Path) -> None:
    plan = plan_of(network())
    whole = network()
    run(trainer(tmp_path / "whole", whole, plan, **FITTING))
    with pytest.raises(Killed):
        run(trainer(tmp_path / "cut", network(), plan, **FITTING), killed_after=epochs_before)
    again = network()
    assert len(run(trainer(tmp_path / "cut", again, plan, **FITTING))) == 8 - epochs_before
    assert same(whole, again)


def test_levels_that_nothing_has_any_more_are_empty_and_the_others_in_order() -> None:
    weight = torch.tensor([-0.9, -0.5, -0.4, 0.0, 0.3, 0.35, 0.8, 0.9])
    plan = make_plan(nn.ParameterDict({"w": nn.Parameter(weight)}), {"w": Theta(0.1, 3)})
    (one,) = bake(nn.ParameterDict({"w": nn.Parameter(weight.clone())}), plan).values()
    moved = torch.where(one.codes == one.codes.max(), 0.4, torch.where(one.codes > 0, 0.2, one.values))
    found = levels.read({"w": moved}, plan)["w"]
    there = found.levels[~found.levels.isnan()]
    assert (there.diff() > 0).all()
    assert found.codes.max() == 2
    assert torch.equal(found.levels.nan_to_num()[found.codes.long() + plan.layers[0].share.negative], moved)


class Round:
    """A trained LeNet-5 in a store, and others of trained levels and codes behind it."""

    def __init__(
        self, folder: Path, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.folder, model = folder, lenet(weights)
        source = Source(make(storage=str(folder), engine="local", unit_order="given"), model, DIGITS)
        self.inventory = inventory(model, DIGITS.train.batch(torch.arange(2), None)[0])
        self.plan = make_plan(model, {one.name: Theta(0.5, 3) for one in self.inventory.layers})
        self.quantized, self.state = codes_of(model, self.plan), model.state_dict()
        self.trained: dict[bool, Store] = {}
        monkeypatch.setattr(fitting.stages, "trained", lambda *given, free_codes: self.trained[free_codes])
        self.run: Any = SimpleNamespace(
            source=source, data=DIGITS, config=source.config, reporter=Reporter(quiet=True), seconds_left=None, notes=[],
        )  # fmt: skip

    def store(self, name: str, *, factor: float = 1.0, spoilt: bool = False, large: bool = False) -> Store:
        """The quantized weights times `factor`; `spoilt`: the bias of one class out of all proportion; `large`: with a level that float16 does not hold."""
        changed = {**self.state, **{name: factor * one.values for name, one in self.quantized.items()}}
        last, first = list(changed)[-1], self.inventory.layers[0].name
        if spoilt:
            changed[last] = changed[last] + 50.0 * torch.eye(10)[0]
        if large:
            least = changed[first][changed[first] > 0].min()
            changed[first] = torch.where(changed[first] == least, 1e-9, changed[first])
        found = Store(self.folder / name)
        write_state(found, WEIGHTS, changed)
        return found

    def tuned(self, *, spoilt: bool) -> Store:
        """The full-precision weights."""
        found, last = Store(self.folder / "tuned"), list(self.state)[-1]
        wrong = 50.0 * torch.eye(10)[0] if spoilt else 0.0
        write_state(found, WEIGHTS, {**self.state, last: self.state[last] + wrong})
        return found

    def packed(
        self, tuned: Store, *, held: bool, most: int | None = None
    ) -> tuple[Store | None, packing.PackedNetwork, tuple[Store, ...]]:
        """What becomes of the round."""
        return fitting.packed(
            self.run, tuned, self.plan, self.inventory, "0" * 64, Store(self.folder / "work"), 1,
            further=True, held=held, most_bytes=most,
        )  # fmt: skip


@pytest.fixture
def a_round(
    tmp_path: Path, digits_weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> Round:
    return Round(tmp_path, digits_weights, monkeypatch)


@pytest.mark.parametrize(("better", "words"), [(True, "fitted"), (False, "means")])
def test_trained_levels_are_taken_where_validation_images_like_them_better(
    better: bool, words: str, a_round: Round
) -> None:
    # other levels, so that they can be told from the means
    a_round.trained[False] = a_round.store("fitted", factor=1.2, spoilt=not better)
    taken, made, trained = a_round.packed(a_round.tuned(spoilt=better), held=False)
    assert made.levels == words
    assert trained == (a_round.trained[False],)
    assert taken == (trained[0] if better else None)
    for name, one in a_round.quantized.items():
        factor = 1.2 if better else 1.0
        np.testing.assert_allclose(codec.arrays(made.file)[name], factor * one.values.numpy(), rtol=2**-9)


def test_free_codes_that_break_the_promise_of_a_size_give_way_to_fixed_ones(a_round: Round) -> None:
    free, fixed = a_round.store("free", large=True), a_round.store("fixed")
    a_round.trained = {True: free, False: fixed}
    tuned = a_round.tuned(spoilt=True)
    taken, larger, trained = a_round.packed(tuned, held=True)
    assert (taken, trained) == (free, (free,))  # a file of any size will do
    most = len(larger.file)
    assert a_round.packed(tuned, held=True, most=most)[::2] == (free, (free,))
    taken, smaller, trained = a_round.packed(tuned, held=True, most=most - 1)
    assert (taken, trained) == (fixed, (free, fixed))
    assert smaller.levels == "fitted"
    assert len(smaller.file) < most
    # nothing keeps it: the smallest, which comes closest
    taken, found, trained = a_round.packed(tuned, held=True, most=10)
    assert len(trained) == 2
    assert taken in (fixed, None)
    assert len(found.file) < most


def a_last_epoch_of(tuned: Store, seconds: float) -> Store:
    """`tuned` with the curve of a training whose last epoch took so long."""
    rows = [{"seconds": 0.0}, {"seconds": seconds}]
    tuned.write(CURVE, json.dumps({"curve": rows, "notes": []}).encode())
    return tuned


@pytest.mark.parametrize(
    ("left", "epoch", "tries"), [(-5.0, 0.0, 0), (20.0, 30.0, 0), (1000.0, 30.0, 1), (None, 30.0, 1)]
)
def test_levels_are_trained_where_a_deadline_leaves_time_for_an_epoch_and_packing(
    left: float | None, epoch: float, tries: int, a_round: Round
) -> None:
    a_round.trained[False] = a_round.store("fitted", factor=1.2)
    a_round.run.seconds_left = left
    taken, made, trained = a_round.packed(a_last_epoch_of(a_round.tuned(spoilt=True), epoch), held=False)
    assert len(trained) == tries
    assert made.levels == ("fitted" if tries else "means")
    assert (taken is not None) == (tries == 1)
    assert [note.split(",")[0] for note in a_round.run.notes] == [
        "levels: not trained behind round 1 by --deadline-hours"
    ] * (1 - tries)


def test_packing_counts_before_a_deadline_too(a_round: Round, monkeypatch: pytest.MonkeyPatch) -> None:
    a_round.trained[False] = a_round.store("fitted", factor=1.2)
    a_round.run.seconds_left = 100.0
    times = iter((1000.0, 1080.0))  # packing took 80 s
    monkeypatch.setattr(fitting, "time", SimpleNamespace(monotonic=lambda: next(times)))
    assert a_round.packed(a_last_epoch_of(a_round.tuned(spoilt=True), 30.0), held=False)[2] == ()
    assert "leaves 100 s for an epoch and packing (110 s)" in a_round.run.notes[0]


def test_of_two_tries_the_second_one_is_left_out_where_the_first_took_the_time(
    a_round: Round, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = a_round.store("free", large=True)
    a_round.run.seconds_left = 1000.0

    def trained(*given: Any, free_codes: bool) -> Store:
        assert free_codes
        a_round.run.seconds_left = 10.0
        return free

    monkeypatch.setattr(fitting.stages, "trained", trained)
    tuned = a_last_epoch_of(a_round.tuned(spoilt=True), 30.0)
    assert a_round.packed(tuned, held=True, most=10)[2] == (free,)  # which no file keeps
    assert len(a_round.run.notes) == 1


def test_within_chance_the_loss_says_which_network_is_better() -> None:
    labels = np.zeros(3000, np.int64)

    def packed(wrong: range, loss: float) -> Any:
        predictions = labels.copy()
        predictions[wrong] = 1
        return SimpleNamespace(
            file=b"",
            validation=SimpleNamespace(
                predictions=predictions, labels=labels, loss=loss, top1=1 - len(wrong) / 3000
            ),
        )

    usual = packed(range(30), 0.04)
    better, worse = packed(range(5, 37), 0.03), packed(range(5, 37), 0.05)
    far_worse = packed(range(5, 70), 0.03)
    assert packing.best([usual, better], None) == 1
    assert packing.best([usual, worse], None) == 0
    assert packing.best([usual, usual], None) == 0
    assert packing.best([usual, far_worse], None) == 0
    assert packing.best([far_worse, usual, better], None) == 2


def test_codes_that_are_too_large_leave_the_file_as_it_was(a_round: Round) -> None:
    large = a_round.store("large", large=True)
    a_round.trained = {True: large, False: large}
    tuned = a_round.tuned(spoilt=True)
    most = len(a_round.packed(tuned, held=True)[1].file) - 1
    taken, made, trained = a_round.packed(tuned, held=True, most=most)
    assert (taken, made.levels, trained) == (None, "means", (large, large))


def test_a_run_with_trained_levels_says_what_became_of_them(tmp_path: Path) -> None:
    result = compressed(tmp_path, target_ratio=20.0, rounds=1, level_epochs=2)
    assert result.manifest["metrics"]["levels"] in ("fitted", "means")
    epochs = 2 if result.manifest["metrics"]["levels"] == "fitted" else 0
    assert len(result.manifest["curves"]["levels"]) == epochs
    assert [one["epochs"] for one in result.manifest["promise"]["rounds"]] == [4]
    assert [one["stage"] for one in result.manifest["stages"]][-1] == "levels"
    assert (
        compressed(tmp_path / "without", target_ratio=20.0, rounds=1).manifest["metrics"]["levels"] == "means"
    )


def test_codes_behind_a_held_round_are_free_first_and_fixed_where_they_are_not_taken(
    tmp_path: Path,
) -> None:
    """At a rate of nothing they are those of the round before, and of equals the means are taken."""
    given: dict[str, Any] = {
        "target_bytes": 6000, "rounds": 1, "epochs": 4, "level_epochs": 1, "level_learning_rate": 1e-12
    }  # fmt: skip
    free = compressed(tmp_path, **given).manifest
    assert [one["stage"] for one in free["stages"]].count("levels") == 1
    held = compressed(tmp_path, **given, hold_size=True).manifest
    assert held["metrics"]["levels"] == "means"
    assert [one["stage"] for one in held["stages"]].count("levels") == 2
    assert [one["epochs"] for one in held["promise"]["rounds"]] == [6]  # all that were trained
    assert held["metrics"]["bytes_after"] < 0.98 * 6000


def test_levels_that_diverge_leave_the_round_as_it_is_without_them(tmp_path: Path) -> None:
    given: dict[str, Any] = {"target_ratio": 20.0, "rounds": 1, "epochs": 1}
    hot = compressed(tmp_path, **given, level_epochs=1, level_learning_rate=1e30)
    without = compressed(tmp_path, **given)
    assert hot.manifest["metrics"]["levels"] == "means"
    assert Store(hot.uri).read("model.clq") == Store(without.uri).read("model.clq")
    assert hot.manifest["promise"] == without.manifest["promise"]
    (said,) = [note for note in hot.manifest["notes"] if "diverged" in note]
    assert said.startswith("the levels and codes of round 1 are its own: levels diverged in epoch 1 (")
    assert said.endswith("; lower --level-learning-rate (now 1e+30)")


@pytest.mark.parametrize(
    ("free", "kept"),
    [
        ({"factor": 0.0}, "those that were trained before"),
        ({"large": True}, "its own"),
    ],  # a smaller file, a larger one
)
def test_levels_of_fixed_codes_that_diverge_leave_the_best_that_there_is_without_them(
    free: dict[str, Any], kept: str, a_round: Round, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, error = a_round.store("free", **free), DivergedError("levels diverged in epoch 1 (loss nan)")

    def trained(*given: Any, free_codes: bool) -> Store:
        if not free_codes:
            raise error
        return before

    monkeypatch.setattr(fitting.stages, "trained", trained)
    tuned = a_round.tuned(spoilt=False)
    taken, _, tries = a_round.packed(tuned, held=True, most=10)  # which no file keeps
    assert tries == (before,)
    assert taken == (before if "factor" in free else None)
    assert a_round.run.notes == [f"the levels and codes of round 1 are {kept}: {error}"]


@pytest.mark.parametrize("kind", [HeldError, RunError])
def test_levels_that_end_for_another_reason_end_the_round(
    kind: type[RunError], a_round: Round, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(*given: Any, free_codes: bool) -> Store:
        raise kind("another job took over")

    monkeypatch.setattr(fitting.stages, "trained", trained)
    with pytest.raises(kind, match="another job took over"):
        a_round.packed(a_round.tuned(spoilt=False), held=False)
    assert a_round.run.notes == []
