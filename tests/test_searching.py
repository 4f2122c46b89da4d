"""What decides a search as a stage."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch

from clipq_ray import network
from clipq_ray.cluster.engine import LocalEngine
from clipq_ray.config import make
from clipq_ray.groups import grouped
from clipq_ray.progress import Reporter
from clipq_ray.searching import Search, planned, scoring_images
from clipq_ray.source import Source
from clipq_ray.stages import Run
from clipq_ray.states import WEIGHTS, write_state
from clipq_ray.storage import Store


def search(storage: Path, **options: Any) -> Search:
    """That of a LeNet-5 with 36 training images."""
    source = Source(make(weights="random", limit_images=40, engine="local", **options))
    run = Run(source, LocalEngine(), Reporter(quiet=True), Store(storage), threading.Lock())
    model, weights = source.network(), Store(storage / "weights")
    write_state(weights, WEIGHTS, model.state_dict())
    images = torch.zeros(2, 1, 28, 28)
    inventory = network.inventory(model, images, ())
    groups = grouped(model, [layer.name for layer in inventory.layers], ())
    return planned(run, model, weights, inventory, groups, images)


def test_more_images_than_there_are_make_no_other_search(tmp_path: Path) -> None:
    all_of_them, beyond, usual, fewer = (
        search(tmp_path, **options)
        for options in ({"search_images": 36}, {"search_images": 37}, {}, {"search_images": 35})
    )
    assert all_of_them.key == beyond.key == usual.key != fewer.key
    for one, images in ((all_of_them, 36), (beyond, 36), (usual, 36), (fewer, 35)):
        assert one.task.images == len(scoring_images(one.run)) == images
