"""Top-1, top-5 and loss of a network on a split; batch-norm statistics anew.

On the CPU images go in as channels_last where the network takes that: 0.73 of the time on ResNet-20 (median of 30 interleaved pairs,
2 threads, torch 2.14), 0.66 to 1.10 on eight other networks (4 to 15 pairs on a busy machine; 1.10 where the layout does not arrive, so
noise). Not covered: evaluation over many devices; one process evaluates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from clipq_ray import logs, seeds
from clipq_ray.data import Split, batches
from clipq_ray.data.prefetch import Feed
from clipq_ray.errors import ClipqError, DataError, ModelError, RunError, brief, from_signal
from clipq_ray.memory import ran_out

log = logs.logger(__name__)
_Z95 = 1.959963984540054  # the normal's 97.5 % point
NO_CLASS = -1  # predicted where scores are not numbers


@dataclass(frozen=True)
class Evaluation:
    """What a network scored on `n` images; fractions in 0..1; `predictions` and the `labels` that they were held against: int64 (n,). An image that cannot be
    read has its next one's label, which stands for it. Scores that are not numbers predict -1, which no label is."""

    n: int
    top1: float
    top5: float
    loss: float
    predictions: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of top-1, as fractions (Wilson 1927, without continuity correction)."""
        n, p, z = self.n, self.top1, _Z95
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        # where p is 0 or 1 the bound is p itself, up to rounding
        return min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half))


def logits(output: Any) -> Tensor:
    """The class scores (n, classes) in what a network returned: a tensor, or a tuple or mapping with auxiliary outputs."""
    if isinstance(output, Mapping) and output:
        output = output["logits"] if "logits" in output else next(iter(output.values()))
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.dim() != 2:
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ModelError(
            f"expected class scores (n, classes) from the network, got {got}; use a classification network"
        )
    return output


def scores(network: nn.Module, images: Tensor, advice: str) -> Tensor:
    """`logits` of a network that may be anybody's, so that whatever it raises is a `ModelError` in one line, which ends with `advice`."""
    with _answering(images, advice):
        return logits(network(images))


def gradients(network: nn.Module, images: Tensor, labels: Tensor, advice: str) -> None:
    """Those of a step of a network in training mode, as `scores`; labels are folded into its outputs. Short memory says nothing: a worker may have more."""
    with _answering(images, advice):
        try:
            output = logits(network(images))
            nn.functional.cross_entropy(output.float(), labels % output.shape[1]).backward()
        except ModelError as error:
            raise ModelError(f"{error}; {advice}") from error
        except Exception as error:
            if not ran_out(error):
                raise


@contextmanager
def _answering(images: Tensor, advice: str) -> Iterator[None]:
    try:
        yield
    except ClipqError:
        raise
    except (Exception, SystemExit) as error:  # torchvision's assert
        if from_signal(error):
            raise
        raise ModelError(
            f"expected a network that takes images of {tuple(images.shape[1:])}, got: {brief(error)}; {advice}"
        ) from error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; every module's own mode afterwards, so frozen parts stay frozen."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
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
    feed: Feed = batches,
) -> Evaluation:
    """Score `model`, which lies on `device`, on all images of `split`, in eval mode; modes are restored.

    `progress(done, n)` is called after every batch; `feed` makes the batches. Batches that do not fit the device's memory are halved, said once. `DataError`
    without images, or where a label lies outside the network's outputs.
    """
    tally = Tally(len(split))
    forward = Forward(model, torch.device(device))
    with evaluating(model):
        for images, labels in feed(split, torch.arange(tally.n).split(batch_size), lambda step: None):
            tally.add(forward(images), labels)
            if progress:
                progress(tally.done, tally.n)
    return tally.result()


class Tally:
    """Scores of `n` images as they come in, batch by batch."""

    def __init__(self, n: int) -> None:
        if n == 0:
            raise DataError("expected at least one image to evaluate on, got none; check --data")
        self.n, self.done = n, 0
        self.top1, self.top5, self.loss = 0, 0, 0.0
        self._predictions, self._labels = torch.empty((2, n), dtype=torch.int64)

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """`scores`: float32 (images, classes) on the CPU; `labels`: int64 (images,)."""
        _refuse_labels(labels, scores.shape[1])
        best = scores.topk(min(5, scores.shape[1]), dim=1).indices
        # topk takes NaN for the largest
        best = best.masked_fill(scores.isnan().any(dim=1, keepdim=True), NO_CLASS)
        hits = best == labels[:, None]
        self.top1, self.top5 = self.top1 + int(hits[:, 0].sum()), self.top5 + int(hits.any(dim=1).sum())
        self.loss += float(nn.functional.cross_entropy(scores.double(), labels, reduction="sum"))
        these = slice(self.done, self.done + len(labels))
        self._predictions[these], self._labels[these] = best[:, 0], labels
        self.done += len(labels)

    def result(self) -> Evaluation:
        """The evaluation of the images that came in."""
        n = self.done
        predictions, labels = self._predictions[:n].numpy(), self._labels[:n].numpy()
        return Evaluation(n, self.top1 / n, self.top5 / n, self.loss / n, predictions, labels)


