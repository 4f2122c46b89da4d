"""One of the processes that train together, and what all of them have alike. Not covered: who starts them (`cluster`)."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from clipq_ray.errors import RunError


@dataclass(frozen=True)
class Rank:
    """This process among `world` of them, and the device that it trains on."""

    rank: int
    world: int
    device: torch.device


class Patience:
    """Waits for ranks that work alone (rank 0 scores the network and measures its file), which may take longer than any other collective operation: hours,
    within which an engine knows whether they make steps. Made by all ranks at the same time."""

    def __init__(self, rank: Rank) -> None:
        self._group: Any = dist.new_group(timeout=datetime.timedelta(days=1)) if rank.world > 1 else None

    def wait(self) -> None:
        """Until all ranks are here."""
        if self._group is not None:
            dist.barrier(group=self._group)


def agreed(rank: Rank, here: bool) -> bool:
    """On all ranks what rank 0 has `here`."""
    found = torch.tensor(int(here), device=rank.device)
    if rank.world > 1:
        dist.broadcast(found, src=0)
    return bool(found.item())


def compare_codes(rank: Rank, hashes: Mapping[str, int], where: str) -> None:
    """`RunError` unless all ranks have these `hashes` of their layers' codes, which each computes by itself; `where`: for the words."""
    mine = torch.tensor(list(hashes.values()), dtype=torch.int64, device=rank.device)
    all_ranks = [torch.empty_like(mine) for _ in range(rank.world)]
    dist.all_gather(all_ranks, mine)
    for number, layer in enumerate(hashes):
        if len({int(hashed[number]) for hashed in all_ranks}) > 1:
            raise RunError(
                f"{where}: workers hold different codes in layer {layer}; use machines of one CPU or GPU type with the same library versions"
            )
