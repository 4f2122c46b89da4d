"""Stages that several jobs want at the same time: one of them makes a stage, the others wait for it and take what it has made.

Whoever waits holds no claim on another stage, so no two jobs wait for each other; a job that dies leaves the stage to the next one, which goes on from its
checkpoints or trials where they are kept with the stage. As with runs (`claims`) this saves work and decides nothing: two that made a stage would write the same.
Not covered: the networks of one job, of which one at a time makes a stage (`stages.Run.alone`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from clipq_ray import claims
from clipq_ray.errors import StorageError
from clipq_ray.progress import Reporter
from clipq_ray.storage import Store

MAKING = "_making"
"""Where the claim on a stage lies, in the stage."""
WAIT_SECONDS = 5.0
"""Between two looks at a stage that another job makes."""


def claimed(name: str, store: Store, reporter: Reporter, said: set[str]) -> claims.Claim | None:
    """This job's claim on the stage `name` in `store`; None while another job makes it, which is said where `said` does not hold it yet. What was made
    between the caller's look and the claim is the caller's to see."""
    found = claims.claim(store.child(MAKING), shared=True)
    if isinstance(found, claims.Claim):
        return found
    words = f"{name}: is being made by another job ({found.words}) for a run of its own; waiting for it ({store.uri})"
    if words not in said:
        reporter.say(words)
        said.add(words)
    return None


@contextlib.contextmanager
def held(claim: claims.Claim) -> Iterator[None]:
    """While a stage is made; it is anybody's again where that fails."""
    try:
        yield
    except BaseException:
        claim.give_back()
        raise
    claim.finish()


def clear(store: Store) -> None:
    """Remove the claim of a job that died right behind the end of the stage in `store`."""
    with contextlib.suppress(StorageError):  # nobody looks at it any more
        if store.names(f"{MAKING}/") and claims.holder(store.child(MAKING)) is None:
            store.child(MAKING).remove_tree()
