"""The compiled operator gives the bits of the reference, whatever the weights, the threads and the passes before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reference import ARRANGEMENTS, anything, same, thetas
from torch import Tensor

from clipq_ray.errors import ModelError
from clipq_ray.plan import Share, Theta
from clipq_ray.quantizer import NonFinite, fast, reference, requantizer, selection
from clipq_ray.quantizer.on_cpu import CpuRequantizer

SIZES = [0, 1, 2, 31, 32, 33, 1023, 1024, 1025, 4096, 4097, 70_001]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def drawn(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 0.02


def equal(weight: Tensor, theta: Theta, share: Share | None = None) -> None:
    found, wanted = fast.quantize(weight, theta, share), reference.quantize(weight, theta, share)
    assert same(found, wanted)
    assert found.values.stride() == wanted.values.stride()
    assert found.values.dtype == wanted.values.dtype


@settings(max_examples=1500, deadline=None)
@given(anything, thetas)
def test_any_tensor_gives_the_references_bits(array: np.ndarray, theta: Theta) -> None:
    weight = torch.from_numpy(array)
    assert fast.decide_share(weight, theta) == reference.decide_share(weight, theta)
    equal(weight, theta)


@settings(max_examples=300, deadline=None)
@given(anything, thetas, st.data())
def test_any_given_share_gives_the_references_bits(array: np.ndarray, theta: Theta, data: Any) -> None:
    positive = data.draw(st.integers(0, theta.intervals))
    negative = data.draw(st.integers(0, theta.intervals - positive))
    equal(torch.from_numpy(array), theta, Share(negative, positive))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("theta", [Theta(0.0, 2), Theta(0.6, 3), Theta(0.3, 5), Theta(0.99, 8)])
def test_every_size_around_blocks_and_chunks(n: int, theta: Theta) -> None:
    equal(drawn(n), theta)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("theta", [Theta(1e-5, 2), Theta(0.7, 4), Theta(0.99999, 8)])
def test_large_tensors_in_any_arrangement(arrangement: str, theta: Theta) -> None:
    equal(ARRANGEMENTS[arrangement](drawn(100_000)), theta)


@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-6, 1e-4])
def test_intervals_so_narrow_that_edges_collapse(spread: float) -> None:
    weight = 1.0 + spread * torch.rand(5000, generator=torch.Generator().manual_seed(1))
    signs = torch.where(torch.arange(5000) % 3 == 0, -1.0, 1.0)
    for b in (2, 4, 8):
        equal(weight * signs, Theta(0.2, b))
        equal(weight * signs, Theta(0.0, b), Share(0, 3))


def test_tails_from_denormals_to_the_largest_float() -> None:
    exponents = torch.linspace(-149, 127, 20_000)
    weight = (2.0 ** exponents.double()).float() * torch.where(torch.arange(20_000) % 2 == 0, 1.0, -1.0)
    for theta in (Theta(0.5, 2), Theta(0.9, 8), Theta(0.0, 5)):
        equal(weight, theta)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_channels_last(dtype: torch.dtype) -> None:
    weight = drawn(6 * 5 * 3 * 3).view(6, 5, 3, 3)
    equal(weight.to(dtype), Theta(0.4, 3))
    equal(weight.to(memory_format=torch.channels_last), Theta(0.4, 3))
    equal(weight.to(dtype).to(memory_format=torch.channels_last), Theta(0.4, 3))
    equal(weight[:1].expand(4, 5, 3, 3), Theta(0.4, 3))


@pytest.mark.parametrize("theta", [Theta(0.6, 2), Theta(0.05, 6)])
def test_threads_change_no_bit(theta: Theta) -> None:
    weight = drawn((1 << 20) + 12_345)
    torch.set_num_threads(1)
    one = fast.quantize(weight, theta)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert same(fast.quantize(weight, theta), one)
    assert same(reference.quantize(weight, theta), one)


@pytest.mark.slow
def test_forty_million_weights() -> None:
    torch.set_num_threads(2)
    equal(drawn(40_000_000), Theta(0.7, 3))


# --- pass after pass -----------------------------------------------------------------------------------------------------------

LAYERS = [Theta(0.6, 2), Theta(0.3, 4), Theta(0.0, 3), Theta(0.9, 5), Theta(0.5, 2)]


def network(dtype: torch.dtype) -> list[Tensor]:
    shapes = [(16, 8, 3, 3), (40, 250), (300,), (0, 4), (1100, 1000)]
    weights = [drawn(int(np.prod(shape)), seed).view(shape) for seed, shape in enumerate(shapes)]
    weights[0] = weights[0].to(memory_format=torch.channels_last)
    return [weight.to(dtype) for weight in weights]


def moved(weight: Tensor, how: str) -> Tensor:
    if how == "a little":
        return weight + 1e-4 * drawn(weight.numel(), 99).view(weight.shape)
    changes = {
        "not": weight,
        "far": weight * 5 + 0.01,
        "to zero": weight * 0,
        "to one side": weight.abs(),
        "back": -weight + 0.003 * weight.sign(),
    }
    return changes[how]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_pass_after_pass_gives_the_references_bits_and_counts_changes(
    dtype: torch.dtype, threads: int
) -> None:
    torch.set_num_threads(threads)
    weights = network(dtype)
    shares = [reference.decide_share(weight, theta) for weight, theta in zip(weights, LAYERS, strict=True)]
    quantizer = requantizer(list(zip(LAYERS, shares, strict=True)), weights)
    assert isinstance(quantizer, CpuRequantizer)
    values = [torch.full_like(weight, 7.0) for weight in weights]
    before: list[Tensor] = []
    changes = torch.zeros(len(weights), dtype=torch.int64)
    for how in (
        "not",
        "a little",
        "a little",
        "far",
        "a little",
        "to one side",
        "to zero",
        "not",
        "back",
        "far",
    ):
        for weight in weights:
            weight.copy_(moved(weight, how))
        quantizer.run(weights, values)
        zeros = []
        for number, (weight, theta, share) in enumerate(zip(weights, LAYERS, shares, strict=True)):
            wanted = reference.quantize(weight, theta, share)
            assert torch.equal(values[number], wanted.values), (how, number)
            assert quantizer.clips(number) == wanted.clips
            assert torch.equal(quantizer.levels(number).nan_to_num(9), wanted.levels.nan_to_num(9))
            order = reference.in_memory_order(weight)
            codes = wanted.codes.permute(order).reshape(-1)
            assert torch.equal(quantizer.indices[number].long() - share.negative, codes.long())
            zeros.append(codes == 0)
        for number, (now, then) in enumerate(zip(zeros, before, strict=bool(before))):
            changes[number] += int((now != then).sum())
        before = zeros
        assert torch.equal(quantizer.changes, changes), how


@pytest.mark.parametrize("kind", [CpuRequantizer, fast.PlainRequantizer])
def test_rates_that_are_set_count_from_the_next_pass_on(kind: Any) -> None:
    weights = network(torch.float32)
    shares = [reference.decide_share(weight, theta) for weight, theta in zip(weights, LAYERS, strict=True)]
    quantizer = kind(list(zip(LAYERS, shares, strict=True)), weights)
    values = [torch.empty_like(weight) for weight in weights]
    quantizer.run(weights, values)
    for step in range(1, 4):
        rates = [min(0.999, theta.p + step * (1 - theta.p) / 4) for theta in LAYERS]
        quantizer.set_rates(rates)
        quantizer.run(weights, values)
        for value, weight, theta, p, share in zip(values, weights, LAYERS, rates, shares, strict=True):
            assert torch.equal(value, reference.quantize(weight, Theta(p, theta.b), share).values)


def test_the_plain_one_counts_and_gives_the_same() -> None:
    weights = network(torch.float32)
    shares = [reference.decide_share(weight, theta) for weight, theta in zip(weights, LAYERS, strict=True)]
    layers = list(zip(LAYERS, shares, strict=True))
    both = fast.PlainRequantizer(layers, weights), CpuRequantizer(layers, weights)
    values = (
        [torch.empty_like(weight) for weight in weights],
        [torch.empty_like(weight) for weight in weights],
    )
    for how in ("not", "a little", "far"):
        for weight in weights:
            weight.copy_(moved(weight, how))
        for quantizer, into in zip(both, values, strict=True):
            quantizer.run(weights, into)
        assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(both[0].indices, both[1].indices, strict=True))
    assert torch.equal(both[0].changes, both[1].changes)
    assert int(both[0].changes.sum()) > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layer", [1, 4])
def test_the_layer_with_a_number_that_is_none_is_named(bad: float, layer: int) -> None:
    weights = network(torch.float32)
    quantizer = requantizer([(theta, Share(1, 1)) for theta in LAYERS], weights)
    weights[layer].view(-1)[-1] = bad
    with pytest.raises(NonFinite) as refused:
        quantizer.run(weights, [torch.empty_like(weight) for weight in weights])
    assert refused.value.args == (layer,)
    with pytest.raises(ModelError, match="expected finite weights"):
        fast.quantize(weights[layer], Theta(0.5, 2))


def test_what_is_kept_is_less_than_two_bytes_per_weight() -> None:
    weight = drawn(3_000_000)
    quantizer = CpuRequantizer([(Theta(0.5, 3), Share(3, 4))], [weight])
    (layer,) = quantizer._layers
    kept = sum(value.nbytes for value in vars(layer).values() if isinstance(value, np.ndarray))
    assert kept < 1.5 * weight.numel()


def test_a_bracket_narrows_to_what_the_thresholds_move_and_is_left_only_by_jumps() -> None:
    weight, lo, hi = drawn(50_000), np.zeros(2, np.int32), np.zeros(2, np.int32)
    bits = weight.numpy().view(np.int32)
    selection.guess(bits, 0.6, lo, hi)
    results, inside = np.empty((1, 8), np.int64), np.empty((1, 2, 4096), np.int32)
    clips, largest, halves = np.empty(2, np.int32), np.empty(2, np.int32), np.zeros(2, np.int64)
    widths = []
    for _ in range(12):
        selection.survey(bits, lo, hi, results[0], inside[0])
        assert selection.settle(results, inside, 0.6, clips, largest) == 0
        selection.track(clips, halves, 0, len(bits), results, lo, hi)
        widths.append(int(hi[0]) - int(lo[0]))
        weight *= 1.0 + 1e-6
    assert widths[-1] < widths[0]
    assert 100 < results[0, selection.INSIDE] < 500
    weight *= 3.0
    selection.survey(bits, lo, hi, results[0], inside[0])
    assert selection.settle(results, inside, 0.6, clips, largest) == 3
