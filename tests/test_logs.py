"""Whose a log line is: it begins with the network's name, in whatever thread it is said."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from data_files import parquet, png, write

from clipq_ray import logs
from clipq_ray.claims import claim
from clipq_ray.data import batches, open_data
from clipq_ray.errors import StorageError
from clipq_ray.storage import Store
from clipq_ray.summary import table

log = logs.logger(__name__)


def test_lines_begin_with_the_name_that_holds_in_their_thread(caplog: pytest.LogCaptureFixture) -> None:
    begun = threading.Barrier(2)

    def say(name: str) -> None:
        with logs.about(name):
            begun.wait()
            log.warning("%d images", 3)
            begun.wait()
            carried = threading.Thread(target=logs.carried(lambda: log.warning("waits")))
            carried.start()
            carried.join()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(say, ["lenet5", "100%_small"]))
    log.warning("nobody's")
    assert sorted(record.getMessage() for record in caplog.records) == [
        "100%_small: 3 images", "100%_small: waits", "lenet5: 3 images", "lenet5: waits", "nobody's",
    ]  # fmt: skip


def test_a_network_that_is_left_takes_its_name_along_also_by_an_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with logs.about("outer"):
        with pytest.raises(ZeroDivisionError), logs.about("inner"):
            raise ZeroDivisionError
        log.warning("on")
    assert caplog.messages == ["outer: on"]


def test_the_thread_that_prepares_batches_says_whose_images_it_cannot_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images: list[bytes | None] = [png(number) for number in range(60)]
    images[5] = b"no image"
    uri = write(tmp_path, {"train.parquet": parquet(images, [number % 3 for number in range(60)])})
    options = {"input_shape": (3, 8, 8), "memory_limit_bytes": 1000, "validation_images": 6}
    split = open_data(uri, **options, bad_image_limit=1).train  # type: ignore[arg-type]
    with logs.about("lenet5"):
        list(batches(split, split.index_batches(torch.Generator().manual_seed(1), 16), lambda step: None))
    assert caplog.messages
    assert all(line.startswith("lenet5: unreadable image ") for line in caplog.messages)


def test_a_claim_that_cannot_be_kept_alive_says_whose_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipq_ray.claims.BEAT_SECONDS", 0.01)
    work = Store(str(tmp_path / "work"))
    with logs.about("lenet5"):
        held = claim(work)

    def full(store: Store, name: str, data: bytes) -> None:
        raise StorageError(f"cannot write {len(data)} bytes to {store.uri}/{name}: No space left on device")

    with monkeypatch.context() as later:
        later.setattr(Store, "write", full)
        limit = time.monotonic() + 60
        while not caplog.messages:
            assert time.monotonic() < limit, "nothing was said"
            time.sleep(0.01)
    held.give_back()  # type: ignore[union-attr]
    assert caplog.messages[0].startswith("lenet5: the claim on ")


def test_at_the_end_of_a_job_every_line_of_several_networks_names_its_own() -> None:
    scores = {
        "n": 9,
        "original": {"top1_percent": 90.0},
        "compressed": {"top1_percent": 90.0},
        "control": None,
    }
    metrics = {"test": scores, "parameters": 5, "bytes_before": 20, "bytes_after": 2, "ratio": 10.0}
    manifests = [{"model": name, "metrics": metrics, "notes": ["cut short"]} for name in ("one", "two")]
    below = table(manifests, ["a", "b"]).partition("\n\n")[2].splitlines()
    assert below == ["one: run: a", "one: note: cut short", "two: run: b", "two: note: cut short"]
    assert table(manifests[:1], ["a"]).endswith("run: a\nnote: cut short")
    assert table(manifests[:1], ["a"], ["two"]).endswith("one: run: a\none: note: cut short")
