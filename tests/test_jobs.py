"""The jobs as a person runs them: what is wrong ends in one line with exit code 2, before anything is written."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from clipq_ray import codec, console, manifest, models
from clipq_ray.evaluate import evaluate
from clipq_ray.storage import Store

ROOT = Path(__file__).resolve().parents[1]
QUICK = [
    "--engine", "local", "--epochs", "1", "--baseline-epochs", "2", "--batch-size", "32", "--search-evaluations", "4",
    "--search-start", "3", "--search-images", "60", "--target-ratio", "15", "--rounds", "1",
]  # fmt: skip


def started(job: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The job in a process of its own."""
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=800, check=False, env=environment, cwd=ROOT
    )


def imported(job: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_{job}_job", ROOT / "jobs" / f"{job}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def called(
    job: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> tuple[int, list[str]]:
    """Exit code and the job's lines on stderr without progress, in this process: the same path without an import's seconds."""
    monkeypatch.setattr(sys, "argv", [job, *arguments])
    code = console.run(job, imported(job).main)
    return code, [line for line in capfd.readouterr().err.splitlines() if not line.startswith("[")]


def weights(path: Path, change: str = "") -> str:
    """A LeNet-5's weights as safetensors, with one thing wrong."""
    torch.manual_seed(1)
    state = models.build(models.architecture("lenet5", 10, {})).state_dict()
    if change == "name":
        state["fc4.weight"] = state.pop("fc3.weight")
    elif change == "shape":
        state["conv1.weight"] = state["conv1.weight"][:, :, :3].contiguous()
    elif change == "nan":
        state["fc1.weight"][3, 4] = torch.nan
    save_file(state, path)
    return str(path)


def folder(root: Path, *, classes: int = 2, broken: bool = False) -> str:
    """An image folder of 28 x 28 pixels."""
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for name in range(classes):
            place = root / split / f"class{name:02d}"
            place.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 255, (28, 28), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{index}.png")
    if broken:
        (root / "train" / "class00" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    return str(root)


def case(name: str, tmp_path: Path) -> tuple[list[str], list[str]]:
    """Arguments that are wrong in one way, and words that the line has to hold."""
    if name == "unknown network":
        return ["--model", "resnet51"], ["'resnet51'", "nearest names", "resnet50"]
    if name == "unknown option":
        return ["--targetratio", "3"], ["did you mean --target-ratio"]
    if name == "out of range":
        return ["--target-ratio", "0.5"], ["--target-ratio", "greater than 1", "0.5"]
    if name == "contradiction":
        return ["--target-ratio", "3", "--tradeoff", "1"], ["leave one out"]
    if name == "missing data":
        return ["--data", "/nowhere/at/all"], ["/nowhere/at/all"]
    if name == "unknown data":
        return ["--data", "cifar11"], ["cifar1"]
    if name == "empty data":
        (tmp_path / "empty").mkdir()
        return ["--data", str(tmp_path / "empty")], [str(tmp_path / "empty")]
    if name == "unreadable image":
        return ["--data", folder(tmp_path / "images", broken=True)], ["3.png"]
    if name == "more labels than outputs":
        data = folder(tmp_path / "images", classes=12)
        return ["--data", data, "--weights", weights(tmp_path / "w.safetensors")], ["label", "10"]
    if name == "missing weights":
        return ["--weights", "/nowhere.safetensors"], ["/nowhere.safetensors"]
    if name == "weights of another network":
        return ["--weights", weights(tmp_path / "w.safetensors", "name")], ["fc3.weight", "fc4.weight"]
    if name == "weights of another shape":
        return ["--weights", weights(tmp_path / "w.safetensors", "shape")], [
            "conv1.weight",
            "(6, 1, 5, 5)",
            "(6, 1, 3, 5)",
        ]
    if name == "nan in weights":
        return ["--weights", weights(tmp_path / "w.safetensors", "nan")], ["fc1.weight", "NaN"]
    if name == "truncated weights":
        path = Path(weights(tmp_path / "w.safetensors"))
        path.write_bytes(path.read_bytes()[:5000])
        return ["--weights", str(path)], ["w.safetensors"]
    if name == "wrong arguments of the network":
        return ["--model-args", '{"depth": 3}'], ["--model-args"]
    if name == "fewer outputs than classes":
        return ["--model-args", '{"num_classes": 3}'], ["3 outputs", "10 classes"]
    if name == "input too small":
        return ["--input-size", "9"], ["(1, 9, 9)", "--input-size"]
    if name == "no GPU":
        return ["--device", "cuda"], ["--device", "GPU"]
    if name == "nothing matches --keep":
        return ["--keep", "nothing.*"], ["nothing.*"]
    assert name == "unwritable storage"
    return ["--storage", "/proc/nothing"], ["/proc/nothing"]


BY_ITSELF = ["unknown network", "contradiction", "unreadable image"]
CASES = [
    "unknown option", "out of range", "missing data", "unknown data", "empty data", "more labels than outputs",
    "missing weights", "weights of another network", "weights of another shape", "nan in weights", "truncated weights",
    "wrong arguments of the network", "unwritable storage", "fewer outputs than classes", "input too small",
    pytest.param("no GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
]  # fmt: skip


def instead(*arguments: str) -> list[str]:
    """The quick job with `arguments` in the place of its own: an option is given once."""
    own = [
        (name, value) for name, value in zip(QUICK[::2], QUICK[1::2], strict=True) if name not in arguments
    ]
    return [*(word for pair in own for word in pair), *arguments]


def refused(lines: list[str], words: list[str], storage: Path) -> None:
    assert len(lines) == 1, lines
    assert lines[0].startswith("compress: ")
    assert [word for word in words if word not in lines[0]] == [], lines[0]
    assert "Traceback" not in lines[0]
    assert not [path for path in storage.rglob("*") if path.is_file()], "half a run was left"


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_exit_code_2(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments, words = case(name, tmp_path)
    storage = [] if "--storage" in arguments else ["--storage", str(tmp_path / "s")]
    given = instead(*storage, *arguments)
    code, lines = called("compress", given, monkeypatch, capfd)
    assert code == 2
    refused(lines, words, tmp_path / "s")


@pytest.mark.parametrize("name", BY_ITSELF)
def test_bad_input_is_one_line_in_a_process_too(name: str, tmp_path: Path) -> None:
    arguments, words = case(name, tmp_path)
    ended = started("compress", *instead("--storage", str(tmp_path / "s"), *arguments))
    assert ended.returncode == 2
    refused([line for line in ended.stderr.splitlines() if not line.startswith("[")], words, tmp_path / "s")


def test_storage_that_cannot_be_written_is_found_before_any_data_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    given = [*QUICK, "--storage", "/proc/nothing", "--data", "/nowhere/at/all"]
    code, lines = called("compress", given, monkeypatch, capfd)
    assert code == 2
    assert "/proc/nothing" in lines[0]


def test_a_dry_run_says_what_would_happen_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = "--dry-run --storage s --search-evaluations 9 --rung-epochs 3"
    monkeypatch.setattr(sys, "argv", ["compress", *options.split()])
    assert console.run("compress", imported("compress").main) == 0
    printed = capfd.readouterr().out
    assert "61,706 parameters, 5 layers" in printed
    assert "at most 90 evaluations" in printed  # a drop may need a second search
    assert "note        --rung-epochs has nothing to do with --rungs 1" in printed
    for word in ("baseline", "fine-tuning", "time", "disk", "nothing was done"):
        assert word in printed
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_refuses_a_storage_that_the_job_could_not_write_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(b"")
    code, lines = called("compress", ["--dry-run", "--storage", f"{tmp_path}/file/s"], monkeypatch, capfd)
    assert (code, len(lines)) == (2, 1)
    assert f"{tmp_path}/file is no directory; choose another --storage" in lines[0]


def test_a_dry_run_counts_all_that_a_ladder_may_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = (
        "--dry-run --storage s --search-evaluations 9 --target-bytes 2000 --rungs 4 --rung-epochs 3 --search-again --epochs 8 --level-epochs 2 "
        "--rounds 3 --round-epochs 5 --baseline-epochs 6 --control always"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compress", *options.split()])
    assert console.run("compress", imported("compress").main) == 0
    out = capfd.readouterr().out
    printed = {line[:11].strip(): line[12:] for line in out.splitlines()}
    assert "control     17 ep" in out  # as long as the rungs and the first round
    assert "at most 270 evaluations" in printed["search"]  # 5 layers, before each of 6 rounds
    wanted = {"baseline": "6 ep", "rungs": "at most 9 ep", "fine-tuning": "8 ep", "more rounds": "at most 10 ep", "levels": "at most 6 ep"}  # fmt: skip
    for name, words in wanted.items():
        assert printed[name].startswith(words)
    assert "at most 17 MB" in printed["disk"]  # 11 trainings of a network of 0.25 MB


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that the job made in a process of its own, and what it printed."""
    storage = tmp_path_factory.mktemp("storage")
    ended = started("compress", *QUICK, "--storage", str(storage))
    assert ended.returncode == 0, ended.stderr
    (run,) = manifest.committed(Store(storage))
    return Path(run.store.uri.removeprefix("file://")), ended.stdout


def test_the_job_ends_with_a_table_of_what_is_in_the_manifest(made: tuple[Path, str]) -> None:
    run, printed = made
    metrics = manifest.read_manifest(Store(run))["metrics"]
    scores = metrics["test"]
    for text in (
        "lenet5",
        "61,706",
        "246,824",
        f"{metrics['bytes_after']:,}",
        f"{metrics['ratio']:.1f}x",
        f"{scores['original']['top1_percent']:.2f} %",
        f"{scores['compressed']['top1_percent']:.2f} %",
        str(run),
    ):
        assert text in printed


@pytest.mark.parametrize("given", ["file", "run"])
def test_evaluate_prints_the_numbers_of_the_manifest(
    given: str, made: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run, _ = made
    metrics = manifest.read_manifest(Store(run))["metrics"]
    uri = str(run / "model.clq" if given == "file" else run)
    monkeypatch.setattr(sys, "argv", ["evaluate", uri, "--data", "digits"])
    assert console.run("evaluate", imported("evaluate").main) == 0
    printed = capfd.readouterr().out
    assert f"bytes       {metrics['bytes_after']:,}\n" in printed
    assert f"ratio       {metrics['ratio']:.2f}x (of {metrics['bytes_before']:,} bytes)" in printed
    score = metrics["test"]["compressed"]
    assert f"top-1       {score['top1_percent']:.2f} % on 360 test images" in printed
    assert f"{score['top1_low_percent']:.2f} to {score['top1_high_percent']:.2f}" in printed


@pytest.mark.parametrize(
    "damage", ["truncated", "flipped", "missing", "empty", "no data", "batch", "foreign"]
)
def test_evaluate_refuses_what_is_damaged_or_wrong_in_one_line(
    damage: str,
    made: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    content = bytearray((made[0] / "model.clq").read_bytes())
    path, data, more = tmp_path / "damaged.clq", "digits", []
    if damage == "truncated":
        content = content[:-100]
    elif damage == "flipped":
        content[len(content) // 2] ^= 4
    elif damage == "empty":
        content = bytearray()
    elif damage == "no data":
        data = "/nowhere/at/all"
    elif damage == "batch":
        more = ["--batch-size", "0"]
    elif damage == "foreign":  # whole, but without what evaluate.py needs
        content = bytearray(
            codec.encode(codec.Packed({"architecture": {"name": "lenet5", "kwargs": {}}}, {}))
        )
    if damage != "missing":
        path.write_bytes(content)
    code, lines = called("evaluate", [str(path), "--data", data, *more], monkeypatch, capfd)
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("evaluate: ")


OWN = """
from clipq_ray.models import Architecture, build

def network(classes=10):
    return build(Architecture("lenet5", {"num_classes": classes}))

class Other(type(network())):
    def forward(self, images):
        return super().forward(images[:, :, ::2])

def other():
    return Other()
"""


def changed(run: Path, path: Path, **metadata: Any) -> str:
    """The file of a run with something else in its metadata."""
    packed = codec.decode((run / "model.clq").read_bytes())
    path.write_bytes(codec.encode(dataclasses.replace(packed, metadata={**packed.metadata, **metadata})))
    return str(path)


@pytest.fixture
def own(made: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The file of the run, but made of a network of the user's own, which `users_network:network` builds."""
    (tmp_path / "users_network.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_network", raising=False)
    return changed(made[0], tmp_path / "own.clq", architecture=None)


@pytest.mark.parametrize(
    "named",
    [["users_network:network"], ["users_network:network", "--model-args", '{"classes": 10}']],
)
def test_evaluate_scores_a_network_of_the_users_own(
    named: list[str],
    own: str,
    made: tuple[Path, str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", own, "--data", "digits", "--model", *named])
    assert console.run("evaluate", imported("evaluate").main) == 0
    printed = capfd.readouterr().out
    score = manifest.read_manifest(Store(made[0]))["metrics"]["test"]["compressed"]
    assert f"network     {named[0]}\n" in printed
    assert f"top-1       {score['top1_percent']:.2f} % on 360 test images" in printed


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "expected --model package.module:function for a file that names no registered network, got none"),
        (["--model", "users_network:nothing"], "expected an importable package.module:function, got "),
        (["--model", "lenet5"], "--model: expected package.module:function, got 'lenet5'; "),
        (["--model", "users_network:network", "--model-args", "[1]"], "--model-args: expected names and values, got '[1]'"),
        (["--model", "users_network:network", "--model-args", "{"], "--model-args: expected JSON such as "),
        (["--model", "users_network:network", "--model-args", '{"classes": 7}'], "the network does not fit the file: "),
        (["--model", "users_network:network", "--model-args", '{"sizes": 7}'], "users_network:network cannot be built with {'sizes': 7}: "),
        (["--model", "users_network:other"], "expected a network that takes images of (1, 28, 28), got: "),
    ],
)  # fmt: skip
def test_what_does_not_build_the_network_of_a_file_is_one_line(
    given: list[str],
    words: str,
    own: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    code, lines = called("evaluate", [own, "--data", "digits", *given], monkeypatch, capfd)
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"evaluate: {words}")


def test_where_a_file_states_no_normalisation_of_a_users_own_network_evaluate_says_so(
    own: str,
    made: tuple[Path, str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    images = {"shape": [1, 28, 28], "resize": None, "mean": [0.0], "std": [1.0]}
    plain = changed(made[0], Path(own).with_name("plain.clq"), architecture=None, input=images)
    job = imported("evaluate")
    for path, said in ((own, 0), (plain, 1)):
        assert job.main([path, "--data", "digits", "--model", "users_network:network"]) == 0
        assert capfd.readouterr().out.count("note        images went in as pixels in 0..1") == said


@pytest.mark.parametrize("given", [["--model", "lenet5"], ["--model-args", "{}"]])
def test_a_file_that_says_how_its_network_is_built_takes_no_other(
    given: list[str],
    made: tuple[Path, str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    code, lines = called("evaluate", [str(made[0]), "--data", "digits", *given], monkeypatch, capfd)
    assert code == 2
    assert lines[0].startswith(
        f"evaluate: {given[0]}: expected none for a file that says how its network is built, got "
    )


def test_a_damaged_file_is_one_line_in_a_process_too(made: tuple[Path, str], tmp_path: Path) -> None:
    path = tmp_path / "damaged.clq"
    path.write_bytes((made[0] / "model.clq").read_bytes()[:-1])
    ended = started("evaluate", str(path), "--data", "digits")
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith("evaluate: ")


def stated(path: Path, images: dict[str, Any]) -> str:
    """A file of a LeNet-5 that says that it takes such images."""
    torch.manual_seed(0)
    architecture = models.architecture("lenet5", 10, {})
    tensors: dict[str, Any] = {
        key: value.numpy() for key, value in models.build(architecture).state_dict().items()
    }
    metadata = {"architecture": architecture.to_json(), "classes": 10, "input": images}
    path.write_bytes(codec.encode(codec.Packed(metadata, tensors)))
    return str(path)


@pytest.mark.parametrize("shape", [[1, 20, 20], [3, 28, 28]])
def test_a_network_that_cannot_take_the_images_that_its_file_states_is_one_line(
    shape: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    images = {"shape": shape, "resize": 40, "mean": [0.5] * shape[0], "std": [0.5] * shape[0]}
    path = stated(tmp_path / "network.clq", images)
    code, lines = called("evaluate", [path, "--data", "digits"], monkeypatch, capfd)
    assert code == 2
    assert len(lines) == 1, lines
    words = f"evaluate: expected a network that takes images of {tuple(shape)}, got: "
    assert lines[0].startswith(words)


def test_an_input_that_its_network_takes_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = stated(
        tmp_path / "network.clq", {"shape": [1, 28, 28], "resize": None, "mean": [0.5], "std": [0.5]}
    )
    assert called("evaluate", [path, "--data", "digits"], monkeypatch, capfd)[0] == 0


def test_test_images_that_cannot_be_read_are_passed_over_up_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = stated(
        tmp_path / "network.clq", {"shape": [1, 28, 28], "resize": None, "mean": [0.5], "std": [0.5]}
    )
    for name in "0123456789":
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.new("L", (28, 28)).save(tmp_path / "test" / name / "1.png")
    (tmp_path / "test" / "3" / "2.png").write_bytes(b"junk")
    given = [path, "--data", str(tmp_path / "test")]
    code, lines = called("evaluate", given, monkeypatch, capfd)
    assert (code, len(lines)) == (2, 1)
    assert "expected at most 0 unreadable images, found 1" in lines[0]
    assert "raise --bad-image-limit" in lines[0]
    monkeypatch.setattr(sys, "argv", ["evaluate", *given, "--bad-image-limit", "1"])
    assert console.run("evaluate", imported("evaluate").main) == 0
    assert "on 10 test images" in capfd.readouterr().out


@pytest.mark.parametrize(("values", "images"), [(1 << 28, 250), (7 * 784 + 783, 7), (5, 1)])
def test_the_images_of_a_batch_take_no_more_memory_whatever_a_file_states(
    values: int,
    images: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = stated(
        tmp_path / "network.clq", {"shape": [1, 28, 28], "resize": None, "mean": [0.5], "std": [0.5]}
    )
    job, printed, sizes = imported("evaluate"), [], []

    def watching(*given: Any, batch_size: int, **more: Any) -> Any:
        sizes.append(batch_size)
        return evaluate(*given, batch_size=batch_size, **more)

    monkeypatch.setattr(job, "evaluate", watching)
    for most in (job._VALUES, values):
        monkeypatch.setattr(job, "_VALUES", most)
        assert job.main([path, "--data", "digits"]) == 0
        printed.append(capfd.readouterr().out)
    assert sizes == [250, images]
    assert printed[0] == printed[1]


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "jobs").glob("*.py")))
def test_a_job_runs_from_a_checkout_that_is_not_installed(name: str, tmp_path: Path) -> None:
    # what is installed as a link to this checkout is not there for the job
    code = f"""
import runpy, sys
sys.path[:] = [one for one in sys.path if one not in ({str(ROOT)!r}, "")]
sys.meta_path[:] = [one for one in sys.meta_path if "editable" not in getattr(one, "__module__", type(one).__module__)]
sys.argv = [{name!r}, "--help"]
try:
    import clipq_ray
except ModuleNotFoundError:
    runpy.run_path({str(ROOT / "jobs" / name)!r}, run_name="__main__")
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
