"""What is wrong with one option, in one line that names it, and which name may be meant. Not covered: what does not go together (`consistency`)."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any


def nearest(name: str, known: Collection[str]) -> str:
    """Which of the names that are `known` may be meant by `name`; some of them where none is like it."""
    near = difflib.get_close_matches(name.lower()[:100], known, n=3, cutoff=0.4)
    return f"nearest names: {', '.join(near)}" if near else f"e.g. {', '.join(list(known)[:6])}"


def line(detail: Any, known: list[str]) -> str:
    """One line for one error of pydantic's; `known`: the names of all options."""
    message = str(detail["msg"]).removeprefix("Value error, ")
    if not detail["loc"]:
        return message
    option = str(detail["loc"][0])
    if detail["type"] == "extra_forbidden":
        return unknown(option, known)
    message = message.replace("String should have at least 1 character", "expected a text, or no such option")
    wanted = message.replace("Input should be", "expected").replace("Field required", "expected a value")
    return f"--{option.replace('_', '-')}: {wanted}, got {detail['input']!r}"


def unknown(name: str, known: list[str]) -> str:
    """One line for a name that is not known, with the nearest ones."""
    near = difflib.get_close_matches(name.replace("-", "_"), known, n=3, cutoff=0.5)
    hint = (
        f"; did you mean {' or '.join('--' + word.replace('_', '-') for word in near)}?"
        if near
        else "; see --help"
    )
    return f"unknown option {name!r}{hint}"
