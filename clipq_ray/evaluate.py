"""Top-1, top-5 and loss of a network on a split; batch-norm statistics anew.

Not covered: evaluation over many devices; one process evaluates.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from clipq_ray import seeds
from clipq_ray.data import Split, batches
from clipq_ray.errors import DataError, RunError

log = logging.getLogger(__name__)
_Z95 = 1.959963984540054  # the normal's 97.5 % point


@dataclass(frozen=True)
class Evaluation:
    """What a network scored on `n` images; fractions in 0..1; `predictions`: int64 (n,)."""

    n: int
    top1: float
    top5: float
    loss: float
    predictions: npt.NDArray[np.int64]

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of top-1, as fractions."""
        n, p, z = self.n, self.top1, _Z95
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)


def logits(output: Any) -> Tensor:
    """The class scores (n, classes) in what a network returned: a tensor, or a tuple or mapping with auxiliary outputs."""
    if isinstance(output, Mapping):
        output = output["logits"] if "logits" in output else next(iter(output.values()))
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple):
        output = output[0]
    assert isinstance(output, Tensor)
    return output


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    split: Split,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score `model` on all images of `split`, in eval mode; the mode is restored.

    A batch that does not fit the device's memory is halved, said once. `DataError` where a label lies beyond the network's outputs.
    """
    was_training = model.training
    model.eval()
    n, top1, top5, loss = len(split), 0, 0, 0.0
    predictions = torch.empty(n, dtype=torch.int64)
    try:
        indices = torch.arange(n).split(batch_size)
        done = 0
        for images, labels in batches(split, indices, lambda step: None):
            scores = _forward(model, images, torch.device(device)).float().cpu()
            _refuse_labels(labels, scores.shape[1])
            best = scores.topk(min(5, scores.shape[1]), dim=1).indices
            hits = best == labels[:, None]
            top1, top5 = top1 + int(hits[:, 0].sum()), top5 + int(hits.any(dim=1).sum())
            loss += float(nn.functional.cross_entropy(scores.double(), labels, reduction="sum"))
            predictions[done : done + len(labels)] = best[:, 0]
            done += len(labels)
            if progress:
                progress(done, n)
    finally:
        model.train(was_training)
    return Evaluation(n, top1 / n, top5 / n, loss / n, predictions.numpy())


def _forward(model: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    try:
        return logits(model(images.to(device)))
    except torch.OutOfMemoryError:
        if len(images) == 1:
            raise RunError("one image does not fit the device's memory; use a larger device") from None
        log.warning("evaluation: %d images do not fit the device's memory; halved", len(images))
    half = math.ceil(len(images) / 2)
    return torch.cat([_forward(model, part, device) for part in images.split(half)])


def _refuse_labels(labels: Tensor, outputs: int) -> None:
    if len(labels) and int(labels.max()) >= outputs:
        raise DataError(
            f"expected labels below the network's {outputs} outputs, got label {int(labels.max())}; "
            "use the data that the network was trained for, or --model-args with its number of classes"
        )


@torch.no_grad()
def reestimate_batch_norm(
    model: nn.Module, split: Split, *, images: int, batch_size: int, seed: int, device: torch.device | str = "cpu"
) -> None:
    """Running statistics of every batch norm anew, as a cumulative average over shuffled images augmented as in training.

    Only batch norms are in training mode; modes and momenta are restored. Nothing happens without batch norm.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    order = split.order(seeds.generator(seed, "batch norm", "order"))[:images]
    parts = [part for part in order.split(batch_size) if len(part) > 1]
    for pixels, _ in batches(split, parts, lambda step: seeds.generator(seed, "batch norm", "augment", step)):
        model(pixels.to(device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for module, mode in modes.items():
        module.training = mode
