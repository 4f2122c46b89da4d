"""The search proposes, measures and chooses; every part by itself."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from clipq_ray import codec
from clipq_ray.acquisition import Candidates
from clipq_ray.aim import LADDER, START, START_AGAIN
from clipq_ray.data import Preprocessing
from clipq_ray.data.tensors import TensorSplit
from clipq_ray.evaluate import evaluate
from clipq_ray.groups import Group
from clipq_ray.operator import bake_keeping, make_plan
from clipq_ray.plan import BITS_MAX, BITS_MIN, Theta
from clipq_ray.quantizer import decide_share, quantize
from clipq_ray.search import (
    RATES,
    LayerEvaluator,
    Settings,
    Suggestion,
    Trial,
    exhausted,
    milder,
    step_group,
    suggest,
)

GRID = tuple(Theta(p, b) for b in range(BITS_MIN, BITS_MAX + 1) for p in RATES)
SETTINGS = Settings(evaluations=9, start=4, tradeoffs=(2.0, 8.0, 32.0), seed=5)
BASE = Trial("a", 0, "start", 0.5, 3, 100, 0.25, 1.0, 1000, 0.125, 2.0, 0.0, "here")


def alone(layer: str) -> Group:
    return Group(layer, (layer,))


def trial(layer: str, step: int, theta: Theta) -> Trial:
    """An error that grows with p, and a size that falls with it."""
    size = int(1000 * (1 - theta.p) * theta.b)
    error = theta.p**4 + 0.3 / 2**theta.b
    loss = -math.log(max(1.0 - error, 1e-3))
    saved = (32_000 - size) / 64_000
    return replace(
        BASE, layer=layer, step=step, p=theta.p, b=theta.b, error=error, loss=loss, bytes=size, saved=saved
    )


KNOWN = Candidates(
    GRID,
    np.array([trial("a", 0, theta).saved for theta in GRID]),
    np.array([theta.p**2 + (1 - theta.p**2) / 4**theta.b for theta in GRID]),
)


def searched(layer: str, settings: Settings) -> list[Trial]:
    trials: list[Trial] = []
    for step in range(settings.evaluations):
        found = suggest(trials, layer, settings, KNOWN)
        trials.append(replace(trial(layer, step, found.theta), origin=found.origin, tradeoff=found.tradeoff))
    return trials


def test_a_suggestion_is_a_function_of_its_arguments_only() -> None:
    trials = searched("conv1.weight", SETTINGS)
    for step in (0, 4, 7):
        np.random.seed(step)
        random.seed(step)
        torch.manual_seed(step)
        found = suggest(trials[:step], "conv1.weight", SETTINGS, KNOWN)
        assert (found.theta, found.origin) == (trials[step].theta, trials[step].origin)


def test_the_start_points_come_first_and_save_the_most_at_their_distortion() -> None:
    trials = searched("a", SETTINGS)
    assert [t.origin for t in trials] == ["start"] * 4 + ["bayes"] * 5
    place = {theta: index for index, theta in enumerate(GRID)}
    for made, most in zip(trials[:4], START, strict=False):
        allowed = KNOWN.distortion <= most
        assert allowed[place[made.theta]]
        assert made.saved == KNOWN.saved[allowed].max()


def test_only_suggested_points_carry_a_prediction() -> None:
    trials = searched("a", SETTINGS)
    assert suggest(trials[:3], "a", SETTINGS, KNOWN).mean is None
    found = suggest(trials, "a", SETTINGS, KNOWN)
    made = trial("a", 9, found.theta)
    assert found.mean is not None
    assert found.deviation is not None
    assert abs(found.mean - made.objective(found.tradeoff)) < max(4 * found.deviation, 0.05)


@pytest.mark.parametrize(("gain", "ends"), [(None, False), (0.0009, True), (0.0011, False)])
def test_a_layer_ends_when_less_than_a_tenth_of_an_image_is_to_be_gained(
    gain: float | None, ends: bool
) -> None:
    settings = replace(SETTINGS, stop_gain=0.1)
    assert exhausted(Suggestion(GRID[0], "bayes", 2.0, 0.0, 0.1, gain), [BASE], settings) is ends
    assert not exhausted(Suggestion(GRID[0], "bayes", 2.0, 0.0, 0.1, gain), [BASE], SETTINGS)


def test_no_point_is_measured_twice() -> None:
    many = searched("a", replace(SETTINGS, evaluations=18, start=13))
    assert len({t.theta for t in many}) == 18
    assert all(t.theta in GRID for t in many)
    assert [t.origin for t in many].count("start") == 13


def test_further_start_points_differ_by_layer_and_seed() -> None:
    settings = replace(SETTINGS, evaluations=14, start=14)
    first = {t.theta for t in searched("a", settings)[len(START) :]}
    assert first != {t.theta for t in searched("b", settings)[len(START) :]}
    assert first != {t.theta for t in searched("a", replace(settings, seed=6))[len(START) :]}


def test_the_search_improves_on_its_start_points() -> None:
    settings = replace(SETTINGS, evaluations=12, start=3, tradeoffs=(8.0,))
    trials = searched("a", settings)
    assert min(t.objective(8.0) for t in trials[3:]) < min(t.objective(8.0) for t in trials[:3])


def test_the_objective_is_the_error_less_lambda_times_what_is_saved() -> None:
    assert BASE.objective(0.0) == 0.25
    assert BASE.objective(8.0) == 0.25 - 8.0 * 0.125
    assert BASE.theta == Theta(0.5, 3)
    assert Trial(**BASE.to_json()) == BASE


def images() -> TensorSplit:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (60, 1, 4, 4), dtype=np.uint8)
    labels = generator.integers(0, 3, 60)
    return TensorSplit(pixels, labels, Preprocessing((1, 4, 4), None, (0.5,), (0.3,)))


def evaluator() -> tuple[nn.Module, LayerEvaluator]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    device = torch.device("cpu")
    return model, LayerEvaluator(model, images(), 4 * 84, batch_size=32, device=device, node="here")


@pytest.mark.parametrize("layer", ["0.weight", "3.weight"])
def test_a_measurement_is_the_network_with_only_this_layer_compressed(layer: str) -> None:
    model, measures = evaluator()
    theta = Theta(0.6, 2)
    made = measures.measure(alone(layer), theta, step=3, origin="bayes", tradeoff=8.0)
    weight = model.get_parameter(layer)
    share = decide_share(weight, theta)
    quantized = quantize(weight.detach(), theta, share)
    assert made.bytes == codec.layer_bytes(codec.coded(quantized, share))
    assert made.saved == (4 * weight.numel() - made.bytes) / (4 * 84)
    with torch.no_grad():
        weight.copy_(quantized.values)
    result = evaluate(model, images(), batch_size=32)
    assert (made.error, made.loss, made.images) == (pytest.approx(1.0 - result.top1), result.loss, 60)
    assert (made.layer, made.step, made.origin, made.tradeoff, made.node) == (layer, 3, "bayes", 8.0, "here")


def test_what_is_known_of_a_layer_is_what_the_encoder_writes_and_the_quantizer_loses() -> None:
    model, measures = evaluator()
    known = measures.known(alone("3.weight"))
    assert known is measures.known(alone("3.weight"))
    # of 24 weights a side or fewer, a step of two thousandths rarely clips others than the one before
    assert set(known.thetas) >= {theta for theta in GRID if theta.p <= 0.95}
    assert len({theta.p for theta in known.thetas if theta.p > 0.95}) <= 4
    weight = model.get_parameter("3.weight").detach()
    for theta in (Theta(0.0, 2), Theta(0.6, 3), Theta(0.95, 8)):
        made = measures.measure(alone("3.weight"), theta, step=0, origin="start", tradeoff=8.0)
        assert known.saved[known.thetas.index(theta)] == pytest.approx(made.saved)
        lost = (weight - quantize(weight, theta, decide_share(weight, theta)).values).square().sum()
        assert known.distortion[known.thetas.index(theta)] == pytest.approx(
            float(lost / weight.square().sum()), abs=1e-6
        )


def test_near_1_rates_lie_closer_where_a_layer_is_large_enough() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 500))
    measures = LayerEvaluator(
        model, images(), 4 * 8_500, batch_size=32, device=torch.device("cpu"), node="here"
    )
    known = measures.known(alone("1.weight"))
    fine = [theta.p for theta in known.thetas if theta.b == 2 and theta.p >= 0.95]
    assert fine == [p for p in RATES if p >= 0.95]
    weight = model.get_parameter("1.weight").detach()
    left = [int((quantize(weight, Theta(p, 2)).codes != 0).sum()) for p in fine]
    assert left == sorted(set(left), reverse=True)
    assert all(fewer > 0.7 * more for more, fewer in itertools.pairwise(left[: fine.index(0.998)]))
    saved = [known.saved[known.thetas.index(Theta(p, 2))] for p in fine]
    assert saved == sorted(saved)


def test_a_layer_without_points_left_ends() -> None:
    _, measures = evaluator()
    known = measures.known(alone("0.weight"))
    trials = [replace(BASE, layer="0.weight", p=theta.p, b=theta.b) for theta in known.thetas]
    assert step_group(measures, alone("0.weight"), trials, SETTINGS) is None


def test_of_a_large_layer_some_rows_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4000))
    given = (model, images(), 4 * 68_000)
    options = {"batch_size": 32, "device": torch.device("cpu"), "node": "here"}
    whole = LayerEvaluator(*given, **options).known(alone("1.weight"))
    monkeypatch.setattr("clipq_ray.search.SAMPLE", 8_000)
    sampled = LayerEvaluator(*given, **options).known(alone("1.weight"))
    assert sampled.saved == pytest.approx(whole.saved, abs=0.03)  # the levels of 8,000 weights weigh more
    assert sampled.distortion == pytest.approx(whole.distortion, abs=0.05)
    assert not np.array_equal(sampled.distortion, whole.distortion)


def test_a_layer_that_is_exhausted_is_measured_no_more() -> None:
    _, measures = evaluator()
    trials: list[Trial] = []
    settings = replace(SETTINGS, evaluations=50, stop_gain=1e9)  # nothing is worth that
    made = [step_group(measures, alone("0.weight"), trials, settings) for _ in range(5)]
    assert made[:4] == trials
    assert made[4] is None


def sensitive() -> LayerEvaluator:
    """A network with nearly all of its weights' energy in one that no image reaches: of the shares that start points lose nothing is left that matters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    pixels = np.random.default_rng(0).integers(0, 256, (60, 1, 4, 4), dtype=np.uint8)
    pixels[:, 0, 0, 0] = 128
    shown = Preprocessing((1, 4, 4), None, (128 / 255,), (0.3,))
    split = TensorSplit(pixels, np.zeros(60, np.int64), shown)
    with torch.no_grad():
        labels = model(split.batch(torch.arange(60), None)[0]).argmax(1).numpy()
        model[1].weight[0, 0] = 8.0
    split = TensorSplit(pixels, labels, shown)
    return LayerEvaluator(model, split, 4 * 51, batch_size=32, device=torch.device("cpu"), node="here")


