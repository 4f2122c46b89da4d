"""In which precision a training's forward and backward passes are computed on a device, and that float32 is float32.

A CPU without instructions for bfloat16 emulates it: ResNet-20 at batch 128 takes 1.26 s of such a CPU for a step, 0.53 s in float32 (bench/LOG.md).
Not covered: weights, levels and evaluation, which are float32 everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.backends import cuda, cudnn, mkldnn

_CPU_HAS = ("avx512_bf16", "amx_bf16", "bf16")
"""Any of these, by `torch.cpu.get_capabilities` (the last on ARM)."""

_CUDNN, _MKLDNN = cast(Any, cudnn), cast(Any, mkldnn)  # torch declares no types of their parts
_PARTS: tuple[Any, ...] = (
    cuda.matmul, _CUDNN.conv, _CUDNN.rnn, _MKLDNN.matmul, _MKLDNN.conv, _MKLDNN.rnn,
)  # fmt: skip
"""What may compute float32 with fewer bits, on a GPU and on a CPU."""


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of autocast for `precision` ("float32", "bfloat16", "auto"); "auto": bfloat16 where `device` computes in it, float32 elsewhere."""
    if precision == "auto":
        precision = "bfloat16" if _computes_in_bfloat16(device) else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


def exact_float32() -> None:
    """In this process float32 is float32, whatever a caller has set: the 10 bits of TF32, which convolutions on a GPU take by default, and the 7 of
    bfloat16 turn images that a promise counts."""
    cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    for part in _PARTS:  # what is set for each of them, or for all (`torch.backends.fp32_precision`), counts for more than these two
        part.fp32_precision = "ieee"


@contextmanager
def own_float32() -> Iterator[None]:
    """How float32 is computed afterwards is as it was before, whatever `exact_float32` does inside."""
    convolutions, products = _said(lambda: cudnn.allow_tf32), _said(torch.get_float32_matmul_precision)
    parts = [part.fp32_precision for part in _PARTS]
    try:
        yield
    finally:
        if convolutions is not None:
            cudnn.allow_tf32 = convolutions
        if products is not None:
            torch.set_float32_matmul_precision(products)
        for part, before in zip(_PARTS, parts, strict=True):
            part.fp32_precision = "none"  # so that what was inherited is inherited again
            if part.fp32_precision != before:
                part.fp32_precision = before


def _said(setting: Callable[[], Any]) -> Any:
    """A setting for several parts at once; None where they differ by what is set for each, of which torch refuses to make one."""
    try:
        return setting()
    except RuntimeError:
        return None


def _computes_in_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # older releases of torch do not say, and float32 is right everywhere
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(found.get(name) for name in _CPU_HAS)
