"""The commit of a run, and what readers see: committed runs only.

A run is a directory; `manifest.json` in it is its commit. `commit` writes every file whole, reads each back, and puts the manifest
last, with the size and SHA-256 of every file and a SHA-256 of the manifest itself. A directory without a manifest does not exist for
readers, whatever lies in it. `verify` checks every hash and decodes the packed network. Not covered: what the manifest says about a run (`pipeline` builds it), and
reading the tables of many (`datasets`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from clipq_ray.consistency import NAME
from clipq_ray.errors import FormatError, StorageError, UserError, brief
from clipq_ray.storage import MANIFEST, MODEL, Store

FORMAT = 1
_RUN = re.compile(rf"model=([^/]+)/run=([^/]+)/{re.escape(MANIFEST)}")
_FLEET = re.compile(rf"fleet=([^/]+)/{re.escape(MANIFEST)}")
_HEX = re.compile(r"[0-9a-f]{64}")
_SELF = "manifest_sha256"
_DEPTH = 64  # as the header of a .clq file; those that are written have fewer than ten levels
_REPLACED_AT_MOST = 5
_MENDED_WITHIN_SECONDS = (1.0, 2.0, 4.0, 8.0)
_RESTORE = "restore it, or make a new run with --force"
_Kinds = tuple[type[UserError], ...]


def _names_runs(value: Any) -> bool:
    """Whether this is {name: run} of what a storage may hold."""
    return isinstance(value, dict) and all(
        isinstance(run, str) and all(NAME.fullmatch(part) for part in (name, run))
        for name, run in value.items()
    )


def _names_stages(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, dict) and all(isinstance(one.get(key), str) for key in ("stage", "key"))
        for one in value
    )


_KINDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("model", "run", "fleet"), lambda value: isinstance(value, str)),
    **dict.fromkeys(
        ("metrics", "data", "curves", "config", "promise", "versions"), lambda value: isinstance(value, dict)
    ),
    "runs": _names_runs,
    "stages": _names_stages,
    "notes": lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
}
"""What keys that others than a run's own job read must have, where they are there."""


class CommittedRun(NamedTuple):
    """A run that has a manifest."""

    model: str
    run: str
    store: Store


def commit(run: Store, files: Mapping[str, bytes], manifest: Mapping[str, Any]) -> None:
    """Write all files, then the manifest; afterwards the run exists and never changes, unless a job that lost it has damaged it: that one mends it.

    `manifest` is JSON content; `files` and the hashes are added here. Raises `StorageError` if the run is committed already or cannot be
    written, `FormatError` if the manifest is no JSON (NaN included); until the end nobody sees anything.
    """
    content = _manifest_bytes(files, manifest)
    written: dict[str, bytes] = {}
    for name, data in files.items():
        if run.exists(MANIFEST):
            _behind_another(run, files, written, manifest)
            return
        run.write(name, data)
        written[name] = data
    for name, data in files.items():
        if run.read(name) != data:
            raise StorageError(
                f"{run.uri}/{name} came back other than it was written; is another job writing the same run? "
                "run again, or choose another storage"
            )
    # An answer that got lost on the way looks like a manifest of somebody else's.
    if not run.create(MANIFEST, content) and run.read(MANIFEST) != content:
        _behind_another(run, files, written, manifest)
        return
    for name, data in files.items():
        # a job that was told that it had lost the run may have written its own meanwhile
        if run.read(name) != data and _stands(run, content):
            run.write(name, data)


def _behind_another(
    run: Store, files: Mapping[str, bytes], written: Mapping[str, bytes], manifest: Mapping[str, Any]
) -> None:
    """Another job has committed the run: its result stays, unless this one has `written` over it and nobody mends that, since the other has ended."""
    for wait in (*_MENDED_WITHIN_SECONDS, None):
        if not _overwritten(run, written):
            break
        if wait is None:
            replace(run, files, manifest)
            return
        time.sleep(wait)
    raise StorageError(
        f"expected no run at {run.uri}, got a committed one, which never changes; use --force for a new run"
    )


def _stands(run: Store, content: bytes) -> bool:
    """Whether the run has this manifest, and nobody has taken it over."""
    return run.exists(MANIFEST) and run.read(MANIFEST) == content


def _overwritten(run: Store, files: Mapping[str, bytes]) -> bool:
    """Whether one of `files` lies where the manifest of another job states its own: it came late, from a machine that was halted while it wrote. What it
    replaced is lost, and of the same inputs `files` are as good."""
    try:
        stated = read_manifest(run)["files"]
    except FormatError:  # not that of a job
        return False
    return any(
        run.read(name) == data and hashlib.sha256(data).hexdigest() != stated.get(name, {}).get("sha256")
        for name, data in files.items()
    )