def test_a_layer_without_a_usable_start_point_gets_milder_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> list[Trial]:
        measures, trials = sensitive(), list[Trial]()
        while len(trials) < 12 and step_group(
            measures, alone("1.weight"), trials, replace(SETTINGS, stop_gain=0.1)
        ):
            pass
        return trials

    trials = found()
    assert min(t.error for t in trials[:4]) > 0.1
    assert [t.origin for t in trials[:5]] == ["start"] * 5
    assert min(t.error for t in trials) < 0.1
    monkeypatch.setattr("clipq_ray.search.milder", lambda *given: None)
    assert min(t.error for t in found()) > 0.1  # it ended with no point that a plan could take


def test_a_layer_that_is_near_the_original_gets_no_milder_start_point() -> None:
    trials = [replace(t, error=0.5 + t.error / 2) for t in searched("a", SETTINGS)[:4]]
    least = min(t.error for t in trials)
    assert milder(trials, SETTINGS, KNOWN, lambda: least - 0.09) is None
    found = milder(trials, SETTINGS, KNOWN, lambda: least - 0.11)
    assert found is not None
    assert found.origin == "start"
    assert milder(trials[:3], SETTINGS, KNOWN, lambda: 0.0) is None  # start points are left
    assert milder(trials, replace(SETTINGS, again=True), KNOWN, lambda: 0.0) is None


