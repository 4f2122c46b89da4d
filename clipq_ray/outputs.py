"""Files that a user names to be written: whole, replacing nothing that is no such file, in no committed run.

Not covered: what jobs write into their storage (`storage`, `manifest`).
"""

from __future__ import annotations

import json
import os

from clipq_ray.errors import ConfigError, StorageError
from clipq_ray.storage import MANIFEST, Store


def output(uri: str | os.PathLike[str], what: str) -> tuple[Store, str]:
    """The store and the name to write for the file at `uri`; `what`: the option or argument that names it.

    `ConfigError` for a device, a pipe or a directory there, and for anything in a committed run or fleet. A link is followed: what it leads to is replaced, and not the link.
    """
    store, name = Store.of_file(uri)
    if store.local is None:
        if _committed(store):
            raise ConfigError(f"expected {what} outside of a committed run, got {uri}; choose another folder")
        return store, name
    try:
        whole = (store.local / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL
        raise ConfigError(f"expected a path as {what}, got {str(uri)!r}: {error}; correct it") from error
    if whole.exists() and not whole.is_file():
        kind = "a directory" if whole.is_dir() else "something else"
        raise ConfigError(
            f"expected {what} to be a file or nothing yet, got {kind} at {uri}; choose another name"
        )
    if any(_committed(Store(folder)) for folder in whole.parents):
        raise ConfigError(f"expected {what} outside of a committed run, got {uri}; choose another folder")
    return Store(whole.parent), whole.name


def _committed(folder: Store) -> bool:
    """Whether a run or a fleet is committed there: other programs have files called manifest.json too."""
    try:
        found = json.loads(folder.read(MANIFEST))
    except (StorageError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"format", "files"} <= found.keys()
