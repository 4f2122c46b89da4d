"""What a store does on a directory of this machine, and on an fsspec file system such as S3.

`directories.Directory` and `objects.Objects` do the same few things; names are checked by `storage.Store` before they come here, and whatever goes wrong is
raised as it is and put into words there. Not covered: what the objects are called and mean (`storage`), and how a store is reached
(`connections`).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

INTERNAL = ".clipq-"


class Upload(NamedTuple):
    """Parts of an object that was never completed: nobody sees them, and the store keeps them. `begun`: by the clock of the storage [s since 1970]."""

    name: str
    id: str
    begun: float


class Entry(NamedTuple):
    """An object in a listing; `modified`: when it was last written, by the clock of the storage [s since 1970]."""

    bytes: int
    modified: float


class Backend(Protocol):
    """What a kind of storage has to do; names are checked, and every exception may pass."""

    def child(self, *parts: str) -> Backend:
        """The directory `parts` inside this one."""
        ...

    def read(self, name: str) -> bytes:
        """The whole object; `FileNotFoundError` if there is none."""
        ...

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """The bytes from `start` to below `stop`, fewer where the object ends."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Put the whole object, over another one."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Put the whole object if none is there; whether it was put."""
        ...

    def size(self, name: str) -> int | None:
        """The bytes of the object, None if there is none."""
        ...

    def modified(self, name: str) -> float:
        """When the object was last written, by the clock of the storage [s since 1970]."""
        ...

    def names(self, prefix: str) -> list[str]:
        """All objects whose relative name begins with `prefix`."""
        ...

    def entries(self, prefix: str) -> dict[str, Entry]:
        """All objects whose relative name begins with `prefix`, by that name."""
        ...

    def remove(self, name: str) -> None:
        """Remove an object if it is there."""
        ...

    def remove_tree(self) -> None:
        """Remove all objects."""
        ...

    def tidy(self) -> None:
        """Remove directories without objects, where there are directories."""
        ...

    def uploads(self) -> list[Upload]:
        """Objects that are sent in parts and not complete."""
        ...

    def abandon(self, upload: Upload) -> None:
        """Let the parts go."""
        ...

    def arrow(self) -> tuple[Any, str]:
        """A pyarrow file system and the path of this directory in it."""
        ...
