"""Whatever is killed of a job on three nodes, at random moments, the artifact is byte for byte the undisturbed run's, and nothing is left over."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from job_process import committed, started
from kills import Nodes, artifact, disturbed, left_over, orders, rows_so_far, submission, three_nodes
from safetensors.torch import save_file
from torch import Tensor

pytestmark = pytest.mark.chaos

PAIRS = (
    ("search actor", "search"),
    ("training worker", "finetune"),
    ("raylet", "finetune"),
    ("driver", "finetune"),
    ("driver", "commit"),
)
SEED = 5


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with three_nodes() as made:
        yield made


@pytest.fixture(scope="module")
def options(digits_weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """No baseline and no dense control to train: those are killed by `make bench-chaos`."""
    path = tmp_path_factory.mktemp("weights") / "lenet5.safetensors"
    save_file(digits_weights, path)
    return {"weights": path, "control": "never", "epochs": 14}


@pytest.fixture(scope="module")
def undisturbed(nodes: Nodes, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storage of a job that nothing disturbs."""
    place = tmp_path_factory.mktemp("undisturbed")
    ended = disturbed(nodes, place / "s", place / "logs", **options)
    assert ended.kills == ended.missed == []
    assert left_over(place / "s") == []
    return place / "s"


def epochs(storage: Path) -> list[dict[str, Any]]:
    """Of fine-tuning, by now."""
    return rows_so_far(storage).get("finetune", [])


def lose_busy(nodes: Nodes, count: int) -> None:
    """Lose so many nodes, those with a training's workers first."""
    for raylet in sorted(nodes.raylets(), key=lambda one: not nodes.working("training worker", one))[:count]:
        nodes.lose(raylet)


# The first on this cluster: what Ray counts elastic workers by looks at the nodes every 20 seconds, and ones that have just come back may be missing.
def test_with_fewer_workers_allowed_a_training_goes_on_without_the_lost_host(
    nodes: Nodes, options: dict[str, Any], tmp_path: Path
) -> None:
    storage, errors = tmp_path / "s", tmp_path / "errors"
    given = submission(storage, **{**options, "search_evaluations": 4}, min_workers=1)
    with started(given, errors, RAY_ADDRESS=nodes.address) as job:
        job.until(lambda: len(epochs(storage)) > 2)
        before = epochs(storage)
        lose_busy(nodes, 2)
        ended = job.wait()
    nodes.add()
    nodes.add()
    assert ended == (0, [])
    document = committed(storage)
    assert document["promise"]["kept"]
    curve = document["curves"]["finetune"]
    workers = [row["workers"] for row in curve]
    assert len(curve) == options["epochs"]
    assert curve[: len(before)] == before
    assert workers == sorted(workers, reverse=True)
    assert (workers[0], workers[-1]) == (2, 1)
    (note,) = [note for note in document["notes"] if "--min-workers" in note]
    assert "the bytes are not those of a run with one number of workers" in note


def test_kills_at_random_moments_change_no_byte_and_leave_nothing(
    nodes: Nodes, options: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    # of a commit, at its first moment: it lasts less than a second; `make bench-chaos` takes any
    given = orders(PAIRS, SEED, {"commit": 0.0})
    ended = disturbed(nodes, tmp_path / "s", tmp_path / "logs", given, SEED, **options)
    assert ended.missed == []
    assert {(kill.kind, kill.stage) for kill in ended.kills} == set(PAIRS)
    assert artifact(tmp_path / "s") == artifact(undisturbed)
    assert left_over(tmp_path / "s") == []
    for kill in ended.kills:
        assert kill.redone == 0, f"{kill.kind} in {kill.stage}: what was stored was made again"


def test_a_training_waits_for_a_lost_host_and_says_so(
    nodes: Nodes, options: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    storage, errors = tmp_path / "s", tmp_path / "errors"
    searched = shutil.ignore_patterns("finetune-*")
    shutil.copytree(undisturbed / "_stages", storage / "_stages", ignore=searched)
    with started(submission(storage, **options), errors, RAY_ADDRESS=nodes.address) as job:
        job.until(lambda: len(epochs(storage)) > 2)
        lose_busy(nodes, 2)
        job.until(lambda: "it goes on when a host joins" in errors.read_text())
        before = epochs(storage)
        nodes.add()
        nodes.add()
        waits, goes_on = job.wait().lines
    assert waits.startswith("finetune waits for a host since ")
    assert "it needs 2 workers and the cluster has room for 1" in waits
    assert goes_on == "finetune: the host is there, it goes on"
    assert artifact(storage) == artifact(undisturbed)
    assert epochs(storage)[: len(before)] == before
