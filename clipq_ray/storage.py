"""One directory at any URI, with objects that appear whole or not at all; and the names inside a run directory.

`Store` is the one place that touches storage: a local path or `file://` (a temporary file in the same directory, fsync, rename),
`s3://` (one put per object, or parts that appear together, through s3fs with the credentials, region and endpoint that `connections` finds), `memory://`
and every other protocol of an installed fsspec package. Listings are never cached, so what one process wrote, the next one sees. A
store pickles as its URI alone and opens its own connections in every process, forked ones included.

Every failure is a `StorageError` of one line with the URI, what failed and what to do. Names that begin with `.clipq-` belong to
unfinished writes and are never listed. Not covered: locks (`create` is the only primitive; what commits a run stands in `manifest`),
and streaming: objects are read and written as bytes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from clipq_ray import refusals
from clipq_ray.backends import INTERNAL, Backend, Entry, Upload
from clipq_ray.connections import S3, Connection, connection
from clipq_ray.consistency import NAME, NAME_WORDS
from clipq_ray.directories import Directory
from clipq_ray.errors import ClipqError, ConfigError, StorageError
from clipq_ray.objects import Objects

MODEL = "model.clq"
LAYERS = "layers.parquet"
TRIALS = "trials.parquet"
PREDICTIONS = "predictions.parquet"
MODELS = "models.parquet"
REPORT = "report.html"
MANIFEST = "manifest.json"
WORK = "_work"
USES = "uses"
_WEB = ("http://", "https://")
_T = TypeVar("_T")


class Store:
    """One directory of objects at a URI; nothing is touched before the first call."""

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        """`uri`: a local path (made absolute), `file://`, `s3://bucket/prefix`, `memory://name` or another fsspec protocol."""
        protocol, path = _parse(os.fspath(uri))
        self.uri = path if protocol == "file" else f"{protocol}://{path}"
        self.local: Path | None = Path(path) if protocol == "file" else None
        self._backend: Backend = (
            Directory(Path(path))
            if protocol == "file"
            # fsspec's paths on the web are whole URLs
            else Objects(_connection(protocol), self.uri if protocol in ("http", "https") else path)
        )

    @classmethod
    def of_file(cls, uri: str | os.PathLike[str]) -> tuple[Store, str]:
        """The store that holds the object at `uri`, and the object's name in it."""
        text = cls(uri).uri
        address, query = _split(text)
        parent, _, name = address.rpartition("/")
        name += query
        if not name or parent.endswith(":/"):
            raise StorageError(f"expected the URI of a file, got {text}")
        return cls(parent or "/"), name

    def child(self, *parts: str) -> Store:
        """The store of a directory inside this one."""
        names = [_checked(self.uri, part) for part in parts]
        store = Store.__new__(Store)
        store.uri = "/".join([self.uri.rstrip("/"), *names])
        store.local = self.local.joinpath(*names) if self.local is not None else None
        store._backend = self._backend.child(*names)
        return store

    def read(self, name: str) -> bytes:
        """The whole content of an object; `StorageError` if there is none."""
        with _translated(self._at(name), "read"):
            return self._backend.read(name)

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """The bytes of an object from `start` to below `stop`, fewer where it ends; nothing else is fetched."""
        with _translated(self._at(name), "read"):
            return self._backend.read_range(name, start, stop) if stop > start else b""

    def write(self, name: str, data: bytes) -> None:
        """Put a whole object in place of whatever is there; readers see the old or the new content, never a part."""
        with _translated(self._at(name), f"write {len(data):,} bytes to", self.local):
            self._backend.write(name, bytes(data))

    def create(self, name: str, data: bytes) -> bool:
        """Put a whole object only if none is there, and say whether it was put.

        Of any number of callers at once, one gets True. After a lost connection the answer may be False although the object is this
        caller's: who must know reads it back. Stores without conditional puts (some S3 imitations) only check before they write.
        """
        with _translated(self._at(name), f"write {len(data):,} bytes to", self.local):
            return self._backend.create(name, bytes(data))

    def exists(self, name: str) -> bool:
        """Whether there is an object (not a directory) of this name."""
        with _translated(self._at(name), "look up"):
            return self._backend.size(name) is not None

    def size(self, name: str) -> int:
        """The object's size in bytes; `StorageError` if there is none."""
        with _translated(self._at(name), "look up"):
            size = self._backend.size(name)
            if size is None:
                raise FileNotFoundError(errno.ENOENT, "there is no such object")
            return size

    def modified(self, name: str) -> float:
        """When the object was last written, by the clock of the storage [s since 1970]; `StorageError` if there is none."""
        with _translated(self._at(name), "look up"):
            return self._backend.modified(name)

    def now(self) -> float:
        """The clock of the storage [s since 1970], from an object that is written and removed."""
        with self.probe(b"") as name, _translated(self._at(name), "look up"):
            return self._backend.modified(name)

    def exclusive(self) -> bool:
        """Whether `create` is exclusive here: some stores overwrite in silence what should be created only once."""
        # twice: another job that ends may have removed the first one
        return any(self._is_exclusive() for _ in range(2))

    def _is_exclusive(self) -> bool:
        with self.probe(b"1") as name, _translated(self._at(name), "write"):
            try:
                return not self._backend.create(name, b"2") and self._backend.read(name) == b"1"
            except FileNotFoundError:
                return False

    @contextlib.contextmanager
    def probe(self, data: bytes) -> Iterator[str]:
        """A small object of a unique name that is never listed."""
        name = f"{INTERNAL}probe-{uuid.uuid4().hex}"
        with _translated(self.uri, "write to", self.local):
            self._backend.write(name, data)
        try:
            yield name
        finally:
            with _translated(self.uri, "remove a file from"):
                self._backend.remove(name)

    def names(self, prefix: str = "") -> list[str]:
        """All objects whose relative name begins with `prefix`, at any depth, sorted; empty if the directory is not there."""
        if prefix.strip("/"):
            _checked(self.uri, prefix.rstrip("/"))
        with _translated(self.uri, "list"):
            found = self._backend.names(prefix)
        return sorted(name for name in found if not name.rpartition("/")[2].startswith(INTERNAL))

    def entries(self, prefix: str = "") -> dict[str, Entry]:
        """All objects whose relative name begins with `prefix`, at any depth, with size and time, in one listing where the storage has one."""
        with _translated(self.uri, "list"):
            found = self._backend.entries(prefix)
        return {
            name: found[name] for name in sorted(found) if not name.rpartition("/")[2].startswith(INTERNAL)
        }

    def unfinished(self, older_than: float) -> list[str]:
        """Writes that never came to their end, older than so many seconds by the clock of the storage, sorted."""
        with _translated(self.uri, "list"):
            found = [one for one in self._backend.names("") if one.rpartition("/")[2].startswith(INTERNAL)]
        if not found:
            return []
        now, old = self.now(), []
        for name in found:
            with contextlib.suppress(StorageError):  # it came to its end meanwhile
                if now - self.modified(name) > older_than:
                    old.append(name)
        return sorted(old)

    def uploads(self, older_than: float) -> list[Upload]:
        """Objects that were begun in parts more than so many seconds ago, by the clock of the storage, and never completed; readers do not see them."""
        with _translated(self.uri, "list"):
            found = self._backend.uploads()
        now = self.now() if found else 0.0
        return sorted(one for one in found if now - one.begun > older_than)

    def abandon(self, upload: Upload) -> None:
        """Let the parts of an object go that was never completed."""
        with _translated(self._at(upload.name), "remove parts of"):
            self._backend.abandon(upload)

    def remove(self, name: str) -> None:
        """Remove an object; one that is not there is no error."""
        with _translated(self._at(name), "remove"):
            self._backend.remove(name)

    def remove_tree(self) -> None:
        """Remove everything in this directory, leftovers of unfinished writes included; a bucket itself stays."""
        with _translated(self.uri, "remove"):
            self._backend.remove_tree()

    def beyond(self, name: str) -> bool:
        """Whether a link leads from this directory to an object, or to where it would be, outside of it."""
        return self.local is not None and not (self.local / name).resolve().is_relative_to(
            self.local.resolve()
        )

    def tidy(self) -> None:
        """Remove what is empty in this directory, and it itself if it is; on object storage there are no directories."""
        with _translated(self.uri, "remove"):
            self._backend.tidy()

    def check_writable(self) -> None:
        """Write, read back and remove a small object of a unique name; `StorageError` if any of it fails."""
        data = os.urandom(64)
        with self.probe(data) as name, _translated(self.uri, "read back from"):
            came = self._backend.read(name)
        if came != data:
            raise StorageError(
                f"cannot use {self.uri}: {len(data)} bytes were written and {len(came)} other bytes came back; "
                "choose another storage or check its checksum settings"
            )

    def arrow(self) -> tuple[Any, str]:
        """A `pyarrow.fs.FileSystem` with the same credentials and endpoint, and this directory's path in it."""
        with _translated(self.uri, "open"):
            return self._backend.arrow()

    def patiently(self, ask: Callable[[], _T]) -> _T:
        """What `ask` gives, which reads from here through `arrow`: a store that has answered before is waited for, and what it raises is raised as it is."""
        return self._backend.connection.patiently(ask) if isinstance(self._backend, Objects) else ask()

    def _at(self, name: str) -> str:
        return f"{self.uri.rstrip('/')}/{_checked(self.uri, name)}"

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return (Store, (self.uri,))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store) and other.uri == self.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"


