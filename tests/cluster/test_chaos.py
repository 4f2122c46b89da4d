"""Whatever is killed of a job on three nodes, at random moments, the artifact is byte for byte the undisturbed run's, and nothing is left over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kills import Nodes, artifact, disturbed, left_over, orders, three_nodes
from safetensors.torch import save_file
from torch import Tensor

pytestmark = pytest.mark.slow

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
def undisturbed(
    nodes: Nodes, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    place = tmp_path_factory.mktemp("undisturbed")
    ended = disturbed(nodes, place / "s", place / "logs", **options)
    assert ended.kills == ended.missed == []
    assert left_over(place / "s") == []
    return artifact(place / "s")


def test_kills_at_random_moments_change_no_byte_and_leave_nothing(
    nodes: Nodes, options: dict[str, Any], undisturbed: dict[str, str], tmp_path: Path
) -> None:
    given = orders(PAIRS, SEED, {"commit": 0.5})
    ended = disturbed(nodes, tmp_path / "s", tmp_path / "logs", given, SEED, **options)
    assert ended.missed == []
    assert {(kill.kind, kill.stage) for kill in ended.kills} == set(PAIRS)
    assert artifact(tmp_path / "s") == undisturbed
    assert left_over(tmp_path / "s") == []
    for kill in ended.kills:
        assert kill.redone == 0, f"{kill.kind} in {kill.stage}: what was stored was made again"
