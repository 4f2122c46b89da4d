"""A network as it is trained: in which memory layout, and which of its modules as in evaluation.

Channels last is faster for convolutions on CPUs and GPUs alike. Shapes and values are the same, the order of sums and so the last bits are not: a training keeps
to its end the layout that it began in. Not covered: evaluation, which decides for itself (`evaluate.Forward`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from clipq_ray.memory import ran_out

PLAIN, FAST = torch.contiguous_format, torch.channels_last


def in_layout(images: Tensor, layout: torch.memory_format) -> Tensor:
    """`images` in `layout`, where they have height and width."""
    return images.contiguous(memory_format=layout) if images.dim() == 4 else images


def takes_fast(model: nn.Module, step: Callable[[], object]) -> bool:
    """Whether a step of `model` works in channels last, in which it is left, as is its mode; else it is left in the plain layout.

    `step`: forward and backward of a few images in channels last. A `view` of activations does not take them, parameters of five dimensions (3-D convolutions) cannot be laid out so.
    Errors that the plain layout has too come again from there. Gradients and buffers are as before.
    """
    with without_effect(model):
        try:
            model.to(memory_format=FAST)
            step()
        except Exception as error:
            if not ran_out(error):  # what does not fit in memory is found out by smaller steps
                model.to(memory_format=PLAIN)
                return False
    return True


@contextmanager
def without_effect(model: nn.Module) -> Iterator[None]:
    """Behind it gradients are gone and buffers as they were."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)


def training_mode(model: nn.Module) -> None:
    """All of it, but for batch norms that a user has frozen: their statistics stay with their scale and shift."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and _frozen(module):
            module.eval()


def _frozen(module: nn.Module) -> bool:
    """Whether it has parameters, and none that is trained."""
    parameters = list(module.parameters(recurse=False))
    return bool(parameters) and not any(one.requires_grad for one in parameters)