def run_store(storage: Store, model: str, run: str) -> Store:
    """The directory of one run, `model={model}/run={run}`; `ConfigError` if a name would not survive as a partition key."""
    return storage.child(f"model={_label('model name', model)}", f"run={_label('run id', run)}")


def fleet_store(storage: Store, name: str) -> Store:
    """The directory of a fleet's results, `fleet={name}`."""
    return storage.child(f"fleet={_label('fleet name', name)}")


def stage_store(storage: Store, stage: str, key: str) -> Store:
    """The directory of a stage's outputs, `_stages/{stage}-{key}`."""
    return storage.child("_stages", f"{_label('stage', stage)}-{_label('stage key', key)}")


def _parse(uri: str) -> tuple[str, str]:
    """Protocol and path, local paths absolute, nothing trailing."""
    if not uri.strip() or "::" in uri or "\0" in uri:
        raise StorageError(
            f"expected a storage URI (a path, s3://bucket/prefix, memory://name), got {uri!r}; chained URIs are not taken"
        )
    protocol, separator, path = uri.partition("://")
    if not separator and re.match(r"(s3a?|gs|gcs|az|abfs|file|memory):", uri):
        raise StorageError(
            f"expected two slashes behind the protocol, as s3://bucket/prefix, got {uri!r}; add one"
        )
    if not separator:
        return "file", os.path.abspath(os.path.expanduser(uri))
    if protocol in ("file", "local"):
        return "file", os.path.abspath(re.sub(r"^localhost(?=/)", "", path))
    address, query = _split(f"{protocol}{separator}{path}")
    path = address.partition("://")[2].strip("/") + query
    if not path:
        raise StorageError(
            f"expected {protocol}://NAME or {protocol}://NAME/PREFIX, got {uri!r}; add the bucket's name"
        )
    return protocol, path


