"""`make bench-data`: images per second of the three ways in which a worker gets its batches, and what a GPU waits for.

"memory": decoded images in memory; "worker": row groups that the worker reads and decodes itself, with a thread ahead; "cluster-N": Ray Data with N
decoding tasks at a time (`clipq_ray.cluster.ray_data`), which gives the same batches. Data: CIFAR-10 as Parquet, and JPEGs of 500 x 375 pixels as
ImageNet has them on average, made here, in row groups of 100 and cropped to 224; from a folder, and from an S3 server on loopback (moto, which is one
Python process and slow). Images of other sizes than the input's have no way through memory: each epoch draws new crops.

Rates are of one whole epoch after a first one that is not counted (processes start, files are cached). "busy": the part of the time in which a GPU of
a stated speed computes, waiting for batches else; a step is a pause here, so that it takes no CPU from the decoders, as on a machine with a GPU.

What it shows on a machine of few cores is what the ways cost per image and that the GPU's share grows with the decoders; not how far it scales: worker,
decoders and the S3 server share the cores. Not covered: several nodes, and networks between them.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import ray
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests"))

from s3_server import environment, make_bucket, serving  # type: ignore[import-not-found]

from bench.images import HEIGHT, QUALITY, ROWS, WIDTH, jpegs
from bench.record import Row, row, write
from clipq_ray import seeds
from clipq_ray.cluster.ray_data import Decoders
from clipq_ray.data import Split, batches, open_data
from clipq_ray.data.encoded import EncodedSplit
from clipq_ray.data.prefetch import Feed
from clipq_ray.data.reading import assembled, reading
from clipq_ray.storage import Store

BATCH = 64
GPU_RATE = 2500.0
"""Assumption: images per second that a data-centre GPU trains a ResNet-50 on in bfloat16."""
PARTS = (0.5, 0.9)
"""What a GPU takes of the images per second that a way delivers alone."""
_LARGE, _SMALL = 10**10, 10**6


def epoch(split: Split, feed: Feed, number: int, gpu_rate: float | None = None) -> tuple[float, float]:
    """Images per second of one epoch, and the part of its time, from its first batch on, that a GPU of `gpu_rate` images per second computes."""
    order = split.index_batches(seeds.generator(0, "order", number), BATCH)
    started, images, computed = time.perf_counter(), 0, 0.0
    first = started
    for _, labels in feed(split, order, lambda step: seeds.generator(0, "augment", number, step)):
        first = time.perf_counter() if not images else first
        images += len(labels)
        if gpu_rate is not None:
            time.sleep(len(labels) / gpu_rate)
            computed += len(labels) / gpu_rate
    end = time.perf_counter()
    return images / (end - started), computed / (end - first)


Measured = dict[str, list[float]]


def ways(split: Split, memory: Split | None, cpus: int) -> Iterator[tuple[str, Split, Feed]]:
    """The ways to the batches of one data set."""
    if memory is not None:
        yield "memory", memory, batches
    yield "worker", split, batches
    for count in range(1, cpus + 1):
        yield f"cluster-{count}", split, Decoders(count, 10**9)


def measured(place: str, split: Split, memory: Split | None, given: argparse.Namespace) -> list[Row]:
    """Rates of all ways, `rounds` epochs each, in turns; and what they are of the worker's own in the same turn, since a machine is not always as fast."""
    chosen = list(ways(split, memory, os.cpu_count() or 1))
    rates: Measured = {}
    for number in range(given.rounds + 1):
        for name, source, feed in chosen:
            rate, _ = epoch(source, feed, number)
            print(f"{place}/{name}: {rate:.0f} images/s{'' if number else ' (not counted)'}", flush=True)
            if number:
                rates.setdefault(name, []).append(rate)
    rows = [
        row(f"data/{place}/{name}", values, "images/s", better="higher") for name, values in rates.items()
    ]
    for name, values in rates.items():
        if name != "worker":
            shares = [rate / own for rate, own in zip(values, rates["worker"], strict=True)]
            rows.append(row(f"data/{place}/{name}/over_worker", shares, "ratio", better="higher"))
    return rows


