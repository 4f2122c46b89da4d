"""Randomness as a function of where in a run it is used, never of history.

Every random choice takes its seed from (run seed, stage, epoch, step, rank, ...), so a run that was killed and resumed draws what it
would have drawn (border 7 of the design).
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def derive(seed: int, *place: str | int) -> int:
    """A seed of 63 bits for one place in a run, e.g. `derive(seed, "finetune", epoch, step, rank)`."""
    text = "/".join(str(part) for part in (seed, *place))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *place: str | int) -> torch.Generator:
    """A CPU generator seeded by `derive`."""
    return torch.Generator().manual_seed(derive(seed, *place))


def everywhere(seed: int, *place: str | int) -> None:
    """Set Python's, numpy's and torch's global random states by `derive`: a network may draw from any of them."""
    derived = derive(seed, *place)
    random.seed(derived)
    np.random.seed(derived % 2**32)
    torch.manual_seed(derived)
