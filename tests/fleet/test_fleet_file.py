"""A fleet file is read whole, and every mistake in it is named at once with its line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from refusals import refused

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
    with refused(ConfigError, match=re.escape(str(folder))) as caught:
        read(folder, text)
    return str(caught.value)


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
        (1, "name: expected a name of letters, digits, '.', '_' and '-'"),
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
        ("models: [{model: lenet5}]\n", "name: expected a name of letters, digits, '.', '_' and '-'"),
        ("name: a\nmodels: [{model: lenet5, name: 'c:50'}]\n", "line 2: expected a --name of letters, digits"),
        ("name: 2026-02-30\nmodels: [{model: lenet5}]\n", "line 1: name: day is out of range for month"),
        ("name: a\nmodels: [{model: lenet5}, {model: lenet5}]\n", "line 2: expected names that differ, got 'lenet5' as in line 2"),
        ("name: a\nmodels: [{model: lenet5, storage: /x}]\n", "storage: expected one for the whole fleet; move it to defaults"),
        ("name: a\nmodels: [{model: lenet5, max_drop: 1, target_ratio: 2}]\n", "line 2: expected one intent in a network, got max_drop and target_ratio; leave one out"),
        ("name: a\ndefaults: {model: lenet5}\nmodels: [{model: lenet5}]\n", "line 2: model: expected with a network, got it in defaults"),
        ("name: a\nmodels: [{model: lenet99}]\n", "line 2: expected a known network or package.module:function, got 'lenet99'"),
        ("name: a\nmodels: [{model: lenet5, priority: high}]\n", "priority: expected a whole number, got 'high'"),
        ("name: a\nmodels: [{model: !!python/object:os.system x}]\n", "line 2: model: could not determine a constructor"),
        (GOOD + "  - {name: vote, members: [lenet5, small]}\n", "line 13: expected names that differ, got 'vote' as in line 12"),
        (GOOD + "  - {name: small, members: [lenet5, small]}\n", "line 13: name: expected one that no network has, got 'small'"),
        (GOOD + "  - {name: v, members: [small, small]}\n", "line 13: members: expected a list of at least two different networks"),
        (GOOD + "  - {name: v, members: [lenet5, small], bytes: 9}\n", "line 13: unknown key 'bytes' in an ensemble; expected name, members, max_drop"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(tmp_path: Path, text: str, words: str) -> None:
    assert words in mistakes(tmp_path, text)


def test_what_is_merged_from_another_place_is_as_if_it_stood_there(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        """\
name: night
defaults: &all {data: digits, epochs: 3}
models:
  - &base {model: lenet5, keep: [fc3.weight], target-ratio: 25}
  - {<<: *base, name: small, target_ratio: 30}
  - {epochs: 7, <<: [{epochs: 5, seed: 2}, *base], model: resnet20}
limits: {<<: {trainings: 2}}
""",
    )
    same: dict[str, Any] = {"data": "digits", "keep": ("fc3.weight",), "trainings": 2}
    assert found.configs == (
        make(model="lenet5", epochs=3, target_ratio=25, **same),
        make(model="lenet5", name="small", epochs=3, target_ratio=30, **same),
        make(model="resnet20", epochs=7, seed=2, target_ratio=25, **same),
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\nmodels:\n  - &b {model: lenet5, epoch: 3}\n  - {<<: *b, name: x}\n", "1 mistake: line 3: unknown option 'epoch'"),
        ("name: a\nmodels: [{model: lenet5, <<: 3}]\n", "1 mistake: line 2: <<: expected a mapping or list of mappings for merging, but found scalar"),
        ("name: a\nmodels: [{model: lenet5, model: vgg16, <<: {model: vgg11}}]\n", "1 mistake: line 2: model: is there twice in a network; leave one out"),
    ],
)  # fmt: skip
def test_mistakes_in_what_is_merged_are_named_where_they_stand(tmp_path: Path, text: str, words: str) -> None:
    assert words in mistakes(tmp_path, text)


def test_names_alone_are_one_mistake_each_and_nothing_else_is_said_of_them(tmp_path: Path) -> None:
    said = mistakes(
        tmp_path,
        "name: a\nmodels:\n  - lenet5\n  - vgg16\nensembles:\n  - {name: v, members: [lenet5, vgg16]}\n",
    )
    for line, name in ((3, "lenet5"), (4, "vgg16")):
        assert f"line {line}: expected a network as 'name: value' lines, got {name!r}" in said
    assert "2 mistakes: " in said


def test_ways_to_a_size_of_one_network_are_refused_in_an_ensemble_with_one_intent_and_nothing_else_is_said(
    tmp_path: Path,
) -> None:
    text = ONE_INTENT.replace("epochs: 3", "epochs: 3, hold_size: true, rungs: 3")
    said = mistakes(tmp_path, text)
    assert said.count("line 2: ") == 2
    assert "2 mistakes: " in said
    assert "hold_size: expected none with the networks of ensemble 'vote'" in said
    own = text.replace("{model: lenet5}", "{model: lenet5, hold_size: false, rungs: 1}").replace(
        "{model: lenet_300_100}", "{model: lenet_300_100, hold_size: false, rungs: 1}"
    )
    assert [config.hold_size for config in read(tmp_path, own).configs] == [False, False, True]


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--fleet: expected a readable YAML file"):
        fleet.read(str(tmp_path / "nowhere.yaml"), {})
    assert "expected YAML in" in mistakes(tmp_path, "name: [\n")


@pytest.mark.parametrize("depth", [100, 300, 3000])  # which step gives up depends on the depth
@pytest.mark.parametrize("line", ["models: {}", "name: {}", "models: [{{model: lenet5, model_args: {}}}]"])
def test_brackets_in_brackets_are_a_mistake_of_one_line(line: str, depth: int, tmp_path: Path) -> None:
    said = mistakes(tmp_path, line.format("[" * depth + "]" * depth))
    assert depth < 3000 or "nested too deep; take levels out" in said


ONE_INTENT = """\
name: night
defaults: {data: digits, epochs: 3, target_ratio: 15}
models:
  - {model: lenet5}
  - {model: lenet_300_100}
  - {model: resnet20}
