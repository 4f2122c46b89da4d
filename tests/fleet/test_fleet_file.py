"""A fleet file is read whole, and every mistake in it is named at once with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clipq_ray.config import make
from clipq_ray.errors import ConfigError
from clipq_ray.fleet import file as fleet

GOOD = """\
name: night
defaults: {data: digits, epochs: 3, target-ratio: 15}
limits: {trainings: 2, searches: 4}
models:
  - {model: lenet5, priority: 1}
  - model: lenet5
    name: small
    max_drop: 0.5
    keep: [fc3.weight]
  - {model: resnet20, priority: 5}
ensembles:
  - {name: vote, members: [lenet5, small]}
"""


def read(folder: Path, text: str, **options: Any) -> fleet.Fleet:
    path = folder / "fleet.yaml"
    path.write_text(text)
    return fleet.read(str(path), options)


def test_a_fleet_holds_every_network_with_its_options_highest_priority_first(tmp_path: Path) -> None:
    found = read(tmp_path, GOOD)
    shared: dict[str, Any] = {"data": "digits", "epochs": 3, "search_parallel": 4, "trainings": 2}
    assert found == fleet.Fleet(
        "night",
        (
            make(model="resnet20", target_ratio=15, **shared),
            make(model="lenet5", target_ratio=15, **shared),
            make(model="lenet5", name="small", max_drop=0.5, keep=("fc3.weight",), **shared),
        ),
        (fleet.Ensemble("vote", ("lenet5", "small")),),
        (5, 1, 0),
    )
    assert [source.priority for source in found.sources()] == [5, 1, 0]


def test_what_the_job_may_take_is_said_once_and_the_command_line_counts_more(tmp_path: Path) -> None:
    text = GOOD.replace("searches: 4", "cpus: 8, gpus: 2")
    (first, *_) = read(tmp_path, text).configs
    assert (first.limit_cpus, first.limit_gpus, first.trainings, first.search_parallel) == (8, 2, 2, None)
    assert read(tmp_path, text, limit_cpus=3).configs[0].limit_cpus == 3
    said = mistakes(tmp_path, text.replace("epochs: 3", "limit_cpus: 4"))
    assert "line 3: cpus: is there twice, limit_cpus in defaults says it too; leave one out" in said
    said = mistakes(tmp_path, text.replace("epochs: 3", "workers: 9"))
    assert (
        "expected --workers x --threads-per-worker at most --limit-cpus (8), got 9; lower one of them" in said
    )


def test_the_command_line_comes_before_the_defaults_and_behind_a_networks_own_lines(tmp_path: Path) -> None:
    found = read(tmp_path, GOOD, epochs=7, target_bytes=5000, storage="/elsewhere")
    assert {config.epochs for config in found.configs} == {7}
    assert [config.target_bytes for config in found.configs] == [5000, 5000, None]
    assert found.configs[2].max_drop == 0.5
    assert {config.storage for config in found.configs} == {"/elsewhere"}


def mistakes(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as refused:
        read(folder, text)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_all_mistakes_are_named_at_once_with_their_lines(tmp_path: Path) -> None:
    said = mistakes(
        tmp_path,
        """\
name: a/b
defaults:
  data: digits
  epochs: 0
limits: {cores: 3, trainings: 0}
modles: []
models:
  - {model: lenet5, epoch: 3}
  - model: lenet5
  - model: lenet5
    learning_rate: -1
  - {epochs: 3}
  - [lenet5]
ensembles:
  - {name: vote, members: [lenet5, other]}
  - {name: outer, members: [vote, lenet5]}
""",
    )
    assert said.startswith(f"{tmp_path}/fleet.yaml: ")
    for line, words in (
        (1, "name: expected a name without spaces"),
        (4, "--epochs: expected greater than or equal to 1, got 0"),
        (5, "unknown key 'cores' in limits; expected trainings, searches, cpus, gpus"),
        (5, "trainings: expected a whole number of at least 1, got 0"),
        (6, "unknown key 'modles' in a fleet"),
        (8, "unknown option 'epoch'; did you mean --epochs"),
        (11, "--learning-rate: expected greater than 0, got -1"),
        (12, "model: expected the name of a network, got none"),
        (13, "expected a network as 'name: value' lines, got a list"),
        (15, "members: expected names of networks in this fleet, got 'other'"),
        (16, "members: expected networks, got the ensemble 'vote'; name its members"),
    ):
        assert f"line {line}: {words}" in said, said
    assert said.count("--epochs: expected greater") == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1: expected a fleet as 'name: value' lines, got nothing"),
        ("- a\n", "expected a fleet as 'name: value' lines, got a list"),
        ("name: a\nmodels: lenet5\n", "line 2: models: expected a list, got 'lenet5'"),
        ("name: a\nmodels: []\n", "line 2: models: expected at least one network, got none"),
        ("name: a\nname: b\nmodels: [{model: lenet5}]\n", "line 2: name: is there twice in a fleet"),
        ("models: [{model: lenet5}]\n", "name: expected a name without spaces"),
        ("name: a\nmodels: [{model: lenet5}, {model: lenet5}]\n", "line 2: expected names that differ, got 'lenet5' as in line 2"),
        ("name: a\nmodels: [{model: lenet5, storage: /x}]\n", "storage: expected one for the whole fleet; move it to defaults"),
        ("name: a\nmodels: [{model: lenet5, max_drop: 1, target_ratio: 2}]\n", "expected one intent, got --max-drop and --target-ratio"),
        ("name: a\ndefaults: {model: lenet5}\nmodels: [{model: lenet5}]\n", "line 2: model: expected with a network, got it in defaults"),
        ("name: a\nmodels: [{model: lenet99}]\n", "line 2: expected a known network or package.module:function, got 'lenet99'"),
        ("name: a\nmodels: [{model: lenet5, priority: high}]\n", "priority: expected a whole number, got 'high'"),
        ("name: a\nmodels: [{model: !!python/object:os.system x}]\n", "line 2: model: could not determine a constructor"),
        (GOOD + "  - {name: vote, members: [lenet5, small]}\n", "line 13: expected names that differ, got 'vote' as in line 12"),
        (GOOD + "  - {name: small, members: [lenet5, small]}\n", "line 13: name: expected one that no network has, got 'small'"),
        (GOOD + "  - {name: v, members: [small, small]}\n", "line 13: members: expected a list of at least two different networks"),
        (GOOD + "  - {name: v, members: [lenet5, small], target_bytes: 9}\n", "line 13: unknown key 'target_bytes' in an ensemble; expected name, members"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(tmp_path: Path, text: str, words: str) -> None:
    assert words in mistakes(tmp_path, text)


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--fleet: expected a readable YAML file"):
        fleet.read(str(tmp_path / "nowhere.yaml"), {})
    assert "expected YAML in" in mistakes(tmp_path, "name: [\n")