def repeated() -> AbstractContextManager[None]:
    """The same random numbers every time, for a network that draws some when it is evaluated."""
    return seeds.everywhere(0, "evaluation")


class Forward:
    """Class scores float32 (n, classes) on the CPU, in parts that fit the device's memory."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.device = model, device
        self.most: int | None = None  # images at once, once that had to be limited
        cpu = device.type == "cpu"
        self.layout = torch.channels_last if cpu else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        """The class scores of `images`."""
        while True:
            most = min(self.most or len(images), len(images))
            try:
                return torch.cat([self._scores(part) for part in images.split(most)])
            except Exception as error:
                if not ran_out(error):
                    raise
                self._halve(most, error)

    def _scores(self, images: Tensor) -> Tensor:
        if self.layout == torch.channels_last and images.dim() == 4:
            try:
                return self._scores_in(images, torch.channels_last)
            except RuntimeError as error:
                if ran_out(error):
                    raise
                # .view() on an activation needs the plain layout; any other error comes again from there
                self.layout = torch.contiguous_format
        return self._scores_in(images, torch.contiguous_format)

    def _scores_in(self, images: Tensor, layout: torch.memory_format) -> Tensor:
        placed = self._placed(images, layout)
        with repeated():
            return logits(self.model(placed)).float().cpu()

    def placed(self, images: Tensor) -> Tensor:
        """Images on the device, in the layout that the network took before."""
        return self._placed(images, self.layout if images.dim() == 4 else torch.contiguous_format)

    def _placed(self, images: Tensor, layout: torch.memory_format) -> Tensor:
        return images.to(self.device).contiguous(memory_format=layout)

    def _halve(self, most: int, error: BaseException) -> None:
        if most == 1:
            raise RunError("one image does not fit the device's memory; use a larger device") from error
        if self.most is None:
            log.warning("evaluation: %d images do not fit the device's memory; going on with less", most)
        self.most = most // 2


def _refuse_labels(labels: Tensor, outputs: int) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= outputs:
        raise DataError(
            f"expected labels from 0 below the network's {outputs} outputs, got label {high if high >= outputs else low}; "
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
) -> bool:
    """Running statistics of every batch norm anew, as a cumulative average over shuffled images augmented as in training, without masks
    (`--cutout-pixels`), which no image has where the network is used.

    Only batch norms are in training mode; modes and momenta are restored. Batches are of nearly equal size, `batch_size` at most and
    2 at least (one image has no variance), since the average counts each alike. Where they do not fit the device's memory, all is done again with half as
    many images at a time, said once: an average over batches of several sizes would count their images otherwise. A batch norm that is never reached keeps
    its statistics, and all do if this fails on the way. `DataError` for fewer than 2 images; `RunError` where 2 do not fit; False, and nothing happens,
    without batch norm.
    """
    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    if not norms:
        return False
    order = split.order(seeds.generator(seed, "batch norm", "order"))[:images]
    if len(order) < 2:
        raise DataError(f"expected at least 2 images for batch norm, got {len(order)}; give more images")
    most = batch_size
    while True:
        parts = order.tensor_split(min(math.ceil(len(order) / most), len(order) // 2))
        try:
            _average(model, norms, split, parts, seed, device)
            return True
        except Exception as error:
            if not ran_out(error):
                raise
            if len(parts) == len(order) // 2:
                raise RunError(
                    f"{len(parts[0])} images, the fewest for batch norm, do not fit the device's memory; use a larger device"
                ) from error
            if most == batch_size:
                log.warning(
                    "batch norm: %d images do not fit the device's memory; beginning again with less",
                    len(parts[0]),
                )
            most = math.ceil(len(parts[0]) / 2)


def _average(
    model: nn.Module,
    norms: list[nn.modules.batchnorm._BatchNorm],
    split: Split,
    parts: Sequence[Tensor],
    seed: int,
    device: torch.device | str,
) -> None:
    """The statistics of `norms` over batches of the images `parts`, each int64 (B,); as they were if this fails."""
    with evaluating(model), _collecting(norms):
        drawn = batches(split, parts, lambda step: seeds.generator(seed, "batch norm", "augment", step))
        for step, (pixels, _) in enumerate(drawn):
            with seeds.everywhere(seed, "batch norm", "step", step):  # networks may draw in eval mode, too
                model(pixels.to(device))


@contextmanager
def _collecting(norms: list[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    """Batch norms that average what they see from here on; modes are the caller's to restore."""
    before = [({k: v.clone() for k, v in norm.named_buffers()}, norm.momentum) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    finished = False
    try:
        yield
        finished = True
    finally:
        for norm, (buffers, momentum) in zip(norms, before, strict=True):
            norm.momentum = momentum
            if not (finished and norm.num_batches_tracked):
                for name, value in buffers.items():
                    norm.get_buffer(name).copy_(value)
