"""Units of work: what they leave in their stores, and what a deadline or a bad image changes."""

from __future__ import annotations

import io
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from clipq_ray import network
from clipq_ray.cluster.engine import LocalEngine
from clipq_ray.config import make
from clipq_ray.data.tensors import TensorSplit
from clipq_ray.errors import FormatError, RunError
from clipq_ray.groups import grouped
from clipq_ray.memory import Attempts
from clipq_ray.optimizers import Schedule
from clipq_ray.ranks import Rank
from clipq_ray.search import Settings, Trial
from clipq_ray.source import Source
from clipq_ray.states import WEIGHTS, read_state, write_state
from clipq_ray.storage import Store
from clipq_ray.training import TrainTask, train
from clipq_ray.work import (
    CURVE,
    Searcher,
    SearchTask,
    fewest_of_late,
    group_name,
    late_name,
    partial_name,
    read_trials,
    search_images,
)


def silent(*_: Any) -> None:
    return None


def searched(task: SearchTask, progress: Any = silent) -> None:
    told: list[Any] = []
    LocalEngine().search([task], progress, lambda number, error: told.append((number, error)))
    assert told == [(0, None)]


def search_task(tmp_path: Path, deadline: float | None) -> SearchTask:
    source = Source(make(model="lenet5", weights="random", engine="local"))
    model, weights = source.network(), Store(tmp_path / "weights")
    write_state(weights, WEIGHTS, model.state_dict())
    found = network.inventory(model, torch.zeros(2, 1, 28, 28), ())
    groups = grouped(model, [layer.name for layer in found.layers], ())
    settings = Settings(4, 3, (8.0,), 0)
    return SearchTask(
        source, weights.uri, groups, settings, 40, found.bytes_before, Store(tmp_path / "out").uri, deadline
    )


def test_a_search_without_a_deadline_makes_all_its_evaluations(tmp_path: Path) -> None:
    task = search_task(tmp_path, None)
    searched(task)
    assert {len(trials) for trials in read_trials(task).values()} == {4}
    assert task.open_groups() == []


def test_a_search_that_has_waited_takes_its_share_of_what_is_left_then(tmp_path: Path) -> None:
    # 1,000 s are left, of which 400 are the search's; when its turn comes 500 s later, 200 are
    task = replace(search_task(tmp_path, 10_000.0 + 400.0), deadline_share=0.4).after(500.0)
    assert task.deadline == pytest.approx(10_500.0 + 200.0)
    assert search_task(tmp_path, None).after(500.0).deadline is None
    training = TrainTask(task.source, "finetune", None, None, Schedule(1, 4, 0.01, 0.0, 0.9, 0.0, 0.0), "out", "work", 10_700.0)  # fmt: skip
    assert replace(training, deadline_share=0.7).after(500.0).deadline == 10_000 + 500 + 0.7 * (1000 - 500)


def test_a_search_whose_deadline_has_passed_still_measures_every_layer_once(tmp_path: Path) -> None:
    task = search_task(tmp_path, time.time() - 1)
    searched(task)
    assert {len(trials) for trials in read_trials(task).values()} == {1}
    assert len(read_trials(task)) == 5


def test_a_layer_that_ends_early_is_stored_and_counts_as_whole(tmp_path: Path) -> None:
    task = search_task(tmp_path, None)
    task = replace(task, settings=replace(task.settings, stop_gain=1e9))  # nothing is worth that
    told: list[tuple[int, int]] = []
    searched(task, lambda done, total, words: told.append((done, total)))
    assert {len(trials) for trials in read_trials(task).values()} == {3}  # the start points
    assert told == sorted(told)
    assert told[-1] == (5 * 4, 5 * 4)


def photographs(root: Path) -> str:
    """A folder of JPEG files larger than the network's input, so that they are read when a batch needs them; one is broken."""
    random = np.random.default_rng(0)
    for split in ("train", "validation"):
        for label in ("a", "b"):
            (root / split / label).mkdir(parents=True)
            for index in range(6):
                file = io.BytesIO()
                Image.fromarray(random.integers(0, 255, (40, 40), dtype=np.uint8)).save(file, "JPEG")
                (root / split / label / f"{index}.jpg").write_bytes(file.getvalue())
    (root / "train" / "b" / "3.jpg").write_bytes(b"\xff\xd8\xff\xe0nothing")
    return str(root)


