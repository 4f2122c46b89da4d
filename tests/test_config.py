"""A configuration is right or refused: in one line that names the option, what was expected and what came."""

from __future__ import annotations

import datetime
import math
import re
from typing import Any

import pytest
from pydantic import ValidationError
from refusals import refused

from clipq_ray.config import Config, make
from clipq_ray.consistency import idle
from clipq_ray.errors import ConfigError
from clipq_ray.source import Source


def test_every_option_says_what_it_is() -> None:
    for name, field in Config.model_fields.items():
        assert field.description, name
        assert field.description[0] != " ", name


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        make().seed = 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_ratio": 1.0}, "--target-ratio"),
        ({"target_ratio": float("nan")}, "--target-ratio"),
        ({"tradeoff": 0.0}, "--tradeoff"),
        ({"epochs": 0}, "--epochs"),
        ({"epochs": "many"}, "'many'"),
        ({"batch_size": 0}, "--batch-size"),
        ({"learning_rate": float("inf")}, "--learning-rate"),
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"momentum": 1.0}, "--momentum"),
        ({"weight_decay": -1e-9}, "--weight-decay"),
        ({"label_smoothing": 1.0}, "--label-smoothing"),
        ({"search_evaluations": 3}, "--search-evaluations"),
        ({"search_evaluations": 911}, "--search-evaluations"),
        ({"search_start": 2}, "--search-start"),
        ({"search_images": 1}, "--search-images"),
        ({"workers": 0}, "--workers"),
        ({"threads_per_worker": 0}, "--threads-per-worker"),
        ({"expect_top1_percent": 101.0}, "--expect-top1-percent"),
        ({"deadline_hours": 0.0}, "--deadline-hours"),
        ({"input_size": 7}, "--input-size"),
        ({"seed": -1}, "--seed"),
        ({"engine": "spark"}, "'ray' or 'local'"),
        ({"device": "tpu"}, "--device"),
        ({"control": "sometimes"}, "--control"),
        ({"precision": "float16"}, "--precision"),
        ({"std": (0.5, 0.0, 0.5)}, "--std above 0"),
        ({"limit_cpus": 3, "workers": 4}, "at most --limit-cpus (3), got 4"),
        ({"limit_cpus": 3, "workers": 2, "decode": "cluster"}, "--decode cluster, got 4; lower one of them"),
        ({"name": "a b"}, "--name"),
        ({"name": "../up"}, "--name"),
        ({"name": "_stages"}, "--name"),
        ({"name": ""}, "--name"),
        ({"name": "a" * 201}, "at most 200 in all"),
        ({"weights": ""}, "--weights"),
        ({"data_root": ""}, "--data-root"),
        ({"memory_limit_gib": 1e308}, "--memory-limit-gib"),
        ({"search_cache_gib": 1e308}, "--search-cache-gib"),
        ({"epochs": 10**400}, "--epochs"),
        ({"baseline_epochs": 10**400}, "--baseline-epochs"),
        ({"batch_size": 10**22}, "--batch-size"),
        *[
            ({name: 10**400}, f"--{name.replace('_', '-')}")
            for name in ("round_epochs", "rung_epochs", "level_epochs", "evaluation_batch_size")
        ],
        *[
            ({name: 1e308}, f"--{name.replace('_', '-')}")
            for name in ("deadline_hours", "stall_minutes", "attempt_hours")
        ],
    ],
)
def test_a_value_out_of_range_is_refused_by_name_in_one_line(options: dict[str, Any], words: str) -> None:
    with refused(ConfigError, match=re.escape(words)):
        make(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_ratio": 15.0, "tradeoff": 2.0}, "expected one intent"),
        ({"max_drop": 0.0, "target_bytes": 9}, "expected one intent"),
        ({"max_drop": -0.1}, "--max-drop"),
        ({"target_bytes": 0}, "--target-bytes"),
        ({"rounds": 0}, "--rounds"),
        (
            {"paper": True, "ramp_share": 0.5, "vectors": "auto"},
            "with --paper, got --ramp-share 0.5, --vectors auto; leave",
        ),
        ({"rungs": 3}, "expected --target-bytes or --target-ratio with --rungs 3"),
        ({"rungs": 3, "tradeoff": 8.0}, "expected --target-bytes or --target-ratio with --rungs 3"),
        ({"search_again": True, "tradeoff": 2.0}, "expected several rounds with --search-again"),
        (
            {"search_again": True, "target_bytes": 9, "rounds": 1},
            "expected several rounds with --search-again",
        ),
        ({"hold_size": True, "max_drop": 0.5}, "expected --target-bytes or --target-ratio with --hold-size"),
        ({"engine": "local", "workers": 2}, "--engine ray"),
        ({"workers": 64, "batch_size": 32}, "--batch-size of at least"),
        ({"epochs": 1, "warmup_epochs": 1.0}, "--warmup-epochs below"),
        ({"mean": (33.3,), "std": (78.6,)}, r"expected --mean of values in 0..1, .* divide both"),
        ({"keep": True}, "--keep"),
        ({"groups": 3}, "--groups"),
        ({"mean": True, "std": True}, "--mean"),
        ({"mean": (-0.1,), "std": (0.3,)}, r"expected --mean of values in 0..1"),
        ({"model_args": {"clip": math.inf}}, "expected JSON values .* in --model-args, got {'clip': inf}"),
        ({"model_args": {"layers": [{"scale": math.nan}]}}, "expected JSON values .* in --model-args"),
        ({"model_args": {"day": datetime.date(2026, 1, 1)}}, "expected JSON values .* in --model-args"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"search_start": 4, "search_evaluations": 4},
        {"workers": 32, "batch_size": 32},
        {"epochs": 1, "warmup_epochs": 0.0},
        {"rungs": 1, "tradeoff": 8.0},
        {"shift_pixels": 0},
        {"rungs": 1, "rung_epochs": 3},  # a recipe's, with its ladder switched off on the command line
        {"cutout_pixels": 1024},
        {"target_ratio": 10_000.0},
        {"momentum": 0.0, "weight_decay": 0.0},
        {"expect_top1_percent": 100.0},
        {"name": "a" * 200},
    ],
)
def test_values_on_the_border_are_taken(options: dict[str, Any]) -> None:
    made = make(**options)
    assert {name: getattr(made, name) for name in options} == options


