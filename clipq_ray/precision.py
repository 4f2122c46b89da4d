"""In which precision a training's forward and backward passes are computed on a device.

A CPU without instructions for bfloat16 emulates it: ResNet-20 at batch 128 takes 1.26 s of such a CPU for a step, 0.53 s in float32 (bench/LOG.md).
Not covered: weights, levels and evaluation, which are float32 everywhere.
"""

from __future__ import annotations

from typing import Any

import torch

_CPU_HAS = ("avx512_bf16", "amx_bf16", "bf16")
"""Any of these, by `torch.cpu.get_capabilities` (the last on ARM)."""


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of autocast for `precision` ("float32", "bfloat16", "auto"); "auto": bfloat16 where `device` computes in it, float32 elsewhere."""
    if precision == "auto":
        precision = "bfloat16" if _computes_in_bfloat16(device) else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


def exact_float32() -> None:
    """In this process float32 is float32 on a GPU too: the 10 bits of TF32, which convolutions take by default, turn images that a promise counts."""
    torch.backends.cudnn.allow_tf32 = False


def _computes_in_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # older releases of torch do not say, and float32 is right everywhere
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(found.get(name) for name in _CPU_HAS)
