"""A store that fails five requests in a hundred, in every way that S3 and networks fail, is the same store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_faults import KINDS, FaultyProxy, faulty
from store_promises import exercise

from clipq_ray import manifest
from clipq_ray.batch import compress
from clipq_ray.cluster.engine import LocalEngine
from clipq_ray.config import make
from clipq_ray.progress import Reporter
from clipq_ray.source import Source
from clipq_ray.storage import Store

pytest_plugins = ["s3_server"]


@pytest.fixture
def place(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, FaultyProxy]]:
    """The URI of a bucket behind a proxy that fails, and the proxy."""
    from s3_server import environment, make_bucket

    with faulty(s3_server, silence_seconds=1.5) as (endpoint, proxy):
        for name, value in environment(endpoint).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("CLIPQ_S3_TIMEOUT_SECONDS", "0.75")
        yield f"s3://{make_bucket(s3_server)}", proxy


def test_everything_that_a_store_does_comes_to_its_right_end(place: tuple[str, FaultyProxy]) -> None:
    uri, proxy = place
    exercise(Store(f"{uri}/some/place"), 100)
    assert set(proxy.faults) == set(KINDS), proxy.faults
    assert sum(proxy.faults.values()) > 0.02 * proxy.requests


def test_a_run_through_it_is_the_run_of_an_undisturbed_store(
    place: tuple[str, FaultyProxy], tmp_path: Path
) -> None:
    uri, proxy = place
    proxy.share = 0.1
    options = {
        "engine": "local", "epochs": 2, "baseline_epochs": 2, "batch_size": 32, "search_evaluations": 6, "search_start": 3,
        "search_images": 100, "target_ratio": 15, "rounds": 1,
    }  # fmt: skip
    hashes = set()
    for storage in (uri, str(tmp_path)):
        result = compress(Source(make(**options, storage=storage)), LocalEngine(), Reporter(quiet=True))
        assert manifest.verify(Store(result.uri)) == []
        hashes.add(result.manifest["files"]["model.clq"]["sha256"])
    assert len(hashes) == 1
    assert sum(proxy.faults.values()) > 5