def idled(config: Config) -> list[str]:
    return list(idle(config, Source(config).weights_origin()))


def test_what_has_nothing_to_do_is_said() -> None:
    said = idled(make(rung_epochs=3, round_epochs=4, level_learning_rate=0.1, rounds=1))
    assert said == [
        "--rung-epochs has nothing to do with --rungs 1",
        "--round-epochs has nothing to do with --rounds 1",
        "--level-learning-rate has nothing to do with --level-epochs 0",
    ]
    assert idled(make(rungs=2, rung_epochs=3, rounds=2, round_epochs=4, level_epochs=1, level_learning_rate=0.1, target_bytes=9)) == []  # fmt: skip
    assert idled(make()) == []


@pytest.mark.parametrize(
    ("options", "busy", "said"),
    [
        ({"tradeoff": 8.0, "round_epochs": 4}, {"target_bytes": 9, "round_epochs": 4}, "--round-epochs has nothing to do with --tradeoff, which makes one round"),
        ({"weights": "w.pt", "baseline_epochs": 9}, {"baseline_epochs": 9}, "--baseline-epochs has nothing to do with weights that are not trained first (w.pt)"),
        ({"model": "resnet18", "baseline_epochs": 9}, {"model": "resnet18", "weights": "train", "baseline_epochs": 9}, "--baseline-epochs has nothing to do with weights that are not trained first (torchvision)"),
        (
            {"weights": "random", "baseline_learning_rate": 0.3},
            {"weights": "train", "baseline_learning_rate": 0.3},
            "--baseline-learning-rate has nothing to do with weights that are not trained first (random)",
        ),
        (
            {"search_start": 9, "search_evaluations": 8},
            {"search_start": 8, "search_evaluations": 8},
            "--search-start has nothing to do beyond --search-evaluations 8, which all lie where it says: nothing is proposed",
        ),
        *[
            ({"engine": "local", name: 2}, {name: 2}, f"--{name.replace('_', '-')} has nothing to do with --engine local, which does one thing at a time")
            for name in ("search_parallel", "limit_cpus", "limit_gpus", "trainings", "decode_cpus")
        ],
        *[
            ({"engine": "local", name: 2}, {name: 2}, f"--{name.replace('_', '-')} has nothing to do with --engine local, which watches over no worker")
            for name in ("stall_minutes", "attempt_hours", "max_failures")
        ],
        ({"tradeoff": 8.0, "rounds": 5}, {"target_bytes": 9, "rounds": 5}, "--rounds has nothing to do with --tradeoff, which makes one round"),
        ({"decode": "worker", "decode_cpus": 3}, {"decode_cpus": 3}, "--decode-cpus has nothing to do with --decode worker"),
        (
            {"data": "digits", "data_root": "/x"},
            {"data": "mnist", "data_root": "/x"},
            "--data-root has nothing to do with digits: no torchvision set by its name alone",
        ),
        (
            {"data": "/own", "validation_data": "/more", "data_root": "/x"},
            {"data": "/own", "validation_data": "mnist:", "data_root": "/x"},
            "--data-root has nothing to do with /own and /more: no torchvision set by its name alone",
        ),
    ],
)  # fmt: skip
def test_a_part_that_other_options_leave_no_work_is_said(
    options: dict[str, Any], busy: dict[str, Any], said: str
) -> None:
    assert idled(make(**options)) == [said]
    assert idled(make(**busy)) == []


@pytest.mark.parametrize(
    ("options", "named"),
    [({"storage": "/x/caf\udce9"}, "--storage"), ({"model_args": {"x": ["\ud800"]}}, "--model-args")],
)
def test_text_that_no_manifest_can_hold_is_refused_before_anything_is_made(
    options: dict[str, Any], named: str
) -> None:
    with refused(ConfigError, match=f"expected text in UTF-8 as {named}, got "):
        make(**options)


def test_the_paper_switches_off_what_goes_beyond_it() -> None:
    made = make(paper=True)
    assert (made.vectors, made.dead_units, made.ramp_share, made.rungs) == ("exact", "keep", 0.0, 1)
    assert make(paper=True, ramp_share=0.0, vectors="exact") == made
    assert make().vectors == "auto"


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"--epochs.*; .*--momentum"):
        make(epochs=0, momentum=2.0)


def test_an_unknown_option_gets_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean --learning-rate"):
        make(learningrate=0.1)
    with pytest.raises(ConfigError, match="see --help"):
        make(zzzzzz=1)


def test_no_intent_is_the_intent_to_lose_nothing() -> None:
    assert make() == make(max_drop=0.0)
    assert make(target_ratio=20.0).max_drop is None


@pytest.mark.parametrize(
    "name", ["epochs", "target_bytes", "max_drop", "expect_top1_percent", "seed", "name"]
)
def test_a_yes_or_no_is_no_value_of_other_options(name: str) -> None:
    with refused(ConfigError, match=f"^--{name.replace('_', '-')}: expected .*, got True$"):
        make(**{name: True})
    assert make(paper=True).paper
