"""What a store does on a directory of this machine, and on an fsspec file system such as S3.

`Directory` and `Objects` do the same few things; names are checked by `storage.Store` before they come here, and whatever goes wrong is
raised as it is and put into words there. Not covered: what the objects are called and mean (`storage`), and how a store is reached
(`connections`).
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
from typing import Any, NamedTuple, Protocol

from clipq_ray.connections import S3, Connection, codes

INTERNAL = ".clipq-"
PART_BYTES = 64 * 2**20
"""Objects of twice this size and more go to S3 in parts, each of which is tried again by itself."""
# s3fs sends one put below twice its chunk size, and S3 takes at most 5 GiB in one.
_ONE_PUT_CHUNK = 5 * 2**29
_PARTS_AT_ONCE = 4
_CREATE_ATTEMPTS = 4
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


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

    def entries(self) -> dict[str, Entry]:
        """All objects by relative name."""
        ...

    def remove(self, name: str) -> None:
        """Remove an object if it is there."""
        ...

    def remove_tree(self) -> None:
        """Remove all objects."""
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
                return self._create_unlinked(name, temporary)
        return True

    def _create_unlinked(self, name: str, temporary: Path) -> bool:
        """Where the file system has no hard links: still exclusive, but for a moment a reader may see an empty file."""
        target = self.root / name
        try:
            target.touch(exist_ok=False)  # the name is taken by this
        except FileExistsError:
            return False
        try:
            os.replace(temporary, target)
        except BaseException:
            target.unlink(missing_ok=True)  # else it would count as created
            raise
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

    def entries(self) -> dict[str, Entry]:
        """All objects by relative name."""
        found = {}
        for name in self.names(""):
            with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                stat = (self.root / name).stat()
                found[name] = Entry(stat.st_size, stat.st_mtime)
        return found

    def remove(self, name: str) -> None:
        """Remove an object if it is there."""
        (self.root / name).unlink(missing_ok=True)

    def remove_tree(self) -> None:
        """Remove all objects."""
        # Entry by entry: one that another process removes meanwhile must not keep the rest.
        shutil.rmtree(self.root, onerror=lambda _, __, error: _pass_unless_gone(error[1]))

    def uploads(self) -> list[Upload]:
        """Objects that are sent in parts: none."""
        return []

    def abandon(self, upload: Upload) -> None:
        """Nothing to let go."""

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
        return bytes(self.connection.call("cat_file", self._at(name)))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """The bytes from `start` to below `stop`, fewer where the object ends."""
        data = bytes(self.connection.call("cat_file", self._at(name), start=start, end=stop))
        # A server of plain files (python -m http.server) may not know ranges and sends everything.
        return data if len(data) <= stop - start else data[start:stop]

    def write(self, name: str, data: bytes) -> None:
        """Put the whole object, over another one; a large one goes to S3 in parts, and is there once the last one is."""
        if self.connection.protocol not in S3:
            self.connection.call("pipe_file", self._at(name), data, mode="overwrite")
            return
        parts = {"chunksize": PART_BYTES, "max_concurrency": _PARTS_AT_ONCE}
        for attempt in range(2):
            try:
                self.connection.call("pipe_file", self._at(name), data, mode="overwrite", **parts)
                return
            except FileNotFoundError as error:
                # The answer to the completion got lost, and the same request again finds no upload to complete.
                if "NoSuchUpload" not in codes(error) or attempt:
                    raise

    def create(self, name: str, data: bytes) -> bool:
        """Put the whole object if none is there; whether it was put."""
        for attempt in range(_CREATE_ATTEMPTS):
            try:
                self._create(name, data)
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

    def _create(self, name: str, data: bytes) -> None:
        # In one put whatever the size: on some stores the completion of parts overwrites in silence.
        options = {"chunksize": _ONE_PUT_CHUNK} if self.connection.protocol in S3 else {}
        self.connection.call("pipe_file", self._at(name), data, mode="create", **options)

    def size(self, name: str) -> int | None:
        """The bytes of the object, None if there is none."""
        try:
            info = self.connection.call("info", self._at(name))
        except FileNotFoundError as error:
            if "NoSuchBucket" in codes(error):
                raise
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def modified(self, name: str) -> float:
        """When the object was last written, by the clock of the storage [s since 1970]."""
        return float(self.connection.call("modified", self._at(name)).timestamp())

    def names(self, prefix: str) -> list[str]:
        """All objects whose relative name begins with `prefix`."""
        return list(self._found(prefix))

    def entries(self) -> dict[str, Entry]:
        """All objects by relative name."""
        found = {}
        for name, info in self._found("").items():
            when = info.get("LastModified")
            with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                found[name] = Entry(int(info["size"]), when.timestamp() if when else self.modified(name))
        return found

    def _found(self, prefix: str) -> dict[str, dict[str, Any]]:
        """What fsspec says of all objects whose relative name begins with `prefix`."""
        fs = self.connection.open()
        folder, _, leaf = prefix.rpartition("/")
        top = self._at(folder) if folder else self.path
        takes_prefix = "prefix" in inspect.signature(fs.find).parameters
        options = {"prefix": leaf} if takes_prefix and leaf else {}
        try:
            found = self.connection.call("find", top, detail=True, **options)
        except FileNotFoundError as error:
            if "NoSuchBucket" in codes(error):
                raise
            return {}
        root = fs._strip_protocol(self.path).rstrip("/") + "/"
        inside = {
            name[len(root) :]: info
            for name, info in found.items()
            if name.startswith(root) and not name.endswith("/")
        }
        return {name: info for name, info in inside.items() if name.startswith(prefix)}

    def remove(self, name: str) -> None:
        """Remove an object if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.connection.call("rm_file", self._at(name))

    def remove_tree(self) -> None:
        """Remove all objects."""
        # One by one: a recursive removal of a bucket's root would remove the bucket.
        for name in self.names(""):
            self.remove(name)

    def uploads(self) -> list[Upload]:
        """Objects that are sent in parts and not complete."""
        if self.connection.protocol not in S3:
            return []
        bucket, _, inside = self.path.partition("/")
        root = f"{inside.rstrip('/')}/" if inside else ""
        found: list[Upload] = []
        after: dict[str, str] = {}
        while True:
            page = self.connection.call(
                "call_s3", "list_multipart_uploads", Bucket=bucket, Prefix=root, **after
            )
            found.extend(
                Upload(one["Key"].removeprefix(root), one["UploadId"], one["Initiated"].timestamp())
                for one in page.get("Uploads", [])
            )
            if not page.get("IsTruncated"):
                return found
            after = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def abandon(self, upload: Upload) -> None:
        """Let the parts go."""
        bucket, _, key = self._at(upload.name).partition("/")
        with contextlib.suppress(FileNotFoundError):
            self.connection.call(
                "call_s3", "abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload.id
            )

    def arrow(self) -> tuple[Any, str]:
        """A pyarrow file system and the path of this directory in it."""
        from pyarrow import fs

        inner = self.connection.open()
        return fs.PyFileSystem(fs.FSSpecHandler(inner)), str(inner._strip_protocol(self.path))


def _leads_to(folder: str, prefix: str) -> bool:
    return folder.startswith(prefix) or prefix.startswith(folder)


def _pass_unless_gone(error: BaseException) -> None:
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
