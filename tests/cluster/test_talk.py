"""What a worker leaves for the driver is the same named error there."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from clipq_ray.cluster.talk import tell, told
from clipq_ray.errors import ClipqError, DataError, DivergedError, HeldError, RunError, StorageError, named
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


def test_an_error_of_a_full_disk_is_told_and_one_that_another_attempt_may_not_meet_is_raised(
    tmp_path: Path,
) -> None:
    output, full, busy = Store(tmp_path), StorageError("full"), StorageError("busy")
    full.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    for cause in (ConnectionResetError(), OSError(errno.ESTALE, "Stale file handle"), None):
        busy.__cause__ = cause
        with pytest.raises(StorageError, match="busy"):
            tell(output, busy)
    assert told(output) is None
    tell(output, full)
    assert type(told(output)) is StorageError


def test_an_error_of_a_name_that_is_none_of_ours_is_one_of_the_run() -> None:
    assert [type(named(kind, "x")) for kind in ("HeldError", "ValueError", "named", "nothing")] == [
        HeldError, RunError, RunError, RunError,
    ]  # fmt: skip