def test_an_image_that_cannot_be_read_while_training_is_named_in_the_notes(tmp_path: Path) -> None:
    uri = photographs(tmp_path / "images")
    source = Source(make(model="lenet5", weights="random", data=uri, bad_image_limit=1, engine="local"))
    schedule = Schedule(1, 5, 0.01, 0.0, 0.9, 0.0, 0.0)
    out = Store(tmp_path / "out")
    task = TrainTask(source, "baseline", None, None, schedule, out.uri, Store(tmp_path / "checkpoints").uri)
    train(task, Rank(0, 1, torch.device("cpu")), silent, silent)
    (note,) = json.loads(out.read(CURVE))["notes"]
    assert "1 unreadable" in note
    assert "3.jpg" in note


def test_images_that_were_left_out_when_they_were_read_were_replaced_by_no_others(tmp_path: Path) -> None:
    uri = photographs(tmp_path / "images")
    options = {"input_size": 40, "mean": (0.5,), "std": (0.5,)}  # their own size: they are decoded once
    source = Source(make(model="test_work:small", data=uri, bad_image_limit=1, engine="local", **options))
    assert isinstance(source.data().train, TensorSplit)
    out = Store(tmp_path / "out")
    task = TrainTask(source, "baseline", None, None, Schedule(1, 4, 0.01, 0.0, 0.9, 0.0, 0.0), out.uri, Store(tmp_path / "c").uri)  # fmt: skip
    train(task, Rank(0, 1, torch.device("cpu")), silent, silent)
    assert json.loads(out.read(CURVE))["notes"] == []
    assert any("1 unreadable images left out" in note for note in source.data().notes)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 38 * 38, 2))


def test_a_training_that_ray_s_memory_monitor_ended_is_no_end_for_the_local_engine(tmp_path: Path) -> None:
    source = Source(make(model="lenet5", weights="random", limit_images=20, engine="local"))
    task = TrainTask(
        source, "baseline", None, None, Schedule(1, 4, 0.01, 0.0, 0.9, 0.0, 0.0), Store(tmp_path / "out").uri, Store(tmp_path / "c").uri,
    )  # fmt: skip
    attempts = Attempts(Store(task.checkpoints), task.stage)
    for images in (4, 2):
        attempts.begin(0, images)
        attempts.heard(f"a node was full with {images}")
    with pytest.raises(RunError, match="out of memory"):
        attempts.most()
    LocalEngine().train(task, silent)
    assert Store(task.output).exists(CURVE)


def test_a_further_training_of_a_kind_makes_other_weights(tmp_path: Path) -> None:
    source = Source(make(model="lenet5", weights="random", limit_images=20, engine="local"))
    made = []
    for place, number in (("a", 1), ("b", 1), ("c", 2)):
        out, checkpoints = (Store(tmp_path / kind / place).uri for kind in ("out", "checkpoints"))
        schedule = Schedule(1, 4, 0.01, 0.0, 0.9, 0.0, 0.0)
        task = TrainTask(source, "finetune", None, None, schedule, out, checkpoints, number=number)
        train(task, Rank(0, 1, torch.device("cpu")), silent, silent)
        made.append(read_state(Store(out))["fc3.weight"])
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_a_training_that_another_job_has_finished_meanwhile_is_left_as_it_is(tmp_path: Path) -> None:
    source = Source(make(model="lenet5", weights="random", limit_images=20, engine="local"))
    out = Store(tmp_path / "out")
    out.write(CURVE, b"theirs")
    task = TrainTask(source, "baseline", None, None, Schedule(1, 4, 0.01, 0.0, 0.9, 0.0, 0.0), out.uri, Store(tmp_path / "c").uri)  # fmt: skip
    train(task, Rank(0, 1, torch.device("cpu")), silent, silent)
    assert (out.names(), out.read(CURVE)) == ([CURVE], b"theirs")


def test_a_state_dict_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {"a": torch.randn(3, 4), "n": torch.tensor(5), "h": torch.randn(2).to(torch.bfloat16)}
    store = Store(tmp_path)
    write_state(store, WEIGHTS, state)
    back = read_state(store)
    assert back.keys() == state.keys()
    assert all(
        torch.equal(back[name], value) and back[name].dtype == value.dtype for name, value in state.items()
    )


def test_weights_that_are_damaged_are_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(WEIGHTS, b"no tensors")
    with pytest.raises(FormatError, match=r"expected safetensors at .*weights\.safetensors"):
        read_state(store)


