"""Decoding on a cluster: the same batches and the same training as in the worker itself, whatever is lost on the way."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from data_files import folder, numbered, parquet, png, write
from ray.cluster_utils import Cluster
from refusals import refused
from s3_server import environment, make_bucket

from clipq_ray.cluster import ray_data
from clipq_ray.cluster.engine import Engine, LocalEngine
from clipq_ray.cluster.on_ray import RayEngine
from clipq_ray.cluster.ray_data import Decoders
from clipq_ray.cluster.room import Amount
from clipq_ray.config import Config, make
from clipq_ray.data import batches, open_data
from clipq_ray.data.encoded import EncodedSplit
from clipq_ray.data.prefetch import Feed
from clipq_ray.errors import ConfigError, DataError
from clipq_ray.optimizers import Schedule
from clipq_ray.source import Source
from clipq_ray.states import WEIGHTS
from clipq_ray.storage import Store
from clipq_ray.training import TrainTask

pytest_plugins = ["s3_server"]
pytestmark = pytest.mark.slow

LIMIT_SECONDS = 120.0
Batches = list[tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def cluster(s3_server: str) -> Iterator[Cluster]:
    """A head with two CPUs and a node with two, which find the S3 server; to which more may be added."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**environment(s3_server), "RAY_worker_niceness": "0"}.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        store = 150 * 2**20
        made = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 2, "object_store_memory": store, "include_dashboard": False},
        )
        made.add_node(num_cpus=2, object_store_memory=store)
        ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
        try:
            yield made
        finally:
            ray.shutdown()
            made.shutdown()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_data, "PIECE_BYTES", 1)  # a task per row group, or per file


def until(what: Callable[[], Any]) -> None:
    limit = time.monotonic() + LIMIT_SECONDS
    while not what():
        assert time.monotonic() < limit, "it took too long"
        time.sleep(0.05)


def free_cpus() -> float:
    return float(ray.available_resources().get("CPU", 0.0))


def opened(uri: str, **options: Any) -> EncodedSplit:
    given = {"input_shape": (3, 8, 8), "memory_limit_bytes": 15_000, "validation_images": 6}
    split = open_data(uri, **{**given, **options}).train
    assert isinstance(split, EncodedSplit)
    return split


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def epoch(split: EncodedSplit, feed: Feed) -> Batches:
    return list(feed(split, split.index_batches(seeded(1), 16), lambda step: seeded(50 + step)))


def assert_same(first: Batches, second: Batches) -> None:
    assert len(first) == len(second) > 3
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


@pytest.mark.parametrize("kind", ["row groups", "larger images", "files", "S3"])
def test_batches_from_the_cluster_are_those_of_the_worker(
    cluster: Cluster, kind: str, s3_server: str, tmp_path: Path
) -> None:
    if kind == "S3":
        uri = f"s3://{make_bucket(s3_server)}/data"
        Store(uri).write("train-0.parquet", numbered(0, 90))
    elif kind == "files":
        folder(tmp_path, "train", 70)
        uri = str(tmp_path)
    else:
        size = (8, 8) if kind == "row groups" else (30, 20)
        uri = write(tmp_path, {f"train-{part}.parquet": numbered(60 * part, 60, size) for part in range(2)})
    split = opened(uri, memory_limit_bytes=10_000)
    assert_same(epoch(split, Decoders(2, 10**6)), epoch(split, batches))
    assert_same(epoch(split, Decoders(4, 2000)), epoch(split, batches))


def test_unreadable_images_are_replaced_and_counted_as_in_the_worker(
    cluster: Cluster, tmp_path: Path
) -> None:
    images: list[bytes | None] = [png(number) for number in range(90)]
    images[5] = images[6] = images[40] = images[77] = b"no image"
    uri = write(tmp_path, {"train.parquet": parquet(images, [n % 3 for n in range(90)])})
    here, there = (opened(uri, memory_limit_bytes=1000, bad_image_limit=4) for _ in range(2))
    assert_same(epoch(there, Decoders(2, 10**6)), epoch(here, batches))
    assert there.unreadable == here.unreadable
    assert len(here.unreadable) >= 3
    with pytest.raises(DataError, match="at most 0 unreadable images, found 1"):
        epoch(opened(uri, memory_limit_bytes=1000), Decoders(2, 10**6))


