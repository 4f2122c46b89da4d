"""Whole runs at their edges: everything on S3, networks that are not worth hours, little time, little memory."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from refusals import refused
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import clipq_ray
from clipq_ray import manifest, models, original, stages, tables
from clipq_ray.batch import compress
from clipq_ray.cluster.engine import LocalEngine
from clipq_ray.config import make
from clipq_ray.data import open_data
from clipq_ray.errors import RunError
from clipq_ray.evaluate import Evaluation, evaluate
from clipq_ray.pipeline import Result
from clipq_ray.progress import Reporter
from clipq_ray.source import Source
from clipq_ray.stages import Run
from clipq_ray.states import WEIGHTS, write_state
from clipq_ray.storage import Store
from clipq_ray.training import TrainTask
from clipq_ray.work import CURVE

pytest_plugins = ["s3_server"]

QUICK: dict[str, Any] = {
    "engine": "local", "epochs": 2, "batch_size": 32, "search_evaluations": 4, "search_start": 3, "search_images": 60,
    "control": "never", "target_ratio": 15, "rounds": 1,
}  # fmt: skip
DIGITS = open_data("digits", input_shape=(1, 28, 28))


def run(storage: Path | str, **changes: Any) -> Result:
    config = make(**{**QUICK, "storage": str(storage), **changes})
    return compress(Source(config), LocalEngine(), Reporter(quiet=True))


def top1_percent(state: dict[str, Tensor], split: str = "test") -> float:
    model = models.build(models.architecture("lenet5", 10, {}))
    model.load_state_dict(state)
    return 100 * evaluate(model, getattr(DIGITS, split), batch_size=250).top1


def saved(state: dict[str, Tensor], path: Path) -> str:
    save_file(state, path)
    return str(path)


# --- storage and data on S3 ----------------------------------------------------------------------------------------------------


def digits_parquet(first: int, count: int) -> bytes:
    """Handwritten digits as PNG in the columns of Hugging Face's data sets, 100 to a row group."""
    digits = load_digits()
    images = []
    for pixels in digits.images[first : first + count]:
        out = io.BytesIO()
        Image.fromarray((pixels * 15.9).astype(np.uint8)).resize((28, 28)).save(out, "PNG")
        images.append({"bytes": out.getvalue(), "path": None})
    table = pa.table(
        {
            "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "label": pa.array(digits.target[first : first + count], pa.int64()),
        }
    )
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=100)
    return file.getvalue()


@pytest.mark.slow
def test_a_job_with_storage_and_data_on_s3_leaves_the_bytes_of_the_same_job_on_disk(
    s3_server: str, s3_uri: str, tmp_path: Path
) -> None:
    files = {
        "train-0.parquet": digits_parquet(0, 500),
        "train-1.parquet": digits_parquet(500, 500),
        "test-0.parquet": digits_parquet(1000, 300),
    }
    (tmp_path / "data").mkdir()
    client = boto3.client("s3", endpoint_url=s3_server)
    for name, content in files.items():
        (tmp_path / "data" / name).write_bytes(content)
        client.put_object(Bucket=s3_uri.removeprefix("s3://"), Key=f"some/data/{name}", Body=content)
    options = {"baseline_epochs": 4, "epochs": 2}

    there = run(f"{s3_uri}/some/runs", data=f"{s3_uri}/some/data", **options)
    here = run(tmp_path / "runs", data=str(tmp_path / "data"), **options)

    assert there.uri.startswith(f"{s3_uri}/some/runs/model=lenet5/run=")
    assert manifest.verify(Store(there.uri)) == []
    assert [run.store.uri for run in manifest.committed(Store(f"{s3_uri}/some/runs"))] == [there.uri]
    assert there.manifest["files"]["model.clq"] == here.manifest["files"]["model.clq"]
    assert there.manifest["metrics"] == here.manifest["metrics"]
    assert there.manifest["run"] == here.manifest["run"]
    assert there.manifest["metrics"]["test"]["compressed"]["top1_percent"] > 50
    assert not Store(there.uri).names("_work/")
    loaded, local = clipq_ray.load(there.uri).state_dict(), clipq_ray.load(here.uri).state_dict()
    assert all(torch.equal(value, local[name]) for name, value in loaded.items())
    assert run(f"{s3_uri}/some/runs", data=f"{s3_uri}/some/data", **options).reused


# --- networks that are not worth hours -----------------------------------------------------------------------------------------


def searched(storage: Path) -> bool:
    return bool(list(storage.glob("_stages/search-*")))


