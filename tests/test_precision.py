"""Promises of `--precision`: what a device computes in, and nothing that it would only emulate."""

from pathlib import Path

import pytest
import torch

from clipq_ray.precision import autocast_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_what_is_asked_for_is_taken(name: str, dtype: torch.dtype) -> None:
    assert autocast_dtype(name, CPU) == dtype


@pytest.mark.skipif(
    not Path("/proc/cpuinfo").exists(), reason="needs the kernel's list of a CPU's instructions"
)
def test_auto_is_what_the_kernel_says_of_this_cpu() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    native = flags & {"avx512_bf16", "amx_bf16", "bf16"}
    assert autocast_dtype("auto", CPU) == (torch.bfloat16 if native else torch.float32)


def test_a_release_of_torch_that_does_not_say_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert autocast_dtype("auto", CPU) == torch.float32


@pytest.mark.parametrize(
    ("found", "dtype"),
    [
        ({"avx512_f": True, "avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"neon": True, "bf16": True}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": False}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_auto_looks_for_instructions(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, bool], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert autocast_dtype("auto", CPU) == dtype
