"""Promises of `--precision`: what a device computes in, nothing that it would only emulate, and float32 that is float32."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from clipq_ray import precision
from clipq_ray.precision import autocast_dtype, exact_float32, own_float32

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


def by_parts() -> list[str]:
    return [part.fp32_precision for part in precision._PARTS]


def medium() -> None:
    torch.set_float32_matmul_precision("medium")


def products_alone() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def convolutions_of_a_cpu() -> None:
    backends: Any = torch.backends
    backends.mkldnn.conv.fp32_precision = "bf16"


def all_at_once() -> None:
    torch.backends.fp32_precision = "tf32"


@pytest.fixture
def undone() -> Iterator[None]:
    """Other tests find what they would have found."""
    whole = torch.backends.fp32_precision
    with own_float32():
        yield
        torch.backends.fp32_precision = whole


@pytest.mark.usefixtures("undone")
@pytest.mark.parametrize("wanted", [medium, products_alone, convolutions_of_a_cpu, all_at_once, lambda: None])
def test_float32_is_exact_whatever_a_caller_wants_and_his_again_afterwards(
    wanted: Callable[[], None],
) -> None:
    wanted()
    before = by_parts()
    with own_float32():
        exact_float32()
        assert set(by_parts()) == {"ieee"}
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
    assert by_parts() == before
    torch.backends.fp32_precision = "ieee"  # who follows that still does
    assert set(by_parts()) == {"ieee"} or wanted is not all_at_once


@pytest.mark.usefixtures("undone")
def test_products_of_a_caller_of_medium_precision_have_all_their_bits() -> None:
    torch.set_float32_matmul_precision("medium")
    exact_float32()
    one, other = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    product = (one.to(device) @ other.to(device)).cpu().double()
    torch.testing.assert_close(product, one.double() @ other.double(), rtol=0, atol=1e-4)