def test_a_file_that_vanishes_is_the_same_named_error(cluster: Cluster, tmp_path: Path) -> None:
    uri = write(tmp_path, {"train-0.parquet": numbered(0, 90), "train-1.parquet": numbered(90, 90)})
    split = opened(uri)
    (tmp_path / "train-1.parquet").unlink()
    said = []
    for feed in (batches, Decoders(2, 10**6)):
        with pytest.raises(DataError, match=r"cannot read .*train-1\.parquet") as error:
            epoch(split, feed)
        said.append(str(error.value))
    assert said[0] == said[1]


@contextmanager
def held_by_others(place: Path) -> Iterator[None]:
    """All CPUs of the cluster are taken."""
    end = place / "end"

    @ray.remote(num_cpus=2, max_retries=0)
    def hold() -> None:
        while not end.exists():
            time.sleep(0.05)

    until(lambda: free_cpus() == 4)
    held = [hold.remote() for _ in range(2)]
    try:
        until(lambda: free_cpus() == 0)
        yield
    finally:
        end.touch()
        ray.get(held)


@pytest.mark.parametrize("looks", [True, False], ids=["before an epoch", "in the middle of one"])
def test_where_others_hold_all_cpus_the_worker_decodes_itself(
    cluster: Cluster, looks: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    split = opened(write(tmp_path, {"train.parquet": numbered(0, 90)}))
    decoders = Decoders(2, 10**6)
    decoders.stall_seconds, decoders.look_seconds = 2.0, 0.5
    if not looks:  # as if they were taken after the look
        monkeypatch.setattr(decoders, "_cpu_is_free", lambda: True)
    with held_by_others(tmp_path):
        found = epoch(split, decoders)
    assert_same(found, epoch(split, batches))
    assert ("its epoch itself" if looks else "the rest of the epoch itself") in caplog.text


def test_an_epoch_that_is_left_gives_its_cpus_back(cluster: Cluster, tmp_path: Path) -> None:
    split = opened(write(tmp_path, {"train.parquet": numbered(0, 400)}))
    until(lambda: free_cpus() == 4)
    begun = iter(Decoders(4, 2000)(split, split.index_batches(seeded(1), 4), lambda step: seeded(step)))
    next(begun)
    begun.close()
    until(lambda: free_cpus() == 4)
    assert not [one for one in threading.enumerate() if one.name == "clipq-batches"]


def options(uri: str, **changes: Any) -> Config:
    return make(
        model="lenet5", weights="random", data=uri, input_size=28, memory_limit_gib=2e-5, validation_images=20, batch_size=30, epochs=2,
        device="cpu", max_failures=0, **changes,
    )  # fmt: skip


def trained(engine: Engine, config: Config, place: Path, watch: Callable[[], None] = lambda: None) -> bytes:
    """The weights that two epochs make; `watch` is called again and again meanwhile."""
    schedule = Schedule(2, config.batch_size, 0.05, 0.0, 0.9, 0.0, 0.0)
    output = Store(place / "output")
    task = TrainTask(
        Source(config), "baseline", None, None, schedule, output.uri, Store(place / "checkpoints").uri
    )
    with engine:
        engine.train(task, lambda done, total, words: watch())
    return output.read(WEIGHTS)


def test_a_training_ends_with_the_same_bytes_wherever_images_are_decoded(
    cluster: Cluster, tmp_path: Path
) -> None:
    images = [png(number, (34, 31), mode="L") for number in range(200)]
    uri = write(
        tmp_path / "data", {"train.parquet": parquet(images, [number % 2 for number in range(200)], ())}
    )
    alone = trained(LocalEngine(), options(uri, engine="local"), tmp_path / "1")
    assert trained(RayEngine(), options(uri, decode="cluster"), tmp_path / "1c") == alone
    two = trained(RayEngine(), options(uri, workers=2, decode="worker"), tmp_path / "2")
    assert trained(RayEngine(), options(uri, workers=2, decode="cluster"), tmp_path / "2c") == two
    assert two != alone


def test_decoders_take_their_part_of_a_limit_so_that_no_trial_does(cluster: Cluster, tmp_path: Path) -> None:
    images = [png(number, (34, 31), mode="L") for number in range(200)]
    uri = write(
        tmp_path / "data", {"train.parquet": parquet(images, [number % 2 for number in range(200)], ())}
    )
    config = options(uri, decode="cluster", limit_cpus=3)
    engine, used, others = RayEngine(config), [0.0], list[bool]()

    def watch() -> None:
        looks = [4 - free_cpus()]
        while looks[-1] > 3 and len(looks) < 10:  # what moves between nodes counts twice for a moment
            time.sleep(0.05)
            looks.append(4 - free_cpus())
        used.append(min(looks))
        others.append(engine._room.begin(len(others), Amount(1)))

    until(lambda: free_cpus() == 4)
    trained(engine, config, tmp_path / "limited", watch)
    assert max(used) <= 3
    assert set(others) == {False}


def test_the_cluster_decodes_where_it_has_cpus_beyond_those_of_the_workers(cluster: Cluster) -> None:
    def cpus(world: int, trainings: int = 1, **changes: Any) -> int | None:
        feed = ray_data.feed(options("/nowhere", workers=world, **changes), world, trainings)
        return feed.cpus if isinstance(feed, Decoders) else None

    assert [cpus(1), cpus(2), cpus(3), cpus(4), cpus(5)] == [3, 1, None, None, None]
    assert [cpus(1, trainings=2), cpus(2, trainings=2)] == [1, None]
    assert [cpus(1, threads_per_worker=2), cpus(1, threads_per_worker=4)] == [2, None]
    assert [cpus(1, decode="worker"), cpus(4, decode="cluster")] == [None, 1]
    assert [cpus(1, decode_cpus=2), cpus(1, decode_cpus=9)] == [2, 3]
    assert [cpus(1, limit_cpus=3), cpus(1, limit_cpus=3, decode="cluster")] == [None, 2]


def test_decoders_within_a_limit_are_as_many_as_are_counted(cluster: Cluster) -> None:
    def both(workers: int, trainings: int = 1, world: int | None = None, **changes: Any) -> tuple[int, int]:
        config = options("/nowhere", workers=workers, decode="cluster", **changes)
        counted = ray_data.counted(config, trainings)
        world = workers if world is None else world
        made = ray_data.feed(config, world, trainings, counted)
        assert isinstance(made, Decoders)
        return counted, world * made.cpus

    assert [both(1, limit_cpus=2), both(1, limit_cpus=4), both(1, limit_cpus=40)] == [(1, 1), (3, 3), (3, 3)]
    assert [both(2, limit_cpus=4), both(2, limit_cpus=4, world=1)] == [(2, 2), (2, 2)]
    assert [both(1, 2, limit_cpus=4), both(1, 3, limit_cpus=4)] == [(1, 1), (1, 1)]
    assert both(1, limit_cpus=4, decode_cpus=2) == (2, 2)
    assert [ray_data.counted(options("/nowhere", limit_cpus=4), 1), both(1)] == [0, (0, 3)]


def test_workers_that_leave_no_cpu_to_decoders_are_refused_on_one_machine(
    cluster: Cluster, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"a CPU beyond its own for each of 4 workers with --decode cluster"
    ):
        trained(RayEngine(), options("/nowhere", workers=4, decode="cluster"), tmp_path)


def test_data_in_memory_take_no_decoders(cluster: Cluster, tmp_path: Path) -> None:
    split = open_data(
        write(tmp_path, {"train.parquet": numbered(0, 90)}), input_shape=(3, 8, 8), validation_images=6
    ).train
    order = split.index_batches(seeded(1), 16)
    feed = Decoders(2, 10**6)
    expected = [split.batch(indices, seeded(step)) for step, indices in enumerate(order)]
    assert_same(list(feed(split, order, seeded)), expected)
    assert not feed._held


def test_a_node_that_is_lost_while_it_decodes_loses_and_doubles_no_image(
    cluster: Cluster, tmp_path: Path
) -> None:
    # a row group is more than Ray keeps with the owner of an object, so what is decoded lies on the nodes
    uri = write(tmp_path, {"train.parquet": numbered(0, 600, (64, 64))})
    split = opened(uri, input_shape=(3, 64, 64))
    expected = epoch(split, batches)
    node = cluster.add_node(num_cpus=2, object_store_memory=150 * 2**20)
    until(lambda: free_cpus() == 6)
    begun = iter(
        Decoders(6, 2000)(split, split.index_batches(seeded(1), 16), lambda step: seeded(50 + step), 1)
    )
    found = [next(begun) for _ in range(4)]
    cluster.remove_node(node, allow_graceful=False)
    assert_same([*found, *begun], expected)


def test_options_that_contradict_each_other_are_one_line() -> None:
    with refused(ConfigError, match="expected --engine ray with --decode cluster"):
        make(engine="local", decode="cluster")
    assert os.environ.get("RAY_ADDRESS") is None
