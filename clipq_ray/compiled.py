"""Functions that numba compiles and caches on disk, beside their module or in the user's cache folder, so that the next process need not compile.

The cache knows the file of a function, not those of compiled ones that it calls elsewhere: `source_of` these, as the value of its last parameter, makes it another one when they
are edited. Where neither can be written (a package that root installed, a user without a home), numba refuses such a function when it is defined. Then each
process compiles what it uses, which takes seconds. Not covered: functions that only compiled ones call, which are cached with these.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from numba import njit

_NOWHERE = "no locator available"  # of numba's RuntimeError, which has no class of its own (0.61 to 0.68)


def source_of(module: ModuleType) -> int:
    """A number for the text of a module."""
    return zlib.crc32(Path(str(module.__file__)).read_bytes())


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
