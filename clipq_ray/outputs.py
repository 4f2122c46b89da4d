"""Files that a user names to be written: whole, replacing nothing that is no such file, in no committed run.

Not covered: what jobs write into their storage (`storage`, `manifest`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from clipq_ray.errors import ConfigError, StorageError
from clipq_ray.storage import MANIFEST, Store


def output(uri: str | os.PathLike[str], what: str) -> tuple[Store, str]:
    """The store and the name to write for the file at `uri`; `what`: the option or argument that names it.

    `ConfigError` for a device, a pipe or a directory there, and for anything in a committed run or fleet. A link is followed: what it leads to is replaced, and not the link.
    """
    store, name = Store.of_file(uri)
    if store.local is None:
        _refuse_committed([store], uri, what)
        return store, name
    whole = _resolved(store.local / name, uri, what)
    if whole.exists() and not whole.is_file():
        kind = "a directory" if whole.is_dir() else "something else"
        raise ConfigError(
            f"expected {what} to be a file or nothing yet, got {kind} at {uri}; choose another name"
        )
    _refuse_committed(map(Store, whole.parents), uri, what)
    return Store(whole.parent), whole.name


def output_folder(uri: str | os.PathLike[str], what: str) -> Store:
    """The directory at `uri` to write files into; `ConfigError` where that, or one that it is in, is a committed run or fleet."""
    store = Store(uri)
    if store.local is None:
        _refuse_committed([store], uri, what)
        return store
    whole = _resolved(store.local, uri, what)
    _refuse_committed(map(Store, (whole, *whole.parents)), uri, what)
    return Store(whole)


def _resolved(path: Path, uri: str | os.PathLike[str], what: str) -> Path:
    try:
        whole = path.resolve()
        whole.exists()
    except (OSError, RuntimeError, ValueError) as error:
        # a loop of links, a NUL, a name of 300 letters, a folder of somebody else's
        raise ConfigError(f"expected a path as {what}, got {str(uri)!r}: {error}; correct it") from error
    return whole


def _refuse_committed(folders: Iterable[Store], uri: str | os.PathLike[str], what: str) -> None:
    if any(map(_committed, folders)):
        raise ConfigError(f"expected {what} outside of a committed run, got {uri}; choose another folder")


def _committed(folder: Store) -> bool:
    """Whether a run or a fleet is committed there: other programs have files called manifest.json too."""
    try:
        found = json.loads(folder.read(MANIFEST))
    except (StorageError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"format", "files"} <= found.keys()