def test_a_given_network_near_chance_stops_before_the_search(
    digits_weights: dict[str, Tensor], tmp_path: Path
) -> None:
    state = dict(digits_weights)
    for name in ("fc3.weight", "fc3.bias"):  # the labels of another order
        state[name] = digits_weights[name].roll(1, dims=0).contiguous()
    weights = saved(state, tmp_path / "w.safetensors")
    with refused(RunError, match=r"chance is 10\.00 %") as caught:
        run(tmp_path / "s", weights=weights)
    line = str(caught.value)
    assert f"top-1 {top1_percent(state, 'validation'):.2f} % on 143 validation images" in line
    for cause in ("labels in another order", "--mean/--std", "--input-size", "--weights"):
        assert cause in line
    assert not searched(tmp_path / "s")
    assert list(manifest.committed(Store(tmp_path / "s"))) == []


def test_a_network_far_from_the_expected_top1_stops_before_the_search(
    digits_weights: dict[str, Tensor], tmp_path: Path
) -> None:
    weights, percent = saved(digits_weights, tmp_path / "w.safetensors"), top1_percent(digits_weights)
    assert percent > 60
    for expected in (percent - 20.0, 5.0):
        with refused(RunError, match="labels in another order") as caught:
            run(tmp_path / "s", weights=weights, expect_top1_percent=expected)
        assert f"near {expected} % (--expect-top1-percent), got {percent:.2f} %" in str(caught.value)
    assert not searched(tmp_path / "s")


def test_a_network_near_the_expected_top1_goes_on(digits_weights: dict[str, Tensor], tmp_path: Path) -> None:
    weights, percent = saved(digits_weights, tmp_path / "w.safetensors"), top1_percent(digits_weights)
    result = run(tmp_path / "s", weights=weights, expect_top1_percent=percent - 1.5, epochs=1)
    assert result.manifest["metrics"]["test"]["original"]["top1_percent"] == pytest.approx(percent)


def scored(right: int, n: int) -> Evaluation:
    return Evaluation(n, right / n, 1.0, 0.0, *np.zeros((2, n), np.int64))


def judge(
    validation: Evaluation,
    test: Evaluation | None = None,
    origin: str = "module",
    data: Any = None,
    **options: Any,
) -> list[str]:
    """What is noted of a network of two classes that scores so."""
    given: Any = SimpleNamespace(
        config=make(**options), data=SimpleNamespace(classes=2), reporter=Reporter(quiet=True), notes=[],
        source=SimpleNamespace(own_data=data),
    )  # fmt: skip
    stages.refuse_bad_baseline(given, {"validation": validation, "test": test}, origin)
    return list(given.notes)


def test_a_network_that_is_right_about_the_few_images_there_are_goes_on() -> None:
    right = scored(3, 3)
    assert right.interval()[0] < 0.5  # chance is within
    judge(right)
    with refused(RunError, match=r"got top-1 66\.67 % on 3 validation images \(chance is 50\.00 %\)"):
        judge(scored(2, 3))
    with refused(
        RunError, match=r"images that the loaders prepare otherwise than in training, wrong weights$"
    ):
        judge(scored(2, 3), data=object())  # whose loaders are the caller's own


def test_validation_images_decide_whether_a_network_is_near_chance_and_test_images_nothing() -> None:
    with refused(RunError, match=r"got top-1 52\.00 % on 100 validation images"):
        judge(scored(52, 100), scored(100, 100))
    judge(scored(80, 100), scored(50, 100))
    assert judge(scored(50, 100), origin="random") == []


def test_a_network_that_was_trained_here_and_learned_nothing_is_noted() -> None:
    (note,) = judge(scored(52, 100), scored(100, 100), origin="train")
    assert "got top-1 52.00 % on 100 validation images (chance is 50.00 %)" in note
    assert "--baseline-epochs" in note
    assert judge(scored(80, 100), scored(50, 100), origin="train") == []


def test_the_top1_that_is_expected_is_that_of_test_images_where_there_are_any() -> None:
    judge(scored(99, 100), scored(9100, 10000), expect_top1_percent=90.0)
    judge(scored(91, 100), expect_top1_percent=90.0)
    with refused(RunError, match=r"near 90\.0 % \(--expect-top1-percent\), got 95\.00 %"):
        judge(scored(90, 100), scored(9500, 10000), expect_top1_percent=90.0)


def test_of_a_few_images_the_right_network_may_be_further_from_what_is_expected() -> None:
    judge(scored(90, 100), scored(95, 100), expect_top1_percent=90.0)
    with refused(RunError, match="--expect-top1-percent"):
        judge(scored(90, 100), scored(95, 100), expect_top1_percent=80.0)


def test_a_control_is_trained_as_long_as_a_ladder_and_its_first_round(tmp_path: Path) -> None:
    class Noting(LocalEngine):
        def train(self, task: TrainTask, progress: Any) -> float:
            assert (task.stage, task.plan) == ("control", None)
            made.append(task.schedule.epochs)
            Store(task.output).write(CURVE, b'{"curve": [], "notes": []}')
            return 0.0

    made: list[int] = []
    options = {"target_bytes": 9, "rungs": 3, "rung_epochs": 2, "epochs": 7, "rounds": 5, "round_epochs": 9}
    source, weights = Source(make(limit_images=20, engine="local", **options)), Store(tmp_path / "w")
    write_state(weights, WEIGHTS, source.network().state_dict())
    given = Run(source, Noting(), Reporter(quiet=True), Store(tmp_path), threading.Lock())
    with given.turn:
        original.control(given, weights, Store(tmp_path / "work"))
    assert made == [2 + 2 + 7]


