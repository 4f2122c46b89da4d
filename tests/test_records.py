"""The records' targets and recipes fit together, and what the table says is what was stored."""

from __future__ import annotations

import argparse
import fcntl
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bench import record, records, records_peers, records_units
from clipq_ray import console, manifest
from clipq_ray.batch import compress
from clipq_ray.cluster.engine import LocalEngine
from clipq_ray.config import make
from clipq_ray.consistency import PAPER, idle
from clipq_ray.errors import ConfigError, RunError, StorageError
from clipq_ray.progress import Reporter
from clipq_ray.source import Source
from clipq_ray.storage import Store

TARGETS = {target.name: target for target in records_units.TARGETS}

ROOT = Path(__file__).parents[1]


@pytest.fixture
def units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of units of its own, and of records."""
    monkeypatch.setattr(records_units, "UNITS", tmp_path / "units")
    monkeypatch.setattr(records, "RECORDS", tmp_path / "records")
    (tmp_path / "units").mkdir()
    return tmp_path / "units"


def put(unit: records.Unit, file: bytes = b"a file", **said: Any) -> dict[str, Any]:
    """A unit with the settings of now and what is `said` of it."""
    unit.clq_path.write_bytes(file)
    found = {
        "bytes": len(file), "test_error_percent": 9.0, "seconds": 60.0, "epochs": 61, "seed": unit.seed, "validation_top1_percent": 91.0, "plan": [], "commit": "c", "machine": {}, "config": make(**unit.options()).model_dump(mode="json"), "sha256": records_units.sha256(file),
        "data": unit.target.data, "weights": unit.target.weights, "of": unit.of(), **said,
    }  # fmt: skip
    unit.json_path.write_text(json.dumps(found))
    return found


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


def test_rows_state_n_and_goals_and_the_median_seeds_file_is_kept(units: Path) -> None:
    target = TARGETS["lenet_300_100-mnist-noloss"]
    for seed, (size, error) in enumerate([(5900, 1.7), (5950, 1.5), (5800, 1.6)]):
        put(
            records_units.Unit(target, "ours", 200 + seed),
            b"seed %d" % seed,
            bytes=size,
            test_error_percent=error,
        )
    size, error, _ = records.rows_of(target, "ours")
    assert (size.value, size.goal, size.n) == (5900, 6000, 3)
    assert (error.value, error.goal, error.n, error.met) == (1.6, 1.64, 3, True)
    assert records.rows_of(target, "paper") == []
    kept = units.parent / "records" / f"{target.name}.clq"
    records.keep_median(target)
    assert kept.read_bytes() == b"seed 2"
    put(records_units.Unit(target, "ours", 202), b"made anew", test_error_percent=1.61)
    records.keep_median(target)
    assert kept.read_bytes() == b"made anew"
    put(records_units.Unit(target, "ours", 200), b"as bad, smaller", bytes=1, test_error_percent=1.61)
    records.keep_median(target)
    assert kept.read_bytes() == b"as bad, smaller"
    records_units.Unit(target, "ours", 200).json_path.unlink()
    put(records_units.Unit(target, "ours", 202), b"of two", test_error_percent=1.61)
    records.keep_median(target)
    assert kept.read_bytes() == b"as bad, smaller"  # two seeds replace no row's file


def test_units_of_other_epochs_stand_beside_the_recipes_own(units: Path) -> None:
    target = TARGETS["resnet20-cifar10-noloss"]
    for variant in ("ours", "uniform", "without-ramp-share"):
        said = put(records_units.Unit(target, variant, 0, 12), epochs=12)
        assert said["config"]["epochs"] == 12
    assert records.epochs_beside(target) == [12]
    assert records.epochs_beside(TARGETS["resnet20-cifar10-small"]) == []
    bytes_of, *_ = records.rows_of(target, "uniform", 12)
    assert (bytes_of.name, bytes_of.goal) == (f"records/{target.name}/12-epochs/uniform/bytes", None)
    assert records.rows_of(target, "ours", 12)[0].goal is None
    assert records.rows_of(target, "ours") == records.rows_of(target, "ours", 13) == []
    assert records.outdated() == []
    records.keep_median(target)
    assert not (units.parent / "records").exists()


def test_a_peer_of_another_file_than_the_one_that_is_there_is_not_there(units: Path) -> None:
    ours, peer = (
        records_units.Unit(TARGETS["lenet_300_100-mnist-noloss"], variant, 0)
        for variant in ("ours", "uniform")
    )
    put(ours, b"one")
    found = put(peer)
    assert peer.result == found
    put(ours, b"made anew")
    assert peer.result is None
    assert records.outdated() == [peer.stem.name]
    put(peer, of=None)
    assert peer.result is None


def test_a_unit_is_of_the_recipe_of_now_whatever_a_line_was_that_it_had_or_lacks(
    units: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = TARGETS["lenet5_caffe-mnist-small"]
    unit, options = records_units.Unit(target, "ours", 0), target.options()
    found = put(unit)
    assert unit.result == found
    for changed in ({"threads_per_worker": 2}, {"storage": "elsewhere", "engine": "ray"}):
        monkeypatch.setattr(records.Target, "options", lambda _, more=changed: {**options, **more})
        assert unit.result == found
    for name in options.keys() - {"data"}:  # a line of the recipe that is gone
        monkeypatch.setattr(
            records.Target, "options", lambda _, name=name: {k: v for k, v in options.items() if k != name}
        )
        assert unit.result is None, name
    monkeypatch.setattr(records.Target, "options", lambda _: {**options, "label_smoothing": 0.1})
    assert unit.result is None


def test_a_unit_of_other_weights_or_data_or_whose_file_is_not_its_own_is_not_there(
    units: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unit = records_units.Unit(TARGETS["resnet20-cifar10-noloss"], "ours", 0)
    put(unit)
    assert unit.result is not None
    for said in ({"weights": "others.safetensors"}, {"data": "mnist"}):
        put(unit, **said)
        assert unit.result is None
    assert capsys.readouterr().err == ""
    whole = put(unit)
    needed = whole.keys() - {"data", "weights", "of"}
    damaged = [{**whole, "config": 3}, *({k: v for k, v in whole.items() if k != name} for name in needed)]
    for text in ("{}", "[]", "cut o", *map(json.dumps, damaged)):
        records_units._SAID.clear()
        unit.json_path.write_text(text)
        assert unit.result is None, text
        assert "it counts as not there" in capsys.readouterr().err, text
    put(unit)
    unit.clq_path.write_bytes(b"another file")
    records_units._SAID.clear()
    assert unit.result is unit.result is None
    assert capsys.readouterr().err.count("it counts as not there") == 1  # said once
    put(unit)
    unit.clq_path.unlink()
    assert unit.result is None
    assert records.rows_of(unit.target, "ours") == []
    assert records.sections() == {}
    assert records.outdated() == [unit.stem.name]


def test_a_unit_is_made_by_one_process_at_a_time(units: Path, tmp_path: Path) -> None:
    unit, *peers = (
        records_units.Unit(TARGETS["resnet20-cifar10-noloss"], variant, 0)
        for variant in ("ours", *records_units.PEERS)
    )
    works_in = f"{unit.target.name}-peers-seed0"  # all peers of a seed work in one place
    for one, place in ((unit, unit.stem.name), *((peer, works_in) for peer in peers)):
        with (tmp_path / f"{place}.lock").open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            with pytest.raises(RunError, match=f"{place}: expected to make it alone"):
                one.make(tmp_path, tmp_path, [])
        put(unit)  # before its peers
    unit.json_path.unlink()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="expected a folder to write to"):
        unit.make(tmp_path, tmp_path / "file", [])


def test_a_lever_that_the_recipe_has_not_cannot_be_left_out(units: Path) -> None:
    target = TARGETS["lenet_300_100-mnist-noloss"]
    put(records_units.Unit(target, "ours", 0))
    unit = records_units.Unit(target, "without-rungs", 0)
    with pytest.raises(ConfigError, match="without-rungs-seed0: expected a recipe with --rungs, got one"):
        unit.make(units, units, [])
    options = {"model": "lenet5", "target_bytes": 5_000, "rungs": 3, "epochs": 5}  # and so rungs of three
    assert records_units.without(options, "without-rungs")["epochs"] == 5 + 2 * 3


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


@pytest.mark.parametrize("how", ["code_of", "used_by"])
def test_what_ends_is_listened_to_until_it_has_ended(tmp_path: Path, how: str) -> None:
    """A job that is ended says so, and stores what it has behind it."""
    inner = (
        "import pathlib, signal, sys, time\n"
        f"def end(*_): print('ended', flush=True); pathlib.Path({str(tmp_path / 'kept')!r}).write_text('all'); sys.exit(143)\n"
        "signal.signal(15, end); print('there', flush=True); time.sleep(60)\n"
    )
    hear = ", hear=lambda _: None" if how == "code_of" else ""
    outer = f"import signal, sys; from bench import processes; signal.signal(15, processes.end); processes.{how}([sys.executable, '-c', {inner!r}]{hear})"
    with subprocess.Popen([sys.executable, "-c", outer], cwd=ROOT, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "there\n"
        job.terminate()
        assert job.wait(120) == 128 + 15
    assert (tmp_path / "kept").read_text() == "all"


def test_a_unit_is_the_run_that_its_job_names_and_what_failed_passes_for_none(
    units: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipes" / "t.yaml"
    recipe.parent.mkdir()
    recipe.write_text(yaml.safe_dump({**QUICK, "model": "lenet5"}))
    job = tmp_path / "jobs" / "compress.py"
    job.parent.mkdir()
    monkeypatch.setattr(records_units, "ROOT", tmp_path)
    target = records.Target("t", "digits", None, 20_000, 9.0)
    unit = records_units.Unit(target, "ours", 0)
    run = made(tmp_path, name="t-seed0", seed=0)
    made(tmp_path, name="t-seed0", seed=0, learning_rate=0.01)  # a later one of another recipe
    job.write_text("raise SystemExit(1)\n")
    with pytest.raises(RunError, match="t-seed0: the job ended with 1; run again"):
        unit.make(tmp_path, tmp_path, [])
    job.write_text("raise SystemExit(2)\n")
    with pytest.raises(ConfigError, match="t-seed0: the job refused its input"):
        unit.make(tmp_path, tmp_path, [])
    for kept in (0, 1):  # 1: the promise is not kept, and the file is there
        job.write_text(f"print('run: {run.uri}')\nraise SystemExit({kept})\n")
        assert unit._job(tmp_path, tmp_path, [])[1] == run.read("model.clq")
    scorer = tmp_path / "jobs" / "evaluate.py"
    scorer.write_text("import sys; sys.exit('no images')\n")
    with pytest.raises(RunError, match="expected its top-1 on test images, got 'no images'"):
        unit.make(tmp_path, tmp_path, [])
    assert list(units.iterdir()) == []  # nothing half-written
    scorer.write_text("print('top-1 97.50 % on 1,797 test images')\n")
    monkeypatch.setattr(records_units.identity, "versions", lambda: {"of": "now"})
    unit.make(tmp_path, tmp_path, [])
    assert sorted(path.name for path in units.iterdir()) == ["t-seed0.clq", "t-seed0.json"]
    found = unit.result or {}
    assert (found["bytes"], found["test_error_percent"], found["test_images"]) == (
        run.size("model.clq"),
        2.5,
        1797,
    )
    assert found["versions"] == manifest.read_manifest(run)["versions"] != {"of": "now"}


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


def test_weights_that_ours_trained_first_elsewhere_are_trained_alike_and_stay_out_of_its_stages(
    tmp_path: Path,
) -> None:
    store = made(tmp_path / "ours", **QUICK)
    ours = {**records_units.told(manifest.read_manifest(store), store, tmp_path / "ours"), "target": "t"}
    config = make(**records_peers.left(QUICK, 2), data="digits", seed=0, engine="local")
    here, there = (records_peers._Given(config, ours, tmp_path / name).state for name in ("ours", "other"))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert not (tmp_path / "other" / "_stages").exists()


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
    units: Path, tmp_path: Path
) -> None:
    target = TARGETS["lenet_300_100-mnist-noloss"]
    for variant, epochs in (("ours", 61), ("paper", 64), ("two-stage", 64)):
        unit = records_units.Unit(target, variant, 0)
        settings = make(**unit.options(), data_root="elsewhere").model_dump(mode="json")
        said = put(unit, epochs=64, config=settings)
        assert settings["epochs"] == epochs
        assert unit.result == said
        unit.make(tmp_path / "nothing here", tmp_path / "nothing here", [])
    assert not (tmp_path / "nothing here").exists()
    ours = records_units.Unit(target, "ours", 0).json_path
    ours.write_text(ours.read_text().replace('"epochs": 64', '"epochs": 70'))
    assert records_units.Unit(target, "paper", 0).result is None  # as many epochs as `ours`
    assert records.rows_of(target, "paper") == []
    ours.write_text(ours.read_text().replace('"target_bytes": 5000', '"target_bytes": 5001'))
    with pytest.raises(ConfigError, match=r"paper-seed0: expected the unit 'ours' of this seed before it"):
        records_units.Unit(target, "paper", 0).make(tmp_path, tmp_path, [])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "lenet6"], "--only: expected the beginning of one of lenet_300_100-mnist-noloss, "),
        (["--epochs", "0"], "--epochs: expected a whole number from 1 on, got '0'"),
        (["--threads", "-1"], "--threads"),
        (["--parallel", "x"], "--parallel: expected a whole number from 1 on, got 'x'"),
        (["--table", "--no-table"], "not allowed with"),
        (["--variants", "others"], "invalid choice: 'others'"),
        (["--seeds", "one"], "--seeds"),
    ],
)
def test_wrong_words_are_one_line_and_make_nothing(
    words: list[str], said: str, units: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert console.run("records", records.main, ["--shared", str(units / "none"), *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert list(units.iterdir()) == []


def test_targets_are_chosen_by_name_or_by_how_they_begin() -> None:
    assert record.chosen([""], list(TARGETS)) == list(TARGETS)
    assert record.chosen(["resnet20-cifar10-small", "lenet5"], list(TARGETS)) == [
        "lenet5_caffe-mnist-noloss", "lenet5_caffe-mnist-small", "resnet20-cifar10-small",
    ]  # fmt: skip
    assert record.chosen(["a"], ["ab", "a", "b"]) == ["a"]  # its own name before what begins so
    with pytest.raises(ConfigError, match="--only: expected the beginning of one of ab, b, got 'c'"):
        record.chosen(["a", "c"], ["ab", "b"])


def test_what_fails_is_named_and_what_comes_behind_it_is_tried(
    units: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = []

    def make(unit: records.Unit, *_: Any) -> None:
        tried.append(unit.stem.name)
        if unit.seed == 0:
            raise RunError("diverged") if unit.target.data == "mnist" else ConfigError("no data")

    monkeypatch.setattr(records.Unit, "make", make)
    words = [
        "--shared", str(tmp_path), "--only", "lenet5_caffe-mnist-small", "resnet56", "--seeds", "0", "1", "0", "--variants", "ours", "paper", "--no-table",
    ]  # fmt: skip
    assert console.run("records", records.main, words) == 1
    small, large = "lenet5_caffe-mnist-small", "resnet56-cifar10-noloss"
    assert tried == [
        f"{small}-seed0", f"{small}-seed1", f"{small}-paper-seed1", f"{large}-seed0", f"{large}-seed1", f"{large}-paper-seed1",
    ]  # fmt: skip
    assert f"{small} seed 0, {large} seed 0: not made to the end" in capsys.readouterr().err
    assert console.run("records", records.main, [*words[:3], *words[4:]]) == 2  # input alone


def test_of_units_made_at_once_those_that_failed_are_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
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
    failed = records.at_once([(target, seed + 7) for target, seed in series], given)
    assert failed == {"resnet20-cifar10-noloss seed 7": 2, "resnet20-cifar10-small seed 8": 2}
    assert capfd.readouterr().err.count("the job refused its input") == 2
    assert records.at_once([], given) == {}