def test_measuring_leaves_the_weights_bit_for_bit() -> None:
    model, measures = evaluator()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measures.measure(alone("0.weight"), Theta(0.9, 2), step=0, origin="start", tradeoff=1.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_measurement_that_fails_leaves_the_weights_bit_for_bit() -> None:
    model, measures = evaluator()
    before = model.get_parameter("0.weight").detach().clone()

    def fail(module: nn.Module, inputs: object) -> None:
        raise RuntimeError("broken")

    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        measures.measure(alone("0.weight"), Theta(0.9, 2), step=0, origin="start", tradeoff=1.0)
    assert torch.equal(model.get_parameter("0.weight"), before)


def test_steps_take_turns_over_the_lambdas_and_a_search_cut_off_goes_on_as_before() -> None:
    whole: list[Trial] = []
    _, measures = evaluator()
    for _ in range(6):
        step_group(measures, alone("0.weight"), whole, SETTINGS)
    assert [t.tradeoff for t in whole] == [2.0, 8.0, 32.0, 2.0, 8.0, 32.0]
    assert [t.step for t in whole] == list(range(6))
    resumed = whole[:5]
    _, fresh = evaluator()
    step_group(fresh, alone("0.weight"), resumed, SETTINGS)
    assert replace(resumed[5], seconds=0.0) == replace(whole[5], seconds=0.0)


def test_layers_that_share_theta_are_measured_together() -> None:
    model, measures = evaluator()
    both, theta = Group("both", ("0.weight", "3.weight")), Theta(0.6, 2)
    made = measures.measure(both, theta, step=0, origin="start", tradeoff=8.0)
    apart = [
        measures.measure(alone(name), theta, step=0, origin="start", tradeoff=8.0) for name in both.layers
    ]
    assert made.layer == "both"
    assert made.bytes == sum(one.bytes for one in apart)
    assert made.saved == pytest.approx(sum(one.saved for one in apart))
    known = [measures.known(group) for group in (both, alone("0.weight"), alone("3.weight"))]
    saved = [dict(zip(one.thetas, one.saved, strict=True)) for one in known]
    for point in set.intersection(*map(set, saved)):  # small layers have fewer points near 1
        assert saved[0][point] == pytest.approx(saved[1][point] + saved[2][point])
    with torch.no_grad():
        for name in both.layers:
            weight = model.get_parameter(name)
            weight.copy_(quantize(weight, theta, decide_share(weight, theta)).values)
    result = evaluate(model, images(), batch_size=32)
    assert (made.error, made.loss) == (pytest.approx(1.0 - result.top1), result.loss)


def test_a_network_that_is_compressed_already_is_searched_from_its_full_precision_weights() -> None:
    model, _ = evaluator()
    plan = make_plan(model, {"0.weight": Theta(0.5, 2), "3.weight": Theta(0.7, 3)})
    full = bake_keeping(model, plan)
    baked = {name: value.clone() for name, value in model.state_dict().items()}
    measures = LayerEvaluator(
        model, images(), 4 * 84, batch_size=32, device=torch.device("cpu"), node="here", full=full
    )
    theta = Theta(0.25, 4)
    made = measures.measure(alone("3.weight"), theta, step=0, origin="start", tradeoff=8.0)
    assert all(torch.equal(value, baked[name]) for name, value in model.state_dict().items())
    share = decide_share(full["3.weight"], theta)
    wanted = quantize(full["3.weight"], theta, share)
    assert made.bytes == codec.layer_bytes(codec.coded(wanted, share))
    with torch.no_grad():
        model.get_parameter("3.weight").copy_(wanted.values)  # the other one stays as the plan has it
    result = evaluate(model, images(), batch_size=32)
    assert (made.error, made.loss) == (pytest.approx(1.0 - result.top1), result.loss)


def test_a_search_of_a_compressed_network_begins_where_that_is() -> None:
    model, _ = evaluator()
    plan = make_plan(model, {"0.weight": Theta(0.5, 2), "3.weight": Theta(0.72, 3)})
    measures = LayerEvaluator(
        model, images(), 4 * 84, batch_size=32, device=torch.device("cpu"), node="here",
        full=bake_keeping(model, plan), rates={"0.weight": 0.5, "3.weight": 0.72},
    )  # fmt: skip
    before = evaluate(model, images(), batch_size=32)
    trials: list[Trial] = []
    for _ in range(4):
        step_group(measures, alone("3.weight"), trials, replace(SETTINGS, again=True, shares=START_AGAIN))
    assert (trials[0].error, trials[0].loss) == (pytest.approx(1.0 - before.top1), before.loss)
    known = measures.known(alone("3.weight"))
    places = [known.thetas.index(theta) for theta in (trials[0].theta, Theta(0.72, 3))]  # they clip the same
    assert list(known.distortion[places]) == pytest.approx([0.0, 0.0], abs=1e-12)
    assert all(one.saved >= trials[0].saved for one in trials[1:])


def test_a_layer_that_the_plan_clips_whole_is_judged_by_its_full_precision_weights() -> None:
    """What is held of it is zero, of which every point that clips all loses nothing, and every other one everything."""
    model, measures = evaluator()
    before = measures.known(alone("0.weight"))
    plan = make_plan(model, {"0.weight": Theta(0.5, 2), "3.weight": Theta(0.5, 2)})
    full = bake_keeping(model, plan)
    with torch.no_grad():
        model.get_parameter("0.weight").zero_()
    again = LayerEvaluator(
        model, images(), 4 * 84, batch_size=32, device=torch.device("cpu"), node="here",
        full=full, rates={"0.weight": 0.999, "3.weight": 0.5},
    ).known(alone("0.weight"))  # fmt: skip
    assert again.thetas == before.thetas
    np.testing.assert_allclose(again.distortion, before.distortion, rtol=1e-6)


def test_an_evaluation_that_cannot_win_ends_and_is_a_bound() -> None:
    _, measures = evaluator()
    options = {"step": 1, "origin": "start", "tradeoff": 2.0}
    whole = measures.measure(alone("0.weight"), Theta(0.6, 2), **options)
    ended = measures.measure(alone("0.weight"), Theta(0.6, 2), **options, beat=whole.objective(2.0) - 0.5)
    assert (whole.bound, ended.bound, whole.images, ended.images) == (
        False,
        True,
        60,
        32,
    )  # after the first batch
    assert whole.objective(2.0) - 0.5 < ended.objective(2.0) <= whole.objective(2.0)
    winner = measures.measure(alone("0.weight"), Theta(0.6, 2), **options, beat=whole.objective(2.0))
    assert replace(winner, seconds=0.0) == replace(whole, seconds=0.0)


def two_layers() -> tuple[nn.Module, TensorSplit]:
    """A trained network of two layers on three separable classes."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 400)
    centres = random.uniform(60, 200, (3, 16))
    pixels = np.clip(centres[labels] + random.normal(0, 45, (400, 16)), 0, 255).astype(np.uint8)
    split = TensorSplit(pixels.reshape(400, 1, 4, 4), labels, Preprocessing((1, 4, 4), None, (0.5,), (0.3,)))
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 14), nn.ReLU(), nn.Linear(14, 3))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    inputs, targets = split.batch(torch.arange(400), None)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return model.eval(), split


def measuring(batch_size: int) -> LayerEvaluator:
    model, split = two_layers()
    return LayerEvaluator(
        model, split, 4 * 276, batch_size=batch_size, device=torch.device("cpu"), node="here"
    )


def test_early_ends_lose_no_objective_and_need_one_lambda() -> None:
    settings = replace(SETTINGS, evaluations=12, tradeoffs=(2.0,))
    found = {}
    for early in (False, True):
        measures, trials = measuring(40), list[Trial]()
        while len(trials) < settings.evaluations:
            step_group(measures, alone("1.weight"), trials, replace(settings, early_stop=early))
        found[early] = trials
    assert any(one.bound for one in found[True])
    best = min(one.objective(2.0) for one in found[True] if not one.bound)
    assert all(one.objective(2.0) > best for one in found[True] if one.bound)
    # start points are the same, whether they were measured to their end or not
    assert best <= min(one.objective(2.0) for one in found[False][: settings.start])
    with pytest.raises(ValueError, match="one lambda"):
        replace(SETTINGS, early_stop=True)


@pytest.fixture(scope="module")
def enumerated() -> dict[str, list[Trial]]:
    """All points of the grid of both layers."""
    measures = measuring(400)
    return {
        layer: [measures.measure(alone(layer), theta, step=0, origin="start", tradeoff=1.0) for theta in GRID]
        for layer in ("1.weight", "3.weight")
    }


@pytest.mark.parametrize("layer", ["1.weight", "3.weight"])
def test_of_a_network_of_two_layers_the_best_thetas_are_found(
    enumerated: dict[str, list[Trial]], layer: str
) -> None:
    measures, trials = measuring(400), list[Trial]()
    settings = Settings(18, 4, LADDER, seed=0, loss_share=0.0)
    for _ in range(settings.evaluations):
        step_group(measures, alone(layer), trials, settings)
    for tradeoff in LADDER:
        best = min(one.objective(tradeoff) for one in enumerated[layer])
        assert (
            best
            <= min(one.objective(tradeoff) for one in trials)
            <= best + 1 / 400 + tradeoff * 2 / (4 * 276)
        )  # an image, two bytes
