"""What a file says of itself: the keys that the project writes, and their types.

A reader refuses others, so that whoever uses them need not look again. Not covered: whether they are true.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from clipq_ray.errors import ArtifactError


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _architecture(value: Any) -> bool:
    if value is None:
        return True
    known = isinstance(value, dict) and isinstance(value.get("name"), str)
    return known and isinstance(value.get("kwargs", {}), dict)


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0  # JSON's true is an int to Python


_KINDS: dict[str, Callable[[Any], bool]] = {
    "architecture": _architecture,
    "classes": _count,
    "class_names": _texts,
    "input": lambda value: isinstance(value, dict),
    "source": lambda value: isinstance(value, str),
    "ties": lambda value: isinstance(value, dict) and _texts(list(value.values())),
    "dropped": _texts,
}


def check(metadata: dict[str, Any], names: Collection[str]) -> None:
    """`ArtifactError` where a known key has a value of another kind, or a tie leads to none of the tensors in `names`."""
    for key, is_right in _KINDS.items():
        if key in metadata and not is_right(metadata[key]):
            raise ArtifactError(
                f"the metadata of the .clq file has something else than {key} should be: {str(metadata[key])[:100]}"
            )
    if lost := sorted(set(metadata.get("ties", {}).values()) - set(names)):
        raise ArtifactError(f"the .clq file ties a name to {lost[0]!r}, which it does not hold")
