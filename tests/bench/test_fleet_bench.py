"""The soak's rows see what grows and what is left."""

from __future__ import annotations

from pathlib import Path

from bench.fleet import Sample, left_in_storage, rows
from clipq_ray.storage import Store


def found(leak: float, slower: float = 0.0) -> dict[str, bool]:
    samples = [Sample(n, 10.0 * n + slower * n * n, 800 + leak * n, 40) for n in range(1, 101)]
    return {row.name.rpartition("/")[2]: row.met for row in rows(samples, 100, 0, ([], ["a"]))}


def test_growth_from_network_20_on_falls_short() -> None:
    assert found(0.0)["driver_memory_growth"]
    assert not found(1.0)["driver_memory_growth"]
    assert found(0.0)["second_half_over_first"]
    assert not found(0.0, 0.1)["second_half_over_first"]
    assert found(0.0)["temporary_files_left"]
    assert not found(0.0)["objects_left"]


def test_what_work_under_way_leaves_is_found_in_a_storage(tmp_path: Path) -> None:
    storage = Store(tmp_path)
    run = storage.child("model=a", "run=r-1")
    run.write("manifest.json", b"{}")
    run.child("_work").write("claim-000001.json", b"{}")
    stage = storage.child("_stages", "search-1")
    stage.write("group-0000.json", b"[]")
    stage.write("partial-0001.json", b"[]")
    (tmp_path / "model=a" / ".clipq-1").write_bytes(b"")
    assert sorted(left_in_storage(storage)) == [
        "_stages/search-1/partial-0001.json",
        "model=a/.clipq-1",
        "model=a/run=r-1/_work/claim-000001.json",
    ]
