"""The straight-through operator against a hand-written one, and what it leaves behind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipq_ray.errors import ModelError
from clipq_ray.operator import Operator, bake, make_plan
from clipq_ray.plan import LayerPlan, Plan, Share, Theta
from clipq_ray.quantizer import quantize

THETAS = {"0.weight": Theta(0.5, 3), "2.weight": Theta(0.3, 2)}


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 12, generator=generator), torch.randint(0, 4, (6,), generator=generator)


def loss_of(model: nn.Module, step: int) -> Tensor:
    images, labels = batch(step)
    return F.cross_entropy(model(images), labels)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_the_network_computes_with_quantized_weights_at_once() -> None:
    model = network()
    full = values(model)
    plan = make_plan(model, THETAS)
    Operator(model, plan)
    for layer in plan.layers:
        wanted = quantize(full[layer.layer], layer.theta, layer.share).values
        assert torch.equal(model.get_parameter(layer.layer), wanted)
    assert torch.equal(model.get_parameter("0.bias"), full["0.bias"])


def test_training_equals_a_hand_written_straight_through_sgd() -> None:
    rate, momentum, decay = 0.1, 0.9, 0.01
    model = network()
    plan = make_plan(model, THETAS)
    full = values(model)  # the hand-written side: plain tensors and the formulas of SGD
    speed: dict[str, Tensor] = {}
    operator = Operator(model, plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum, weight_decay=decay)
    layers = {layer.layer: layer for layer in plan.layers}
    for step in range(6):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        with operator.full_precision():
            optimizer.step()

        used = {
            name: (
                quantize(value, layers[name].theta, layers[name].share).values if name in layers else value
            )
            .clone()
            .requires_grad_()
            for name, value in full.items()
        }
        images, labels = batch(step)
        hidden = torch.tanh(F.linear(images, used["0.weight"], used["0.bias"]))
        scores = F.linear(hidden, used["2.weight"], used["2.bias"])
        F.cross_entropy(scores, labels).backward()
        for name, value in full.items():
            gradient = used[name].grad
            assert gradient is not None
            push = gradient + decay * value
            speed[name] = push if name not in speed else momentum * speed[name] + push
            full[name] = value - rate * speed[name]
        with operator.reading_full_precision():
            for name, value in model.named_parameters():
                torch.testing.assert_close(value.detach(), full[name], rtol=1e-6, atol=1e-7)
    moved = full["0.weight"] - network()[0].weight.detach()
    assert bool((moved != 0).all())  # clipped weights train as well


def test_the_gradient_of_clipped_weights_is_that_of_the_loss_at_zero() -> None:
    model = network()
    Operator(model, make_plan(model, {"0.weight": Theta(0.9, 2)}))
    loss_of(model, 0).backward()
    weight = model.get_parameter("0.weight")
    assert weight.grad is not None
    clipped = weight.detach() == 0
    assert float(clipped.float().mean()) > 0.8
    assert float((weight.grad[clipped] != 0).float().mean()) > 0.99


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 12)
        self.b = nn.Linear(12, 12)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))  # type: ignore[no-any-return]


def test_tied_weights_are_quantized_once_and_get_both_gradients() -> None:
    torch.manual_seed(0)
    model = Tied()
    full = model.a.weight.detach().clone()
    plan = make_plan(model, {"a.weight": Theta(0.4, 2)})
    operator = Operator(model, plan)
    wanted = quantize(full, plan.layers[0].theta, plan.layers[0].share).values
    assert model.b.weight is model.a.weight
    assert torch.equal(model.b.weight, wanted)
    images, labels = batch(0)
    F.cross_entropy(model(images), labels).backward()

    used = wanted.clone().requires_grad_()
    hidden = torch.tanh(F.linear(images, used, model.a.bias.detach()))
    F.cross_entropy(F.linear(hidden, used, model.b.bias.detach()), labels).backward()
    torch.testing.assert_close(model.a.weight.grad, used.grad)
    with operator.full_precision():
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        torch.testing.assert_close(model.b.weight.detach(), full - 0.1 * used.grad)  # type: ignore[operator]


def test_full_precision_is_exchanged_and_quantized_anew_on_leaving() -> None:
    model = network()
    full = values(model)["0.weight"]
    plan = make_plan(model, THETAS)
    operator = Operator(model, plan)
    with operator.full_precision():
        assert torch.equal(model.get_parameter("0.weight"), full)
        with torch.no_grad():
            model.get_parameter("0.weight").add_(1.0)
    layer = plan.layers[0]
    assert torch.equal(model.get_parameter("0.weight"), quantize(full + 1.0, layer.theta, layer.share).values)


def test_the_parameters_stay_the_same_objects() -> None:
    model = network()
    before = list(model.parameters())
    operator = Operator(model, make_plan(model, THETAS))
    with operator.full_precision():
        pass
    operator.detach()
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))


def test_reading_and_errors_inside_leave_the_quantized_weights() -> None:
    model = network()
    operator = Operator(model, make_plan(model, THETAS))
    quantized = values(model)
    with operator.reading_full_precision():
        assert not torch.equal(model.get_parameter("0.weight"), quantized["0.weight"])
    with pytest.raises(KeyError), operator.full_precision():
        raise KeyError
    assert all(torch.equal(value, quantized[name]) for name, value in values(model).items())


def test_detaching_leaves_the_full_precision_weights_bit_for_bit() -> None:
    model = network()
    full = values(model)
    operator = Operator(model, make_plan(model, THETAS))
    operator.detach()
    assert all(torch.equal(value, full[name]) for name, value in values(model).items())
    operator.detach()
    assert all(torch.equal(value, full[name]) for name, value in values(model).items())


def test_baking_gives_what_the_operator_computed_with() -> None:
    model = network()
    plan = make_plan(model, THETAS)
    operator = Operator(model, plan)
    attached = values(model)
    operator.detach()
    quantized = bake(model, plan)
    assert all(torch.equal(value, attached[name]) for name, value in values(model).items())
    assert list(quantized) == list(THETAS)
    for name, layer in quantized.items():
        share = next(planned.share for planned in plan.layers if planned.layer == name)
        assert torch.equal(layer.levels[layer.codes.long() + share.negative], model.get_parameter(name))


def test_the_share_is_the_plans_however_the_weights_move() -> None:
    model = network()
    plan = Plan((LayerPlan("0.weight", Theta(0.2, 3), Share(1, 6)),))
    operator = Operator(model, plan)
    with operator.full_precision(), torch.no_grad():
        model.get_parameter("0.weight").mul_(-3.0)
    used = model.get_parameter("0.weight").detach().unique()
    assert int((used < 0).sum()) == 1
    assert 2 <= int((used > 0).sum()) <= 6


def test_channels_last_weights_are_the_same_to_it_and_keep_their_layout() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(4, 8, 3))
    last = nn.Sequential(nn.Conv2d(4, 8, 3)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    last.load_state_dict(plain.state_dict())
    plan = make_plan(plain, {"0.weight": Theta(0.5, 3)})
    assert make_plan(last, {"0.weight": Theta(0.5, 3)}) == plan
    operator = Operator(last, plan)
    Operator(plain, plan)
    with operator.full_precision():
        assert last[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert last[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last[0].weight, plain[0].weight)


def test_a_plan_for_another_network_is_refused_in_one_line() -> None:
    plan = Plan((LayerPlan("9.weight", Theta(0.5, 2), Share(1, 2)),))
    for use in (Operator, bake):
        with pytest.raises(ModelError, match=r"the plan names 9\.weight") as caught:
            use(network(), plan)
        assert "\n" not in str(caught.value)


def test_weights_that_diverged_are_named() -> None:
    model = network()
    operator = Operator(model, make_plan(model, THETAS))

    def diverge() -> None:
        with operator.full_precision(), torch.no_grad():
            model.get_parameter("2.weight")[0, 0] = torch.nan

    with pytest.raises(ModelError, match=r"layer 2\.weight") as caught:
        diverge()
    assert "\n" not in str(caught.value)
