"""Whether all nodes of a cluster see the same storage and may write there: a small object that the driver writes is looked for on each, before hours of work.

A folder that every node has for itself, credentials that only one has, a network that leads elsewhere: each ends the job at once, by name.
Not covered: nodes that join later; what they cannot write fails by name.
"""

from __future__ import annotations

import os
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clipq_ray import logs
from clipq_ray.errors import StorageError
from clipq_ray.storage import Store

LIMIT_SECONDS = 60.0
"""For all nodes together; one that has not answered by then may be busy, and is passed over."""
_PROBE_BYTES = 64
log = logs.logger(__name__)


def check(storage: Store) -> None:
    """`StorageError` where an alive node does not find what was just written to `storage`, or cannot write there, with node and reason."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    own = ray.get_runtime_context().get_node_id()
    others = [node for node in nodes if node["NodeID"] != own]
    if not others:
        return
    data = os.urandom(_PROBE_BYTES)
    with storage.probe(data) as name:
        problems = _asked(storage, name, data, others)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise StorageError(
            f"expected a --storage that all {len(nodes)} nodes see and may write to, but node {problems[0]}{more}; use object storage or a folder that all nodes "
            "mount, with credentials on each"
        )


def _asked(storage: Store, name: str, data: bytes, nodes: list[dict[str, Any]]) -> list[str]:
    """Node and reason where the object is not seen as it was written."""
    look = ray.remote(num_cpus=0, max_retries=0)(_look)
    asked = {look.options(scheduling_strategy=_on(node)).remote(storage.uri, name): node for node in nodes}
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=LIMIT_SECONDS)
    for one in late:
        log.warning(
            "%s did not say within %.0f s whether it sees %s", _said(asked[one]), LIMIT_SECONDS, storage.uri
        )
        ray.cancel(one, force=True)
    problems = []
    for one in done:
        try:
            seen, reason = ray.get(one)
        except ray.exceptions.RayError as error:  # the node went away: the work finds others
            log.warning("%s could not be asked: %s", _said(asked[one]), str(error).strip().splitlines()[-1])
            continue
        if seen != data:
            problems.append(
                f"{_said(asked[one])} does not: {reason or 'it read other bytes than were written'}"
            )
    return sorted(problems)


def _look(uri: str, name: str) -> tuple[bytes | None, str]:
    """What a node reads there, or why it does not, or cannot write."""
    try:
        data = Store(uri).read(name)
        Store(uri).check_writable()
        return data, ""
    except StorageError as error:
        return None, str(error)


def _on(node: dict[str, Any]) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)


def _said(node: dict[str, Any]) -> str:
    """The node's name and address."""
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
