"""What a file says of itself: the keys that the project writes, and their types.

A reader refuses others, so that whoever uses them need not look again. Not covered: whether they are true.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

from clipq_ray.errors import ArtifactError

SIDE_LIMIT, INPUT_LIMIT = 1 << 13, 1 << 26
"""Channels, height and width of an input are at most the first each, their product the second, so that a small file cannot ask for a large image."""


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _architecture(value: Any) -> bool:
    if value is None:
        return True
    known = isinstance(value, dict) and isinstance(value.get("name"), str)
    return known and isinstance(value.get("kwargs", {}), dict)


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0  # JSON's true is an int to Python


def _side(value: Any) -> bool:
    return type(value) is int and 1 <= value <= SIDE_LIMIT


def _numbers(value: Any, count: int) -> bool:
    known = isinstance(value, list) and len(value) == count
    return known and all(type(one) in (int, float) and math.isfinite(one) for one in value)


def _input(value: Any) -> bool:
    """Whether images can be prepared by it, as `data.Preprocessing` does."""
    if not isinstance(value, dict) or {"shape", "resize", "mean", "std"} - value.keys():
        return False
    shape, resize, std = value["shape"], value["resize"], value["std"]
    if not isinstance(shape, list) or len(shape) != 3 or not all(map(_side, shape)):
        return False
    return (
        math.prod(shape) <= INPUT_LIMIT
        and (resize is None or (_side(resize) and resize >= max(shape[1:])))  # images are cropped after it
        and _numbers(value["mean"], shape[0])
        and _numbers(std, shape[0])
        and min(std) > 0
        and isinstance(value.get("interpolation", ""), str)
    )


_KINDS: dict[str, Callable[[Any], bool]] = {
    "architecture": _architecture,
    "classes": _count,
    "class_names": _texts,
    "input": _input,
    "source": lambda value: isinstance(value, str),
    "ties": lambda value: isinstance(value, dict) and _texts(list(value.values())),
    "dropped": _texts,
}


def check(metadata: dict[str, Any], names: Collection[str]) -> None:
    """`ArtifactError` where a known key has a value of another kind, or a tie leads to none of the tensors in `names`, or is one of them itself."""
    for key, is_right in _KINDS.items():
        if key in metadata and not is_right(metadata[key]):
            raise ArtifactError(
                f"the metadata of the .clq file has something else than {key} should be: {metadata[key]!r:.300}; fetch the file again or make it anew"
            )
    if both := sorted(set(metadata.get("ties", {})) & set(names)):
        raise ArtifactError(f"the .clq file ties {both[0]!r:.100} to another tensor, and holds it as well")
    if lost := sorted(set(metadata.get("ties", {}).values()) - set(names)):
        raise ArtifactError(f"the .clq file ties a name to {lost[0]!r:.100}, which it does not hold")