# --- little time ---------------------------------------------------------------------------------------------------------------


def epochs(result: Result) -> dict[str, list[int]]:
    return {name: [row["epoch"] for row in curve] for name, curve in result.manifest["curves"].items()}


def test_without_time_every_training_has_one_epoch_and_the_run_is_committed(tmp_path: Path) -> None:
    result = run(
        tmp_path / "s", deadline_hours=1e-6, baseline_epochs=3, epochs=4, control="always", weights="train"
    )
    assert manifest.verify(Store(result.uri)) == []
    assert epochs(result) == {"finetune": [1], "levels": [], "control": [1]}
    for stage, wanted in (("baseline", 3), ("finetune", 4), ("control", 4)):
        note = f"{stage}: shortened from {wanted} to 1 epochs by --deadline-hours"
        assert result.manifest["notes"].count(note) == 1


def test_a_size_that_is_held_is_that_of_the_plan_where_the_deadline_cuts_the_ramp(
    digits_weights: dict[str, Tensor], tmp_path: Path
) -> None:
    weights = saved(digits_weights, tmp_path / "w.safetensors")
    result = run(
        tmp_path / "s", weights=weights, deadline_hours=1e-6, epochs=16, target_ratio=20.0, rounds=1, hold_size=True, ramp_share=0.5, max_drop=None
    )  # fmt: skip
    store = Store(result.uri)
    assert epochs(result)["finetune"] == [1]
    assert result.manifest["promise"]["rounds"][0]["epochs"] == 1
    chosen = {row["layer"]: row["p"] for row in tables.from_bytes(store.read("trials.parquet")).to_pylist() if row["chosen"]}  # fmt: skip
    made = {row["layer"]: row["p"] for row in tables.from_bytes(store.read("layers.parquet")).to_pylist()}
    assert made == pytest.approx(chosen, abs=1e-6)


def test_with_enough_time_no_epoch_is_left_out(digits_weights: dict[str, Tensor], tmp_path: Path) -> None:
    weights = saved(digits_weights, tmp_path / "w.safetensors")
    result = run(tmp_path / "s", weights=weights, deadline_hours=2.0, epochs=3, control="always")
    assert epochs(result) == {"finetune": [1, 2, 3], "levels": [], "control": [1, 2, 3]}
    assert not [note for note in result.manifest["notes"] if "--deadline-hours" in note]


# --- little memory -------------------------------------------------------------------------------------------------------------


class Narrow(nn.Module):
    """A network for which only `fits` images at a time fit the memory in training."""

    def __init__(self, fits: int = 10**9) -> None:
        super().__init__()
        self.fits, self.first, self.last = fits, nn.Linear(16, 24), nn.Linear(24, 4)

    def forward(self, images: Tensor) -> Tensor:
        if self.training and len(images) > self.fits:
            raise torch.OutOfMemoryError(f"{len(images)} images")
        out: Tensor = self.last(torch.relu(self.first(images.flatten(1))))
        return out


def narrow(fits: int, storage: Path) -> Result:
    """A run of 18 images per step on a trained network of which `fits` images fit the memory."""
    torch.manual_seed(0)
    model = Narrow()
    images = torch.randn(400, 1, 4, 4)
    labels = images.flatten(1)[:, :4].argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    model.fits = fits
    loader, others = (
        DataLoader(TensorDataset(images[half], labels[half]), batch_size=20)
        for half in (slice(200), slice(200, 400))
    )
    return clipq_ray.compress(
        model, loader, test_loader=others, storage=str(storage), quiet=True, **{**QUICK, "batch_size": 18}
    )


def test_where_memory_is_short_gradients_are_accumulated_and_the_run_says_so(tmp_path: Path) -> None:
    short, enough = narrow(7, tmp_path / "short"), narrow(18, tmp_path / "enough")
    assert manifest.verify(Store(short.uri)) == []
    (note,) = [note for note in short.manifest["notes"] if "micro-batches" in note]
    assert note.startswith("finetune: 18 images per worker do not fit")
    assert "micro-batches of 5 " in note  # 18, 9, 5
    assert not [note for note in enough.manifest["notes"] if "micro-batches" in note]
    # 5 + 5 + 4 + 4 images are the same step as 18 at once
    losses = [[row["loss"] for row in run.manifest["curves"]["finetune"]] for run in (short, enough)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_where_not_even_one_image_fits_the_run_stops_in_one_line(tmp_path: Path) -> None:
    with refused(RunError, match="^one image does not fit the device's memory; "):
        narrow(0, tmp_path / "s")
    assert list(manifest.committed(Store(tmp_path / "s"))) == []