def busy(place: str, split: Split, rates: list[Row], given: argparse.Namespace) -> list[Row]:
    """What a GPU computes of the time that needs 0.5 and 0.9 of what each way delivers alone, in turns."""
    alone = {one.name: one.value for one in rates}
    shares: dict[tuple[str, float], list[float]] = {}
    for number in range(given.rounds + 1, 2 * given.rounds + 1):
        for name, source, feed in ways(split, None, os.cpu_count() or 1):
            for part in PARTS:
                speed = part * alone[f"data/{place}/{name}"]
                share = 100 * epoch(source, feed, number, speed)[1]
                print(
                    f"{place}/{name}: a GPU of {speed:.0f} images/s computes {share:.0f} % of the time",
                    flush=True,
                )
                shares.setdefault((name, part), []).append(share)
    return [
        row(f"data/{place}/busy/{name}/gpu_of_{part}", values, "% of the time", goal=95 if part == PARTS[0] else None, better="higher")
        for (name, part), values in shares.items()
    ]  # fmt: skip


def assembling(split: EncodedSplit, given: argparse.Namespace) -> Row:
    """What one worker can take at most: batches of images that are decoded already, by one thread."""
    order = split.index_batches(seeds.generator(0, "order", 0), BATCH)
    plan = reading(split, order, [0] * len(order), waiting_bytes=_LARGE, piece_bytes=1)
    images = [
        image for piece in range(plan.pieces) for part in plan.decoded(split, piece, ROWS) for image in part
    ]
    rates = []
    for _ in range(given.rounds):
        started = time.perf_counter()
        for _ in assembled(split, plan, images, lambda step: torch.Generator().manual_seed(0)):
            pass
        rates.append(len(images) / (time.perf_counter() - started))
    return row("data/jpeg/assembling", rates, "images/s", better="higher")


@contextmanager
def ray_on(cpus: int) -> Iterator[None]:
    """Ray on this machine with the environment as it is now."""
    ray.init(
        address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    try:
        yield
    finally:
        ray.shutdown()


def opened(uri: str, size: int, memory_bytes: int) -> EncodedSplit:
    """The training images, beyond the memory limit."""
    split = open_data(
        uri, input_shape=(3, size, size), memory_limit_bytes=memory_bytes, validation_images=10
    ).train
    assert isinstance(split, EncodedSplit), "expected images beyond the memory limit"
    return split


def main() -> int:
    """All rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True, help="folder with CIFAR-10 as Parquet")
    parser.add_argument("--images", type=int, default=2000, help="JPEGs (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each way (default: %(default)s)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    rows: list[Row] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        endpoint = stack.enter_context(serving())
        os.environ.update(environment(endpoint))
        bucket = f"s3://{make_bucket(endpoint)}"
        stack.enter_context(ray_on(os.cpu_count() or 1))
        size = jpegs(f"{folder}/jpegs", given.images)
        copied(Path(given.data), f"{bucket}/cifar10")
        copied(folder / "jpegs", f"{bucket}/jpegs")
        memory = open_data(given.data, input_shape=(3, 32, 32), validation_images=10).train
        rows += measured("cifar10/local", opened(given.data, 32, 160 * _SMALL), memory, given)
        rows += measured("cifar10/s3", opened(f"{bucket}/cifar10", 32, 160 * _SMALL), None, given)
        jpeg_rows = measured("jpeg/local", opened(f"{folder}/jpegs", 224, 10**9), None, given)
        rows += jpeg_rows + busy("jpeg/local", opened(f"{folder}/jpegs", 224, 10**9), jpeg_rows, given)
        rows += measured("jpeg/s3", opened(f"{bucket}/jpegs", 224, 10**9), None, given)
        worker = next(one.value for one in jpeg_rows if one.name.endswith("/worker"))
        rows.append(assembling(opened(f"{folder}/jpegs", 224, 10**9), given))
        rows += [
            Row("data/jpeg/bytes", size, "bytes"),
            Row("data/jpeg/cores_for_a_gpu", GPU_RATE / worker, "cores"),
        ]
    notes = {
        "jpeg": f"{given.images} images of {WIDTH} x {HEIGHT}, quality {QUALITY}, row groups of {ROWS}, random crops of 224",
        "batch": BATCH,
        "cores_for_a_gpu": f"decoding cores for {GPU_RATE:.0f} images/s, an assumption, at the rate of the worker's one thread",
    }
    print(f"stored in {write('data', rows, notes=notes)}")
    return 0


def copied(folder: Path, uri: str) -> None:
    """The Parquet files of `folder` at `uri`."""
    for path in sorted(folder.glob("*.parquet")):
        Store(uri).write(path.name, path.read_bytes())


if __name__ == "__main__":
    sys.exit(main())
