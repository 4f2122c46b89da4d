"""Generated JPEGs of the size that ImageNet has on average, as benches need them where there is no ImageNet."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from clipq_ray.storage import Store

WIDTH, HEIGHT, QUALITY = 500, 375, 90
ROWS = 100
DISTINCT = 200


def jpeg(seed: int) -> bytes:
    """A JPEG of smooth areas and some noise, about as many bytes per pixel as a photograph."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = smooth + draw.normal(0, 12, (HEIGHT, WIDTH, 1)).astype(np.int16)
    out = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


def jpegs(uri: str, count: int, classes: int = 10) -> float:
    """`count` JPEGs of `classes` classes, 200 of them distinct, as one Parquet file; their mean bytes."""
    made = [jpeg(seed) for seed in range(min(count, DISTINCT))]
    images = pa.array([{"bytes": made[number % len(made)], "path": None} for number in range(count)])
    out = io.BytesIO()
    pq.write_table(
        pa.table({"image": images, "label": pa.array(np.arange(count) % classes)}), out, row_group_size=ROWS
    )
    Store(uri).write("train-00000.parquet", out.getvalue())
    return sum(len(one) for one in made) / len(made)
