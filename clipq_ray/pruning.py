"""What a storage holds that nobody needs: found first, shown, and removed only then.

Kept are committed runs with the files that their manifests name, the stages that these name, fleets with a manifest, and whatever a run uses that a
live job claims (`claims`), or that something was written to since: its directory, and the stages that it has begun, which it lists in its `_work` before it looks at them. All else in the
directories that jobs write is left over once nothing in it was written for `OLDER_THAN_HOURS`, by the clock of the storage: runs without a manifest,
stages of attempts that nobody continues, checkpoints, unfinished writes, parts of objects that were never completed.

A job may begin while `remove` works. So that a stage never goes away under it, what says that a stage is finished is taken away first, and then
claims are looked at once more: a job that has named the stage by then gets it back whole, one that looks in between or later finds no finished stage and makes it again; what it
writes meanwhile stays.
Not covered: files that no job wrote, and what links lead to outside of the storage.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from clipq_ray import claims
from clipq_ray.backends import Entry, Upload
from clipq_ray.manifest import read_manifest
from clipq_ray.storage import MANIFEST, USES, WORK, Store

OLDER_THAN_HOURS = 24.0
FINISHED = ("curve.json", "done.json", "group-*.json")
"""The objects of a stage that say that it, or a part of a search, is finished."""
_UNFINISHED_SECONDS = 3600.0  # a write that is under way is never older
_RUN = re.compile(r"(model=[^/]+/run=[^/]+)/(.+)")
_STAGE = re.compile(r"(_stages/([^/]+))/(.+)")
_FLEET = re.compile(r"(fleet=[^/]+)/(.+)")


@dataclass(frozen=True)
class Leftover:
    """Objects of one directory that nobody needs; `reason` in words."""

    place: str
    names: tuple[str, ...]
    bytes: int
    reason: str
    uploads: tuple[Upload, ...] = ()


@dataclass(frozen=True)
class Leftovers:
    """What could be removed, by directory, and what is too young for that."""

    old: list[Leftover]
    young: list[Leftover]


def leftovers(storage: Store, older_than_hours: float = OLDER_THAN_HOURS) -> Leftovers:
    """What nobody needs; `FormatError` where a manifest is damaged, since then nobody knows what it names."""
    entries, limit = storage.entries(), 3600.0 * older_than_hours
    latest = _before(storage, limit)
    # what lies behind a link is of another storage, whose runs may need it
    found = [one for one in _unneeded(storage, entries, latest) if not storage.beyond(one.place)]
    young = [one for one in found if any(entries[name].modified > latest() for name in one.names)]
    old = [one for one in found if one not in young]
    return Leftovers([*old, *_unfinished(storage, max(limit, _UNFINISHED_SECONDS))], young)


def _before(storage: Store, seconds: float) -> Callable[[], float]:
    """When it was so many seconds ago; asked of the storage once, and only where somebody wants to know, since that takes a write."""
    return cache(lambda: storage.now() - seconds)


def _unneeded(storage: Store, entries: Mapping[str, Entry], latest: Callable[[], float]) -> list[Leftover]:
    """What of `entries` no run and no job needs, whatever its age; a run without a manifest counts as one while something was written to it after `latest`."""
    runs, stages, fleets = (_by_place(pattern, entries) for pattern in (_RUN, _STAGE, _FLEET))
    used: set[str] = set()
    found: list[Leftover] = []
    for place, inside in runs.items():
        run = storage.child(*place.split("/"))
        held = claims.holder(run.child(WORK)) is not None
        if held or (
            MANIFEST not in inside and any(entries[f"{place}/{name}"].modified > latest() for name in inside)
        ):
            used.update(_used(run))
        if MANIFEST in inside:
            document = read_manifest(run)
            used.update(f"{one['stage']}-{one['key']}" for one in document.get("stages", []))
            inside = [name for name in inside if name != MANIFEST and name not in document["files"]]
        reason = (
            "not named by the run's manifest"
            if MANIFEST in runs[place]
            else "an unfinished run, which the same job would continue"
        )
        if inside and not held:
            found.append(_leftover(entries, place, inside, f"{reason}, and no job makes it"))
    for place, inside in fleets.items():
        if MANIFEST not in inside:
            found.append(_leftover(entries, place, inside, "a fleet without a manifest"))
    for place, inside in stages.items():
        if place.removeprefix("_stages/") not in used:
            found.append(
                _leftover(entries, place, inside, "a stage that no committed run and no job under way uses")
            )
    return found


def _unfinished(storage: Store, seconds: float) -> Iterator[Leftover]:
    """Writes that are that old."""
    if names := [name for name in storage.unfinished(seconds) if not storage.beyond(name)]:
        size = sum(storage.size(name) for name in names)
        yield Leftover(".", tuple(names), size, "writes that did not come to their end")
    # below the storage others may keep data, whose uploads are no job's
    if uploads := [one for one in storage.uploads(seconds) if _of_jobs(one.name)]:
        more = f" and {len(uploads) - 1} more" if len(uploads) > 1 else ""
        reason = f"parts of an object that was never completed ({uploads[0].name}){more}"
        yield Leftover(".", (), 0, reason, tuple(uploads))


def _of_jobs(name: str) -> bool:
    """Whether an object lies where jobs write."""
    return any(pattern.fullmatch(name) for pattern in (_RUN, _STAGE, _FLEET))


def _by_place(pattern: re.Pattern[str], names: Mapping[str, Entry]) -> dict[str, list[str]]:
    result: dict[str, list[str]] = {}
    for name in names:
        if match := pattern.fullmatch(name):
            result.setdefault(match[1], []).append(match[match.re.groups])
    return result


def _used(run: Store) -> Iterator[str]:
    """The stages that an unfinished run has begun."""
    for name in run.child(WORK).names(f"{USES}/"):
        yield name.removeprefix(f"{USES}/")


def _leftover(entries: Mapping[str, Entry], place: str, names: list[str], reason: str) -> Leftover:
    full = tuple(f"{place}/{name}" for name in names)
    return Leftover(place, full, sum(entries[name].bytes for name in full), reason)


def remove(
    storage: Store,
    found: list[Leftover],
    say: Callable[[str], None],
    older_than_hours: float = OLDER_THAN_HOURS,
) -> int:
    """Remove what is still left over; bytes that were removed."""
    still = leftovers(storage, older_than_hours).old
    going = [one for one in found if one.place == "." or one in still]
    before = storage.entries() if going else {}
    going = _without_their_ends(storage, going, _before(storage, 3600.0 * older_than_hours))
    freed = 0
    for one in found:
        if one not in going:
            say(f"kept: {one.place} is used by now")
            continue
        for name in one.names:
            # removing takes time: what somebody writes anew meanwhile stays
            if one.place == "." or _is_as(storage, name, before.get(name)):
                storage.remove(name)
        if one.place != ".":
            storage.child(*one.place.split("/")).tidy()
        for upload in one.uploads:
            storage.abandon(upload)
        freed += one.bytes
    return freed


def _is_as(storage: Store, name: str, before: Entry | None) -> bool:
    """Whether an object is the one that it was."""
    return before is not None and storage.entries(name).get(name) == before


def _is_end(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name.rpartition("/")[2], pattern) for pattern in FINISHED)


def _without_their_ends(storage: Store, going: list[Leftover], latest: Callable[[], float]) -> list[Leftover]:
    """Those of `going` that nobody needs after what says that they are finished was taken away; the others have it back."""
    ends = [name for one in going for name in one.names if _is_end(name)]
    taken = {name: storage.read(name) for name in ends}
    unneeded: list[Leftover] = []
    try:
        for name in taken:
            storage.remove(name)
        there = {**{name: Entry(len(data), 0.0) for name, data in taken.items()}, **storage.entries()}
        now = {one.place: one for one in _unneeded(storage, there, latest)}
        unneeded = [
            one
            for one in going
            if one.place == "." or (one.place in now and set(now[one.place].names) <= set(one.names))
        ]
    finally:
        gone = {name for one in unneeded for name in one.names}
        for name, data in taken.items():
            if name not in gone:
                storage.create(name, data)
    return unneeded
