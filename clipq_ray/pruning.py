"""What a storage holds that nobody needs: found first, shown, and removed only then.

Kept are committed runs with the files that their manifests name, the stages that these name, fleets with a manifest, and whatever a run uses that a
live job claims (`claims`): its directory, and the stages that it has begun, which it lists in its `_work`. All else in the directories that jobs
write is left over: runs without a manifest, stages of attempts that nobody continues, checkpoints, unfinished writes. Not covered: files that no job wrote.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from clipq_ray import claims
from clipq_ray.errors import StorageError
from clipq_ray.manifest import read_manifest
from clipq_ray.storage import MANIFEST, USES, WORK, Store

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


def leftovers(storage: Store) -> list[Leftover]:
    """What could be removed, by directory; `FormatError` where a manifest is damaged, since then nobody knows what it names."""
    names = storage.names()
    runs, stages, fleets = (_by_place(pattern, names) for pattern in (_RUN, _STAGE, _FLEET))
    used: set[str] = set()
    found: list[Leftover] = []
    for place, inside in runs.items():
        run = storage.child(*place.split("/"))
        held = claims.holder(run.child(WORK)) is not None
        if held:
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
            found.append(_leftover(storage, place, inside, f"{reason}, and no job makes it"))
    for place, inside in fleets.items():
        if MANIFEST not in inside:
            found.append(_leftover(storage, place, inside, "a fleet without a manifest"))
    for place, inside in stages.items():
        if place.removeprefix("_stages/") not in used:
            found.append(
                _leftover(storage, place, inside, "a stage that no committed run and no job under way uses")
            )
    unfinished = storage.unfinished(older_than=3600.0)
    if unfinished:
        found.append(_leftover(storage, "", unfinished, "writes that did not come to their end"))
    return found


def _by_place(pattern: re.Pattern[str], names: list[str]) -> dict[str, list[str]]:
    result: dict[str, list[str]] = {}
    for name in names:
        if match := pattern.fullmatch(name):
            result.setdefault(match[1], []).append(match[match.re.groups])
    return result


def _used(run: Store) -> Iterator[str]:
    """The stages that an unfinished run has begun."""
    for name in run.child(WORK).names(f"{USES}/"):
        yield name.removeprefix(f"{USES}/")


def _leftover(storage: Store, place: str, names: list[str], reason: str) -> Leftover:
    full = tuple(f"{place}/{name}" if place else name for name in names)
    size = 0
    for name in full:
        try:
            size += storage.size(name)
        except StorageError:  # gone meanwhile
            continue
    return Leftover(place or ".", full, size, reason)


def remove(storage: Store, found: list[Leftover], say: Callable[[str], None]) -> int:
    """Remove what is still left over, a directory at a time; bytes that were removed."""
    freed, still = 0, leftovers(storage)
    for one in found:
        # a job may have claimed a run, or committed one that names a stage, since it was shown
        if one.place != "." and one not in still:
            say(f"kept: {one.place} is used by now")
            continue
        for name in one.names:
            storage.remove(name)
        freed += one.bytes
    return freed