def test_a_search_that_was_cut_off_continues_behind_its_last_evaluation(tmp_path: Path) -> None:
    task = search_task(tmp_path, None)
    first = Searcher(task, torch.device("cpu"))
    trials: list[Trial] = []
    for _ in range(3):
        assert not first.step(0, trials)
    again = Searcher(task, torch.device("cpu"))
    assert again.begin(0) == trials
    assert again.begin(1) == []
    Store(task.output).write(partial_name(1), b"[{]")
    assert again.begin(1) == []
    resumed = again.begin(0)
    while not again.step(0, resumed):
        pass
    assert again.begin(0) == []
    assert [one.step for one in resumed] == list(range(len(resumed)))


def test_groups_that_a_deadline_cuts_are_told_from_those_that_end_early(tmp_path: Path) -> None:
    early = search_task(tmp_path, time.time() + 3600)
    early = replace(early, settings=replace(early.settings, stop_gain=1e9))
    searched(early)
    assert Store(early.output).names("late-") == []
    assert fewest_of_late(early) == 0
    late = search_task(tmp_path / "late", time.time() - 1)
    searched(late)
    assert Store(late.output).names("late-") == [late_name(index) for index in range(5)]
    assert fewest_of_late(late) == 1


def over(searcher: Searcher, seconds: float) -> bool:
    """Whether the group's share of the time would be over, had it begun so long ago."""
    share = searcher._share
    assert share is not None
    share._began -= seconds
    try:
        return share.over()
    finally:
        share._began += seconds


def test_every_group_has_its_share_of_the_time_before_a_deadline(tmp_path: Path) -> None:
    searcher = Searcher(search_task(tmp_path, time.time() + 3600), torch.device("cpu"))
    searcher.begin(0)
    assert [over(searcher, seconds) for seconds in (0, 700, 740)] == [False, False, True]


def test_groups_that_are_under_way_together_share_their_time_with_those_behind_them_alone(
    tmp_path: Path,
) -> None:
    searcher = Searcher(search_task(tmp_path, time.time() + 3600), torch.device("cpu"))
    under_way = [1]
    searcher.begin(0, under_way=lambda: under_way[0])
    under_way[0] = 2  # another one has begun behind it
    assert [over(searcher, seconds) for seconds in (740, 1420, 1460)] == [False, False, True]
    under_way[0] = 1  # and ended: it had its time
    assert [over(searcher, seconds) for seconds in (1420, 1460)] == [False, True]
    under_way[0] = 9
    assert [over(searcher, seconds) for seconds in (3590, 3610)] == [False, True]


def test_nobody_is_asked_who_is_under_way_while_there_is_time(tmp_path: Path) -> None:
    searcher = Searcher(search_task(tmp_path, time.time() + 3600), torch.device("cpu"))
    searcher.begin(0, under_way=lambda: pytest.fail("asked"))
    assert not over(searcher, 700)


def test_a_note_says_the_evaluations_of_what_a_deadline_cut_and_not_of_what_ended_early(
    tmp_path: Path,
) -> None:
    task = search_task(tmp_path, None)
    searched(task)
    store = Store(task.output)
    whole = json.loads(store.read(group_name(0)))
    store.write(group_name(0), json.dumps(whole[:1]).encode())  # as where nothing more is worth measuring
    store.write(group_name(1), json.dumps(json.loads(store.read(group_name(1)))[:3]).encode())
    store.write(late_name(1), b"{}")
    assert fewest_of_late(task) == 3


def test_shuffled_images_of_the_search_are_the_same_images() -> None:
    train = Source(make(model="lenet5")).data().train
    plain, shuffled = (search_images(train, 50, 3, shuffled=flag) for flag in (False, True))
    rows = torch.arange(50)
    pixels, labels = plain.batch(rows, None)
    others, other_labels = shuffled.batch(rows, None)
    assert not torch.equal(labels, other_labels)
    assert sorted(float(one.sum()) for one in pixels) == sorted(float(one.sum()) for one in others)


def test_a_group_leaves_their_share_of_the_time_to_those_of_networks_behind_it(tmp_path: Path) -> None:
    task = search_task(tmp_path, time.time() + 3600)
    searcher = Searcher(task, torch.device("cpu"))
    searcher.begin(0, behind=15)
    assert [over(searcher, seconds) for seconds in (170, 190)] == [False, True]
