"""Which fields a manifest has, beside those that MANIFEST.md describes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipq_ray import manifest

Fields = tuple[str, ...]
NAMES = {
    "split": "validation|test",
    "network": "original|control|compressed",
    "stage": "finetune|levels|control",
}
"""What stands for `{...}`; of other ones any name."""
DOCUMENT = Path(manifest.__file__).with_name("MANIFEST.md")


def described(what: str) -> dict[str, str]:
    """The fields under the heading `what`, with their meaning."""
    (body,) = re.findall(rf"^## {what}\n(.*?)(?=^## |\Z)", DOCUMENT.read_text(), re.M | re.S)
    return {
        field: meaning.strip() for field, meaning in re.findall(r"^\| `(.+?)` \|[^|]*\|(.*)\|$", body, re.M)
    }


def assert_described(document: dict[str, Any], what: str) -> None:
    """Every field of a manifest is described, and every field that is described is there, or is said to be there only sometimes."""
    fields = {tuple(field.split(".")): meaning for field, meaning in described(what).items()}
    found = set(_paths(document, list(fields)))
    assert [path for path in found if not any(_are_same(field, path) for field in fields)] == []
    missing = [field for field in fields if not any(_are_same(field, path[: len(field)]) for path in found)]
    assert [field for field in missing if not fields[field].startswith("only")] == []


def _paths(value: Any, fields: list[Fields], path: Fields = ()) -> Iterator[Fields]:
    """The path of every value, down to where the document goes no further."""
    of_elements = (*path[:-1], path[-1] + "[]") if path else ()
    if isinstance(value, list) and any(_are_same(field[: len(path)], of_elements) for field in fields):
        for element in value:
            yield from _paths(element, fields, of_elements)
    elif isinstance(value, dict) and any(
        len(field) > len(path) and _are_same(field[: len(path)], path) for field in fields
    ):
        for key, inner in value.items():
            yield from _paths(inner, fields, (*path, key))
    else:
        yield path


def _are_same(field: Fields, path: Fields) -> bool:
    """Whether the document means this path."""
    return len(field) == len(path) and all(
        re.fullmatch(
            re.sub(r"\\\{(\w+)\\\}", lambda found: f"({NAMES.get(found[1], '.+')})", re.escape(one)), other
        )
        for one, other in zip(field, path, strict=True)
    )
