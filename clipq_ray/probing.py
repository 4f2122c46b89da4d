"""Steps without effect, which a training makes before its first: whether channels last works, how many images at a time all ranks have memory for, and in what order
gradients of several workers are added.

They are made on one image as often as a step has images, since those of a batch lie in many row groups. Not covered: what is done where memory runs out
later (`memory`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipq_ray import seeds
from clipq_ray.data import Split
from clipq_ray.memory import Attempts, most_that_fit, without_single
from clipq_ray.ranks import Rank
from clipq_ray.trainable import takes_fast, training_mode, without_effect

_NO_LIMIT = 2**31 - 1


class Probing:
    """Steps of `model` on this rank's part of a batch, `indices` of `split`; `loss(model, images, labels)` is that of the training."""

    def __init__(
        self,
        model: nn.Module,
        split: Split,
        indices: Tensor,
        place: tuple[int, str],
        rank: Rank,
        loss: Callable[[nn.Module, Tensor, Tensor], Tensor],
    ) -> None:
        """`place`: the seed and the stage."""
        self._model, self._rank, self._loss = model, rank, loss
        self.images = len(indices)
        seed, stage = place
        self._pair = split.batch(indices[:1], seeds.generator(seed, stage, "probe"))

    def _step(self, model: nn.Module, count: int) -> None:
        images, labels = (one.to(self._rank.device).repeat_interleave(count, 0) for one in self._pair)
        self._loss(model, images, labels).backward()

    def takes_fast(self) -> bool:
        """Whether the network is trained in channels last, in which it is left then; two images, since batch norm wants no single one."""
        training_mode(self._model)
        return takes_fast(self._model, lambda: self._step(self._model, 2))

    def fitting(self, attempts: Attempts) -> tuple[int, bool]:
        """How many images at a time all ranks have memory for, and whether there are parameters that got no gradient on any of them. What is tried is this
        attempt's until it says otherwise: where an allocation does not fail, the machine ends the very first step."""
        model, rank, images = self._model, self._rank, self.images
        most = min(images, attempts.most() or images)
        attempts.begin(rank.rank, most)
        training_mode(model)
        with without_effect(model):
            # what several workers reduce gradients in, which is made behind this
            room = [
                torch.empty_like(one) for one in model.parameters() if one.requires_grad and rank.world > 1
            ]
            micro = most_that_fit(lambda count: self._step(model, count), images, most)
            del room
            unread = any(one.requires_grad and one.grad is None for one in model.parameters())
        if rank.world > 1:
            # a batch that is not shared out evenly is no lack of memory on the workers with an image more
            limit = micro if micro < images else _NO_LIMIT
            least = torch.tensor([limit, not unread], device=rank.device)
            dist.all_reduce(least, op=dist.ReduceOp.MIN)
            # three fit in place of another rank's two: where images are odd, this rank's own limit is three or more, or one, which is then all ranks'
            micro, unread = without_single(images, min(images, int(least[0]))), not least[1]
        return micro, unread

    def settle(self, wrapped: nn.Module, micro: int) -> None:
        """Let several workers' gradients be added in one order from the first step on. `DistributedDataParallel` lays them out anew behind the first, as they came;
        of three workers and more that order decides the last bits, and a training that goes on from a checkpoint begins with a first one again."""
        with without_effect(self._model):
            self._step(wrapped, micro)