ensembles:
  - {name: vote, members: [lenet5, lenet_300_100], target_bytes: 60000}
"""


def test_an_ensembles_intent_takes_the_place_of_its_members(tmp_path: Path) -> None:
    found = read(tmp_path, ONE_INTENT, tradeoff=3.0)
    assert [config.tradeoff for config in found.configs] == [None, None, 3.0]
    assert [config.target_ratio for config in read(tmp_path, ONE_INTENT).configs] == [None, None, 15]
    (vote,) = found.ensembles
    assert vote.wants == ("target_bytes", 60000)
    assert vote.intent_of(1_000_000).value == 60000
    ratio = read(tmp_path, ONE_INTENT.replace("target_bytes: 60000", "target_ratio: 20")).ensembles[0]
    assert ratio.intent_of(1_000_000).value == 50_000


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("{model: lenet5}", "{model: lenet5, max_drop: 1}", "line 4: max_drop: expected the intent of ensemble 'vote' to be the only one"),
        ("target_bytes: 60000", "target_bytes: 60000, max_drop: 1", "line 8: expected one intent in an ensemble, got max_drop and target_bytes"),
        ("target_bytes: 60000", "target_bytes: few", "line 8: --target-bytes: expected a valid integer"),
        ("target_bytes: 60000", "max_drop: -1", "line 8: --max-drop: expected greater than or equal to 0, got -1"),
        ("target_bytes: 60000", "tradeoff: 8", "line 8: unknown key 'tradeoff' in an ensemble"),
        ("[lenet5, lenet_300_100]", "[lenet5, lenet9]", "line 8: members: expected names of networks in this fleet, got 'lenet9'"),
        ("{model: lenet5}", "{model: lenet5, seed: 3}", "line 8: members: expected the same seed for all"),
        ("{model: lenet5}", "{model: lenet5, search_again: true}", "line 4: search_again: expected none with the networks of ensemble 'vote'"),
        ("name: vote", "name: lenet5", "line 8: name: expected one that no network has, got 'lenet5'"),
        ("name: vote, ", "", "line 8: name: expected one that no network has, got None"),
        ("60000}", "60000}\n  - {name: pair, members: [resnet20, lenet5], max_drop: 1}", "line 9: members: expected networks that no other intent decides, got 'lenet5' as in 'vote'"),
    ],
)  # fmt: skip
def test_intents_of_ensembles_that_cannot_be_meant_are_refused(
    tmp_path: Path, before: str, after: str, words: str
) -> None:
    assert words in mistakes(tmp_path, ONE_INTENT.replace(before, after, 1))


def test_several_intents_in_defaults_are_named_beside_other_mistakes(tmp_path: Path) -> None:
    text = ONE_INTENT.replace("target_ratio: 15", "target_ratio: 15, max_drop: 1").replace(
        "resnet20}", "resnet20, epoch: 1}"
    )
    said = mistakes(tmp_path, text)
    assert "line 2: expected one intent in defaults, got max_drop and target_ratio; leave one out" in said
    assert "line 6: unknown option 'epoch'" in said
    assert said.count("expected one intent") == 1
