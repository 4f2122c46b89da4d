"""What a store does on a directory of this machine (`backends.Backend`): every object appears whole, or not at all, whoever else writes and removes beside it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from clipq_ray.backends import INTERNAL, Entry, Upload

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_PUTS_BESIDE_REMOVALS = 8
_T = TypeVar("_T")


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

        def put() -> None:
            with self._written(name, data) as temporary:
                os.replace(temporary, self.root / name)

        _beside_removals(put)

    def create(self, name: str, data: bytes) -> bool:
        """Put the whole object if none is there; whether it was put."""
        return _beside_removals(lambda: self._create(name, data))

    def _create(self, name: str, data: bytes) -> bool:
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
        for folder, folders, files in os.walk(top, onerror=_pass_unless_gone, followlinks=True):
            at = Path(folder).relative_to(self.root).as_posix()
            inside = "" if at == "." else f"{at}/"
            folders[:] = [
                one
                for one in folders
                if _leads_to(f"{inside}{one}/", prefix) and not self._leads_back(Path(folder, one))
            ]
            found.extend(f"{inside}{one}" for one in files if f"{inside}{one}".startswith(prefix))
        return found

    def _leads_back(self, folder: Path) -> bool:
        """Whether it is a link to a directory above it; others may lead to another disk."""
        if not folder.is_symlink():
            return False
        above = [one for one in folder.parents if one == self.root or self.root in one.parents]
        return folder.resolve() in {one.resolve() for one in above}

    def entries(self, prefix: str) -> dict[str, Entry]:
        """All objects whose relative name begins with `prefix`, by that name."""
        found = {}
        for name in self.names(prefix):
            with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                stat = (self.root / name).stat()
                found[name] = Entry(stat.st_size, stat.st_mtime)
        return found

    def remove(self, name: str) -> None:
        """Remove an object if it is there."""
        (self.root / name).unlink(missing_ok=True)

    def remove_tree(self) -> None:
        """Remove all objects."""
        # Entry by entry: one that another process removes or adds meanwhile must not keep the rest.
        shutil.rmtree(self.root, onerror=lambda _, __, error: _pass_unless_beside(error[1]))

    def tidy(self) -> None:
        """Remove directories without objects, this one too."""
        for folder, _, _ in os.walk(self.root, topdown=False):
            with contextlib.suppress(OSError):  # something is in it
                os.rmdir(folder)

    def uploads(self) -> list[Upload]:
        """Objects that are sent in parts: none."""
        return []

    def abandon(self, upload: Upload) -> None:
        """Nothing to let go."""

    def arrow(self) -> tuple[Any, str]:
        """A pyarrow file system and the path of this directory in it."""
        from pyarrow import fs

        return fs.LocalFileSystem(), str(self.root)


def _beside_removals(put: Callable[[], _T]) -> _T:
    """What `put` gives, tried again where another process removes the directory between its making and the write, as a job does that ends."""
    for attempt in range(_PUTS_BESIDE_REMOVALS - 1):
        with contextlib.suppress(FileNotFoundError):
            return put()
        time.sleep(0.001 * 2**attempt)
    return put()


def _leads_to(folder: str, prefix: str) -> bool:
    return folder.startswith(prefix) or prefix.startswith(folder)


def _pass_unless_gone(error: BaseException) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _pass_unless_beside(error: BaseException) -> None:
    """Where another process works in the directory that is removed."""
    if not isinstance(error, OSError) or error.errno != errno.ENOTEMPTY:
        _pass_unless_gone(error)


def _sync_directory(path: Path) -> None:
    """Make a rename last over a power cut; file systems that cannot sync directories go without."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
