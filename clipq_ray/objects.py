"""What a store does on an fsspec file system such as S3 (`backends.Backend`): whole objects, large ones in parts, created at most once where the store can say so."""

from __future__ import annotations

import contextlib
import inspect
import time
from typing import Any

from clipq_ray.backends import Entry, Upload
from clipq_ray.connections import S3, Connection, codes

PART_BYTES = 64 * 2**20
"""Objects of twice this size and more go to S3 in parts, each of which is tried again by itself."""
# s3fs sends one put below twice its chunk size, and S3 takes at most 5 GiB in one.
_ONE_PUT_CHUNK = 5 * 2**29
_PARTS_AT_ONCE = 4
_CREATE_ATTEMPTS = 4


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

    def entries(self, prefix: str) -> dict[str, Entry]:
        """All objects whose relative name begins with `prefix`, by that name."""
        found = {}
        for name, info in self._found(prefix).items():
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

    def tidy(self) -> None:
        """Nothing: there are no directories."""

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