def replace(store: Store, files: Mapping[str, bytes], manifest: Mapping[str, Any]) -> None:
    """Write files and manifest in place of others: for what is a summary of runs and no run itself, and for a run that is damaged.

    Until the manifest is there again, nothing is, so that no reader and no crash sees files of two writers; of two at once the one that ends last has
    written all. `StorageError` where another one goes on writing.
    """
    content = _manifest_bytes(files, manifest)
    whole = {**files, MANIFEST: content}
    for _ in range(_REPLACED_AT_MOST):
        store.remove(MANIFEST)
        for name, data in whole.items():
            store.write(name, data)
        if all(store.exists(name) and store.read(name) == data for name, data in whole.items()):
            return
    raise StorageError(
        f"{store.uri} came back other than it was written, {_REPLACED_AT_MOST} times; is another job writing it? run again"
    )


def read_manifest(run: Store) -> dict[str, Any]:
    """The manifest of a committed run.

    `StorageError` if there is none, `FormatError` if it is damaged, of another format or does not say which files it holds.
    """
    if not run.exists(MANIFEST):
        raise StorageError(
            f"expected a committed run at {run.uri}, got no {MANIFEST}; check the URI or let the job finish"
        )
    at = f"{run.uri}/{MANIFEST}"
    try:
        manifest = _parsed(run.read(MANIFEST))
    except ValueError as error:
        raise FormatError(f"expected JSON in {at}, got {brief(error)}; {_RESTORE}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise FormatError(_other_format(manifest, at))
    if _SELF in manifest and manifest[_SELF] != _own_hash(manifest):
        raise FormatError(
            f"expected {at} to have the SHA-256 that it states, got another, so it was edited or damaged; {_RESTORE}"
        )
    if not _names_files(manifest.get("files")):
        raise FormatError(
            f"expected {at} to list its files with bytes and sha256, got something else; {_RESTORE}"
        )
    for key, is_right in _KINDS.items():
        if key in manifest and not is_right(manifest[key]):
            raise FormatError(f"expected {at} to say {key} as manifests do, got something else; {_RESTORE}")
    return manifest


@contextlib.contextmanager
def understood(uri: str) -> Iterator[None]:
    """Whoever shows what the manifest of the stored run at `uri` says finds there what a run says, or it is a `FormatError`: its hash is right for anything."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise FormatError(
            f"expected {uri}/{MANIFEST} to say of a run what manifests do, got something else ({words}); {_RESTORE}"
        ) from error


def refuse_newer(directory: Store) -> None:
    """`FormatError` where what lies there was written by a newer version, which this one must not replace."""
    try:
        content = _parsed(directory.read(MANIFEST)) if directory.exists(MANIFEST) else {}
    except ValueError:
        return
    if isinstance(content, dict) and _newer(content):
        raise FormatError(_other_format(content, f"{directory.uri}/{MANIFEST}"))


def _parsed(data: bytes) -> Any:
    """What a manifest says; `ValueError` where it is no JSON: NaN, half of a surrogate pair, more than `_DEPTH` levels."""
    try:
        content = json.loads(data)
        # neither could be hashed or printed
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError:
        raise ValueError(f"more than {_DEPTH} levels") from None
    level = [content]
    for _ in range(_DEPTH):
        inside = [
            one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)
        ]
        level = [child for values in inside for child in values]
    if level:
        raise ValueError(f"more than {_DEPTH} levels")
    return content


def _newer(manifest: Mapping[str, Any]) -> bool:
    came = manifest.get("format")
    return type(came) is int and came > FORMAT


def _other_format(manifest: Any, at: str) -> str:
    came = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
    if not isinstance(manifest, dict) or not _newer(manifest):
        return f"expected a manifest of format {FORMAT} in {at}, got {came!r}; {_RESTORE}"
    versions = manifest.get("versions")
    by = versions.get("clipq_ray") if isinstance(versions, dict) else None
    writer = f" by clipq_ray {by}" if isinstance(by, str) else ""
    return f"expected a manifest of format {FORMAT} in {at}, got {came}, written{writer}; use that version or a newer one"


def verify(run: Store) -> list[str]:
    """What is wrong with a committed run, one line each, empty if nothing: missing files, sizes, hashes, a packed network that does not decode, what cannot be read."""
    return _verified(run, (FormatError, StorageError))


def damage(run: Store) -> list[str]:
    """As `verify`; `StorageError` where something cannot be read, which says nothing about what lies there."""
    return _verified(run, (FormatError,))


def _verified(run: Store, told: _Kinds) -> list[str]:
    """The lines of `verify`; errors of the kinds `told` are among them, others are raised."""
    try:
        manifest = read_manifest(run)
    except told as error:
        return [str(error)]
    problems = [] if _SELF in manifest else [f"{run.uri}/{MANIFEST}: expected a {_SELF}, got none"]
    place = _place(run.uri)
    problems += [
        f"{run.uri}/{MANIFEST}: expected {key} {value!r} as in the path, got {manifest.get(key)!r}; give the directory its name back"
        for key, value in place.items()
        if manifest.get(key) != value
    ]
    if "run" in place and MODEL not in manifest["files"]:
        problems.append(f"{run.uri}/{MANIFEST}: expected it to list {MODEL}, got a run without; {_RESTORE}")
    for name, stated in sorted(manifest["files"].items()):
        problems.extend(_verify_file(run, name, stated, told))
    return problems


def _place(uri: str) -> dict[str, str]:
    """What the path says that lies there: a model's run, or a fleet; a storage may be called by anything."""
    if match := re.search(r"(?:^|/)model=([^/]+)/run=([^/]+)/?$", uri):
        return {"model": match[1], "run": match[2]}
    match = re.search(r"(?:^|/)fleet=([^/]+)/?$", uri)
    return {"fleet": match[1]} if match else {}


def checked(data: bytes, stated: Mapping[str, Any], origin: str) -> bytes:
    """`data`, if it has the size and SHA-256 that the manifest states for it; else a `FormatError` that names `origin`."""
    if not {"bytes", "sha256"} <= stated.keys():
        raise FormatError(f"{origin}: expected the manifest to list it, got no entry; {_RESTORE}")
    if len(data) != stated["bytes"]:
        raise FormatError(f"{origin}: expected {stated['bytes']} bytes, got {len(data)}; {_RESTORE}")
    if (came := hashlib.sha256(data).hexdigest()) != stated["sha256"]:
        raise FormatError(f"{origin}: expected SHA-256 {stated['sha256']}, got {came}; {_RESTORE}")
    return data


def verify_clq(data: bytes, origin: str) -> list[str]:
    """What is wrong with a .clq file's bytes: the first damage that its decoder finds, with all its checksums, or nothing."""
    # The codec brings the entropy coder; what only lists runs does without.
    from clipq_ray import codec

    try:
        codec.decode(data)
    except FormatError as error:
        return [f"{origin}: {error}"]
    return []


def committed(storage: Store) -> list[CommittedRun]:
    """All committed runs of a storage, sorted by model and run; one listing."""
    return committed_among(storage, storage.names("model="))


def fleets(storage: Store) -> list[Store]:
    """The directories of all fleets that have a manifest, sorted by name."""
    found = (_FLEET.fullmatch(name) for name in storage.names("fleet="))
    return [storage.child(f"fleet={match[1]}") for match in found if match]


def verify_fleet(fleet: Store, storage: Store) -> list[str]:
    """What is wrong with a fleet's own files, and which of its runs `storage` does not hold; the runs' files are not looked at."""
    return verify(fleet) + [
        f"{fleet.uri}/{MANIFEST}: expected run {one.run} of {one.model} to be committed, got no {MANIFEST}; submit the fleet again"
        for one in runs_of(fleet, storage)
        if not one.store.exists(MANIFEST)
    ]


def runs_of(fleet: Store, storage: Store) -> list[CommittedRun]:
    """The runs that a fleet names, whether `storage` holds them or not; none where its manifest cannot be read."""
    try:
        runs = read_manifest(fleet).get("runs", {})
    except (FormatError, StorageError):
        return []
    return [
        CommittedRun(model, run, storage.child(f"model={model}", f"run={run}")) for model, run in runs.items()
    ]


def committed_among(storage: Store, names: list[str]) -> list[CommittedRun]:
    """The committed runs of a storage in which these objects lie, sorted."""
    found = (_RUN.fullmatch(name) for name in names)
    pairs = sorted((match[1], match[2]) for match in found if match)
    return [CommittedRun(model, run, storage.child(f"model={model}", f"run={run}")) for model, run in pairs]


def _manifest_bytes(files: Mapping[str, bytes], manifest: Mapping[str, Any]) -> bytes:
    entries = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in sorted(files.items())
    }
    whole = {**manifest, "files": entries}
    try:
        whole[_SELF] = _own_hash(whole)
        text = json.dumps(whole, indent=1, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise FormatError(f"expected a manifest of JSON values without NaN, got {error}") from error
    if whole.get("format") != FORMAT:
        raise FormatError(f"expected a manifest of format {FORMAT}, got {whole.get('format')!r}")
    return text.encode()


def _own_hash(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the manifest without its own hash, as JSON with sorted keys and no spaces."""
    rest = {key: value for key, value in manifest.items() if key != _SELF}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _names_files(files: Any) -> bool:
    """Whether this is {name: {"bytes": int >= 0, "sha256": 64 hex digits}} with names that stay inside the run."""
    return isinstance(files, dict) and all(
        isinstance(stated, dict)
        and type(stated.get("bytes")) is int
        and stated["bytes"] >= 0
        and isinstance(stated.get("sha256"), str)
        and bool(_HEX.fullmatch(stated["sha256"]))
        and not any(part in ("", ".", "..") for part in name.split("/"))
        for name, stated in files.items()
    )


def _verify_file(run: Store, name: str, stated: Mapping[str, Any], told: _Kinds) -> list[str]:
    at = f"{run.uri}/{name}"
    try:
        if not run.exists(name):
            return [f"{at}: expected {stated['bytes']} bytes, got no file; {_RESTORE}"]
        data = checked(run.read(name), stated, at)
    except told as error:
        return [str(error)]
    return verify_clq(data, at) if name == MODEL else []
