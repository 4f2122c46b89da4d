"""Randomness as a function of where in a run it is used, never of history.

Every random choice takes its seed from (run seed, stage, epoch, step, rank, ...), so a run that was killed and resumed draws what it
would have drawn (border 7 of the design).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(seed: int, *place: str | int) -> int:
    """A seed of 63 bits for one place in a run, e.g. `derive(seed, "finetune", epoch, step, rank)`."""
    text = "/".join(str(part) for part in (seed, *place))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *place: str | int) -> torch.Generator:
    """A CPU generator seeded by `derive`."""
    return torch.Generator().manual_seed(derive(seed, *place))


@contextmanager
def kept() -> Iterator[None]:
    """Python's, numpy's and torch's CPU random states afterwards as before."""
    python, numbers, tensors = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
        torch.random.set_rng_state(tensors)


@contextmanager
def drawn(seed: int) -> Iterator[None]:
    """These states set from `seed`, for code of others that draws from any of them, and put back: what waits at random between tries of a store is not to do so
    in step with other workers."""
    with kept():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def everywhere(seed: int, *place: str | int) -> Iterator[None]:
    """As `drawn`, by `derive`; the states of GPUs are set too, and stay."""
    derived = derive(seed, *place)
    with drawn(derived):
        torch.manual_seed(derived)  # the CPU's as `drawn` has it, and GPUs'
        yield
