"""What can never run is refused at once, with what is needed and what is there; what may come is waited for."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from refusals import refused

pytest.importorskip("ray")

from clipq_ray.cluster import capacity
from clipq_ray.cluster.capacity import Capacity
from clipq_ray.cluster.on_ray import RayEngine
from clipq_ray.config import make
from clipq_ray.errors import ConfigError

HEAD = {"CPU": 0.0, "memory": 8e9}
CPUS = {"CPU": 4.0}
GPUS = {"CPU": 8.0, "GPU": 1.0}
FROM_ZERO = Capacity((HEAD,), ((GPUS, 3), (GPUS, 3)), 3)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Capacity]]:
    """Sets what the cluster is, look by look; the last stays. Time passes only by waiting."""

    def are(*states: Capacity) -> list[Capacity]:
        looks: list[Capacity] = []
        clock = [0.0]

        def look() -> Capacity:
            looks.append(states[min(len(looks), len(states) - 1)])
            return looks[-1]

        def sleep(seconds: float) -> None:
            clock[0] += seconds

        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
        monkeypatch.setattr(capacity, "look", look)
        monkeypatch.setattr(capacity.time, "sleep", sleep)
        monkeypatch.setattr(capacity.time, "monotonic", lambda: clock[0])
        return looks

    return are


def test_room_is_counted_per_node_and_not_over_the_sum() -> None:
    two = Capacity((HEAD, {"CPU": 3.0}, {"CPU": 3.0}))
    assert two.room({"CPU": 2.0}) == 2
    assert two.room({"CPU": 1.0}) == 6
    assert two.room({"CPU": 4.0}) == 0
    assert FROM_ZERO.room({"CPU": 4.0, "GPU": 1.0}) == 3


def test_a_share_of_a_gpu_is_not_lost_to_rounding() -> None:
    assert Capacity((GPUS,)).room({"CPU": 1.0, "GPU": 0.1}) == 8
    assert Capacity(({"CPU": 16.0, "GPU": 1.0},)).room({"CPU": 1.0, "GPU": 0.1}) == 10


def test_a_head_that_works_is_there_beside_what_the_cluster_grows_to() -> None:
    grows = (({"CPU": 8.0}, 2),)
    assert Capacity(({"CPU": 8.0, "memory": 8e9},), grows, 2).room({"CPU": 4.0}) == 4  # one of them, or none
    assert Capacity(({"CPU": 10.0},), grows, 2).room({"CPU": 4.0}) == 6
    assert Capacity(({"CPU": 10.0}, {"CPU": 8.0}, {"CPU": 8.0}), grows, 2).room({"CPU": 4.0}) == 6


@pytest.mark.parametrize(
    "said", ['{"nodes": 2', '{"nodes": 2}', "3", '{"nodes": 2, "kinds": [{"count": 1}]}']
)
def test_a_slip_in_what_the_cluster_may_grow_to_is_one_line(
    said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(capacity.GROWTH, said)
    monkeypatch.setattr(capacity.ray, "nodes", list)
    with refused(ConfigError, match=f"in {capacity.GROWTH}, as .* got {re.escape(repr(said))}"):
        capacity.look()


def test_the_variable_of_the_cluster_file_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As deploy/environment.py writes it from cluster.yaml, without a worker there."""
    root = Path(__file__).parents[2]
    spec = importlib.util.spec_from_file_location("_environment", root / "deploy" / "environment.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = yaml.safe_load((root / "cluster.yaml").read_text().replace("@", ""))
    monkeypatch.setenv(capacity.GROWTH, json.dumps(module.may_grow(config)))
    monkeypatch.setattr(
        capacity.ray,
        "nodes",
        lambda: [{"Alive": True, "Resources": HEAD}, {"Alive": False, "Resources": GPUS}],
    )
    found = capacity.look()
    assert found.nodes == (HEAD,)
    assert found.room({"CPU": 1.0, "GPU": 1.0}) == 8
    assert found.room({"CPU": 1.0, "GPU": 0.25}) == 32


def test_a_gpu_beside_no_cpu_for_work_is_none(there: Callable[..., list[Capacity]]) -> None:
    there(Capacity(({"CPU": 0.0, "GPU": 1.0}, CPUS)))
    assert not capacity.on_gpus("auto")


def test_a_gpu_that_the_autoscaler_may_start_counts(there: Callable[..., list[Capacity]]) -> None:
    there(FROM_ZERO)
    assert capacity.on_gpus("cuda")
    assert capacity.on_gpus("auto")
    assert not capacity.on_gpus("cpu")


def test_no_gpu_where_one_was_asked_for_is_refused_at_the_first_look(
    there: Callable[..., list[Capacity]],
) -> None:
    looks = there(Capacity((HEAD, CPUS, CPUS)))
    with pytest.raises(ConfigError, match=r"--device: expected a GPU .*\(3 nodes with 8 CPUs and 0 GPUs"):
        capacity.on_gpus("cuda")
    assert len(looks) == 1
    assert not capacity.on_gpus("auto")


def test_a_cluster_that_is_too_small_says_what_is_needed_and_what_is_there(
    there: Callable[..., list[Capacity]],
) -> None:
    looks = there(Capacity((HEAD, CPUS, CPUS)))
    capacity.refuse_too_large(make(workers=4, threads_per_worker=2), {"CPU": 2.0, "GPU": 0})
    with pytest.raises(ConfigError) as refused:
        capacity.refuse_too_large(make(workers=5, threads_per_worker=2), {"CPU": 2.0, "GPU": 0})
    for words in ("--workers: expected at most 4", "got 5 of 2 CPUs", "3 nodes with 8 CPUs"):
        assert words in str(refused.value)
    assert len(looks) == 2


@pytest.mark.parametrize(
    ("each", "workers", "words"),
    [
        ({"CPU": 2.0, "GPU": 0.0}, 5, "--workers x --threads-per-worker at most the machine's 8 CPUs, got 10"),
        ({"CPU": 1.0, "GPU": 1.0}, 2, "--workers at most the machine's 1 GPUs, got 2; lower it, or use --device cpu"),
    ],
)  # fmt: skip
def test_a_ray_of_our_own_refuses_what_the_machine_lacks(
    each: dict[str, float], workers: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a training would wait for ever: a Ray of our own never grows."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(capacity.ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 1.0})
    capacity.refuse_too_large(make(workers=workers - 1), each)
    with pytest.raises(ConfigError, match=words):
        capacity.refuse_too_large(make(workers=workers), each)


def test_fewer_hosts_than_workers_are_refused_only_below_the_fewest(
    there: Callable[..., list[Capacity]],
) -> None:
    there(Capacity((HEAD, CPUS)))
    capacity.refuse_too_large(make(workers=8, min_workers=4), {"CPU": 1.0, "GPU": 0})
    with pytest.raises(ConfigError, match=r"--min-workers: expected at most 4, .*got 5 of 1 CPUs"):
        capacity.refuse_too_large(make(workers=8, min_workers=5), {"CPU": 1.0, "GPU": 0})


@pytest.mark.parametrize("fewest", [None, 1])
def test_more_gpus_than_the_job_may_take_are_refused_before_anything_runs(
    there: Callable[..., list[Capacity]], fewest: int | None
) -> None:
    """Also where fewer workers would do: whoever waits for its turn waits for all of them."""
    there(Capacity((HEAD, {"CPU": 8.0, "GPU": 4.0})))
    for device, workers in (("cpu", 4), ("auto", 2)):
        fits = make(workers=workers, min_workers=fewest, limit_gpus=2, device=device)
        RayEngine(fits).check(fits)
    beyond = make(workers=4, min_workers=fewest, limit_gpus=2)
    with pytest.raises(ConfigError, match=r"expected --workers, .*at most --limit-gpus \(2\), got 4"):
        RayEngine(beyond).check(beyond)


def test_a_network_that_can_never_run_here_does_not_keep_others_from_being_counted(
    there: Callable[..., list[Capacity]],
) -> None:
    there(Capacity((HEAD, CPUS)))
    wants = make(device="cuda")
    assert RayEngine().trainings([wants, make(), make(workers=2)]) == 4
    assert RayEngine().trainings([wants]) == 1
    with pytest.raises(ConfigError, match="--device: expected a GPU"):
        RayEngine().check(wants)


def test_trainings_at_a_time_are_counted_once_the_hosts_of_the_cluster_file_have_joined(
    there: Callable[..., list[Capacity]],
) -> None:
    one = {"CPU": 1.0}
    two_join = (
        Capacity((HEAD, one), coming=2),
        Capacity((HEAD, one, one), coming=1),
        Capacity((HEAD, one, one, one)),
    )
    there(*two_join)
    assert RayEngine().trainings([make(device="cpu")] * 3) == 3
    looks = there(*two_join)
    assert RayEngine().trainings([make(device="cpu")]) == 1  # alone it does not wait
    assert len(looks) == 1
    limited = make(device="cpu", limit_cpus=2)
    looks = there(*two_join)
    assert RayEngine(limited).trainings([limited] * 3) == 2
    assert len(looks) == 2


def test_what_a_cluster_may_grow_to_is_the_limit_and_is_said(there: Callable[..., list[Capacity]]) -> None:
    there(FROM_ZERO)
    capacity.refuse_too_large(make(workers=3), {"CPU": 1.0, "GPU": 1.0})
    with pytest.raises(ConfigError, match=r"at most 3.*may grow to 3 workers \(3 of 8 CPUs and 1 GPUs"):
        capacity.refuse_too_large(make(workers=4), {"CPU": 1.0, "GPU": 1.0})


def test_hosts_of_the_cluster_file_that_have_not_joined_are_waited_for(
    there: Callable[..., list[Capacity]],
) -> None:
    looks = there(Capacity((HEAD,), coming=2), Capacity((HEAD, CPUS), coming=1), Capacity((HEAD, CPUS, CPUS)))
    capacity.refuse_too_large(make(workers=8), {"CPU": 1.0, "GPU": 0})
    assert len(looks) == 3


def test_a_host_that_never_joins_is_waited_for_no_longer_than_the_limit(
    there: Callable[..., list[Capacity]],
) -> None:
    looks = there(Capacity((HEAD, CPUS), coming=1))
    with pytest.raises(ConfigError, match="expected at most 4"):
        capacity.refuse_too_large(make(workers=8), {"CPU": 1.0, "GPU": 0})
    assert len(looks) == pytest.approx(capacity.JOIN_SECONDS, abs=3)
