"""Loading a .clq file or a run: what comes back, what is refused, and what is not needed for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import refused
from torch import nn

from clipq_ray import codec, load, load_state_dict, loading, manifest, models
from clipq_ray.errors import FormatError, ModelError
from clipq_ray.storage import MODEL, Store

META = {"architecture": {"name": "lenet5", "kwargs": {"num_classes": 10}}, "classes": 10}


def coded(shape: tuple[int, ...], seed: int = 0) -> codec.CodedLayer:
    codes = np.random.default_rng(seed).integers(-1, 3, size=shape).astype(np.int16)
    return codec.CodedLayer.from_quantized(codes, np.array([-0.5, 0, 0.25, 0.75], np.float32), 1)


def lenet() -> codec.Packed:
    state = models.build(models.Architecture("lenet5", {"num_classes": 10})).state_dict()
    return codec.Packed(
        META,
        {
            name: coded(tuple(value.shape), index)
            if value.ndim > 1
            else np.full(value.shape, 0.5, np.float32)
            for index, (name, value) in enumerate(state.items())
        },
    )


def written(folder: Path, packed: codec.Packed) -> Path:
    path = folder / "network.clq"
    path.write_bytes(codec.encode(packed))
    return path


class Tied(nn.Module):
    """Two names for one weight, a batch norm with its counter, and a head that inference never reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(4)
        self.auxiliary = nn.Linear(4, 2)


def tied() -> codec.Packed:
    plain = {name: np.ones(4, np.float32) for name in ("weight", "bias", "running_mean", "running_var")}
    return codec.Packed(
        {
            "architecture": None,
            "ties": {"second.weight": "first.weight"},
            "dropped": ["auxiliary.weight", "auxiliary.bias"],
        },
        {"first.weight": coded((4, 4)), **{f"norm.{name}": value for name, value in plain.items()}},
    )


def test_a_file_comes_back_as_the_network_that_it_names_in_eval_mode(tmp_path: Path) -> None:
    packed = lenet()
    model = load(written(tmp_path, packed))
    assert type(model) is type(models.build(models.Architecture("lenet5", {"num_classes": 10})))
    assert not model.training
    for name, value in model.state_dict().items():
        tensor = packed.tensors[name]
        expected = tensor.values() if isinstance(tensor, codec.CodedLayer) else tensor
        np.testing.assert_array_equal(value.numpy(), expected)
    assert model(torch.zeros(1, 1, 28, 28)).isfinite().all()


def test_a_run_directory_loads_as_its_file_does(tmp_path: Path) -> None:
    file = written(tmp_path, lenet())
    run = tmp_path / "run"
    manifest.commit(Store(run), {MODEL: file.read_bytes()}, {"format": manifest.FORMAT})
    whole, alone = load_state_dict(run), load_state_dict(file)
    assert whole.keys() == alone.keys()
    assert all(torch.equal(whole[name], alone[name]) for name in alone)


def test_what_is_a_file_is_told_by_its_ending_or_because_it_is_there(tmp_path: Path) -> None:
    written(tmp_path, lenet()).rename(tmp_path / "model.bin")
    manifest.commit(Store(tmp_path / "run"), {MODEL: b"1"}, {"format": manifest.FORMAT})
    assert loading.file_at(tmp_path / "model.bin") == (Store(tmp_path), "model.bin")
    assert loading.file_at(tmp_path / "none.clq") == (Store(tmp_path), "none.clq")
    assert [loading.file_at(tmp_path / one) for one in ("run", "none", "")] == [None] * 3
    assert loading.file_at("memory://bucket") is None
    assert load_state_dict(tmp_path / "model.bin").keys() == lenet().tensors.keys()


@pytest.mark.parametrize(
    "name", ["m.clq?X-Amz-Signature=ab", "m.clq?a=b.c&d=e%2Ff", "weights?id=5", "m.clq?sig=a//b/../c/"]
)
def test_a_presigned_url_is_that_of_a_file(name: str) -> None:
    pytest.importorskip("aiohttp", reason="fsspec reads https:// with it")
    url = f"https://host/a/{name}"
    found = loading.file_at(url)
    assert found == (Store("https://host/a"), name)
    store, name = found
    assert store._at(name) == Store(url).uri == url


def test_a_file_that_differs_from_its_manifest_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    manifest.commit(Store(run), {MODEL: codec.encode(lenet())}, {"format": manifest.FORMAT})
    (run / MODEL).write_bytes(codec.encode(tied()))
    with pytest.raises(FormatError, match=MODEL):
        load_state_dict(run)


def test_tied_tensors_stand_under_each_name_and_dropped_ones_are_nan(tmp_path: Path) -> None:
    path = written(tmp_path, tied())
    state = load_state_dict(path)
    assert torch.equal(state["second.weight"], state["first.weight"])
    assert "auxiliary.weight" not in state
    model = load(path, factory=Tied)
    assert isinstance(model, Tied)
    assert model.second.weight is model.first.weight
    assert torch.equal(model.first.weight, torch.from_numpy(coded((4, 4)).values()))
    assert model.auxiliary.weight.isnan().all()
    assert model.auxiliary.bias.isnan().all()
    assert model.norm.num_batches_tracked == 0


def test_a_network_of_the_callers_own_needs_the_factory(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="factory"):
        load(written(tmp_path, tied()))


def test_an_unknown_architecture_is_refused_with_a_word_on_the_factory(tmp_path: Path) -> None:
    unknown = codec.Packed({"architecture": {"name": "lenet99", "kwargs": {}}}, {})
    with pytest.raises(ModelError, match="factory") as caught:
        load(written(tmp_path, unknown))
    # what is said to those who compress is no advice for those who read
    assert "nearest names" not in str(caught.value)
    strange = codec.Packed({"architecture": {"name": "lenet5", "kwargs": {"depth": 3}}}, {})
    with pytest.raises(ModelError, match=r"^lenet5 cannot be built with .*; pass factory= that builds it$"):
        load(written(tmp_path, strange))


def test_advice_on_the_installation_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: object) -> nn.Module:
        raise ModelError("torchvision's networks need one that matches torch; install the pair together")

    path = written(tmp_path, lenet())
    monkeypatch.setattr(models, "build", build)
    with refused(ModelError, match="; install the pair together; pass factory= that builds it$"):
        load(path)


def test_a_name_with_a_module_in_a_file_is_never_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(tmp_path)
    foreign = codec.Packed({"architecture": {"name": "evil_module:make", "kwargs": {}}}, {})
    with pytest.raises(ModelError, match="expected a registered network"):
        load(written(tmp_path, foreign))
    assert "evil_module" not in sys.modules


def test_a_factory_that_does_not_fit_the_file_is_refused_in_one_line(tmp_path: Path) -> None:
    with refused(ModelError, match="build the one that it was made from"):
        load(written(tmp_path, lenet()), factory=lambda: nn.Linear(2, 2))


def test_loading_works_without_ray_and_without_training_code(tmp_path: Path) -> None:
    path = written(tmp_path, lenet())
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "import clipq_ray\n"
        f"clipq_ray.load({str(path)!r})\n"
        "print([n for n in ('finetune', 'search', 'pipeline') if 'clipq_ray.' + n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
