"""Promises of clipping by rate and distortion: weights are clipped sooner where a file pays more for them, and clipping moves less for the same bytes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from clipq_ray import codec
from clipq_ray.cluster.engine import LocalEngine
from clipq_ray.config import make
from clipq_ray.network import inventory
from clipq_ray.operator import Operator, make_plan
from clipq_ray.optimizers import Schedule
from clipq_ray.places import Costs, Places
from clipq_ray.plan import Theta
from clipq_ray.quantizer import Quantized, decide_share, quantize
from clipq_ray.rates import Ramp
from clipq_ray.source import Source
from clipq_ray.states import WEIGHTS, read_state, write_state
from clipq_ray.storage import Store
from clipq_ray.training import DENSITIES, TrainTask

ROOT = Costs(0.5)
SHAPES = [(6, 8), (4, 6, 3, 3), (5, 3, 40, 40), (7,)]


def uneven(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Weights whose rows and columns differ in size, as those of trained layers do."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    for side in range(min(2, len(shape))):
        scale = torch.exp(0.7 * torch.randn(shape[side], generator=generator))
        weight *= scale.reshape([-1 if other == side else 1 for other in range(len(shape))])
    return weight


def kept(weight: Tensor, p: float) -> Tensor:
    return quantize(weight, Theta(p, 2)).codes != 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_at_the_beginning_no_place_is_dearer_than_another(shape: tuple[int, ...]) -> None:
    weight = uneven(shape)
    assert torch.allclose(Places(kept(weight, 0.5), ROOT).divisors, torch.ones(shape), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_a_weight_is_divided_by_is_all_that_happens_to_it(shape: tuple[int, ...]) -> None:
    weight = uneven(shape)
    places, divided = Places(kept(weight, 0.6), ROOT), weight.clone()
    for _ in range(3):
        places.follow(divided, kept(divided, 0.6))
    assert torch.allclose(divided * places.divisors, weight, rtol=1e-5)
    # what goes on from there goes on with the same
    again = Places(kept(divided, 0.6), Costs(0.5, divided=True), places.densities)
    for _ in range(3):
        again.follow(divided, kept(divided, 0.7))
    assert torch.allclose(divided * again.divisors, weight, rtol=1e-5)


def test_divisors_are_the_roots_of_bits_in_rows_and_columns() -> None:
    mask = torch.zeros(8, 16, dtype=torch.bool)
    mask[0] = True
    mask[:, 3] = True
    mask[5, 9] = True
    places = Places(mask, ROOT)
    found = Places(mask, ROOT, places.found(mask)).divisors

    def odds(ones: float, n: int) -> float:
        density = (ones + mask.double().mean().item()) / (n + 1)
        return math.log2(density / (1 - density))

    rows = [odds(float(row.sum()), 16) for row in mask]
    columns = [odds(float(column.sum()), 8) for column in mask.T]
    mean = sum(2**x / (1 + 2**x) for x in rows) / 8
    whole = math.log2(mean / (1 - mean))
    place = odds(float(mask.sum()), 128)  # of the only place that a kernel has here
    bits = [
        [min(16.0, max(1.0, 2 - (row + column + place - 2 * whole))) for column in columns] for row in rows
    ]
    assert float(found[5, 9] / found[0, 9]) == pytest.approx(math.sqrt(bits[5][9] / bits[0][9]), rel=1e-4)
    assert float(found[5, 9] / found[5, 3]) == pytest.approx(math.sqrt(bits[5][9] / bits[5][3]), rel=1e-4)
    assert found[0, 3] <= found[0, 9] < found[5, 9]


@pytest.mark.parametrize("mask", [torch.zeros(4, 5, dtype=torch.bool), torch.ones(4, 5, dtype=torch.bool)])
def test_layers_of_nothing_or_of_everything_are_left_alone(mask: Tensor) -> None:
    weight = uneven((4, 5))
    before = weight.clone()
    Places(mask, ROOT).follow(weight, mask)
    assert torch.allclose(weight, before)


@pytest.mark.parametrize(
    ("shape", "p"), [((60, 80), 0.95), ((40, 30, 3, 3), 0.9), ((100, 200), 0.98)], ids=str
)
def test_of_as_many_bytes_clipping_moves_less(shape: tuple[int, ...], p: float) -> None:
    weight = uneven(shape)
    share = decide_share(weight, Theta(p, 2))
    places, divided = Places(kept(weight, p), ROOT), weight.clone()
    for _ in range(8):
        places.follow(divided, kept(divided, p))
    ours = quantize(divided, Theta(p, 2), share)
    # as many bytes by one threshold for all
    budget = codec.layer_bytes(codec.coded(ours, share), "small")
    plain = min(
        (quantize(weight, Theta(1 - (1 - p) * step / 50, 2), share) for step in range(25, 75)),
        key=lambda one: abs(codec.layer_bytes(codec.coded(one, share), "small") - budget),
    )
    assert clipped(weight, ours) < 0.97 * clipped(weight, plain)


def clipped(weight: Tensor, quantized: Quantized) -> float:
    """What clipping moves, squared."""
    return float(weight[quantized.codes == 0].double().square().sum())


def test_the_operator_steps_on_what_was_divided_as_on_the_weights_themselves() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9, bias=False))
    operator = Operator(model, make_plan(model, {"0.weight": Theta(0.5, 2)}), None, ROOT)
    operator.follow_costs()
    (places,) = operator._places
    with operator.reading_full_precision():
        before = model[0].weight.detach() * places.divisors
    loss = model(torch.randn(6, 12)).square().sum()
    loss.backward()
    assert model[0].weight.grad is not None
    gradient = model[0].weight.grad.clone()
    with operator.full_precision():
        torch.optim.SGD(model.parameters(), lr=0.01).step()
    with operator.reading_full_precision():
        after = model[0].weight.detach() * places.divisors
    assert torch.allclose(after, before - 0.01 * gradient, atol=1e-6)
    assert not torch.allclose(places.divisors, torch.ones_like(places.divisors), atol=0.01)


def test_a_layer_that_is_not_trained_is_left_as_it_is() -> None:
    """Nothing would train back what dividing its weights changes."""
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 10))
    with torch.no_grad():
        model[0].weight.copy_(uneven((30, 40)))
        model[1].weight.copy_(uneven((10, 30)))
    model[0].requires_grad_(False)
    plan = make_plan(model, {"0.weight": Theta(0.9, 2), "1.weight": Theta(0.9, 2)})
    operator = Operator(model, plan, costs=Costs(0.5))
    first, second = (model[index].weight.detach().clone() for index in (0, 1))
    for _ in range(4):
        operator.follow_costs()
    assert torch.equal(model[0].weight, first)
    assert not torch.equal(model[1].weight, second)


def test_a_training_multiplies_back_what_the_one_before_it_has_divided(tmp_path: Path) -> None:
    """At a rate of nothing, so that nothing else happens to a weight."""
    source = Source(make(model="lenet5", data="digits", weights="random", engine="local", limit_images=64))
    model = source.network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    write_state(Store(tmp_path / "0"), WEIGHTS, before)
    names = [layer.name for layer in inventory(model, torch.zeros(2, 1, 28, 28), ()).layers]
    plan = make_plan(model, {name: Theta(0.8, 2) for name in names})
    schedule, ramp = Schedule(4, 64, 0.0, 0.0, 0.0, 0.0, 0.0), Ramp((0.3,) * len(names), 1.0)
    for number in (1, 2, 3):
        places = [Store(tmp_path / name) for name in (f"{number - 1}", f"{number}", f"c{number}")]
        task = TrainTask(
            source, "finetune", places[0].uri, plan, schedule, places[1].uri, places[2].uri, ramp=ramp,
            costs=Costs(0.5, divided=number > 1), number=number,
        )  # fmt: skip
        LocalEngine().train(task, lambda done, total, words: None)
        now, densities = read_state(places[1]), read_state(places[1], DENSITIES)
        for at, name in enumerate(names):
            divisors = Places(before[name] != 0, ROOT, densities[str(at)]).divisors
            assert torch.allclose(now[name] * divisors, before[name], rtol=1e-4)
        assert not torch.allclose(now[names[-1]], before[names[-1]], rtol=0.05)
