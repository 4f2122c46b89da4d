"""The records' targets and recipes fit together, and what the table says is what was stored."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import records, records_peers, records_units
from clipq_ray import manifest
from clipq_ray.batch import compress
from clipq_ray.cluster.engine import LocalEngine
from clipq_ray.config import make
from clipq_ray.consistency import PAPER, idle
from clipq_ray.progress import Reporter
from clipq_ray.source import Source
from clipq_ray.storage import Store

TARGETS = {target.name: target for target in records_units.TARGETS}

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("target", records_units.TARGETS, ids=lambda target: target.name)
def test_every_target_has_a_recipe_of_its_size_and_a_published_twin(target: records.Target) -> None:
    options = target.options()
    config = make(**options)
    assert config.target_bytes is not None
    assert config.target_bytes <= target.most_bytes
    assert target.name.startswith(f"{config.model}-{config.data}-")
    twin = make(**records_units.published(options, 73))
    assert twin.paper
    assert twin.target_bytes == config.target_bytes
    assert twin.epochs == 73
    assert all(getattr(twin, name) == value for name, value in PAPER.items())
    assert [*idle(config, "train"), *idle(twin, "train")] == []


@pytest.mark.parametrize("variant", records.WITHOUT)
def test_a_lever_that_is_left_out_leaves_as_many_epochs(variant: str) -> None:
    options = {
        **TARGETS["lenet5_caffe-mnist-noloss"].options(), "unit_order": "sorted", "dead_units": "drop", "vectors": "auto", "rate_distortion": 0.5, "cutout_pixels": 4,
    }  # fmt: skip
    lever = variant.removeprefix("without-").replace("-", "_")
    left = records_units.without(options, variant)
    assert make(**left).model_dump()[lever] == PAPER[lever] != make(**options).model_dump()[lever]
    total = [
        one["epochs"] + one["level_epochs"] + (one["rungs"] - 1) * one.get("rung_epochs", 0)
        for one in (options, left)
    ]
    assert total[0] == total[1]
    others = {"rungs": {"rung_epochs", "search_again"}, "level_epochs": {"level_learning_rate"}}
    changed = {name for name in options if options[name] != left.get(name)}
    assert changed <= {"epochs", lever} | others.get(lever, set())
    assert list(idle(make(**left), "train")) == []


def test_the_order_is_from_small_to_large_networks() -> None:
    assert [target.name.split("-")[0] for target in records_units.TARGETS] == [
        "lenet_300_100", "lenet_300_100", "lenet5_caffe", "lenet5_caffe", "resnet20", "resnet20", "resnet56",
    ]  # fmt: skip


def test_rows_state_n_and_goals_and_the_median_seeds_file_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records_units, "UNITS", tmp_path / "units")
    monkeypatch.setattr(records, "RECORDS", tmp_path / "records")
    target = TARGETS["lenet_300_100-mnist-noloss"]
    for seed, (size, error) in enumerate([(5900, 1.7), (5950, 1.5), (5800, 1.6)]):
        unit = records_units.Unit(target, "ours", seed)
        unit.stem.parent.mkdir(exist_ok=True)
        settings = {**target.options(), "seed": seed}
        result = {"bytes": size, "test_error_percent": error, "seconds": 60.0, "config": settings}
        unit.stem.with_suffix(".json").write_text(json.dumps(result))
        unit.stem.with_suffix(".clq").write_bytes(b"seed %d" % seed)
    size, error, _ = records.rows_of(target, "ours", range(100))
    assert (size.value, size.goal, size.n) == (5900, 6000, 3)
    assert (error.value, error.goal, error.n, error.met) == (1.6, 1.64, 3, True)
    assert records.rows_of(target, "paper", range(100)) == []
    records.keep_median(target, range(100))
    assert (tmp_path / "records" / f"{target.name}.clq").read_bytes() == b"seed 2"


def test_units_of_other_epochs_stand_beside_the_recipes_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records_units, "UNITS", tmp_path)
    monkeypatch.setattr(records, "RECORDS", tmp_path / "records")
    target = TARGETS["resnet20-cifar10-noloss"]
    for variant in ("ours", "uniform", "without-ramp-share"):
        unit = records_units.Unit(target, variant, 0, 12)
        settings = unit.options()
        assert settings["epochs"] == 12
        unit.stem.with_suffix(".clq").write_bytes(b"")
        result = {
            "of": unit.of(),
            "bytes": 39_000,
            "test_error_percent": 9.0,
            "seconds": 60.0,
            "epochs": 12,
            "config": settings,
        }
        unit.stem.with_suffix(".json").write_text(json.dumps(result))
    assert records.epochs_beside(target) == [12]
    assert records.epochs_beside(TARGETS["resnet20-cifar10-small"]) == []
    bytes_of, *_ = records.rows_of(target, "uniform", range(9), 12)
    assert (bytes_of.name, bytes_of.goal) == (f"records/{target.name}/12-epochs/uniform/bytes", None)
    assert records.rows_of(target, "ours", range(9), 12)[0].goal is None
    assert records.rows_of(target, "ours", range(9)) == records.rows_of(target, "ours", range(9), 13) == []
    records.keep_median(target, range(9))
    assert not (tmp_path / "records").exists()


def test_a_peer_of_another_file_than_the_one_that_is_there_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records_units, "UNITS", tmp_path)
    ours, peer = (
        records_units.Unit(TARGETS["lenet_300_100-mnist-noloss"], variant, 0)
        for variant in ("ours", "uniform")
    )
    ours.stem.with_suffix(".json").write_text(json.dumps({"epochs": 61, "config": ours.options()}))
    ours.stem.with_suffix(".clq").write_bytes(b"one")
    found = {"config": peer.options(), "of": peer.of()}
    peer.stem.with_suffix(".json").write_text(json.dumps(found))
    assert peer.result == found
    ours.stem.with_suffix(".clq").write_bytes(b"made anew")
    assert peer.result is None
    peer.stem.with_suffix(".json").write_text(json.dumps({"config": peer.options()}))
    assert peer.result is None


QUICK: dict[str, Any] = {
    "epochs": 2, "baseline_epochs": 2, "search_evaluations": 4, "search_images": 50, "batch_size": 32, "rounds": 1, "target_bytes": 20_000,
}  # fmt: skip


def made(storage: Path, **options: Any) -> Store:
    config = make(**{**QUICK, "storage": str(storage), "engine": "local", **options})
    return Store(compress(Source(config), LocalEngine(), Reporter(quiet=True)).uri)


def test_what_is_under_way_ends_with_the_command(tmp_path: Path) -> None:
    forever = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"]
    outer = f"import signal; from bench import processes; signal.signal(15, processes.end); processes.code_of({forever!r})"
    with subprocess.Popen([sys.executable, "-c", outer], cwd=ROOT, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        inner = int(job.stdout.readline())
        job.terminate()
        assert job.wait(120) == 128 + 15
    assert not Path(f"/proc/{inner}").exists()


def test_a_run_of_another_recipe_is_not_taken_for_this_one(tmp_path: Path) -> None:
    first, second = made(tmp_path, seed=3), made(tmp_path, seed=3, learning_rate=0.01)
    folder = tmp_path / "model=lenet5"
    found = {
        rate: records_units.newest(folder, {"seed": 3, "learning_rate": rate}) for rate in (0.01, 0.02, 0.03)
    }
    assert found == {0.01: second, 0.02: first, 0.03: None}
    assert records_units.newest(folder, {"seed": 3}) == second
    assert records_units.newest(tmp_path / "nothing", {}) is None


def test_a_job_that_failed_does_not_pass_for_the_run_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipes" / "t.yaml"
    recipe.parent.mkdir()
    recipe.write_text("model: lenet5\n")
    monkeypatch.setattr(records_units, "ROOT", tmp_path)
    made(tmp_path, name="t-seed0", seed=0)
    target = records.Target("t", "digits", None, 20_000, 9.0)
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "compress.py").write_text("raise SystemExit(1)\n")
    with pytest.raises(SystemExit, match="t-seed0: the job ended with 1; run again"):
        records_units.Unit(target, "ours", 0)._job(tmp_path, tmp_path, [])
    (tmp_path / "jobs" / "compress.py").write_text("")
    assert records_units.Unit(target, "ours", 0)._job(tmp_path, tmp_path, [])[0]["kept"]


LEVERS: dict[str, Any] = {
    **QUICK,
    "ramp_share": 0.5,
    "rate_distortion": 0.5,
    "cutout_pixels": 4,
    "hold_size": True,
}


def theirs(variant: str, ours: dict[str, Any], storage: Path, **more: Any) -> tuple[dict[str, Any], bytes]:
    """A peer on digits."""
    options = records_peers.left(LEVERS, ours["epochs"]) | {"data": "digits", "seed": 0, "engine": "local"}
    return records_peers.peer(variant, {**options, **more}, LEVERS, {**ours, "target": "t"}, storage)


def test_what_ours_is_held_against_has_its_bits_and_its_size(tmp_path: Path) -> None:
    store = made(tmp_path, **{**LEVERS, "epochs": 8})
    ours, size = (
        records_units.told(manifest.read_manifest(store), store, tmp_path),
        len(store.read("model.clq")),
    )
    ours["bytes"] = size
    own = {one["layer"]: one["bits"] for one in ours["plan"]}
    for variant in ("two-stage", "uniform"):
        found, file = theirs(variant, ours, tmp_path)
        # two bits for all layers take less here even where nothing is pruned
        assert (0.85 if variant == "two-stage" else 0.5) * size < len(file) < 1.08 * size, variant
        assert found["validation_top1_percent"] > 50
        held = {"held_bytes": size, "rate_distortion": LEVERS.get("rate_distortion", 0.0)}
        cut = {"cut_to_bytes": size, "cuts": 2, "pruned_epochs": 4, "quantized_epochs": 4}
        other = cut if variant == "two-stage" else held
        assert found["trained_with"] == {"ramp_share": LEVERS["ramp_share"], **other}
        bits = {one["layer"]: one["bits"] for one in found["plan"]}
        assert bits.keys() == own.keys()
        assert bits == own if variant == "two-stage" else len(set(bits.values())) == 1
        again, same = theirs(variant, ours, tmp_path)
        assert same == file
        assert again["plan"] == found["plan"]


def test_one_theta_for_all_layers_is_held_at_the_size_where_units_die(tmp_path: Path) -> None:
    store = made(tmp_path, **{**LEVERS, "epochs": 8})
    ours = {**records_units.told(manifest.read_manifest(store), store, tmp_path), "bytes": 4_000}
    found, file = theirs("uniform", ours, tmp_path)
    assert found["dead_units"] > 0
    assert 0.93 * 4_000 < len(file) < 1.01 * 4_000


def test_two_stages_that_were_cut_off_go_on_to_the_same_bytes_in_another_storage_from_given_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours_at = tmp_path / "ours"
    trained = made(ours_at, **LEVERS)
    (baseline,) = (ours_at / "_stages").glob("baseline-*/weights.safetensors")
    ours = {
        **records_units.told(manifest.read_manifest(trained), trained, ours_at),
        "bytes": 20_000,
        "epochs": 4,
    }
    given = {"weights": str(baseline)}
    whole = theirs("two-stage", ours, tmp_path / "whole", **given)

    said = records_peers.each_epoch
    with monkeypatch.context() as patch:
        for stop in ("prune: epoch 2 of 2", "quantize: epoch 2 of 2"):

            def until(name: str, stop: str = stop) -> Any:
                def progress(done: int, steps: int, words: str) -> None:
                    said(name)(done, steps, words)
                    if f"{name}: {words}" == stop:
                        raise KeyboardInterrupt

                return progress

            patch.setattr(records_peers, "each_epoch", until)
            with pytest.raises(KeyboardInterrupt):
                theirs("two-stage", ours, tmp_path / "parts", **given)
    begun: list[str] = []
    monkeypatch.setattr(
        records_peers, "each_epoch", lambda name: lambda *done: begun.append(f"{name}: {done[-1]}")
    )
    parts = theirs("two-stage", ours, tmp_path / "parts", **given)
    assert set(begun) == {"quantize: epoch 2 of 2"}
    assert parts[1] == whole[1]


def test_a_unit_that_is_there_is_not_made_again_unless_its_settings_were_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records_units, "UNITS", tmp_path)
    target = TARGETS["lenet_300_100-mnist-noloss"]
    for variant, epochs in (("ours", 61), ("paper", 64), ("two-stage", 64)):
        unit = records_units.Unit(target, variant, 0)
        unit.stem.with_suffix(".clq").write_bytes(b"")
        stored = {"epochs": 64, "config": {**unit.options(), "data_root": "elsewhere"}, "of": unit.of()}
        assert stored["config"]["epochs"] == epochs
        unit.stem.with_suffix(".json").write_text(json.dumps(stored))
        assert unit.result == stored
        unit.make(tmp_path / "nothing here", tmp_path / "nothing here", [])
    assert not (tmp_path / "nothing here").exists()
    ours = records_units.Unit(target, "ours", 0).stem.with_suffix(".json")
    ours.write_text(ours.read_text().replace('"epochs": 64', '"epochs": 70'))
    assert records_units.Unit(target, "paper", 0).result is None  # as many epochs as `ours`
    assert records.rows_of(target, "paper", range(9)) == []
    ours.write_text(ours.read_text().replace('"target_bytes": 5000', '"target_bytes": 5001'))
    with pytest.raises(SystemExit, match=r"paper-seed0: expected the unit 'ours' of this seed before it"):
        records_units.Unit(target, "paper", 0).make(tmp_path, tmp_path, [])


def test_of_units_made_at_once_those_that_failed_are_named(tmp_path: Path) -> None:
    """By the command itself; there is no data, so every unit ends with the job's one line."""
    series = [(TARGETS["resnet20-cifar10-noloss"], 0), (TARGETS["resnet20-cifar10-small"], 1)]
    given = argparse.Namespace(
        variants=["ours"],
        shared=tmp_path / "none",
        storage=tmp_path / "runs",
        engine="local",
        parallel=2,
        epochs=None,
        threads=None,
    )
    with pytest.raises(
        SystemExit, match="resnet20-cifar10-noloss seed 7, resnet20-cifar10-small seed 8: not made"
    ):
        records.at_once([(target, seed + 7) for target, seed in series], given)
    records.at_once([], given)
