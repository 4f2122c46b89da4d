"""What a store does on a directory of this machine, and on an fsspec file system such as S3.

`Directory` and `Objects` do the same few things; names are checked by `storage.Store` before they come here, and whatever goes wrong is
raised as it is and put into words there. Not covered: what the objects are called and mean (`storage`).
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import fsspec

INTERNAL = ".clipq-"
S3 = ("s3", "s3a")
# s3fs sends one put below twice its chunk size, and S3 takes at most 5 GiB in one.
_ONE_PUT_CHUNK = 5 * 2**29
_CREATE_ATTEMPTS = 4
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


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

    def remove(self, name: str) -> None:
        """Remove an object if it is there."""
        ...

    def remove_tree(self) -> None:
        """Remove all objects."""
        ...

    def arrow(self) -> tuple[Any, str]:
        """A pyarrow file system and the path of this directory in it."""
        ...


class Directory:
    """A directory of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def child(self, *parts: str) -> Directory:
        """The directory `parts` inside this one."""
        return Directory(self.root.joinpath(*parts))

    def read(self, name: str) -> bytes:
        """The whole object; `FileNotFoundError` if there is none."""
        return (self.root / name).read_bytes()

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """The bytes from `start` to below `stop`, fewer where the object ends."""
        with (self.root / name).open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def write(self, name: str, data: bytes) -> None:
        """Put the whole object, over another one."""
        with self._written(name, data) as temporary:
            os.replace(temporary, self.root / name)

    def create(self, name: str, data: bytes) -> bool:
        """Put the whole object if none is there; whether it was put."""
        with self._written(name, data) as temporary:
            try:
                # A link fails if the name is taken, and the content behind it is already whole; a rename would overwrite.
                os.link(temporary, self.root / name)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return self._create_unlinked(name, data)
        return True

    def _create_unlinked(self, name: str, data: bytes) -> bool:
        """Where the file system has no hard links: still exclusive, but a reader may see a part."""
        try:
            with (self.root / name).open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            return False
        return True

    @contextlib.contextmanager
    def _written(self, name: str, data: bytes) -> Iterator[Path]:
        """A synced temporary file beside `name`, gone afterwards; the directory is synced when the body has succeeded."""
        target = self.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f"{INTERNAL}{uuid.uuid4().hex}.part"
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
            _sync_directory(target.parent)
        finally:
            temporary.unlink(missing_ok=True)

    def size(self, name: str) -> int | None:
        """The bytes of the object, None if there is none."""
        path = self.root / name
        try:
            return path.stat().st_size if path.is_file() else None
        except FileNotFoundError:
            return None

    def modified(self, name: str) -> float:
        """When the object was last written, by the clock of the storage [s since 1970]."""
        return (self.root / name).stat().st_mtime

    def names(self, prefix: str) -> list[str]:
        """All objects whose relative name begins with `prefix`."""
        found: list[str] = []
        top = self.root / prefix.rpartition("/")[0]
        for folder, folders, files in os.walk(top, onerror=_pass_unless_gone):
            at = Path(folder).relative_to(self.root).as_posix()
            inside = "" if at == "." else f"{at}/"
            folders[:] = [one for one in folders if _leads_to(f"{inside}{one}/", prefix)]
            found.extend(f"{inside}{one}" for one in files if f"{inside}{one}".startswith(prefix))
        return found

    def remove(self, name: str) -> None:
        """Remove an object if it is there."""
        (self.root / name).unlink(missing_ok=True)

    def remove_tree(self) -> None:
        """Remove all objects."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.root)

    def arrow(self) -> tuple[Any, str]:
        """A pyarrow file system and the path of this directory in it."""
        from pyarrow import fs

        return fs.LocalFileSystem(), str(self.root)


class Objects:
    """A directory of an fsspec file system."""

    def __init__(self, connection: Connection, path: str) -> None:
        self.connection = connection
        self.path = path

    def child(self, *parts: str) -> Objects:
        """The directory `parts` inside this one."""
        return Objects(self.connection, "/".join([self.path.rstrip("/"), *parts]))

    def _at(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes:
        """The whole object; `FileNotFoundError` if there is none."""
        return bytes(self.connection.open().cat_file(self._at(name)))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """The bytes from `start` to below `stop`, fewer where the object ends."""
        return bytes(self.connection.open().cat_file(self._at(name), start=start, end=stop))

    def write(self, name: str, data: bytes) -> None:
        """Put the whole object, over another one."""
        self._put(name, data, mode="overwrite")

    def create(self, name: str, data: bytes) -> bool:
        """Put the whole object if none is there; whether it was put."""
        for attempt in range(_CREATE_ATTEMPTS):
            try:
                self._put(name, data, mode="create")
                return True
            except FileExistsError:
                return False
            except Exception as error:
                found = codes(error)
                if found & {"PreconditionFailed", "412"}:
                    return False
                if found & {"NotImplemented", "501"}:
                    break
                conflict = bool(found & {"ConditionalRequestConflict", "409"})
                if conflict and self.size(name) is not None:
                    return False
                if not conflict or attempt + 1 == _CREATE_ATTEMPTS:
                    raise
            # Another conditional put was under way; S3 tells the later one to look again.
            time.sleep(0.1 * 2**attempt)
        # No conditional puts here: looking before writing is all that can be done.
        if self.size(name) is not None:
            return False
        self.write(name, data)
        return True

    def _put(self, name: str, data: bytes, mode: str) -> None:
        options = {"chunksize": _ONE_PUT_CHUNK} if self.connection.protocol in S3 else {}
        self.connection.open().pipe_file(self._at(name), data, mode=mode, **options)

    def size(self, name: str) -> int | None:
        """The bytes of the object, None if there is none."""
        try:
            info = self.connection.open().info(self._at(name))
        except FileNotFoundError:
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def modified(self, name: str) -> float:
        """When the object was last written, by the clock of the storage [s since 1970]."""
        return float(self.connection.open().modified(self._at(name)).timestamp())

    def names(self, prefix: str) -> list[str]:
        """All objects whose relative name begins with `prefix`."""
        fs = self.connection.open()
        folder, _, leaf = prefix.rpartition("/")
        top = self._at(folder) if folder else self.path
        takes_prefix = "prefix" in inspect.signature(fs.find).parameters
        try:
            found = fs.find(top, **({"prefix": leaf} if takes_prefix and leaf else {}))
        except FileNotFoundError as error:
            if "NoSuchBucket" in codes(error):
                raise
            return []
        root = fs._strip_protocol(self.path).rstrip("/") + "/"
        inside = [name[len(root) :] for name in found if name.startswith(root) and not name.endswith("/")]
        return [name for name in inside if name.startswith(prefix)]

    def remove(self, name: str) -> None:
        """Remove an object if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.connection.open().rm_file(self._at(name))

    def remove_tree(self) -> None:
        """Remove all objects."""
        # One by one: a recursive removal of a bucket's root would remove the bucket.
        for name in self.names(""):
            self.remove(name)

    def arrow(self) -> tuple[Any, str]:
        """A pyarrow file system and the path of this directory in it."""
        from pyarrow import fs

        inner = self.connection.open()
        return fs.PyFileSystem(fs.FSSpecHandler(inner)), str(inner._strip_protocol(self.path))


