"""From Python: a caller's own module and loaders, with weights that are tied and layers that nothing reaches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import folder
from refusals import refused
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import clipq_ray
from clipq_ray import api, codec
from clipq_ray.cluster.engine import LocalEngine
from clipq_ray.config import make
from clipq_ray.consistency import NAME
from clipq_ray.errors import ConfigError, DataError, RunError, UserError
from clipq_ray.pipeline import Result
from clipq_ray.precision import own_float32

QUICK: dict[str, Any] = {
    "engine": "local", "epochs": 2, "batch_size": 20, "search_evaluations": 4, "search_start": 3, "search_images": 60,
    "control": "never", "target_ratio": 4, "rounds": 1, "quiet": True,
}  # fmt: skip


class Tied(nn.Module):
    """A user's own network: two layers share their weights, and one is never reached."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.last = nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.last(torch.relu(self.second(torch.relu(self.first(images.flatten(1))))))
        return out


def loader(n: int = 200, seed: int = 0) -> DataLoader[Any]:
    images = torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(images, images.flatten(1)[:, :4].argmax(1)), batch_size=20)


def trained() -> Tied:
    torch.manual_seed(0)
    model, data = Tied(), loader()
    images, labels = data.dataset[:]
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tied, dict[str, Tensor], Result]:
    model = trained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    storage = str(tmp_path_factory.mktemp("storage"))
    return (
        model,
        before,
        clipq_ray.compress(model, loader(), test_loader=loader(100, 1), storage=storage, **QUICK),
    )


Compressed = tuple[Tied, dict[str, Tensor], Result]


def test_a_users_own_module_comes_back_through_its_factory(compressed: Compressed) -> None:
    result = compressed[2]
    loaded = clipq_ray.load(result.uri, factory=Tied)
    images, labels = loader(100, 1).dataset[:]
    percent = 100 * float((loaded(images).argmax(1) == labels).float().mean())
    assert percent == pytest.approx(result.manifest["metrics"]["test"]["compressed"]["top1_percent"])
    assert percent > 60


def test_without_the_factory_the_file_says_what_is_missing(compressed: Compressed) -> None:
    with pytest.raises(UserError, match="factory="):
        clipq_ray.load(compressed[2].uri)


def test_the_callers_module_is_left_as_it_was(compressed: Compressed) -> None:
    model, before, _ = compressed
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_tied_weights_are_stored_once_and_tied_again(compressed: Compressed) -> None:
    result = compressed[2]
    loaded = clipq_ray.load(result.uri, factory=Tied)
    assert loaded.get_parameter("second.weight") is loaded.get_parameter("first.weight")
    state = clipq_ray.load_state_dict(result.uri)
    assert torch.equal(state["first.weight"], state["second.weight"])
    file = (Path(result.uri.removeprefix("file://")) / "model.clq").read_bytes()
    assert "second.weight" not in {entry.name for entry in codec.entries(file)}
    assert any("tied" in note for note in result.manifest["notes"])


def test_a_layer_that_nothing_reaches_is_left_out_and_named(compressed: Compressed) -> None:
    result = compressed[2]
    assert any("unused.weight" in note for note in result.manifest["notes"])
    assert clipq_ray.load(result.uri, factory=Tied).get_parameter("unused.weight").isnan().all()


def test_the_run_is_named_after_the_class_and_its_layers_can_be_queried(compressed: Compressed) -> None:
    result = compressed[2]
    assert result.manifest["model"] == "tied"
    storage = result.uri.split("/model=")[0]
    rows = clipq_ray.open_layers(storage).to_table().to_pylist()
    assert [(row["model"], row["layer"]) for row in rows] == [
        ("tied", "first.weight"),
        ("tied", "last.weight"),
    ]
    assert len(clipq_ray.open_trials(storage).to_table()) == 8


def test_the_same_call_again_gives_the_same_run(compressed: Compressed) -> None:
    result = compressed[2]
    storage = result.uri.split("/model=")[0]
    again = clipq_ray.compress(trained(), loader(), test_loader=loader(100, 1), storage=storage, **QUICK)
    assert again.reused
    assert again.uri == result.uri


def state_of_the_process() -> dict[str, Any]:
    """What a run sets for a whole process, as far as Python can see."""
    parts = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul
    return {
        "threads": torch.get_num_threads(),
        "cudnn": [
            getattr(torch.backends.cudnn, name) for name in ("benchmark", "deterministic", "allow_tf32")
        ],
        "float32": [torch.get_float32_matmul_precision(), *(part.fp32_precision for part in parts)],
        "random": [
            random.getstate(),
            str(np.random.get_state()),
            torch.get_rng_state().tolist(),
            torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else [],
        ],
    }


