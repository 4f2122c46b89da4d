"""Functions that numba compiles and caches on disk, beside their module or in the user's cache folder, so that the next process need not compile.

Where neither can be written (a package that root installed, a user without a home), numba refuses such a function when it is defined. Then each
process compiles what it uses, which takes seconds. Not covered: functions that only compiled ones call, which are cached with these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit

_NOWHERE = "no locator available"  # of numba's RuntimeError, which has no class of its own (0.61 to 0.68)


def cached(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` with `options` and a cache on disk, without the cache where there is no place for it."""

    def compiled(function: Callable[..., Any]) -> Any:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError as error:
            if _NOWHERE not in str(error):
                raise
            return njit(**options)(function)

    return compiled
