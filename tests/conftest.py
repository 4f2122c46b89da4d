"""What all tests share: the given data, and limits that keep two cores usable."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MPLBACKEND", "agg")
torch.set_num_threads(2)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and weights: `CLIPQ_SHARED`, else `../shared` beside the checkout."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("CLIPQ_SHARED", default))
    if not (folder / "weights").is_dir():
        pytest.skip(
            f"no shared data at {folder}; set CLIPQ_SHARED to the folder that holds data/ and weights/"
        )
    return folder
