"""Copies to a device behind which the host goes on.

A copy from ordinary memory waits for all that the device was given before: four of them in every step left a GPU idle while Python prepared the next one.
Not covered: copies back, which somebody waits for anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; from a CPU to a GPU by way of pinned memory, which torch keeps until the copy is done."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