@pytest.fixture
def own_settings() -> Iterator[None]:
    """A caller's own, put back for other tests."""
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    with own_float32():
        torch.set_num_threads(threads + 1)
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = True, False, True
        torch.set_float32_matmul_precision("medium")
        yield
    torch.set_num_threads(threads)
    cudnn.benchmark, cudnn.deterministic = before


@pytest.mark.usefixtures("own_settings")
def test_the_callers_process_is_left_as_it_was_also_after_an_error(tmp_path: Path) -> None:
    model, fresh = trained(), Tied()
    before = state_of_the_process()
    clipq_ray.compress(model, loader(), storage=str(tmp_path), **QUICK)
    assert state_of_the_process() == before
    with refused(RunError, match="expected a trained network"):
        clipq_ray.compress(fresh, loader(), model_name="untrained", storage=str(tmp_path), **QUICK)
    assert state_of_the_process() == before


def test_a_name_may_be_given(tmp_path: Path) -> None:
    result = clipq_ray.compress(
        trained(), loader(), loader(60, 2), model_name="mine", storage=str(tmp_path), **QUICK
    )
    assert result.manifest["model"] == "mine"
    assert result.manifest["data"]["validation_images"] == 60
    assert result.manifest["metrics"]["test"] is None


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


def test_wrong_calls_are_one_line(tmp_path: Path) -> None:
    with refused(ConfigError, match="together with a train_loader"):
        clipq_ray.compress(Tied(), storage=str(tmp_path))
    with refused(ConfigError, match="together with a train_loader"):
        clipq_ray.compress(None, loader(), storage=str(tmp_path))
    with refused(ConfigError, match="a train_loader with a validation_loader or test_loader"):
        clipq_ray.compress(test_loader=loader(), storage=str(tmp_path))
    with refused(ConfigError, match="limit_images and resize as well"):
        clipq_ray.compress(Tied(), loader(), limit_images=50, resize=8, storage=str(tmp_path))
    with refused(ConfigError, match="dry_run on the command line only"):
        clipq_ray.compress(Tied(), loader(), dry_run=True, storage=str(tmp_path))
    with refused(DataError, match="other than the test images"):
        clipq_ray.compress(Tied(), loader(), loader(60, 2), loader(60, 2), storage=str(tmp_path), **QUICK)
    with refused(ConfigError, match="did you mean --target-ratio"):
        clipq_ray.compress(Tied(), loader(), targetratio=3, storage=str(tmp_path))
    with refused(DataError, match="map-style dataset"):
        clipq_ray.compress(Tied(), DataLoader(Endless()), storage=str(tmp_path), **QUICK)
    with refused(ConfigError, match=r"a torch\.nn\.Module as model, got str; .* by model_name="):
        clipq_ray.compress("resnet20", loader(), storage=str(tmp_path))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_class_of_any_name_gives_a_name_that_a_result_may_have() -> None:
    for name, expected in (("_Net", "net"), ("Café2", "cafe2"), ("Сеть", "network")):
        found = api._name_of(type(name, (nn.Module,), {})())
        assert found == expected
        assert NAME.fullmatch(found)


def test_a_second_call_sees_the_images_as_they_are_by_then(tmp_path: Path) -> None:
    folder(tmp_path / "data", "train", 36)
    options: dict[str, Any] = {
        "model_name": "lenet5", "model_args": {"num_classes": 3}, "data": str(tmp_path / "data"), "input_size": 28, "weights": "random",
        "storage": str(tmp_path / "runs"), "engine": "local", "epochs": 1, "warmup_epochs": 0.0, "search_evaluations": 4, "search_start": 3,
        "search_images": 12, "quiet": True, "target_ratio": 4, "control": "never", "rounds": 1, "mean": (0.5,), "std": (0.5,),
    }  # fmt: skip
    first = clipq_ray.compress(**options)
    folder(tmp_path / "data", "train", 36, first=100)
    second = clipq_ray.compress(**options)
    assert not second.reused
    assert second.uri != first.uri


def test_the_local_engine_needs_no_ray_and_the_ray_engine_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "clipq_ray.cluster.on_ray", None)
    assert isinstance(api.make_engine(make(engine="local")), LocalEngine)
    with pytest.raises(ConfigError, match=r"clipq_ray\[cluster\]"):
        api.make_engine(make())
