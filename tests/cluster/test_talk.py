"""What a worker leaves for the driver is the same named error there."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipq_ray.cluster.talk import tell, told
from clipq_ray.errors import ClipqError, DataError, DivergedError, RunError
from clipq_ray.storage import Store


@pytest.mark.parametrize("kind", [DataError, DivergedError, RunError])
def test_a_named_error_arrives_once_as_what_it_was(kind: type[ClipqError], tmp_path: Path) -> None:
    output = Store(tmp_path)
    assert told(output) is None
    tell(output, kind("levels diverged in epoch 1 (loss nan)"))
    found = told(output)
    assert type(found) is kind
    assert str(found) == "levels diverged in epoch 1 (loss nan)"
    assert told(output) is None