def _split(uri: str) -> tuple[str, str]:
    """A URI, and of one on the web its query apart, in which slashes separate nothing."""
    address, mark, query = uri.partition("?") if uri.startswith(_WEB) else (uri, "", "")
    return address, mark + query


def _checked(uri: str, name: str) -> str:
    """A relative name that stays inside its store."""
    path = name.partition("?")[0] if uri.startswith(_WEB) else name
    if path and "\0" not in name and not any(part in ("", ".", "..") for part in path.split("/")):
        return name
    raise StorageError(
        f"expected a relative name inside {uri}, got {name!r}; use parts other than '..' without empty ones"
    )


def _label(what: str, text: str) -> str:
    """A name that every reader of hive partitions takes as it is (no '=', '%', '/', ':' or spaces)."""
    if NAME.fullmatch(text):
        return text
    raise ConfigError(f"expected a {what} of {NAME_WORDS}, got {text!r}; choose another name")


def _connection(protocol: str) -> Connection:
    try:
        return connection(protocol)
    except ImportError as error:
        extra = "clipq_ray[s3]" if protocol in S3 else "the package that it names"
        raise StorageError(
            f"cannot open {protocol}:// URIs: {refusals.line(error)}; install {extra}"
        ) from error
    except ValueError as error:
        raise StorageError(
            f"expected a path, file://, s3://, memory:// or another protocol that fsspec knows, got {protocol}://; check the URI"
        ) from error


@contextlib.contextmanager
def _translated(uri: str, action: str, local: Path | None = None) -> Iterator[None]:
    """Whatever storage raises becomes one `StorageError` line; every fsspec package has exceptions of its own, so all are caught. `local`: the
    directory on this machine, for how much is free where it is full."""
    try:
        yield
    except ClipqError:
        raise
    except Exception as error:
        free = refusals.free(error, local)
        raise StorageError(
            f"cannot {action} {uri}: {refusals.line(error)}{free}; {refusals.advice(error)}"
        ) from error
