"""The Triton kernels give the bits of the reference: by Triton's interpreter on a CPU, and compiled where there is a GPU.

The interpreter has to be chosen before Triton is imported, so the checks below run in a process of their own, one for all (`__main__`, with the device). What it
cannot show, and a GPU can: speed, races between programs, and what a compiler would fuse.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clipq_ray.plan import Share, Theta

pytest.importorskip("triton", reason="Triton comes with torch for GPUs")

CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def drawn(n: int, seed: int = 0) -> Tensor:
    made = torch.randn(n, generator=torch.Generator("cpu").manual_seed(seed), device="cpu") * 0.02
    return made.to(torch.get_default_device())


def compare(
    thetas: list[Theta],
    weights: list[Tensor],
    shares: list[Share] | None = None,
    passes: int = 1,
    steady: bool = False,
) -> None:
    """Several layers in one object, pass after pass; every pass against the reference, changes counted by hand. `steady`: rates stay and weights move little, as in
    training, so that thresholds are found near the last ones."""
    from clipq_ray.quantizer import on_gpu, reference

    shares = shares or [reference.decide_share(w, theta) for w, theta in zip(weights, thetas, strict=True)]
    largest = max(weight.numel() for weight in weights)
    quantizer = on_gpu.GpuRequantizer(
        list(zip(thetas, shares, strict=True)), weights, block=4096 if largest < 20_000 or steady else 65_536
    )
    changes = torch.zeros(len(weights), dtype=torch.int64)
    zeros: list[Tensor] = []
    values = [torch.full_like(weight, 7.0) for weight in weights]
    for number in range(passes):
        if number and not steady:  # rates may change between passes
            thetas = [Theta((theta.p + 0.4) % 0.99, theta.b) for theta in thetas]
            quantizer.set_rates([theta.p for theta in thetas])
        quantizer.run(weights, values)
        quantizer.check()
        assert not steady or bool(quantizer._missed.any()) == (number == 0)
        now = []
        for layer, (weight, theta, share) in enumerate(zip(weights, thetas, shares, strict=True)):
            wanted = reference.quantize(weight, theta, share)
            codes = wanted.codes.permute(reference.in_memory_order(weight)).reshape(-1)
            where = (number, layer, theta, weight.dtype, tuple(weight.shape))
            assert torch.equal(quantizer.indices[layer].int() - share.negative, codes.int()), where
            assert torch.equal(quantizer.levels(layer).nan_to_num(9), wanted.levels.nan_to_num(9)), where
            assert quantizer.clips(layer) == wanted.clips, where
            assert torch.equal(values[layer], wanted.values), where
            now.append(codes == 0)
        if zeros:
            changes += torch.stack([(a != b).sum() for a, b in zip(zeros, now, strict=True)])
        assert torch.equal(quantizer.changes, changes)
        zeros = now
        for layer, weight in enumerate(weights):
            factor = 1.0 if steady else [1.0, -1.0, 3.0][number % 3]
            weight.mul_(factor).add_(
                (1e-2 if steady else 1e-3)
                * drawn(weight.numel(), 50 + number + layer).view(weight.shape).to(weight.dtype)
            )


@check
def sizes_and_types_in_one_network() -> None:
    thetas = [
        Theta(0.6, 2),
        Theta(0.3, 4),
        Theta(0.0, 3),
        Theta(0.9, 8),
        Theta(0.5, 5),
        Theta(0.5, 2),
        Theta(0.999, 2),
    ]
    weights = [
        drawn(5000), drawn(3001, 1).bfloat16(), drawn(6 * 5 * 3 * 3, 2).view(6, 5, 3, 3).to(memory_format=torch.channels_last),
        drawn(9000, 3), drawn(4097, 4).half(), torch.empty(0, 4), drawn(1, 5),
    ]  # fmt: skip
    compare(thetas, weights, passes=4)


@check
def thresholds_near_the_last_ones() -> None:
    thetas = [Theta(0.6, 2), Theta(0.3, 4), Theta(0.9, 8), Theta(0.97, 2)]
    weights = [drawn(30_000), drawn(3001, 1).bfloat16(), drawn(9000, 3), drawn(4097, 4)]
    compare(thetas, weights, passes=4, steady=True)


@check
def odd_tensors() -> None:
    exponents = torch.linspace(-149, 127, 6000)
    tails = (2.0 ** exponents.double()).float() * torch.where(torch.arange(6000) % 2 == 0, 1.0, -1.0)
    narrow = 1.0 + 1e-6 * torch.rand(3000, generator=torch.Generator("cpu").manual_seed(1), device="cpu").to(
        drawn(1).device
    )
    odd = {
        "zero": torch.zeros(100), "minus zero": -torch.zeros(9), "equal": torch.full((70,), 0.3), "negative": -drawn(2000).abs(),
        "positive": drawn(2000).abs(), "two values": drawn(3000).sign(), "tails": tails, "narrow": narrow, "largest": tails * 0 + 3.4e38,
        "whole": (drawn(3000) * 200).round(), "denormal": drawn(3000) * 1e-42, "sorted": drawn(4000).sort().values,
    }  # fmt: skip
    for theta in (Theta(0.0, 2), Theta(0.5, 3), Theta(0.25, 6), Theta(0.95, 8)):
        compare([theta] * len(odd), [weight.clone() for weight in odd.values()])


@check
def shares_that_were_handed_in() -> None:
    shares = [Share(0, 3), Share(3, 0), Share(1, 1), Share(0, 0), Share(200, 55)]
    thetas = [Theta(0.4, 2), Theta(0.4, 2), Theta(0.4, 2), Theta(0.4, 2), Theta(0.1, 8)]
    compare(thetas, [drawn(3000, seed) for seed in range(5)], shares, passes=2)


@check
def a_hundred_thousand_weights() -> None:
    compare([Theta(0.7, 3), Theta(0.2, 7)], [drawn(100_000), drawn(120_000, 1)], passes=2)


@check
def a_million_weights() -> None:
    compare([Theta(0.8, 4)], [drawn(1_000_000)])


@check
def numbers_that_are_none_are_flagged_and_touch_no_other_layer() -> None:
    from clipq_ray.quantizer import NonFinite, on_gpu, reference

    for bad in (float("nan"), float("inf"), -float("inf")):
        weights = [drawn(500, seed) for seed in range(3)]
        weights[1][7] = bad
        layers = [(Theta(0.5, 3), Share(3, 4))] * 3
        quantizer = on_gpu.GpuRequantizer(layers, weights)
        values = [torch.empty_like(weight) for weight in weights]
        quantizer.run(weights, values)
        with pytest.raises(NonFinite) as refused:
            quantizer.check()
        assert refused.value.args == (1,)
        for layer in (0, 2):
            assert torch.equal(values[layer], reference.quantize(weights[layer], *layers[layer]).values)


@check
def what_it_cannot_do_is_refused() -> None:
    from clipq_ray.errors import ModelError
    from clipq_ray.quantizer import on_gpu

    layer = [(Theta(0.5, 2), Share(1, 2))]
    with pytest.raises(ModelError, match="without gaps"):
        on_gpu.GpuRequantizer(layer, [drawn(100)[::2]])
    with pytest.raises(ModelError, match="at most 2,147,483,647 weights"):
        on_gpu.GpuRequantizer(layer, [torch.empty(2**31, device="meta")])


@check
def a_network_without_layers_is_nothing_to_do() -> None:
    from clipq_ray.quantizer import on_gpu

    quantizer = on_gpu.GpuRequantizer([], [])
    quantizer.run([], [])
    quantizer.check()


@check
def the_number_of_launches_does_not_depend_on_the_layers_and_nothing_is_allocated_again() -> None:
    from clipq_ray.quantizer import on_gpu

    weights = [drawn(100 + layer, layer) for layer in range(9)]
    quantizer = on_gpu.GpuRequantizer([(Theta(0.5, 2), Share(1, 2))] * 9, weights)
    values = [torch.empty_like(weight) for weight in weights]
    quantizer.run(weights, values)
    held = {name: value.data_ptr() for name, value in vars(quantizer).items() if isinstance(value, Tensor)}
    quantizer.run(values, weights)
    quantizer.run(weights, values)
    assert len(quantizer._addresses) == 2
    assert held == {
        name: value.data_ptr() for name, value in vars(quantizer).items() if isinstance(value, Tensor)
    }
    assert len(quantizer._groups) == 1


@check
def the_trial_kernel_runs() -> None:
    from clipq_ray.quantizer import on_gpu

    on_gpu.try_out(torch.get_default_device())


def said_on(device: str) -> dict[str, str]:
    """What every check said: one process runs them all."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "TRITON_INTERPRET": "1" if device == "cpu" else "0"}  # fmt: skip
    ended = subprocess.run(
        [sys.executable, __file__, device], capture_output=True, text=True, timeout=400, check=False, env=environment,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    lines = [line.partition(": ") for line in ended.stdout.splitlines() if ": " in line]
    assert lines, ended.stderr[-3000:]
    return {name: said for name, _, said in lines}


@pytest.fixture(scope="module")
def outcome() -> dict[str, str]:
    return said_on("cpu")


@pytest.fixture(scope="module")
def outcome_of_a_gpu() -> dict[str, str]:
    return said_on("cuda")


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu(name: str, outcome_of_a_gpu: dict[str, str]) -> None:
    assert outcome_of_a_gpu.get(name) == "ok"


@pytest.mark.parametrize("name", CHECKS)
def test_by_the_interpreter(name: str, outcome: dict[str, str]) -> None:
    assert outcome.get(name) == "ok"


class OnGpu:
    """Stands for a tensor on a device that this machine lacks."""

    device = torch.device("cuda")
    shape = torch.Size([3])

    def numel(self) -> int:
        return 3


@pytest.fixture(autouse=True)
def nothing_known() -> None:
    """What a GPU lacks is asked once per process."""
    from clipq_ray.quantizer import fast

    fast.slow_on.cache_clear()
    fast._warn.cache_clear()


def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "clipq_ray.quantizer.on_gpu", None)


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel's launch ends in Triton's own look for a compiler, which finds none."""
    from triton.runtime import build

    from clipq_ray.quantizer import on_gpu

    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    if not hasattr(build, "_find_compiler"):
        pytest.skip("this Triton looks for its compiler in the middle of a build")
    monkeypatch.setattr(on_gpu, "try_out", lambda device: build._find_compiler("c"))


def without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    from clipq_ray.quantizer import on_gpu

    def refused(device: torch.device) -> None:
        raise PermissionError("[Errno 13] Permission denied: '/.triton'")

    monkeypatch.setattr(on_gpu, "try_out", refused)


@pytest.mark.parametrize("lack", [without_triton, without_compiler, without_a_cache])
def test_where_kernels_cannot_be_made_there_is_one_warning_and_plain_torch(
    monkeypatch: pytest.MonkeyPatch, lack: Callable[[pytest.MonkeyPatch], None]
) -> None:
    from clipq_ray.quantizer import fast

    lack(monkeypatch)
    monkeypatch.setattr(fast, "PlainRequantizer", lambda layers, weights: "plain")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = [fast.requantizer([(Theta(0.5, 2), Share(1, 2))], [OnGpu()]) for _ in range(2)]  # type: ignore[list-item]
    assert made == ["plain", "plain"]
    assert len(caught) == 1
    assert "gcc" in str(caught[0].message)
    assert fast.slow_on(OnGpu.device) == str(caught[0].message)
    assert fast.slow_on(torch.device("cpu")) is None


def test_another_failure_of_a_gpu_is_not_taken_for_a_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    from clipq_ray.quantizer import fast, on_gpu

    def broken(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(on_gpu, "try_out", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        fast.requantizer([(Theta(0.5, 2), Share(1, 2))], [OnGpu()])  # type: ignore[list-item]


if __name__ == "__main__":
    torch.set_default_device(sys.argv[1])
    for name_, function_ in CHECKS.items():
        try:
            function_()
            print(f"{name_}: ok", flush=True)
        except Exception as error:  # the parent process shows it
            print(f"{name_}: {type(error).__name__} {' '.join(str(error).split())[:500]}", flush=True)
