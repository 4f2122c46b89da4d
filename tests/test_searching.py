"""What decides a search as a stage."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_search import BASE

from clipq_ray import network
from clipq_ray.aim import Aim
from clipq_ray.cluster.engine import LocalEngine
from clipq_ray.config import make
from clipq_ray.groups import grouped
from clipq_ray.progress import Reporter
from clipq_ray.search import Trial
from clipq_ray.searching import DONE, Search, Searched, planned, scoring_images
from clipq_ray.source import Source
from clipq_ray.stages import Run
from clipq_ray.states import WEIGHTS, write_state
from clipq_ray.storage import Store
from clipq_ray.work import group_name


def search(storage: Path, **options: Any) -> Search:
    """That of a LeNet-5 with 36 training images."""
    source = Source(make(weights="random", limit_images=40, engine="local", **options))
    run = Run(source, LocalEngine(), Reporter(quiet=True), Store(storage), threading.Lock())
    model, weights = source.network(), Store(storage / "weights")
    write_state(weights, WEIGHTS, model.state_dict())
    images = torch.zeros(2, 1, 28, 28)
    inventory = network.inventory(model, images, ())
    groups = grouped(model, [layer.name for layer in inventory.layers], ())
    return planned(run, model, weights, inventory, groups, images, Aim())


def test_more_images_than_there_are_make_no_other_search(tmp_path: Path) -> None:
    all_of_them, beyond, usual, fewer = (
        search(tmp_path, **options)
        for options in ({"search_images": 36}, {"search_images": 37}, {}, {"search_images": 35})
    )
    assert all_of_them.key == beyond.key == usual.key != fewer.key
    for one, images in ((all_of_them, 36), (beyond, 36), (usual, 36), (fewer, 35)):
        assert one.task.images == len(scoring_images(one.run)) == images


@pytest.mark.parametrize(
    ("late", "said"), [(0, None), (False, None), (3, "to 3 or more"), (True, "to 2 or more")]
)
def test_what_a_deadline_cut_is_said_also_where_the_record_says_no_more_than_that_it_did(
    tmp_path: Path, late: object, said: str | None
) -> None:
    one = search(tmp_path)
    for index, group in enumerate(one.task.groups):
        rows = [
            Trial(group.name, step, "start", 0.5, 2, 36, 0.1, 0.3, 100, 0.1, 8.0, 0.1, "here").to_json()
            for step in range(2 + index)
        ]
        one.store.write(group_name(index), json.dumps(rows).encode())
    one.store.write(DONE, json.dumps({"late": late}).encode())
    assert [len(points) for points in one.trials().values()] == [2, 3, 4, 5, 6]
    assert [said in note for note in one.run.notes] == [True] if said else one.run.notes == []


def test_further_points_of_the_same_weights_follow_those_that_are_there(tmp_path: Path) -> None:
    points = {
        name: [replace(BASE, layer=name, step=step, p=p) for step, p in enumerate((0.1, 0.2))]
        for name in "ab"
    }
    searched = Searched(points, Store(tmp_path), None, 0.0)
    searched.add(
        {
            name: [replace(BASE, layer=name, step=step, p=p) for step, p in enumerate((0.3, 0.2, 0.4))]
            for name in "ab"
        }
    )
    for name in "ab":
        assert [(one.step, one.p) for one in points[name]] == [(0, 0.1), (1, 0.2), (2, 0.3), (3, 0.4)]
