"""Verify a claim from the file alone: `python jobs/evaluate.py FILE --data URI` prints bytes, ratio and top-1 of a .clq file.

`FILE` is a .clq file or a run directory, local or any fsspec URI. Nothing but the file and the data is read. A file holds no code, so a network of your own is
built by `--model package.module:function`, with the `--model-args` that it was compressed with.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from clipq_ray import codec, console, models
from clipq_ray.data import Preprocessing, open_test
from clipq_ray.errors import ConfigError, FormatError, ModelError
from clipq_ray.evaluate import evaluate, scores
from clipq_ray.loading import from_bytes, read_file
from clipq_ray.precision import exact_float32
from clipq_ray.summary import bytes_before

_VALUES = 1 << 28  # of a batch as the network takes it: 1 GiB; a split bounds what it crops that from
UNFIT = "the file states that size; fetch it again or make it anew"
PLAIN = (
    "images went in as pixels in 0..1, since the file states no normalisation; where a caller's own loaders made it, they may have had one: "
    "score clipq_ray.load(uri, factory) on them instead"
)
UNFIT_OWN = "check --model and --model-args"


def main(arguments: list[str]) -> int:
    """The job, from its arguments to its lines."""
    given = _parser().parse_args(arguments)
    if given.batch_size < 1:
        raise ConfigError(f"--batch-size: expected at least 1, got {given.batch_size}")
    if given.bad_image_limit < 0:
        raise ConfigError(f"--bad-image-limit: expected at least 0, got {given.bad_image_limit}")
    data = read_file(given.file)
    content = codec.metadata(data)
    architecture = _architecture(content, given.model, given.model_args)
    stated = content.get("input")
    if stated is None or "classes" not in content:
        raise FormatError(
            f"expected a file that states its input, got none in {given.file}; make it by jobs/compress.py"
        )
    preprocessing = Preprocessing.from_json(stated)
    split, kind = open_test(
        given.data, preprocessing, content["classes"], content.get("class_names", []), memory_limit_bytes=4 * 2**30,
        bad_image_limit=given.bad_image_limit, data_root=given.data_root or "data",
    )  # fmt: skip
    exact_float32()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = _network(data, architecture, imported=given.model is not None).to(device)
    with torch.inference_mode():
        scores(
            network,
            split.batch(torch.arange(1), None)[0].to(device),
            UNFIT if given.model is None else UNFIT_OWN,
        )
    at_once = max(1, _VALUES // math.prod(stated["shape"]))  # whatever a file states
    result = evaluate(network, split, batch_size=min(given.batch_size, at_once), device=device)
    low, high = result.interval()
    before = bytes_before(data)
    lines = [
        f"network     {architecture.name}",
        f"bytes       {len(data):,}",
        f"ratio       {before / len(data):.2f}x (of {before:,} bytes)",
        f"top-1       {100 * result.top1:.2f} % on {result.n:,} {kind} images (95 % interval {100 * low:.2f} to {100 * high:.2f})",
    ]
    if given.model is not None and preprocessing == _as_they_are(preprocessing.input_shape):
        lines.append("note        " + PLAIN)
    console.show(*lines)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = console.OneLineParser(description=__doc__)
    parser.add_argument("file", metavar="FILE", help=".clq file or run directory")
    parser.add_argument(
        "--data",
        required=True,
        metavar="URI",
        help="data as for compress.py; its test set is used, or all of it where there are no training images; training images alone are refused",
    )
    parser.add_argument("--data-root", metavar="DIR", help="folder that holds the files of a torchvision set")
    parser.add_argument(
        "--batch-size", type=int, default=250, metavar="N", help="images per batch (default: 250)"
    )
    parser.add_argument(
        "--bad-image-limit", type=int, default=0, metavar="N", help="unreadable images that are passed over, as for compress.py (default: 0)"
    )  # fmt: skip
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="package.module:function that builds the network, where the file names none",
    )
    parser.add_argument("--model-args", metavar="JSON", help="its keyword arguments, as for compress.py")
    return parser


def _as_they_are(shape: tuple[int, int, int]) -> Preprocessing:
    """Pixels in 0..1 and nothing else, which a file states where a caller's own loaders gave the images."""
    return Preprocessing(shape, None, (0.0,) * shape[0], (1.0,) * shape[0])


def _architecture(
    content: Mapping[str, Any], model: str | None, model_args: str | None
) -> models.Architecture:
    """The network that a file names, or that `--model` and `--model-args` name where it does not."""
    named = content.get("architecture")
    if named:
        for option, value in (("--model", model), ("--model-args", model_args)):
            if value is not None:
                raise ConfigError(
                    f"{option}: expected none for a file that says how its network is built, got {value!r:.100}; leave it out"
                )
        return models.Architecture.from_json(named)
    if model is None:
        raise ModelError(
            "expected --model package.module:function for a file that names no registered network, got none; name what builds the network"
        )
    if ":" not in model:
        raise ModelError(
            f"--model: expected package.module:function, got {model!r:.100}; name a function that returns the network"
        )
    return models.Architecture(
        model, {} if model_args is None else console.json_object("--model-args", model_args)
    )


def _network(data: bytes, architecture: models.Architecture, *, imported: bool) -> nn.Module:
    """The network of a file's bytes; the user's function runs only where it was given."""
    if not imported:
        return from_bytes(data)
    return from_bytes(data, lambda: models.build(architecture, allow_import=True))


if __name__ == "__main__":
    sys.exit(console.run("evaluate", main))
