"""The files of a data set at any URI: names, sizes, bytes.

One listing per data set, taken when it is opened; files added later are not seen. Names with a part that begins with "." are passed
over. Not covered: writing (`storage`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import fs

from clipq_ray import connections, refusals
from clipq_ray.errors import ClipqError, DataError, StorageError
from clipq_ray.storage import Store


@dataclass(frozen=True)
class Listing:
    """`sizes`: bytes per name, relative to the directory `store`, sorted by name."""

    store: Store
    sizes: dict[str, int]

    @classmethod
    def of(cls, uri: str, *, below: bool = True) -> Listing:
        """The directory at `uri`, with all folders `below` it or without, or one file with the directory it lies in; `DataError` if nothing is there."""
        if uri.rstrip("/").endswith(".parquet"):
            store, name = Store.of_file(uri)
            if store.exists(name):
                return cls(store, {name: store.size(name)})
        store = Store(uri)
        with reading(store.uri):
            system, base = store.arrow()
            wanted = fs.FileSelector(base, recursive=below, allow_not_found=True)
            found = store.patiently(lambda: system.get_file_info(wanted))
            root = base.rstrip("/") + "/"
            # a name that is no UTF-8 cannot be told
            sizes = {
                info.path.removeprefix(root): info.size for info in found if info.type == fs.FileType.File
            }
        visible = {name: sizes[name] for name in sorted(sizes) if not f"/{name}".count("/.")}
        if not visible:
            raise DataError(
                f"expected a directory of data at {store.uri}, found no files there; check the URI or the name"
            )
        return cls(store, visible)

    def read(self, name: str) -> bytes:
        """The whole file."""
        return self.store.read(name)

    def open(self, name: str) -> Any:
        """A `pyarrow.NativeFile` for random access."""
        system, base = self.store.arrow()
        path = f"{base.rstrip('/')}/{name}"
        if not isinstance(system, fs.PyFileSystem):
            return system.open_input_file(path)
        # by pyarrow itself `isfile` would be asked first, to which every failure means that there is none
        return pa.PythonFile(system.handler.fs.open(path, "rb"), mode="r")

    def at(self, name: str) -> str:
        """The URI of a file, for messages."""
        return f"{self.store.uri.rstrip('/')}/{name}"


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever storage or Arrow raise becomes one line that names `what`: a `StorageError` where the store may answer later, else a `DataError`."""
    try:
        yield
    except ClipqError:
        raise
    except Exception as error:  # fsspec packages and Arrow have exceptions of their own
        line = f"cannot read {what}: {refusals.line(error)}"
        if connections.passing(error):
            raise StorageError(f"{line}; {refusals.advice(error)}") from error
        raise DataError(
            f"{line}; {refusals.advice(error, 'check that it is whole and may be read')}"
        ) from error


def few(names: list[str] | tuple[str, ...], most: int = 4) -> str:
    """The first names and how many more there are, for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
