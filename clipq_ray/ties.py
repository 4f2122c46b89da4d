"""Tensors of a network that are one: under several names, which is kept, or on one memory, which no file can say.

Not covered: what the tensors are for (`network`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from clipq_ray.errors import ModelError


def names_of_one(state: Mapping[str, Tensor], but: str) -> dict[str, str]:
    """Further names of one tensor (a weight or a module used twice), each with its first; names that end in `but` aside."""
    first: dict[int, str] = {}
    names = [name for name in state if not name.endswith(but)]
    for name in names:
        first.setdefault(id(state[name]), name)
    return {name: first[id(state[name])] for name in names if first[id(state[name])] != name}


def refuse_overlaid(state: Mapping[str, Tensor]) -> None:
    """`ModelError` for a parameter on the memory of another tensor: they would be trained and stored apart, and in the network that is built anew the one that is
    loaded last would win."""
    there: dict[int, list[str]] = {}
    for name, tensor in state.items():
        if not tensor.numel() or tensor.is_meta:
            continue
        others = there.setdefault(tensor.untyped_storage().data_ptr(), [])
        for other in others:
            pair = tensor, state[other]
            if (
                pair[0] is not pair[1]
                and any(isinstance(one, nn.Parameter) for one in pair)
                and _overlap(*pair)
            ):
                raise ModelError(
                    f"expected parameters with memory of their own, got {other} and {name} on the same; tie them by assigning the parameter itself "
                    "(b.weight = a.weight), or clone one"
                )
        others.append(name)


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one storage have an element in common."""
    if _end(one) <= other.data_ptr() or _end(other) <= one.data_ptr():
        return False
    if one.element_size() != other.element_size():
        return True
    # columns of one matrix lie among one another, and have none
    seen = torch.zeros(one.untyped_storage().nbytes() // one.element_size(), dtype=torch.bool)
    seen.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
    return bool(seen.as_strided(other.shape, other.stride(), other.storage_offset()).any())


def _end(tensor: Tensor) -> int:
    """The address behind the last element."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.data_ptr() + tensor.element_size() * (1 + sum((n - 1) * step for n, step in steps))
