"""The bench's images are what it says, and a GPU that waits for nothing is busy."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from bench.data import BATCH, epoch, opened
from bench.images import HEIGHT, ROWS, WIDTH, jpeg, jpegs
from clipq_ray.data import batches


def test_images_have_the_size_and_about_the_bytes_of_photographs() -> None:
    data = jpeg(3)
    assert Image.open(io.BytesIO(data)).size == (WIDTH, HEIGHT)
    assert data == jpeg(3) != jpeg(4)
    assert 40_000 < len(data) < 150_000


def test_an_epoch_counts_whole_batches_and_a_slow_gpu_is_busy(tmp_path: Path) -> None:
    assert 40_000 < jpegs(str(tmp_path), 2 * ROWS) < 150_000
    split = opened(str(tmp_path), 32, 10**8)
    assert len(split) == 2 * ROWS - 10
    rate, share = epoch(split, batches, 0)
    assert rate > 0
    assert share == 0
    assert epoch(split, batches, 0, gpu_rate=rate / 8)[1] > 0.5
    assert len(split) > BATCH * 2