def _leads_to(folder: str, prefix: str) -> bool:
    return folder.startswith(prefix) or prefix.startswith(folder)


def _pass_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _sync_directory(path: Path) -> None:
    """Make a rename last over a power cut; file systems that cannot sync directories go without."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class Connection:
    """A protocol's file system, made at first use and again after a fork; listings are never cached."""

    def __init__(self, protocol: str) -> None:
        """`ImportError` if the protocol's package is missing, `ValueError` if nobody knows the protocol."""
        self.protocol = protocol
        find: Any = fsspec.get_filesystem_class
        self._kind: Any = find(protocol)
        self._made: tuple[int, Any] | None = None

    def open(self) -> Any:
        """This process's own file system."""
        process = os.getpid()
        made = self._made
        # No lock: one that another thread holds while this process forks would never open in the child.
        if made is None or made[0] != process:
            options = {"skip_instance_cache": True, "use_listings_cache": False, **_options(self.protocol)}
            self._made = made = (process, self._kind(**options))
        return made[1]


def _options(protocol: str) -> dict[str, Any]:
    if protocol not in S3:
        return {}
    if "AWS_ENDPOINT_URL" in os.environ or "AWS_ENDPOINT_URL_S3" in os.environ:
        # Ceph, rclone and others refuse or garble uploads with the trailing checksums that newer clients send by default.
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    return {
        "config_kwargs": {
            "connect_timeout": 10,
            "read_timeout": float(os.environ.get("CLIPQ_S3_TIMEOUT_SECONDS", 60)),
            "retries": {"max_attempts": 4, "mode": "standard"},
        }
    }


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def codes(error: BaseException) -> set[str]:
    """S3's error codes and the names of the exception classes that led here."""
    found: set[str] = set()
    for one in chain(error):
        found.add(type(one).__name__)
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            found.add(str(response.get("Error", {}).get("Code")))
    return found
