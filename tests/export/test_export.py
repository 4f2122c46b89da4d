"""Exports give other tools the same network: same tensors, same outputs, a card that says what the run measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import clipq_ray
from clipq_ray import codec, manifest, models
from clipq_ray.cli import main
from clipq_ray.errors import ConfigError, ModelError
from clipq_ray.export import export, format_of, onnx
from clipq_ray.export.source import Source
from clipq_ray.storage import MODEL, Store, run_store

RECORD = Path(__file__).parents[2] / "bench" / "records" / "resnet20-cifar10.clq"
FOLDER = ["README.md", "config.json", "model.clq", "model.safetensors"]
pytest.importorskip("onnxruntime", reason="install clipq_ray[export]")


def scores(top1: float) -> dict[str, float]:
    return {
        "top1_percent": top1, "top1_low_percent": top1 - 0.5, "top1_high_percent": top1 + 0.5, "top5_percent": 99.5, "loss": 0.3,
    }  # fmt: skip


def committed(storage: Path, description: str = "cifar10") -> str:
    """A run of the recorded network."""
    run = run_store(Store(storage), "mine", "r-1")
    measured = {"n": 10_000, "original": scores(91.73), "control": None, "compressed": scores(91.31)}
    document: dict[str, Any] = {
        "format": 1, "model": "mine", "run": "r-1", "data": {"description": description},
        "metrics": {"bytes_before": 1_084_392, "test": measured, "validation": None},
    }  # fmt: skip
    manifest.commit(run, {MODEL: RECORD.read_bytes()}, document)
    return run.uri


def torchvision_file(path: Path, name: str = "squeezenet1_1") -> Path:
    """A network with five classes, its state stored as it is."""
    torch.manual_seed(0)
    architecture = models.architecture(name, 5, {})
    state = {name: value.numpy() for name, value in models.build(architecture).state_dict().items()}
    images = {"shape": [3, 64, 64], "resize": 72, "mean": [0.5] * 3, "std": [0.25] * 3}
    metadata = {"architecture": architecture.to_json(), "classes": 5, "input": images, "source": "ab" * 32}
    path.write_bytes(codec.encode(codec.Packed(metadata, state)))
    return path


def front(card: Path) -> Any:
    return yaml.safe_load(card.read_text(encoding="utf-8").split("---\n")[1])


def snippets(card: Path) -> list[str]:
    return [part.split("```")[0] for part in card.read_text(encoding="utf-8").split("```python\n")[1:]]


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "a.onnx"
    assert main(["export", str(RECORD), str(path)]) == 0
    return path


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_onnx_gives_the_same_outputs_for_any_batch(onnx_file: Path, batch: int) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    (images,) = session.get_inputs()
    assert images.shape == ["batch", 3, 32, 32]
    random = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected = clipq_ray.load(RECORD)(random)
    (came,) = session.run(None, {images.name: random.numpy()})
    assert came.shape == (batch, 10)
    assert np.abs(came - expected.numpy()).max() <= onnx.TOLERANCE * float(expected.abs().max())


def test_onnx_states_input_and_normalisation_and_no_path_of_this_machine(onnx_file: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    stated = session.get_modelmeta().custom_metadata_map
    assert json.loads(stated["clipq.input"])["mean"] == [0.485, 0.456, 0.406]
    assert json.loads(stated["clipq.architecture"])["name"] == "resnet20"
    data = onnx_file.read_bytes()
    assert b"site-packages" not in data
    assert str(Path.home()).encode() not in data or Path.home() == Path("/")


def test_onnx_whose_outputs_differ_is_an_error(onnx_file: Path) -> None:
    other = clipq_ray.load(RECORD)
    with torch.no_grad():
        next(iter(other.parameters())).mul_(1.01)
    with pytest.raises(ModelError, match=r"within 0\.0001 of the largest"):
        onnx.difference(other, onnx_file.read_bytes(), (3, 32, 32))


def test_onnx_without_its_packages_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(onnx, "missing", lambda: ["onnx", "onnxscript"])
    assert main(["export", str(RECORD), str(tmp_path / "a.onnx")]) == 2
    assert capsys.readouterr().err == (
        "clipq: ONNX needs onnx, onnxscript, not installed here: install clipq_ray[export]\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_network_that_the_file_does_not_name_is_no_onnx_but_a_folder(tmp_path: Path) -> None:
    source = Source.read(RECORD)
    unnamed = codec.Packed({**source.packed.metadata, "architecture": None}, source.packed.tensors)
    file = tmp_path / "unnamed.clq"
    file.write_bytes(codec.encode(unnamed))
    with pytest.raises(ModelError, match="names a registered network"):
        export(file, str(tmp_path / "a.onnx"))
    export(file, f"{tmp_path}/out/")
    assert "factory=build" in snippets(tmp_path / "out" / "README.md")[0]
    assert not (tmp_path / "a.onnx").exists()


@pytest.mark.parametrize(("mean", "stated"), [([0.0] * 3, False), ([0.5, 0.0, 0.0], True)])
def test_a_folder_states_no_preparation_of_images_that_the_callers_loaders_made(
    tmp_path: Path, mean: list[float], stated: bool
) -> None:
    packed = Source.read(RECORD).packed
    images = {**packed.metadata["input"], "resize": None, "mean": mean, "std": [1.0] * 3}
    unnamed = codec.Packed({**packed.metadata, "architecture": None, "input": images}, packed.tensors)
    (tmp_path / "own.clq").write_bytes(codec.encode(unnamed))
    export(tmp_path / "own.clq", f"{tmp_path}/out/")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert (config["mean"], config["std"]) == ((mean, [1.0] * 3) if stated else (None, None))
    assert ("divided by [1.0, 1.0, 1.0]" in card) is stated
    assert ("prepared as in training, which the file does not say" in card) is not stated


def test_a_folder_holds_the_original_and_weights_that_load_strictly(tmp_path: Path) -> None:
    assert main(["export", str(RECORD), f"{tmp_path}/out/"]) == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == FOLDER
    assert (out / "model.clq").read_bytes() == RECORD.read_bytes()
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    network = models.build(models.Architecture(config["architecture"], config["architecture_kwargs"])).eval()
    network.load_state_dict(load_file(out / "model.safetensors"))
    images = torch.randn(2, *config["input_size"])
    assert torch.equal(network(images), clipq_ray.load(RECORD)(images))
    assert (config["num_classes"], config["class_names"][3]) == (10, "cat")
    assert "model-index" not in front(out / "README.md")  # nothing was measured on a file alone


def test_the_card_says_what_the_run_measured(tmp_path: Path) -> None:
    uri = committed(tmp_path / "runs")
    assert main(["export", uri, f"{tmp_path}/out/", "--base-model", "somebody/resnet20"]) == 0
    card = tmp_path / "out" / "README.md"
    stated = front(card)
    assert stated["library_name"] == "clipq_ray"
    assert (stated["base_model"], stated["base_model_relation"]) == ("somebody/resnet20", "quantized")
    (result,) = stated["model-index"][0]["results"]
    assert result["dataset"] == {"type": "cifar10", "name": "cifar10", "split": "test"}
    assert [metric["value"] for metric in result["metrics"]] == [91.31, 99.5]
    text = card.read_text(encoding="utf-8")
    assert "| `model.clq` | 57,336 (18.9x smaller than float32) |" in text
    assert "| `model.clq` | 91.31 % (90.81 to 91.81) | 99.50 % |" in text


def test_a_file_without_the_usual_ending_is_no_run(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(RECORD.read_bytes())
    assert Source.read(file).run is None
    assert Source.read(committed(tmp_path / "runs")).run is not None


def test_the_card_tells_no_path_of_the_data(tmp_path: Path) -> None:
    uri = committed(tmp_path / "runs", "image folders at /home/somebody/a secret/cats")
    export(uri, f"{tmp_path}/out/")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "image folders at cats" in text
    assert "secret" not in text


@pytest.mark.parametrize("name", ["squeezenet1_1", "mnasnet0_5"])  # the latter asks for its state's version
def test_the_cards_snippets_run_and_agree(tmp_path: Path, name: str) -> None:
    file = torchvision_file(tmp_path / "a.clq", name)
    export(file, f"{tmp_path}/out/")
    ours, plain = snippets(tmp_path / "out" / "README.md")
    program = "\n".join(
        ["import torch", ours, "one = network", plain, "images = torch.randn(2, 3, 64, 64)",
         "assert torch.equal(one(images), network(images)) and not network.training"]
    )  # fmt: skip
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path / "out", check=True, timeout=120)


@pytest.mark.parametrize("output", ["a.safetensors", "folder/"])
def test_tied_tensors_count_under_each_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    side = 1024  # 2^20 elements: three of them may be in any file, five not in one of some hundred bytes
    layer = codec.CodedLayer(np.zeros((side, side), np.int16), np.zeros(1, np.float32), 0)
    file = tmp_path / "a.clq"
    codes = []
    for aliases in (2, 4):
        ties = {f"a{number}": "w" for number in range(aliases)}
        file.write_bytes(codec.encode(codec.Packed({"ties": ties}, {"w": layer})))
        codes.append(main(["export", str(file), f"{tmp_path}/{aliases}-{output}"]))
    assert codes == [0, 2]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("clipq: expected at most ")
    assert f"got {5 * side * side} with tied tensors under each name" in line
    assert not (tmp_path / f"4-{output}").exists()


@pytest.mark.parametrize("output", ["a.safetensors", "folder/"])
def test_a_name_that_safetensors_reserves_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    file = tmp_path / "a.clq"
    file.write_bytes(codec.encode(codec.Packed({}, {"__metadata__": np.ones(3, np.float32)})))
    assert main(["export", str(file), f"{tmp_path}/{output}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("clipq: expected tensors with names that safetensors can hold, got __metadata__;")
    assert not (tmp_path / output).exists()


def test_an_onnx_error_says_what_went_wrong_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*given: Any, **more: Any) -> None:
        try:
            try:
                raise ValueError("no rule for\n\x1b[1;31mroll\x1b[0m")
            except ValueError as error:
                raise TypeError("half way") from error
        except TypeError as error:
            raise RuntimeError("\x1b[96mFailed to export the model.\x1b[0m " + "Advice. " * 50) from error

    monkeypatch.setattr(torch.onnx, "export", failing)
    with pytest.raises(ModelError) as raised:
        onnx.convert(Source.read(RECORD))
    assert str(raised.value) == (
        "this network cannot be exported to ONNX: no rule for roll; export safetensors instead"
    )


@pytest.mark.parametrize(
    ("what", "done"), [("InferenceSession", "opened by onnxruntime"), ("run", "checked")]
)
def test_what_onnxruntime_raises_is_one_line(
    what: str, done: str, onnx_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    class Session:
        def __init__(self, *given: Any, **more: Any) -> None:
            if what == "InferenceSession":
                raise RuntimeError("model IR version: 12, max supported: 11")

        def run(self, *given: Any) -> list[Any]:
            raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    with pytest.raises(ModelError, match=f"^this network cannot be {done}.*; export safetensors instead$"):
        onnx.difference(clipq_ray.load(RECORD), onnx_file.read_bytes(), (3, 32, 32))


def test_a_folder_that_holds_files_is_written_only_by_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    assert main(["export", str(RECORD), str(tmp_path), "--format", "huggingface"]) == 2
    assert "got README.md; choose another folder or pass --force" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "mine"
    assert main(["export", str(RECORD), str(tmp_path), "--format", "huggingface", "--force"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == FOLDER


def test_the_ending_decides_unless_the_user_does() -> None:
    assert [format_of(name) for name in ("a.safetensors", "s3://b/a.onnx", "a/")] == [
        "safetensors",
        "onnx",
        "huggingface",
    ]
    assert format_of("a.bin", "onnx") == "onnx"
    with pytest.raises(ConfigError, match=r"ends in \.safetensors, \.onnx or /"):
        format_of("a.pt")
    with pytest.raises(ConfigError, match="expected a format of safetensors, onnx, huggingface, got 'gguf'"):
        format_of("a.onnx", "gguf")
    with pytest.raises(ConfigError, match="belongs to a model card"):
        export("a.clq", "a.onnx", base_model="x/y")
