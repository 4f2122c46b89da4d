"""Networks of ImageNet's shape through the whole pipeline: 224 x 224 pixels out of larger images, weights by the million.

Weights are random and training is one epoch of a few images, so nothing is said about accuracy. One network is part of `make test`, the one with most
that others lack: modules of branches, heads that inference never reads. All seven run by `make test-models`.
"""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

import clipq_ray
from clipq_ray import codec, manifest, models, tables
from clipq_ray.batch import compress
from clipq_ray.cluster.engine import LocalEngine
from clipq_ray.config import make
from clipq_ray.data import open_data
from clipq_ray.evaluate import Evaluation, evaluate
from clipq_ray.pipeline import Result
from clipq_ray.progress import Reporter
from clipq_ray.source import Source
from clipq_ray.storage import Store

CLASSES = ("checks", "circles", "gradients", "stripes")
QUICK: dict[str, Any] = {
    "engine": "local", "weights": "random", "epochs": 1, "batch_size": 8, "evaluation_batch_size": 8, "learning_rate": 0.005,
    "search_evaluations": 4, "search_start": 3, "search_images": 2, "batch_norm_images": 8, "validation_images": 4,
    "control": "never", "target_ratio": 15, "rounds": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A network; `parameters`: as torchvision states them for 1,000 classes without heads; `inputs`: of its last layer."""

    name: str
    parameters: int
    inputs: int
    data: str = "folder"
    model_args: dict[str, Any] = field(default_factory=dict)
    groups: tuple[str, ...] = ()


GOOGLENET = (6_624_904, 1024)
# one theta per inception module, so that it is searched in a fifth of the time
HEADS = Case("googlenet", *GOOGLENET, "parquet", {"aux_logits": True}, ("blocks",))
VIT = Case("vit_b_16", 86_567_656, 768)
CASES = [
    pytest.param(HEADS, marks=pytest.mark.slow, id="googlenet-with-heads"),
    *(
        pytest.param(case, marks=(pytest.mark.models, pytest.mark.timeout(1800)), id=f"all-{case.name}")
        for case in (
            Case("resnet18", 11_689_512, 512),
            Case("googlenet", *GOOGLENET),
            Case("mobilenet_v2", 3_504_872, 1280),
            Case("resnet50", 25_557_032, 2048, "parquet"),
            Case("alexnet", 61_100_840, 4096),
            Case("vgg16", 138_357_544, 4096),
            VIT,
        )
    ),
]


# --- data ----------------------------------------------------------------------------------------------------------------------


def picture(label: int, number: int) -> bytes:
    """A JPEG of 260 x 240 pixels whose pattern is the class's own."""
    random = np.random.default_rng([label, number])
    y, x = np.mgrid[:240, :260] + random.integers(0, 40, 2)[:, None, None]
    pattern = (
        ((x // 20 + y // 20) % 2 * 255),
        (np.hypot(x - 150, y - 140) // 15 % 2 * 255),
        (x % 256),
        (y // 12 % 2 * 255),
    )[label]
    colour = np.roll([1.0, 0.5, 0.2], label)
    pixels = pattern[..., None] * colour + random.normal(0, 8, (240, 260, 3))
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same images as a folder and as Parquet."""
    root = tmp_path_factory.mktemp("images")
    (root / "parquet").mkdir()
    for split, count in (("train", 7), ("test", 4)):
        rows = []
        for label, name in enumerate(CLASSES):
            place = root / "folder" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                content = picture(label, number + 100 * (split == "test"))
                (place / f"{number}.jpg").write_bytes(content)
                rows.append(({"bytes": content, "path": f"{number}.jpg"}, label))
        image = pa.array([row[0] for row in rows], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        table = pa.table({"image": image, "label": pa.array([row[1] for row in rows], pa.int64())})
        pq.write_table(table, root / "parquet" / f"{split}-0.parquet", row_group_size=10)
    return {"folder": root / "folder", "parquet": root / "parquet"}


# --- runs ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """A run, and its network loaded and scored."""

    case: Case
    result: Result
    loaded: nn.Module
    scored: Evaluation

    @property
    def file(self) -> bytes:
        return Store(self.result.uri).read("model.clq")

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = tables.from_bytes(
            Store(self.result.uri).read("layers.parquet"), tables.LAYERS
        ).to_pylist()
        return rows


@pytest.fixture(scope="module", params=CASES)
def made(
    request: pytest.FixtureRequest, data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Made]:
    case: Case = request.param
    storage, uri = tmp_path_factory.mktemp(case.name), str(data[case.data])
    threads = torch.get_num_threads()
    given = {**QUICK, "model": case.name, "model_args": case.model_args, "groups": case.groups}
    config = make(**given, data=uri, storage=str(storage))
    result = compress(Source(config), LocalEngine(), Reporter(quiet=True))
    test = open_data(uri, input_shape=(3, 224, 224), validation_images=4).test
    assert test is not None
    loaded = clipq_ray.load(result.uri)
    yield Made(case, result, loaded, evaluate(loaded, test, batch_size=8))
    torch.set_num_threads(threads)
    shutil.rmtree(storage)  # up to some GB of weights


def test_the_run_is_committed_and_verifies(made: Made) -> None:
    assert made.result.manifest["model"] == made.case.name
    assert made.result.manifest["data"]["test_images"] == 16
    assert manifest.verify(Store(made.result.uri)) == []
    assert made.result.manifest["metrics"]["bytes_after"] == len(made.file)
    assert made.result.manifest["metrics"]["ratio"] > 4


def test_the_loaded_network_scores_what_the_run_reports(made: Made) -> None:
    reported = made.result.manifest["metrics"]["test"]["compressed"]
    assert made.scored.n == 16
    assert 100 * made.scored.top1 == reported["top1_percent"]
    assert math.isfinite(reported["loss"])
    assert made.scored.loss == pytest.approx(reported["loss"], rel=1e-9)
    predictions = tables.from_bytes(Store(made.result.uri).read("predictions.parquet")).column("compressed")
    assert predictions.to_pylist() == made.scored.predictions.tolist()


def test_every_convolution_and_matrix_of_inference_is_stored_as_codes(made: Made) -> None:
    wanted = {
        f"{name}.weight"
        for name, module in made.loaded.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and not name.startswith("aux")
    }
    wanted |= {name for name, _ in made.loaded.named_parameters() if name.endswith("in_proj_weight")}
    assert {row["layer"] for row in made.rows} == wanted
    tensors = codec.decode(made.file).tensors
    state = made.loaded.state_dict()
    for row in made.rows:
        coded = tensors[row["layer"]]
        assert isinstance(coded, codec.CodedLayer)
        assert list(coded.codes.shape) == row["shape"] == list(state[row["layer"]].shape)
        assert len(coded.levels) == row["levels"] <= 2 ** row["bits"]
        assert len(state[row["layer"]].unique()) <= row["levels"]


def test_bytes_before_are_the_published_parameters_and_batch_norms_statistics(made: Made) -> None:
    metrics, case = made.result.manifest["metrics"], made.case
    parameters = case.parameters - (1000 - len(CLASSES)) * (case.inputs + 1)
    statistics = sum(
        2 * module.num_features
        for name, module in made.loaded.named_modules()
        if isinstance(module, nn.BatchNorm2d) and not name.startswith("aux")
    )
    assert metrics["parameters"] == parameters
    assert metrics["bytes_before"] == 4 * (parameters + statistics)


def test_what_inference_does_not_read_is_named_and_left_out(made: Made) -> None:
    left_out = [note for note in made.result.manifest["notes"] if "inference never reads them" in note]
    if not made.case.model_args:
        assert left_out == []
        return
    whole = models.build(
        models.Architecture("googlenet", {"num_classes": 4, "aux_logits": True, "init_weights": False})
    ).state_dict()
    heads = [name for name in whole if name.startswith("aux") and not name.endswith("num_batches_tracked")]
    assert len(heads) > 10
    (note,) = left_out
    assert all(name in note for name in heads)
    assert not set(heads) & {entry.name for entry in codec.entries(made.file)}


def test_attention_projections_are_compressed(made: Made) -> None:
    attention = [row for row in made.rows if row["kind"] == "attention"]
    if made.case is not VIT:
        assert attention == []
        return
    inside = [row for row in attention if row["layer"].endswith("self_attention.in_proj_weight")]
    assert [row["shape"] for row in inside] == [[3 * 768, 768]] * 12
    assert all(row["ratio"] > 3 for row in inside)
