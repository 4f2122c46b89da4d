"""An ensemble that cannot be scored: the fleet is written whatever it was, the job ends with 1, and the reason holds no secret."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from clipq_ray.config import make
from clipq_ray.errors import HeldError, RunError
from clipq_ray.fleet.ensembles import all_scored
from clipq_ray.fleet.file import Ensemble
from clipq_ray.pipeline import Result
from clipq_ray.progress import Reporter
from clipq_ray.source import Source
from clipq_ray.states import WEIGHTS, write_state
from clipq_ray.storage import Store, stage_store

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_jobs import imported

SECRET = "pLaNtEd-password"
DEFAULTS: dict[str, Any] = {
    "engine": "local", "weights": "random", "epochs": 1, "batch_size": 32, "search_evaluations": 4, "search_start": 3, "search_images": 60,
    "target_ratio": 3, "rounds": 1, "control": "never",
}  # fmt: skip


def test_members_that_are_committed_and_cannot_vote_together_end_the_job_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = f"memory://me:{SECRET}@{tmp_path.name}/s"
    path = tmp_path / "fleet.yaml"
    models = [
        {"model": "lenet_300_100"},
        {"model": "lenet_300_100", "name": "eleven", "model_args": {"num_classes": 11}},
    ]
    ensembles = [{"name": "vote", "members": ["lenet_300_100", "eleven"]}]
    path.write_text(
        yaml.safe_dump(
            {
                "name": "night",
                "defaults": {**DEFAULTS, "storage": storage},
                "models": models,
                "ensembles": ensembles,
            }
        )
    )
    assert imported("compress").main(["--fleet", str(path)]) == 1
    said, fleet = capsys.readouterr(), Store(storage).child("fleet=night")
    assert said.out.splitlines()[-1] == "2 of 2 committed"
    assert (
        "ensemble vote: not scored, ensemble vote: expected members with the same number of outputs"
        in said.out
    )
    assert f"run: memory://***@{tmp_path.name}/s/model=eleven/" in said.out
    assert f"fleet: memory://***@{tmp_path.name}/s/fleet=night" in said.err
    assert SECRET not in said.out + said.err
    assert b"lenet_300_100 with 10, eleven with 11" in fleet.read("report.html")
    assert all(SECRET.encode() not in fleet.read(name) for name in fleet.names())


NETWORK = f"""\
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.end = nn.Linear(784, 10)
    def forward(self, x):
        raise KeyError("http://me:{SECRET}@host/x")
"""


def test_whatever_a_network_raises_is_why_it_has_no_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "raising.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    storage = Store(tmp_path / "s")
    sources = [
        Source(make(model="raising:Net", name=name, input_size=28, storage=storage.uri))
        for name in ("a", "b")
    ]
    torch.manual_seed(0)
    write_state(stage_store(storage, "baseline", "k"), WEIGHTS, sources[0].network().state_dict())
    results = [Result("nowhere", {"stages": [{"stage": "baseline", "key": "k"}]}, False)] * 2
    with caplog.at_level(logging.ERROR):
        (found,) = all_scored([Ensemble("vote", ("a", "b"))], sources, results, Reporter(quiet=True))
    assert found == {
        "name": "vote", "members": ["a", "b"],
        "error": "unexpected KeyError: 'http://***@host/x'; please report it",
    }  # fmt: skip
    assert "Traceback" in caplog.text  # beside the line, for who mends it
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    ("why", "said"), [(HeldError("held"), "another job makes a, b"), (RunError("diverged"), "a, b failed")]
)
def test_members_that_another_job_makes_are_not_said_to_have_failed(why: RunError, said: str) -> None:
    sources = [Source(make(name=name)) for name in ("a", "b")]
    (found,) = all_scored([Ensemble("vote", ("a", "b"))], sources, [why, why], Reporter(quiet=True))
    assert found["error"] == said
