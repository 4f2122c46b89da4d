"""What this package refuses, it refuses in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from clipq_ray.errors import ClipqError


@contextmanager
def refused(kind: type[ClipqError], match: str) -> Iterator[pytest.ExceptionInfo[ClipqError]]:
    """`pytest.raises`, and the message is one line."""
    with pytest.raises(kind, match=match) as caught:
        yield caught
    assert "\n" not in str(caught.value), str(caught.value)
