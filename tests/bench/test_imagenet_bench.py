"""ImageNet's recipes are options of the job at the operating points, and what is measured of them without trained weights says so."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

from bench import imagenet
from bench.imagenet import BATCH, CUT, RECIPES, STEPS, bytes_of, epochs, planned, rows
from bench.images import jpegs
from bench.record import RESULTS, ROOT
from clipq_ray import console
from clipq_ray.config import make
from clipq_ray.errors import ConfigError, RunError
from clipq_ray.plan import Theta
from clipq_ray.source import Source

RATIOS = {"alexnet": 51, "googlenet": 10, "resnet50": 15, "vgg16": 64, "resnet18": 24, "mobilenet_v2": 10}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_for_the_job_and_says_that_its_accuracy_is_not_measured(recipe) -> None:  # type: ignore[no-untyped-def]
    text = recipe.read_text(encoding="utf-8")
    config = make(**yaml.safe_load(text))
    assert "its accuracy is not measured here" in text
    assert config.target_ratio == RATIOS[config.model]
    assert Source(config).input_shape() == (3, 224, 224)
    assert make(**{**yaml.safe_load(text), **CUT, "search_again": False}).epochs == CUT["epochs"]


def test_an_epoch_of_its_job_has_the_steps_that_seconds_are_divided_by(tmp_path: Path) -> None:
    jpegs(str(tmp_path), BATCH * STEPS + 40, 4)
    options = {name: CUT[name] for name in ("validation_images", "limit_images", "batch_size")}
    source = Source(make(model="resnet18", weights="random", data=str(tmp_path), **options))
    order = source.data().train.index_batches(torch.Generator().manual_seed(0), CUT["batch_size"])
    assert [len(one) for one in order] == [BATCH] * STEPS


def test_every_network_has_one() -> None:
    assert {path.stem.partition("-")[0] for path in RECIPES} == set(RATIOS)


def test_sizes_are_marked_as_those_of_random_weights() -> None:
    unit = {
        "recipe": "alexnet-imagenet-noloss", "batch": 32, "steps": 3, "epoch_seconds": 9.6, "peak_gib": 3.0, "gpu_gib": None, "bytes": 50, "bytes_before": 500, "p": 0.9,
        "bits": 2,
    }  # fmt: skip
    found = {row.name: row.value for row in rows(unit, 40, 60)}
    assert all("random_weights" in name for name in found if "file" in name)
    assert found["imagenet/alexnet-imagenet-noloss/random_weights/file_over_all_tensors"] == 0.1
    for name, count in (("training_here", 40), ("training_here_at_most", 60)):
        hours = found[f"imagenet/alexnet-imagenet-noloss/{name}"]
        assert hours == pytest.approx(0.1 * 1_276_167 * count / 3600)


def test_predicted_hours_are_for_all_trainings_of_a_recipe_its_control_among_them(tmp_path: Path) -> None:
    jpegs(str(tmp_path), BATCH * STEPS + 40, 4)
    recipe = next(one for one in RECIPES if one.stem.startswith("resnet50"))
    options = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    least, most = epochs(recipe, str(tmp_path))
    assert least >= 2 * options["epochs"]  # torchvision's weights have seen the images that are held out
    assert most > least


def test_a_unit_without_a_size_yet_has_no_row_of_it() -> None:
    unit = {
        "recipe": "alexnet-imagenet-noloss", "batch": 128, "steps": 8, "epoch_seconds": 1.0, "peak_gib": 3.0, "gpu_gib": 5.0, "bytes_before": 500,
    }  # fmt: skip
    found = {row.name: row.value for row in rows(unit, 40, 60)}
    assert found["imagenet/alexnet-imagenet-noloss/gpu_memory"] == 5.0
    assert not any("random_weights" in name for name in found)
    assert len(imagenet.table([unit], {unit["recipe"]: (40, 60)}).splitlines()) == 2


def test_the_planned_rate_is_the_mildest_that_meets_the_ratio(tmp_path: Path) -> None:
    jpegs(str(tmp_path), 8, 4)
    config = make(
        model="resnet20", data=str(tmp_path), weights="random", validation_images=2, batch_norm_images=2, resize=32, input_size=32, profile="fast",
        target_ratio=20,
    )  # fmt: skip
    found = planned(config)
    theta, size = Theta(found["p"], found["bits"]), found["bytes"]
    weights = Source(config).network().state_dict()
    layers = {name: tensor for name, tensor in weights.items() if tensor.dim() > 1}
    whole = 4 * sum(tensor.numel() for tensor in weights.values() if tensor.is_floating_point())
    milder = Theta(theta.p - 0.001, theta.b)
    assert bytes_of(config, layers, theta) <= whole / 20 < bytes_of(config, layers, milder)
    assert whole / 20 < size < 1.5 * whole / 20  # batch norm comes on top


def test_the_committed_rows_and_the_documentation_are_what_units_and_recipes_say(tmp_path: Path) -> None:
    jpegs(str(tmp_path), BATCH * STEPS + 40, 4)
    units = [unit for one in RECIPES if (unit := imagenet.unit_of(one))]
    counts = {one.stem: epochs(one, str(tmp_path)) for one in RECIPES}
    assert len(units) == len(RECIPES)
    said = json.loads((RESULTS / "imagenet.json").read_text(encoding="utf-8"))["rows"]
    assert said == [asdict(row) for unit in units for row in rows(unit, *counts[unit["recipe"]])]
    assert imagenet.table(units, counts) in (ROOT / "docs" / "records.md").read_text(encoding="utf-8")


def test_a_unit_of_another_recipe_than_by_now_or_a_damaged_one_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / RECIPES[0].name
    shutil.copy(RECIPES[0], recipe)
    monkeypatch.setattr(imagenet, "UNITS", tmp_path)
    path = tmp_path / f"{recipe.stem}.json"
    assert imagenet.unit_of(recipe) is None
    config = make(**imagenet.asked(recipe, batch_size=7, limit_images=80)).model_dump(mode="json")
    imagenet.stored(path, {"config": config, "batch": 7})  # as a GPU has other batches
    assert imagenet.unit_of(recipe) is not None
    text = recipe.read_text(encoding="utf-8")
    for line, other in (("target_ratio: 51", "target_ratio: 52"), ("profile: small", "profile: fast"), ("precision: auto", "")):  # fmt: skip
        assert line in text
        recipe.write_text(text.replace(line, other), encoding="utf-8")
        assert imagenet.unit_of(recipe) is None
    recipe.write_text(text.replace("epochs: 30", "epochs: 40"), encoding="utf-8")  # only what is predicted
    assert imagenet.unit_of(recipe) is not None
    for damaged in ("{}", "[]", "cut o"):
        path.write_text(damaged)
        assert imagenet.unit_of(recipe) is None


@pytest.mark.parametrize(("code", "said"), [(1, "ended with 1; run again"), (2, "refused its input")])
def test_a_job_that_failed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, said: str
) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "compress.py").write_text(f"raise SystemExit({code})\n")
    monkeypatch.setattr(imagenet, "ROOT", tmp_path)
    with pytest.raises(RunError if code == 1 else ConfigError, match=said):
        imagenet.ran(RECIPES[0], str(tmp_path))


def test_a_recipe_that_there_is_not_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run("imagenet", imagenet.main, ["--only", "alexnet", "bogus"]) == 2
    assert "--only: expected the beginning of one of alexnet-imagenet-noloss" in capsys.readouterr().err
