"""The straight-through operator against a hand-written one, and what it leaves behind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from torch import Tensor, nn

from clipq_ray.errors import ModelError
from clipq_ray.operator import Operator, bake, make_plan, mildest_rates
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
        with refused(ModelError, match=r"the plan names 9\.weight"):
            use(network(), plan)


def test_weights_that_diverged_are_named() -> None:
    model = network()
    operator = Operator(model, make_plan(model, THETAS))

    def diverge() -> None:
        with operator.full_precision(), torch.no_grad():
            model.get_parameter("2.weight")[0, 0] = torch.nan

    with refused(ModelError, match=r"layer 2\.weight"):
        diverge()


def stepped(model: nn.Module, operator: Operator, steps: range, rate: float = 0.5) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        with operator.full_precision():
            optimizer.step()


def test_the_parameters_are_quantized_at_the_rates_that_were_set() -> None:
    model = network()
    full = values(model)
    plan = make_plan(model, THETAS)
    operator = Operator(model, plan, [0.25, 0.0])
    for rates in ([0.25, 0.0], [0.75, 0.1]):
        operator.set_rates(rates)
        operator.requantize()
        for layer, p in zip(plan.layers, rates, strict=True):
            wanted = quantize(full[layer.layer], Theta(p, layer.theta.b), layer.share)
            assert torch.equal(model.get_parameter(layer.layer), wanted.values)


def test_the_mildest_rate_moves_the_weights_least_and_is_at_most_the_plans() -> None:
    model = network()
    plan = make_plan(model, {"0.weight": Theta(0.9, 2), "2.weight": Theta(0.01, 2)})
    first, second = mildest_rates(model, plan)
    assert second == 0.0
    weight, share = model.get_parameter("0.weight").detach(), plan.layers[0].share

    def moved(p: float) -> float:
        return float((weight - quantize(weight, Theta(p, 2), share).values).double().norm())

    assert 0 < first < 0.9
    assert all(moved(first) <= moved(step / 32) for step in range(29))


def test_recovery_counts_what_came_back_and_every_change_of_state() -> None:
    model = network()
    operator = Operator(model, make_plan(model, THETAS))
    first = {name: model.get_parameter(name) == 0 for name in THETAS}
    before, changes = first, dict.fromkeys(THETAS, 0)
    for step in range(8):
        stepped(model, operator, range(step, step + 1))
        now = {name: model.get_parameter(name) == 0 for name in THETAS}
        for name in THETAS:
            changes[name] += int((now[name] != before[name]).sum())
        before = now
    for name, found in operator.recovery().items():
        assert found.clipped_first == int(first[name].sum())
        assert found.recovered == int((first[name] & ~before[name]).sum())
        assert found.changes == changes[name]
    assert sum(found.recovered for found in operator.recovery().values()) > 0


def test_recovery_goes_on_from_a_checkpoint() -> None:
    whole = network()
    operator = Operator(whole, make_plan(whole, THETAS))
    stepped(whole, operator, range(6))
    model = network()
    plan = make_plan(model, THETAS)
    first = Operator(model, plan)
    stepped(model, first, range(3))
    state = {name: tensor.clone() for name, tensor in first.state().items()}
    first.detach()
    second = Operator(model, plan)
    second.load_state(state)
    stepped(model, second, range(3, 6))
    assert second.recovery() == operator.recovery()


def test_hashes_of_codes_are_equal_where_codes_are_and_name_the_layer_where_not() -> None:
    one, other = network(), network()
    plan = make_plan(one, THETAS)
    first, second = Operator(one, plan), Operator(other, plan)
    assert first.code_hashes() == second.code_hashes()
    assert list(first.code_hashes()) == list(THETAS)
    with second.full_precision(), torch.no_grad():
        other.get_parameter("2.weight").neg_()
    differing = [name for name, hashed in first.code_hashes().items() if hashed != second.code_hashes()[name]]
    assert differing == ["2.weight"]


def test_a_compiled_network_sees_every_new_quantization() -> None:
    plain, model = network(), network()
    plan = make_plan(plain, THETAS)
    first, second = Operator(plain, plan), Operator(model, plan)
    compiled = torch.compile(model, backend="aot_eager")
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.3, momentum=0.9) for one in (plain, model)]
    for step in range(4):
        for net, operator, optimizer in ((plain, first, optimizers[0]), (compiled, second, optimizers[1])):
            optimizer.zero_grad()
            loss_of(net, step).backward()
            with operator.full_precision():
                optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


def test_an_average_of_the_weights_is_taken_of_full_precision() -> None:
    model = network()
    operator = Operator(model, make_plan(model, THETAS))
    with operator.reading_full_precision():
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
        )
        wanted = model.get_parameter("0.weight").detach().clone()
    for step in range(3):
        stepped(model, operator, range(step, step + 1))
        with operator.reading_full_precision():
            average.update_parameters(model)
            full = model.get_parameter("0.weight").detach()
            wanted = full.clone() if step == 0 else 0.5 * wanted + 0.5 * full
    assert torch.allclose(average.module.get_parameter("0.weight"), wanted)
    assert average.module.get_parameter("0.weight").unique().numel() == 12 * 9


def test_clipped_gradients_and_gradients_of_several_batches_are_those_of_plain_torch() -> None:
    model, twin = network(), network()
    operator = Operator(model, make_plan(model, THETAS))
    bake(twin, make_plan(twin, THETAS))  # the same quantized weights, without the operator
    for step in range(3):
        (loss_of(model, step) / 3).backward()
        (loss_of(twin, step) / 3).backward()
    norms = [torch.nn.utils.clip_grad_norm_(one.parameters(), 0.05) for one in (model, twin)]
    assert torch.equal(*norms)
    assert float(norms[0]) > 0.05
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)
    with operator.full_precision():
        torch.optim.SGD(model.parameters(), lr=0.1).step()
