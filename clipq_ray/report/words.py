"""Numbers with their units, as the report writes them. 1 KB is 1000 bytes (method, section 5).

A number and its unit are held together by a no-break space. What was not measured (None, NaN) is said: `NONE`. Not covered: locales.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

NONE = "not measured"
SPACE = "\N{NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"
_LISTED = 20
_UNITS = ((1e3, "KB"), (1e6, "MB"), (1e9, "GB"))


def known(value: float | None) -> TypeGuard[float]:
    """Whether there is a finite number."""
    return value is not None and math.isfinite(value)


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """`1,234.50 unit` with a fixed number of decimals."""
    if not known(value):
        return NONE
    text = f"{value:,.{digits}f}".replace("-", MINUS)
    if not any(digit in text for digit in "123456789"):
        text = text.removeprefix(MINUS)  # no "-0.00"
    return f"{text}{SPACE}{unit}" if unit else text


def signed(value: float | None, digits: int = 2, unit: str = "") -> str:
    """As `number`, with a plus sign on what is above zero after rounding."""
    text = number(value, digits, unit)
    above = known(value) and text[0] != MINUS and any(digit in text for digit in "123456789")
    return f"+{text}" if above else text


def percent(value: float | None, digits: int = 2) -> str:
    """A number that is a percentage already: `91.02 %`."""
    return number(value, digits, "%")


def ratio(value: float | None) -> str:
    """`20.3x`: how many times smaller."""
    return f"{number(value, 1)}x" if known(value) else NONE


def count(value: int | None) -> str:
    """A whole number with thousands separators."""
    return NONE if value is None else f"{value:,}"


def size(value: float | None) -> str:
    """Bytes with three significant figures in B, KB, MB or GB (powers of 1000)."""
    if value is None:
        return NONE
    if value < 1000:
        return f"{value:,.0f}{SPACE}B"
    # The first unit in which it does not round up to 1000.
    scale, unit = next(((scale, unit) for scale, unit in _UNITS if value < 999.5 * scale), _UNITS[-1])
    scaled = value / scale
    digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
    return f"{scaled:,.{digits}f}{SPACE}{unit}"


def interval(low: float | None, high: float | None, digits: int = 2, unit: str = "%") -> str:
    """`90.41 to 91.58 %`."""
    if not (known(low) and known(high)):
        return NONE
    return f"{number(low, digits)} to {number(high, digits, unit)}"


def duration(seconds: float | None) -> str:
    """`12.3 s`, `4 min 05 s` or `1 h 12 min`."""
    if seconds is None or not math.isfinite(seconds):
        return NONE
    if seconds < 59.95:
        return f"{seconds:.1f}{SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{SPACE}min {rest:02d}{SPACE}s"
    return f"{minutes // 60}{SPACE}h {minutes % 60:02d}{SPACE}min"


def printable(name: object, longest: int = 10_000) -> str:
    """A name without control characters, shortened in the middle to `longest` characters."""
    text = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in str(name))
    if len(text) <= longest:
        return text
    head = (longest - 1) // 2
    return f"{text[:head]}\N{HORIZONTAL ELLIPSIS}{text[head + len(text) - longest + 1 :]}"


def flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    """A nested JSON value as (dotted path, text) rows, in its own order; lists of plain values stay on one line, long ones cut."""
    if isinstance(value, Mapping) and value:
        return [
            row for key, item in value.items() for row in flat(item, f"{path}.{key}" if path else str(key))
        ]
    if isinstance(value, Sequence) and not isinstance(value, str):
        if any(isinstance(item, Mapping | list) for item in value):
            return [row for index, item in enumerate(value) for row in flat(item, f"{path}[{index}]")]
        text = ", ".join(printable(item) for item in value[:_LISTED]) or "none"
        return [(path, text if len(value) <= _LISTED else f"{text}, … ({count(len(value))} in all)")]
    if isinstance(value, Mapping) or value is None or value == "":
        return [(path, "none")]
    if isinstance(value, bool):
        return [(path, "yes" if value else "no")]
    return [(path, printable(value))]
