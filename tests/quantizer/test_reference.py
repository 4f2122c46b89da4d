"""What the reference operator promises; the oracle beside it is the definition once more, slow and in exact fractions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from oracle import expected
from refusals import refused
from safetensors.torch import load_file
from torch import Tensor

import clipq_ray.quantizer.reference as reference
from clipq_ray.errors import ConfigError, ModelError
from clipq_ray.plan import Share, Theta
from clipq_ray.quantizer.reference import Quantized, decide_share, quantize, thresholds

FLOAT_MAX = float(np.finfo(np.float32).max)
WORKED = [0.1, -0.1, 0.7, -0.4, 0.7, -0.5, 0.9, -0.1, -1.0, -0.6, -1.6, 0.8, -0.5, 1.1, 0.2, 1.2]
WORKED_ZEROS = [0, 1, 7, 14]


# --- what is tried -------------------------------------------------------------------------------------------------------------

shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6)
thetas = st.builds(
    Theta, p=st.one_of(st.floats(0, 0.999), st.sampled_from([0.0, 0.25, 0.5])), b=st.integers(2, 8)
)
any_floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
usual_floats = st.floats(-1, 1, width=32, allow_subnormal=False).map(lambda x: 0.0 if abs(x) < 1e-3 else x)
lopsided_floats = st.builds(
    lambda x, power: float(np.float32(x * 2.0**power)), usual_floats, st.integers(-60, 0)
)
whole_floats = st.integers(-9, 9).map(float)


def arrays(elements: st.SearchStrategy[float]) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float32, shapes, elements=elements)


anything = st.one_of(*map(arrays, (usual_floats, whole_floats, lopsided_floats, any_floats)))
usual = st.one_of(arrays(usual_floats), arrays(whole_floats))
few = settings(max_examples=60, deadline=None)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def negatives(quantized: Quantized, share: Share) -> int:
    assert quantized.levels.shape == (share.negative + 1 + share.positive,)
    return share.negative


def looked_up(quantized: Quantized, share: Share) -> Tensor:
    return quantized.levels[quantized.codes.long() + negatives(quantized, share)]


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def same(one: Quantized, other: Quantized) -> bool:
    tensors = zip((one.values, one.codes, one.levels), (other.values, other.codes, other.levels), strict=True)
    return one.clips == other.clips and all(bits(a) == bits(b) and a.shape == b.shape for a, b in tensors)


# --- the paper's example -------------------------------------------------------------------------------------------------------


def test_the_papers_worked_example_holds_exactly_in_whole_numbers() -> None:
    weight = torch.tensor([round(10 * w) for w in WORKED], dtype=torch.float32)
    result = quantize(weight, Theta(0.25, 2))
    assert result.values.tolist() == [0, 0, 9, -5, 9, -5, 9, 0, -13, -5, -13, 9, -5, 9, 0, 9]
    assert result.codes.tolist() == [0, 0, 1, -1, 1, -1, 1, 0, -2, -1, -2, 1, -1, 1, 0, 1]
    assert result.levels.tolist() == [-13, -5, 0, 9]
    assert result.clips == (1.0, 2.0)
    assert thresholds(weight, 0.25) == (1.0, 2.0)
    assert decide_share(weight, Theta(0.25, 2)) == Share(2, 1)


def test_the_papers_worked_example_holds_as_floats() -> None:
    weight = torch.tensor(WORKED)
    result = quantize(weight, Theta(0.25, 2))
    assert [i for i, code in enumerate(result.codes.tolist()) if code == 0] == WORKED_ZEROS
    assert [i for i, value in enumerate(result.values.tolist()) if value == 0.0] == WORKED_ZEROS
    assert result.levels.tolist() == pytest.approx([-1.3, -0.5, 0.0, 0.9], abs=1e-6)
    assert result.clips == pytest.approx((0.1, 0.2), abs=1e-6)


# --- against the definition ----------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(anything, thetas)
def test_codes_clips_and_share_are_those_of_the_definition(array: np.ndarray, theta: Theta) -> None:
    weight = torch.from_numpy(array)
    want, result = expected(array.ravel(), theta), quantize(weight, theta)
    assert result.codes.flatten().tolist() == want.codes
    assert result.clips == want.clips == thresholds(weight, theta.p)
    assert decide_share(weight, theta) == want.share
    assert same(result, quantize(weight, theta, want.share))


@few
@given(anything, thetas, st.data())
def test_a_given_share_is_kept(array: np.ndarray, theta: Theta, data: st.DataObject) -> None:
    negative = data.draw(st.integers(0, theta.intervals))
    share = Share(negative, data.draw(st.integers(0, theta.intervals - negative)))
    result = quantize(torch.from_numpy(array), theta, share)
    assert result.codes.flatten().tolist() == expected(array.ravel(), theta, share).codes
    assert len(result.levels) == negatives(result, share) + 1 + share.positive


@settings(max_examples=200, deadline=None)
@given(anything, thetas)
def test_levels_are_those_of_the_definition_to_the_bit(array: np.ndarray, theta: Theta) -> None:
    want, result = expected(array.ravel(), theta), quantize(torch.from_numpy(array), theta)
    used = {code: float(result.levels[code + want.share.negative]) for code in want.levels}
    assert used == want.levels
    assert int((~result.levels.isnan()).sum()) == len(used) + 1


@settings(max_examples=200, deadline=None)
@given(anything, thetas)
def test_a_level_is_the_mean_of_its_weights_within_the_stated_bound(array: np.ndarray, theta: Theta) -> None:
    want, result = expected(array.ravel(), theta), quantize(torch.from_numpy(array), theta)
    largest = float(np.abs(array).max(initial=0.0))
    for code, mean in want.means.items():
        level = float(result.levels[code + want.share.negative])
        half_step = max(abs(level) * 2.0**-24, 2.0**-150)
        assert abs(level - mean) <= half_step * 1.0001 + largest * array.size * 2.0**-61


@few
@given(usual, thetas)
def test_levels_of_usual_weights_are_the_float64_means_to_a_millionth(
    array: np.ndarray, theta: Theta
) -> None:
    result, share = quantize(torch.from_numpy(array), theta), decide_share(torch.from_numpy(array), theta)
    codes = result.codes.numpy()
    for code in set(codes.ravel().tolist()) - {0}:
        mean = array[codes == code].mean(dtype=np.float64)
        assert float(result.levels[code + share.negative]) == pytest.approx(mean, rel=1e-6)


# --- what a user counts on -----------------------------------------------------------------------------------------------------


@few
@given(anything, thetas)
def test_values_are_the_levels_of_the_codes_and_at_most_two_to_the_b(array: np.ndarray, theta: Theta) -> None:
    weight = torch.from_numpy(array)
    result, share = quantize(weight, theta), decide_share(weight, theta)
    assert result.values.shape == result.codes.shape == weight.shape
    assert (result.values.dtype, result.codes.dtype, result.levels.dtype) == (
        torch.float32,
        torch.int16,
        torch.float32,
    )
    assert torch.equal(result.values, looked_up(result, share))
    assert len(set(result.codes.flatten().tolist()) - {0}) <= 2**theta.b - 1
    assert len({*result.values.flatten().tolist(), 0.0}) <= 2**theta.b


@few
@given(anything, thetas)
def test_codes_are_ordered_by_value_and_no_level_but_zero_is_zero(array: np.ndarray, theta: Theta) -> None:
    weight = torch.from_numpy(array)
    result, share = quantize(weight, theta), decide_share(weight, theta)
    used = result.levels[~result.levels.isnan()]
    assert (used[1:] > used[:-1]).all()
    assert float(result.levels[share.negative]) == 0.0
    order = weight.flatten().argsort()
    assert (result.codes.flatten()[order].diff() >= 0).all()
    assert torch.equal(result.values == 0, result.codes == 0)


@few
@given(anything, thetas)
def test_exactly_the_stated_fraction_of_each_sign_is_zero_and_more_only_by_ties(
    array: np.ndarray, theta: Theta
) -> None:
    result = quantize(torch.from_numpy(array), theta)
    zero = result.codes.numpy() == 0
    for side in (array < 0, array > 0):
        magnitudes = np.abs(array[side])
        k = math.floor(theta.p * magnitudes.size + 0.5)
        threshold = np.sort(magnitudes)[k - 1] if k else 0.0
        tied = int((magnitudes == threshold).sum()) - 1 if k else 0
        assert k <= int(zero[side].sum()) <= k + tied
        if len(set(magnitudes.tolist())) == magnitudes.size:
            assert int(zero[side].sum()) == k
    assert zero[array == 0].all()


def test_weights_on_an_edge_belong_to_the_interval_nearer_to_zero() -> None:
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, -1.0, -2.0, -3.0, -4.0])
    result = quantize(weight, Theta(0.0, 4), Share(4, 4))
    assert result.codes.tolist() == [1, 2, 3, 4, -1, -2, -3, -4]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_ties_of_the_sums_integers_round_to_even(sign: float) -> None:
    """Four elements up to 1 count in units of 2^-58: 1.5 and 2.5 of them are 2 each."""
    unit = 2.0**-58
    weight = sign * torch.tensor([1.0, 1.5 * unit, 2.5 * unit, 0.0])
    assert (sign * quantize(weight, Theta(0.0, 2)).values).tolist() == [1.0, 2 * unit, 2 * unit, 0.0]


def test_empty_intervals_hold_nan() -> None:
    result = quantize(torch.tensor([1.0, 8.0, -1.0]), Theta(0.0, 3), Share(1, 4))
    assert result.codes.tolist() == [1, 4, -1]
    assert result.levels.isnan().tolist() == [False, False, False, True, True, False]


# --- symmetries ----------------------------------------------------------------------------------------------------------------


@few
@given(anything, thetas, st.integers(0, 2**32))
def test_the_order_of_the_weights_changes_no_bit(array: np.ndarray, theta: Theta, seed: int) -> None:
    weight = torch.from_numpy(array).flatten()
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(seed))
    plain, shuffled = quantize(weight, theta), quantize(weight[order], theta)
    assert torch.equal(shuffled.codes, plain.codes[order])
    assert bits(shuffled.values) == bits(plain.values[order])
    assert bits(shuffled.levels) == bits(plain.levels)


@few
@given(anything, thetas)
def test_negated_weights_with_the_mirrored_share_are_mirrored(array: np.ndarray, theta: Theta) -> None:
    weight = torch.from_numpy(array)
    share = decide_share(weight, theta)
    plain, mirrored = (
        quantize(weight, theta, share),
        quantize(-weight, theta, Share(share.positive, share.negative)),
    )
    assert torch.equal(mirrored.codes, -plain.codes)
    assert torch.equal(mirrored.values, -plain.values)
    assert mirrored.clips == plain.clips[::-1]
    assert torch.equal(mirrored.levels.nan_to_num(), -plain.levels.flip(0).nan_to_num())


@few
@given(usual, thetas, st.integers(-40, 40))
def test_scaling_by_a_power_of_two_scales_the_result(array: np.ndarray, theta: Theta, power: int) -> None:
    weight, scale = torch.from_numpy(array), 2.0**power
    plain, scaled = quantize(weight, theta), quantize(weight * scale, theta)
    assert torch.equal(scaled.codes, plain.codes)
    assert torch.equal(scaled.values, plain.values * scale)
    assert scaled.clips == (plain.clips[0] * scale, plain.clips[1] * scale)


# --- where it is idempotent ----------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(anything, thetas)
def test_one_level_per_side_is_idempotent_without_further_pruning(array: np.ndarray, theta: Theta) -> None:
    """Bit for bit unless one side is so much smaller that the sums round its last bits away; then to the bound of a level."""
    once = quantize(torch.from_numpy(array), theta, Share(1, 1))
    twice = quantize(once.values, Theta(0.0, theta.b), Share(1, 1))
    assert torch.equal(twice.codes, once.codes)
    magnitudes = once.values.abs().double().flatten()
    largest = float(magnitudes.max()) if array.size else 0.0
    if (magnitudes[magnitudes > 0] >= largest * 2.0 ** (array.size.bit_length() - 38)).all():
        assert bits(twice.values) == bits(once.values)
    difference = (twice.values.double() - once.values.double()).abs()
    assert (
        difference <= magnitudes.view(array.shape) * 2.0**-23 + largest * array.size * 2.0**-61 + 2.0**-149
    ).all()


def test_levels_far_below_the_largest_weight_may_change_when_quantized_again() -> None:
    weight = torch.tensor([1 / 3, -1e12])
    assert not torch.equal(quantize(weight, Theta(0.0, 2), Share(1, 1)).values, weight)
    weight = torch.tensor([1 / 3, -1e6])
    assert torch.equal(quantize(weight, Theta(0.0, 2), Share(1, 1)).values, weight)


@few
@given(arrays(st.integers(-60, 60).map(float)))
def test_values_further_apart_than_the_intervals_are_wide_come_back_unchanged(array: np.ndarray) -> None:
    """255 intervals over a length of at most 120 are narrower than 1, the distance of whole numbers."""
    weight = torch.from_numpy(array)
    assert torch.equal(quantize(weight, Theta(0.0, 8)).values, weight)


@few
@given(st.integers(2, 3), st.floats(0, 0.9), arrays(usual_floats))
def test_its_own_output_comes_back_from_enough_intervals(b: int, p: float, array: np.ndarray) -> None:
    """At p = 0 it does wherever the levels of each side lie further apart than 255 intervals are wide."""
    once = quantize(torch.from_numpy(array), Theta(p, b)).values
    share = decide_share(once, Theta(0.0, 8))
    for side, intervals in ((-once[once < 0], share.negative), (once[once > 0], share.positive)):
        distinct = side.unique().double()
        if len(distinct) > 1 and distinct.diff().min() <= distinct.max() / intervals * 1.0001:
            return
    assert torch.equal(quantize(once, Theta(0.0, 8)).values, once)


def test_it_is_not_idempotent_in_general() -> None:
    """The outermost level lies below the largest weight, so the edge between the two intervals moves from 5 to 2.9."""
    theta, share = Theta(0.0, 2), Share(0, 2)
    once = quantize(torch.tensor([4.5, 4.5, *[5.25] * 7, 10.0]), theta, share)
    assert sorted(set(once.codes.tolist())) == [1, 2]
    assert set(quantize(once.values, theta, share).codes.tolist()) == {2}


def test_pruning_again_prunes_more() -> None:
    once = quantize(torch.arange(1.0, 9.0), Theta(0.5, 3)).values
    assert int((once == 0).sum()) == 4
    assert int((quantize(once, Theta(0.5, 3)).values == 0).sum()) == 6


# --- memory, threads, devices --------------------------------------------------------------------------------------------------


@few
@given(hnp.arrays(np.float32, (4, 3, 2, 5), elements=usual_floats), thetas)
def test_the_memory_layout_changes_no_bit_and_is_kept(array: np.ndarray, theta: Theta) -> None:
    weight = torch.from_numpy(array)
    plain = quantize(weight, theta)
    last = quantize(weight.contiguous(memory_format=torch.channels_last), theta)
    assert same(last, plain)
    assert last.values.is_contiguous(memory_format=torch.channels_last)
    assert plain.values.is_contiguous()
    assert same(quantize(weight.permute(3, 1, 0, 2), theta), _permuted(plain, (3, 1, 0, 2)))
    wide = torch.full((8, 3, 2, 10), math.nan)
    wide[::2, :, :, 1::2] = weight
    assert same(quantize(wide[::2, :, :, 1::2], theta), plain)


def _permuted(result: Quantized, order: tuple[int, ...]) -> Quantized:
    return Quantized(result.values.permute(order), result.codes.permute(order), result.levels, result.clips)


def test_an_expanded_tensor_counts_every_element() -> None:
    row = torch.tensor([0.5, -0.25, 1.0])
    assert same(quantize(row.expand(7, 3), Theta(0.3, 2)), quantize(row.repeat(7, 1), Theta(0.3, 2)))


def large(n: int = 300_000) -> Tensor:
    """More than one chunk and enough to be sampled; heavy tails and ties."""
    generator = torch.Generator().manual_seed(n)
    weight = torch.randn(n, generator=generator) ** 3
    weight[::7] = weight[0]
    return weight


@pytest.mark.parametrize("theta", [Theta(0.6, 2), Theta(0.05, 4), Theta(0.99, 8)])
def test_threads_and_chunks_change_no_bit(theta: Theta, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = large()
    torch.set_num_threads(1)
    one = quantize(weight, theta)
    torch.set_num_threads(2)
    assert same(quantize(weight, theta), one)
    monkeypatch.setattr(reference, "_CHUNK", 1000)
    assert same(quantize(weight, theta), one)


@pytest.mark.parametrize("theta", [Theta(0.6, 2), Theta(0.05, 4), Theta(0.99, 8)])
def test_the_path_of_other_devices_gives_the_same_bits(theta: Theta, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = large()
    plain = quantize(weight, theta)
    monkeypatch.setattr(reference, "_on_cpu", lambda _: False)
    assert same(quantize(weight, theta), plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_gives_the_same_bits() -> None:
    weight, theta = large(), Theta(0.6, 4)
    there = quantize(weight.cuda(), theta)
    assert there.values.is_cuda
    assert same(
        Quantized(there.values.cpu(), there.codes.cpu(), there.levels.cpu(), there.clips),
        quantize(weight, theta),
    )


ARRANGEMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as drawn": lambda w: w,
    "sorted": lambda w: w.sort().values,
    "descending": lambda w: w.sort(descending=True).values,
    "every 16th an outlier": lambda w: torch.where(torch.arange(len(w)) % 16 == 0, w * 1e6, w),
    "two values": lambda w: w.sign(),
    "mostly zero": lambda w: w * (torch.arange(len(w)) % 50 == 3),
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("p", [0.0, 1e-5, 0.3, 0.7, 0.99999])
def test_selection_in_large_tensors_is_exact_whatever_the_sample_shows(arrangement: str, p: float) -> None:
    weight = ARRANGEMENTS[arrangement](large(100_000))
    array = weight.numpy()
    wanted = []
    for side in (-array[array < 0], array[array > 0]):
        k = math.floor(p * side.size + 0.5)
        wanted.append(float(np.sort(side)[k - 1]) if k else 0.0)
    assert thresholds(weight, p) == tuple(wanted)


# --- odd tensors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)])
def test_an_empty_tensor_stays_empty(shape: tuple[int, ...]) -> None:
    result = quantize(torch.zeros(shape), Theta(0.5, 2))
    assert result.values.shape == result.codes.shape == shape
    assert result.levels.tolist() == [0.0]
    assert result.clips == (0.0, 0.0)
    assert decide_share(torch.zeros(shape), Theta(0.5, 2)) == Share(0, 0)


@pytest.mark.parametrize(("p", "value"), [(0.0, 3.0), (0.49, 3.0), (0.5, 0.0)])
def test_a_single_weight_of_any_rank_is_itself_or_zero(p: float, value: float) -> None:
    for weight in (torch.tensor(3.0), torch.tensor([3.0]), torch.tensor([[[3.0]]])):
        result = quantize(weight, Theta(p, 3))
        assert result.values.shape == weight.shape
        assert result.values.item() == value


def test_weights_of_one_sign_use_all_intervals_on_their_side() -> None:
    weight = torch.linspace(0.1, 1, 100)
    assert decide_share(weight, Theta(0.3, 3)) == Share(0, 7)
    assert decide_share(-weight, Theta(0.3, 3)) == Share(7, 0)
    assert len(quantize(weight, Theta(0.3, 3)).values.unique()) == 8


def test_all_zero_weights_stay_zero_without_a_sign() -> None:
    weight = torch.tensor([0.0, -0.0, 0.0])
    result = quantize(weight, Theta(0.5, 2))
    assert result.codes.tolist() == [0, 0, 0]
    assert not result.values.signbit().any()
    assert not any(math.copysign(1, clip) < 0 for clip in result.clips)


@pytest.mark.parametrize("value", [0.3, -7e-3])
def test_a_constant_tensor_is_kept_until_a_weight_must_go_and_then_ties_take_all(value: float) -> None:
    weight = torch.full((5, 2), value)
    assert torch.equal(quantize(weight, Theta(0.04, 2)).values, weight)
    assert quantize(weight, Theta(0.05, 2)).values.count_nonzero() == 0


def test_a_side_that_became_non_empty_after_the_share_was_decided_is_clipped_to_zero() -> None:
    theta = Theta(0.0, 2)
    share = decide_share(torch.tensor([1.0, 2.0, 3.0]), theta)
    result = quantize(torch.tensor([1.0, -2.0, -5.0, 3.0]), theta, share)
    assert share == Share(0, 3)
    assert result.values.tolist() == [1.0, 0.0, 0.0, 3.0]
    assert result.clips == (5.0, 0.0)


def test_denormal_weights_are_kept_exactly() -> None:
    tiny = float(np.finfo(np.float32).smallest_subnormal)
    weight = torch.tensor([tiny, 2 * tiny, 3 * tiny, -tiny, -3 * tiny])
    assert torch.equal(quantize(weight, Theta(0.0, 4)).values, weight)


def test_weights_near_the_largest_float_do_not_overflow() -> None:
    weight = torch.full((1000,), FLOAT_MAX)
    weight[::2] = -FLOAT_MAX
    result = quantize(weight, Theta(0.0, 2))
    assert torch.equal(result.values, weight)
    assert quantize(weight, Theta(0.9, 2)).values.count_nonzero() == 0


def test_a_huge_outlier_leaves_tiny_levels_inside_their_interval() -> None:
    weight = torch.tensor([1e-30, 2e-30, FLOAT_MAX])
    result = quantize(weight, Theta(0.4, 2))
    assert result.codes.tolist() == [0, 1, 3]
    assert 1e-30 < result.values[1] < FLOAT_MAX / 3


# --- types and refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_the_codes_and_levels_of_the_widened_weights(dtype: torch.dtype) -> None:
    weight = large(2000).clamp(-100, 100).to(dtype)
    half, full = quantize(weight, Theta(0.5, 4)), quantize(weight.float(), Theta(0.5, 4))
    assert half.values.dtype == dtype
    assert torch.equal(half.codes, full.codes)
    assert bits(half.levels) == bits(full.levels)
    assert torch.equal(half.values, full.values.to(dtype))
    assert thresholds(weight, 0.5) == full.clips
    assert len(half.values.unique()) == len(full.values.unique())


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64, torch.bool])
def test_other_types_are_refused_in_one_line(dtype: torch.dtype) -> None:
    with refused(ModelError, match=f"expected weights of float32.*{dtype}"):
        quantize(torch.ones(3).to(dtype), Theta(0.5, 2))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("call", [lambda w: quantize(w, Theta(0.5, 2)), lambda w: thresholds(w, 0.5)])
def test_nan_and_infinity_are_refused_in_one_line(bad: float, call: Callable[[Tensor], object]) -> None:
    weight = torch.ones(6)
    weight[4] = bad
    wanted = "1 NaN and 0 infinite of 6" if math.isnan(bad) else "0 NaN and 1 infinite of 6"
    with refused(ModelError, match=wanted):
        call(weight)


def test_nan_is_refused_when_the_share_is_decided() -> None:
    with pytest.raises(ModelError, match="1 NaN"):
        decide_share(torch.tensor([math.nan]), Theta(0.5, 2))


def test_a_share_of_more_intervals_than_the_bit_width_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"at most 3 intervals at b = 2, got 2 \+ 2"):
        quantize(torch.ones(3), Theta(0.5, 2), Share(2, 2))


@pytest.mark.parametrize("p", [-0.1, 1.0, math.nan])
def test_a_pruning_rate_outside_its_range_is_refused(p: float) -> None:
    with pytest.raises(ConfigError, match="pruning rate"):
        thresholds(torch.ones(3), p)


def test_the_weight_is_neither_changed_nor_part_of_a_graph() -> None:
    weight = torch.nn.Parameter(torch.tensor(WORKED))
    before = weight.detach().clone()
    result = quantize(weight, Theta(0.25, 2))
    result.values.zero_()
    assert torch.equal(weight.detach(), before)
    assert not result.values.requires_grad


def test_real_weights_give_the_definitions_codes(shared: Path) -> None:
    weight = load_file(shared / "weights" / "resnet20-cifar10.safetensors")["layer3.0.conv1.weight"]
    result = quantize(weight, Theta(0.6, 3))
    want = expected(weight.numpy().ravel(), Theta(0.6, 3))
    assert result.codes.flatten().tolist() == want.codes
    assert int((result.codes == 0).sum()) == pytest.approx(0.6 * weight.numel(), abs=1)
