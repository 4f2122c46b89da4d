"""What all tests share: the given data, and limits that keep two cores usable."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

# A shell ignores interrupts for what it runs in the background, and so would all jobs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("RAY_worker_niceness", "0")  # as a Ray of a job's own has it, in clusters of tests too
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")  # who is short of memory is what else runs here
torch.set_num_threads(
    1
)  # `make test` runs two processes; with two threads each on two cores they wait for one another at every operation


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


@pytest.fixture(scope="session")
def digits_weights() -> dict[str, torch.Tensor]:
    """The weights of a LeNet-5 that knows the digits a little; not to be changed in place."""
    from clipq_ray import models
    from clipq_ray.data import open_data

    torch.manual_seed(0)
    model = models.build(models.architecture("lenet5", 10, {}))
    data = open_data("digits", input_shape=(1, 28, 28)).train
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    for _ in range(3):
        for rows in data.order(torch.Generator().manual_seed(0)).split(32):
            images, labels = data.batch(rows, None)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
