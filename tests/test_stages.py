"""What several networks of a job have of the time before a deadline, and where a training keeps its checkpoints."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from clipq_ray import network, stages
from clipq_ray.cluster.engine import LocalEngine
from clipq_ray.config import make
from clipq_ray.data import Data
from clipq_ray.optimizers import Schedule
from clipq_ray.progress import Reporter
from clipq_ray.source import Source
from clipq_ray.stages import Run, control_epochs, rung_epochs, trained
from clipq_ray.storage import Store
from clipq_ray.training import Size, TrainTask
from clipq_ray.work import CURVE


def test_a_training_goes_on_from_its_own_checkpoints_only(tmp_path: Path) -> None:
    class Noting(LocalEngine):
        places: ClassVar[list[str]] = []

        def train(self, task: TrainTask, progress: Any) -> float:
            self.places.append(task.checkpoints)
            Store(task.output).write(CURVE, b'{"curve": [], "notes": []}')
            return 0.0

    source = Source(make(limit_images=20, storage=str(tmp_path), engine="local"))
    run = Run(source, Noting(), Reporter(quiet=True), Store(tmp_path), threading.Lock())
    with run.turn:
        for rate in (0.1, 0.2):
            schedule = Schedule(1, 4, rate, 0.0, 0.9, 0.0, 0.0)
            trained(run, "finetune", schedule, None, None, Store(tmp_path / "kept"))
    one, other = Noting.places
    assert one != other
    assert one.startswith(f"{Store(tmp_path).uri}/kept/finetune/")


def test_each_network_takes_its_share_of_what_is_left(tmp_path: Path) -> None:
    def run(**options: float) -> Run:
        source = Source(make(**options))
        return Run(source, LocalEngine(), Reporter(quiet=True), Store(tmp_path), threading.Lock())

    def left(others: int, at_once: int) -> float:
        one = run(deadline_hours=1.0)
        one.share_time(others, at_once)
        assert one.seconds_left is not None
        return one.seconds_left

    assert left(0, 1) == pytest.approx(3540, rel=0.01)
    assert left(3, 1) == pytest.approx(3540 / 4, rel=0.01)
    assert left(3, 2) == pytest.approx(3540 / 2, rel=0.01)
    assert left(1, 8) == pytest.approx(3540, rel=0.01)
    behind = run(deadline_hours=1.0)
    behind.late = 1800.0  # of a job that had gone on for half an hour
    behind.share_time(2, 1)
    assert behind.seconds_left == pytest.approx(1740 / 3, rel=0.01)
    none = run()
    none.share_time(3, 1)
    assert none.seconds_left is None


def test_before_a_deadline_the_file_has_the_time_that_the_original_took_to_be_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    def slowly(run: Run, model: nn.Module, images: Any) -> None:
        clock[0] += 500.0

    monkeypatch.setattr(stages, "scored", slowly)
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    source = Source(make(deadline_hours=1.0, limit_images=20))
    run = Run(source, LocalEngine(), Reporter(quiet=True), Store(tmp_path), threading.Lock(), _begun=0.0)
    assert run.seconds_left == 3540.0
    assert set(stages.scored_all(run, nn.Identity())) == {"validation", "test"}
    assert run.seconds_left == 3600.0 - 1000.0 - 1.2 * 1000.0


class Watched(Run):
    """Knows what decided its stages."""

    def stage_store(self, name: str, inputs: Mapping[str, Any]) -> tuple[str, Store]:
        self.inputs = dict(inputs)
        return super().stage_store(name, inputs)


def decided(
    tmp_path: Path,
    model: nn.Module,
    number: int = 1,
    data: Data | None = None,
    size: Size | None = None,
    **options: Any,
) -> tuple[str, dict[str, Any], TrainTask]:
    """The key of a training of a network from its own start, what decided it, and the task."""

    class Noting(LocalEngine):
        def train(self, task: TrainTask, progress: Any) -> float:
            tasks.append(task)
            Store(task.output).write(CURVE, b'{"curve": [], "notes": []}')
            return 0.0

    tasks: list[TrainTask] = []
    source = Source(
        make(limit_images=20, weights="train", storage=str(tmp_path), engine="local", **options), model, data
    )
    run = Watched(source, Noting(), Reporter(quiet=True), Store(tmp_path), threading.Lock())
    with run.turn:
        schedule = Schedule(1, 4, 0.1, 0.0, 0.9, 0.0, 0.0)
        trained(run, "finetune", schedule, None, None, Store(tmp_path), number, size=size)
    return run.stages[0]["key"], run.inputs, tasks[0]


def net(value: float = 1.0, frozen: bool = False) -> nn.Module:
    made = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    for one in made.parameters():
        nn.init.constant_(one, value)
    made[1].bias.requires_grad_(not frozen)
    return made


def test_a_further_training_of_a_kind_is_a_stage_of_its_own(tmp_path: Path) -> None:
    (first, inputs, task), (second, others, further) = (
        decided(tmp_path / str(number), net(), number) for number in (1, 2)
    )
    assert first != second
    assert (task.number, further.number) == (1, 2)
    assert others == {**inputs, "number": 2}
    assert "number" not in inputs


def test_what_is_frozen_and_where_a_training_begins_decide_it(tmp_path: Path) -> None:
    found = [
        decided(tmp_path / str(number), model)
        for number, model in enumerate((net(), net(frozen=True), net(2.0)))
    ]
    assert len({key for key, *_ in found}) == 3
    (_, plain, _), (_, held, _), (_, other, _) = found
    assert held == {**plain, "frozen": ["1.bias"]}
    assert {name for name in plain if plain[name] != other[name]} == {"weights"}


def test_what_classes_are_called_decides_a_training_that_is_held_at_a_file_of_a_size(tmp_path: Path) -> None:
    data = Source(make(limit_images=20)).data()
    renamed = replace(data, class_names=tuple(f"digit {name}" for name in data.class_names))
    inventory = network.inventory(net(), data.train.batch(torch.arange(2), None)[0], ())
    keys = [
        decided(tmp_path / f"{number}{size}", net(), data=one, size=size and Size(size, inventory, None))[0]
        for number, one in enumerate((data, renamed))
        for size in (None, 900)
    ]
    assert keys[0] == keys[2]  # plain weights do not know them
    assert keys[1] != keys[3]


@pytest.mark.parametrize(
    ("options", "held"),
    [
        ({"precision": "bfloat16"}, False),
        ({"shift_pixels": 1}, False),
        ({"deadline_hours": 9.0}, False),
        ({"seed": 1}, False),
        ({"profile": "small"}, True),
        ({"vectors": "exact"}, True),
        ({"dead_units": "keep"}, True),
        ({"unit_order": "given"}, True),
        ({"keep": ("nothing*",)}, True),
    ],
)
def test_an_option_that_decides_a_training_is_in_its_key(
    tmp_path: Path, options: dict[str, Any], held: bool
) -> None:
    data = Source(make(limit_images=20)).data()
    inventory = network.inventory(net(), data.train.batch(torch.arange(2), None)[0], ())

    def keys(size: Size | None) -> list[str]:
        places = (tmp_path / f"{number}{size is None}" for number in range(2))
        return [
            decided(place, net(), data=data, size=size, **given)[0]
            for place, given in zip(places, ({}, options), strict=True)
        ]

    of_a_size = keys(Size(900, inventory, None))
    assert of_a_size[0] != of_a_size[1]
    free = keys(None)
    assert (free[0] != free[1]) is not held  # how a file is packed decides nothing else


@pytest.mark.parametrize(
    ("options", "rung", "control"),
    [
        ({"epochs": 7}, 4, 7),
        ({"epochs": 7, "rungs": 3}, 4, 15),
        ({"epochs": 8, "rungs": 3, "rung_epochs": 2}, 2, 12),
        ({"epochs": 8, "rounds": 5, "level_epochs": 9}, 4, 8),
    ],
)
def test_a_control_is_trained_for_the_first_round_and_those_on_the_way_to_it(
    options: dict[str, int], rung: int, control: int
) -> None:
    config = make(target_bytes=9, **options)
    assert (rung_epochs(config), control_epochs(config)) == (rung, control)
