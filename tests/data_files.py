"""Small generated image files for the data tests: one colour per image, so that every pixel is known."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = ("ant", "bee", "cat")


def png(number: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> bytes:
    """A PNG of `size` (width, height), coloured by `number`."""
    colour = (number % 256, number // 256, 100) if mode == "RGB" else number % 256
    out = io.BytesIO()
    Image.new(mode, size, colour).save(out, "PNG")
    return out.getvalue()


def table(
    images: Sequence[bytes | None],
    labels: Sequence[int | None],
    classes: Sequence[str] | Mapping[str, str] = CLASSES,
) -> pa.Table:
    """The columns as Hugging Face's data sets have them; no class names in the metadata where `classes` is empty."""
    structs = pa.array(
        [{"bytes": image, "path": None} for image in images],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    made = pa.table({"image": structs, "label": pa.array(labels, pa.int64())})
    if not classes:
        return made
    names = dict(classes) if isinstance(classes, Mapping) else list(classes)
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def parquet(
    images: Sequence[bytes | None],
    labels: Sequence[int | None],
    classes: Sequence[str] | Mapping[str, str] = CLASSES,
    rows: int = 10,
) -> bytes:
    """The bytes of a Parquet file with row groups of `rows`."""
    out = io.BytesIO()
    pq.write_table(table(images, labels, classes), out, row_group_size=rows)
    return out.getvalue()


def numbered(first: int, count: int, size: tuple[int, int] = (8, 8), rows: int = 10) -> bytes:
    """Images `first` .. `first + count - 1` with label number % 3, as the bytes of a Parquet file."""
    numbers = range(first, first + count)
    return parquet([png(one, size) for one in numbers], [one % 3 for one in numbers], rows=rows)


def number_of(image: np.ndarray) -> int:
    """The number behind pixels uint8 or float (0..255) (3, h, w), read at the centre."""
    red, green = (
        image[0, image.shape[1] // 2, image.shape[2] // 2],
        image[1, image.shape[1] // 2, image.shape[2] // 2],
    )
    return round(float(red)) + 256 * round(float(green))


def write(root: Path, files: dict[str, bytes]) -> str:
    """The files below `root`, and `root` as a URI."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(root)


def folder(root: Path, split: str, count: int, size: tuple[int, int] = (8, 8), first: int = 0) -> None:
    """`count` images numbered from `first` under `split`/<class>/."""
    for number in range(first, first + count):
        write(root, {f"{split}/{CLASSES[number % 3]}/{number:04d}.png": png(number, size)})


def partly_unreadable(root: Path) -> str:
    """60 images to train on and 60 to test on, numbered from 0, of which 5 and 6 cannot be read."""
    images: list[bytes | None] = [png(number) for number in range(60)]
    images[5] = images[6] = b"no image"
    test = parquet(images, [number % 3 for number in range(60)])
    return write(root, {"train.parquet": numbered(100, 60), "test.parquet": test})
