"""Top-1, top-5 and loss of a network on a split; batch-norm statistics anew.

Not covered: evaluation over many devices; one process evaluates.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from clipq_ray import seeds
from clipq_ray.data import Split, batches
from clipq_ray.errors import DataError, ModelError, RunError

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
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.dim() != 2:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ModelError(
            f"expected class scores (n, classes) from the network, got {got}; use a classification network"
        )
    return output


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    """Every module's mode afterwards as before: a network in training may hold modules that are frozen in eval mode."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    split: Split,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score `model` on all images of `split`, in eval mode; every module's mode is restored.

    A batch that does not fit the device's memory is halved, said once. `DataError` where a label lies beyond the network's outputs.
    """
    n, top1, top5, loss, done = len(split), 0, 0, 0.0, 0
    predictions = torch.empty(n, dtype=torch.int64)
    forward = _Forward(model, torch.device(device), batch_size)
    with _modes_kept(model):
        model.eval()
        for images, labels in batches(split, torch.arange(n).split(batch_size), lambda step: None):
            scores = forward(images).float().cpu()
            _refuse_labels(labels, scores.shape[1])
            best = scores.topk(min(5, scores.shape[1]), dim=1).indices
            hits = best == labels[:, None]
            top1, top5 = top1 + int(hits[:, 0].sum()), top5 + int(hits.any(dim=1).sum())
            loss += float(nn.functional.cross_entropy(scores.double(), labels, reduction="sum"))
            predictions[done : done + len(labels)] = best[:, 0]
            done += len(labels)
            if progress:
                progress(done, n)
    return Evaluation(n, top1 / n, top5 / n, loss / n, predictions.numpy())


class _Forward:
    """Class scores of any number of images, in parts of at most `limit`, which halves where memory runs out and stays so."""

    def __init__(self, model: nn.Module, device: torch.device, limit: int) -> None:
        self._model, self._device, self._limit = model, device, limit

    def __call__(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) -> scores (n, classes). `RunError` where one image does not fit."""
        scores: list[Tensor] = []
        done = 0
        while done < len(images):
            part = images[done : done + self._limit]
            try:
                scores.append(logits(self._model(part.to(self._device))))
                done += len(part)
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise RunError(
                        "one image does not fit the device's memory; use a larger device"
                    ) from None
                self._limit = math.ceil(len(part) / 2)
                log.warning(
                    "evaluation: %d images do not fit the device's memory; goes on with %d",
                    len(part),
                    self._limit,
                )
        return torch.cat(scores)


def _refuse_labels(labels: Tensor, outputs: int) -> None:
    if len(labels) and int(labels.max()) >= outputs:
        raise DataError(
            f"expected labels below the network's {outputs} outputs, got label {int(labels.max())}; "
            "use the data that the network was trained for, or --model-args with its number of classes"
        )


@torch.no_grad()
def reestimate_batch_norm(
    model: nn.Module,
    split: Split,
    *,
    images: int,
    batch_size: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> None:
    """Running statistics of every batch norm anew, as a cumulative average over shuffled images augmented as in training.

    Only batch norms are in training mode; modes and momenta are restored. Nothing happens without batch norm.
    """
    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    if not norms:
        return
    order = split.order(seeds.generator(seed, "batch norm", "order"))[:images]
    parts = [part for part in order.split(batch_size) if len(part) > 1]  # one image has no variance
    if not parts:
        raise DataError(
            f"expected batches of at least 2 images for batch norm, got {len(order)} images in batches of {batch_size}; give more"
        )
    momenta = [norm.momentum for norm in norms]
    with _modes_kept(model):
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        try:
            for pixels, _ in batches(
                split, parts, lambda step: seeds.generator(seed, "batch norm", "augment", step)
            ):
                model(pixels.to(device))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
