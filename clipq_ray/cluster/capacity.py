"""What a cluster has and may grow to, so that a job that can never run is refused at once instead of waiting forever.

Ray itself waits without end for resources that no node has. With the autoscaler of cloud clusters, what it may start counts as there; hosts of a cluster file
that have not joined yet are waited for, for a while. Not covered: what others on a shared cluster hold at the moment, since that is given back.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import ray_constants
from ray.experimental.internal_kv import _internal_kv_get

from clipq_ray import logs
from clipq_ray.config import Config
from clipq_ray.errors import ConfigError

log = logs.logger(__name__)
JOIN_SECONDS = 180.0
"""How long hosts that the cluster file names may take to join; they take 20 to 60 s after `ray up` and after their own start."""
GROWTH = "CLIPQ_MAY_GROW"
"""The variable with what the autoscaler may start (`deploy/environment.py`): Ray itself tells its jobs only what is there."""
Resources = Mapping[str, float]


@dataclass(frozen=True)
class Capacity:
    """`nodes`: the resources of each live node. `kinds`: what the autoscaler may start, as resources of one and their number, `most` nodes of all kinds
    together. `coming`: nodes that the cluster file names and that have not joined."""

    nodes: tuple[Resources, ...]
    kinds: tuple[tuple[Resources, int], ...] = ()
    most: int = 0
    coming: int = 0

    def room(self, each: Resources) -> int:
        """How many workers or trials that need `each` can run at a time, at most."""
        there, grown, left = sum(_fit(node, each) for node in self.nodes), 0, self.most
        for fit, count in sorted(((_fit(kind, each), count) for kind, count in self.kinds), reverse=True):
            grown += fit * min(count, left)
            left -= min(count, left)
        return max(there, grown + sum(_fit(node, each) for node in self.nodes if not self._grows(node)))

    def _grows(self, node: Resources) -> bool:
        """Whether a node is one of those that the autoscaler starts, as the head is not."""
        return any(
            all(node.get(name, 0) == kind.get(name, 0) for name in ("CPU", "GPU")) for kind, _ in self.kinds
        )

    def words(self) -> str:
        """What is there, for a person."""
        total = {name: sum(node.get(name, 0) for node in self.nodes) for name in ("CPU", "GPU")}
        words = f"{len(self.nodes)} nodes with {total['CPU']:.0f} CPUs and {total['GPU']:.0f} GPUs in all"
        if self.kinds:
            most = ", ".join(
                f"{count} of {kind.get('CPU', 0):.0f} CPUs and {kind.get('GPU', 0):.0f} GPUs"
                for kind, count in self.kinds
            )
            words += f", and the cluster may grow to {self.most} workers ({most})"
        return words


def _fit(node: Resources, each: Resources) -> int:
    """How many that need `each` fit on one node."""
    return min(int(node.get(name, 0) / amount + 1e-6) for name, amount in each.items() if amount)


def there() -> Capacity:
    """What the cluster has now, whatever it may grow to."""
    return Capacity(tuple(dict(node["Resources"]) for node in ray.nodes() if node["Alive"]))


def look() -> Capacity:
    """The capacity of the cluster that this process is connected to."""
    nodes = there().nodes
    if said := os.environ.get(GROWTH):
        try:
            growth = json.loads(said)
            kinds = tuple((dict(kind["resources"]), int(kind["count"])) for kind in growth["kinds"])
            return Capacity(nodes, kinds, int(growth["nodes"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f'expected what the cluster may grow to in {GROWTH}, as {{"nodes": 2, "kinds": [{{"resources": {{"CPU": 8}}, "count": 2}}]}}, got {said!r} '
                f"({type(error).__name__}: {error}); correct it"
            ) from error
    return Capacity(nodes, coming=max(0, _named_nodes() - len(nodes)))


def _named_nodes() -> int:
    """How many nodes Ray's older autoscaler keeps, those that have not joined among them; 0 without one."""
    said = _internal_kv_get(ray_constants.DEBUG_AUTOSCALING_STATUS)
    if not said:
        return 0
    report: dict[str, Any] = json.loads(said).get("autoscaler_report") or {}
    return len(report.get("node_type_mapping") or {})


def on_gpus(wanted: str) -> bool:
    """Whether work goes to GPUs, by the option --device and what the cluster has or may start; `ConfigError` where one is wanted and none can be."""
    if wanted == "cpu":
        return False
    one = {"CPU": 1.0, "GPU": 1.0}  # a GPU whose node has no CPU for work is none
    # `auto` waits for the first host that works, since right after `ray up` there is none
    waited = _enough(one if wanted == "cuda" else {"CPU": 1.0}, 1)
    found = waited.room(one) >= 1
    if wanted == "cuda" and not found:
        raise ConfigError(
            f"--device: expected a GPU in the cluster, got none ({waited.words()}); use --device cpu, or a cluster with GPUs"
        )
    return found


def refuse_beyond_machine(each: Resources, count: int) -> None:
    """`ConfigError` where a Ray of our own has less than `count` of `each`: it never grows."""
    has = ray.cluster_resources()
    for name, options in (("CPU", "--workers x --threads-per-worker"), ("GPU", "--workers")):
        wanted, there = count * each.get(name, 0), has.get(name, 0)
        if wanted > there:
            raise ConfigError(
                f"expected {options} at most the machine's {there:.0f} {name}s, got {wanted:g}; lower {'one of them' if name == 'CPU' else 'it, or use --device cpu'}"
            )


def refuse_too_large(config: Config, each: Resources) -> None:
    """`ConfigError` where the fewest workers of `config` that need `each`, or one trial of the search, can never run at a time."""
    fewest = config.fewest_workers
    if not os.environ.get("RAY_ADDRESS"):  # a Ray of our own on this machine
        refuse_beyond_machine(each, fewest)
        return
    found = _enough(each, fewest)
    if (room := found.room(each)) < fewest:
        gpu = ", 1 GPU" if each.get("GPU") else ""
        option = "--workers" if fewest == config.workers else "--min-workers"
        raise ConfigError(
            f"{option}: expected at most {room}, which is what the cluster has room for, got {fewest} of {each['CPU']:.0f} CPUs{gpu} each "
            f"(--threads-per-worker); there are {found.words()}; lower one of them, or add nodes"
        )


def _enough(each: Resources, count: int) -> Capacity:
    """The capacity as `joined` gives it, enough being room for `count`."""
    return joined(lambda found: found.room(each) >= count)


def joined(enough: Callable[[Capacity], bool]) -> Capacity:
    """The capacity as soon as it is `enough`, or no node is missing any more, or `JOIN_SECONDS` are over."""
    limit, said = time.monotonic() + JOIN_SECONDS, False
    while True:
        found = look()
        if enough(found) or not found.coming or time.monotonic() > limit:
            return found
        if not said:
            log.warning(
                "waiting for %d nodes of the cluster file that have not joined yet, up to %.0f s",
                found.coming,
                JOIN_SECONDS,
            )
            said = True
        time.sleep(1.0)
