"""What a stage's key follows: a fixed number of workers makes the same bytes, a number that may change does not."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
from torch import Tensor, nn

from clipq_ray import precision
from clipq_ray.config import make
from clipq_ray.identity import of_network, stage_key
from clipq_ray.work import Source


def key(**options: Any) -> str:
    return stage_key("finetune", make(workers=4, **options), {})


def test_how_faults_are_met_decides_nothing() -> None:
    assert key() == key(max_failures=0, stall_minutes=1, attempt_hours=1, min_workers=4)


def test_a_number_of_workers_that_may_shrink_is_another_stage() -> None:
    assert len({key(), key(min_workers=1), key(min_workers=2)}) == 3


def test_how_many_train_says_nothing_of_a_search() -> None:
    searches = {stage_key("search", make(workers=count), {}) for count in (1, 4)}
    assert len(searches) == 1
    assert len({stage_key("finetune", make(workers=count), {}) for count in (1, 4)}) == 2


def test_what_auto_means_here_and_which_libraries_compute_are_in_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = key(precision="auto")
    monkeypatch.setattr(precision, "_computes_in_bfloat16", lambda device: device is None)
    without = key(precision="auto")
    monkeypatch.setattr(precision, "_computes_in_bfloat16", lambda device: True)
    assert len({without, key(precision="auto")}) == 2
    assert before in {without, key(precision="auto")}
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: real(name) + "1" * (name == "scipy"))
    assert key(precision="auto") not in {without, before}


def test_a_callers_module_that_computes_something_else_is_another_one() -> None:
    class Net(nn.Linear):
        pass

    class Other(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).tanh()

    Other.__name__, Other.__qualname__ = Net.__name__, Net.__qualname__
    named = [of_network(Source(make(), one)) for one in (Net(3, 2), Net(3, 2), Other(3, 2), Net(3, 4))]
    assert named[0] == named[1]
    assert named[0] not in named[2:]
