"""The clipq command: tables from the file alone, every damage found, one line per mistake."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_safetensors

from clipq_ray import codec
from clipq_ray import manifest as manifests
from clipq_ray.cli import main
from clipq_ray.deep_compression import network_bytes
from clipq_ray.errors import ArtifactError
from clipq_ray.loading import load_state_dict
from clipq_ray.storage import MANIFEST, MODEL, REPORT, Store, run_store

sys.path.insert(0, str(Path(__file__).parent / "codec"))
from crafted import crafted

pytest_plugins = ["s3_server"]

SOURCE = "ab" * 32


def packed() -> codec.Packed:
    """LeNet-300-100 of made-up weights, four levels per layer, one in four weights not zero."""
    random = np.random.default_rng(0)
    tensors: dict[str, Any] = {}
    for number, (outputs, inputs) in enumerate([(300, 784), (100, 300), (10, 100)], start=1):
        codes = random.choice(np.array([-1, 0, 1, 2], np.int16), (outputs, inputs), p=[0.1, 0.75, 0.1, 0.05])
        levels = np.array([-0.5, 0.0, 0.25, 0.75], np.float32)
        tensors[f"fc{number}.weight"] = codec.CodedLayer.from_quantized(codes, levels, 1)
        tensors[f"fc{number}.bias"] = np.linspace(-1, 1, outputs, dtype=np.float32)
    metadata = {
        "architecture": {"name": "lenet_300_100", "kwargs": {"num_classes": 10}},
        "classes": 10,
        "input": {"shape": [1, 28, 28], "resize": None, "mean": [0.13], "std": [0.31]},
        "source": SOURCE,
        "ties": {},
        "dropped": [],
        "counters": [],
    }
    return codec.Packed(metadata, tensors)


@pytest.fixture(scope="module")
def data() -> bytes:
    return codec.encode(packed())


@pytest.fixture
def file(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "m.clq"
    path.write_bytes(data)
    return path


def commit(storage: str, run: str, data: bytes) -> Store:
    store = run_store(Store(storage), "lenet", run)
    manifests.commit(store, {MODEL: data, REPORT: b"<html>"}, {"format": 1, "model": "lenet", "run": run})
    return store


def damage(store: Store, name: str) -> None:
    data = store.read(name)
    middle = len(data) // 2
    store.write(name, data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])


def test_inspect_prints_a_row_per_tensor_and_totals_that_add_up(
    file: Path, data: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(file)]) == 0
    text = capsys.readouterr().out
    assert "lenet_300_100(num_classes=10)" in text
    assert SOURCE in text
    entries = {entry.name: entry for entry in codec.entries(data)}
    for name, tensor in packed().tensors.items():
        (row,) = re.findall(rf"^{re.escape(name)} .*$", text, re.M)
        cells = row.split()
        elements = tensor.codes.size if isinstance(tensor, codec.CodedLayer) else tensor.size
        assert cells[2] == entries[name].coder
        assert cells[-2:] == [f"{entries[name].bytes:,}", f"{8 * entries[name].bytes / elements:.2f}"]
        if isinstance(tensor, codec.CodedLayer):
            assert cells[1] == "x".join(map(str, tensor.codes.shape))
            assert cells[3:5] == ["4", f"{100 * np.count_nonzero(tensor.codes) / elements:.1f}"]
    assert (
        f"file: {4 * 266_610:,} bytes before, {len(data):,} bytes now, ratio {4 * 266_610 / len(data):.2f}"
        in text
    )
    parts = re.search(
        r"weights in ([\d,]+) bytes.*\n3 other tensors: ([\d,]+) bytes; header and index: ([\d,]+) bytes",
        text,
    )
    assert parts is not None
    assert sum(int(part.replace(",", "")) for part in parts.groups()) == len(data)
    layers = [tensor for tensor in packed().tensors.values() if isinstance(tensor, codec.CodedLayer)]
    literature = f"for comparison with the literature only: as Deep Compression counts them, the layers would take {network_bytes(layers):,} bytes"
    assert literature in text


def test_inspect_reads_a_committed_run_and_a_file_on_any_storage(
    storage_uri: str, data: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    run = commit(storage_uri, "r-1", data)
    assert main(["inspect", run.uri]) == 0
    from_run = capsys.readouterr().out
    assert main(["inspect", f"{run.uri}/{MODEL}"]) == 0
    assert capsys.readouterr().out == from_run


def test_a_packed_network_may_have_any_name(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(file)]) == 0
    shown = capsys.readouterr().out.replace("m.clq", "model.bin")
    named = file.rename(file.parent / "model.bin")
    assert main(["inspect", str(named)]) == 0
    assert capsys.readouterr().out == shown
    assert main(["verify", str(named)]) == 0
    assert capsys.readouterr().out == f"{named}: ok\n"
    assert main(["export", str(named), str(file.parent / "out.safetensors")]) == 0


def test_inspect_does_without_torch(file: Path) -> None:
    code = f"import sys; sys.modules['torch'] = None; from clipq_ray.cli import main; sys.exit(main(['inspect', {str(file)!r}]))"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


def test_inspect_of_a_run_that_is_not_committed_says_so(
    tmp_path: Path, data: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_store(Store(tmp_path), "lenet", "r-1")
    run.write(MODEL, data)
    assert main(["inspect", run.uri]) == 2
    assert "expected a committed run" in capsys.readouterr().err


def test_verify_finds_nothing_wrong_with_what_is_sound(
    storage_uri: str, data: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = commit(storage_uri, "r-1", data), commit(storage_uri, "r-2", data)
    assert main(["verify", f"{one.uri}/{MODEL}"]) == 0
    assert main(["verify", one.uri]) == 0
    assert capsys.readouterr().out == f"{one.uri}/{MODEL}: ok\n{one.uri}: ok\n"
    assert main(["verify", storage_uri]) == 0
    assert capsys.readouterr().out == f"{one.uri}: ok\n{two.uri}: ok\n2 runs: all ok\n"


def test_verify_of_a_storage_prints_one_line_per_problem_and_exits_with_2(
    storage_uri: str, data: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [commit(storage_uri, f"r-{one}", data) for one in range(4)]
    damage(runs[0], MODEL)
    runs[0].remove(REPORT)
    runs[1].write(MANIFEST, b"{")
    damage(runs[3], REPORT)
    assert main(["verify", storage_uri]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith(f"{runs[0].uri}/{MODEL}: expected SHA-256")
    assert "expected 6 bytes, got no file; restore it" in lines[1]
    assert f"{runs[1].uri}/{MANIFEST}" in lines[2]
    assert lines[3] == f"{runs[2].uri}: ok"
    assert lines[4].startswith(f"{runs[3].uri}/{REPORT}")
    assert lines[5] == "4 runs: 4 problems"


def test_verify_decodes_the_network_even_where_the_manifest_states_the_damaged_bytes(
    tmp_path: Path, data: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    run = commit(str(tmp_path), "r-1", data[:-1] + bytes([data[-1] ^ 1]))
    assert main(["verify", run.uri]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{run.uri}/{MODEL}: ")


def test_verify_finds_truncations_and_flipped_bytes_of_a_file(
    file: Path, data: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in range(0, len(data), len(data) // 23):
        for bad in (data[:place], data[:place] + bytes([data[place] ^ 0x40]) + data[place + 1 :]):
            file.write_bytes(bad)
            assert main(["verify", str(file)]) == 2
            (line,) = capsys.readouterr().out.splitlines()
            assert line.startswith(f"{file}: ")


def test_export_writes_the_decoded_state_dict(
    storage_uri: str, data: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    run = commit(storage_uri, "r-1", data)
    output = f"{storage_uri}/out.safetensors"
    assert main(["export", run.uri, output]) == 0
    assert output in capsys.readouterr().out
    state = load_safetensors(Store(storage_uri).read("out.safetensors"))
    expected = load_state_dict(run.uri)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    levels = torch.tensor([-0.5, 0.0, 0.25, 0.75])
    assert torch.equal(state["fc1.weight"].unique(), levels)


@pytest.mark.parametrize("name", ["model.clq", "manifest.json"])
def test_an_export_replaces_no_file_of_a_committed_run(
    name: str, tmp_path: Path, data: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    run = commit(str(tmp_path), "r-1", data)
    before = run.read(name)
    assert main(["export", run.uri, f"{run.uri}/{name}", "--format", "safetensors"]) == 2
    assert "expected the output outside of a committed run" in capsys.readouterr().err
    assert run.read(name) == before
    # nor is it put beside them, where it would be left over
    assert main(["export", run.uri, f"{run.uri}/dense.safetensors"]) == 2
    assert main(["export", run.uri, f"{run.uri}/", "--force"]) == 2
    assert main(["verify", run.uri]) == 0


@pytest.mark.parametrize("name", ["inspect", "verify"])
def test_the_signature_of_a_url_is_not_printed(
    name: str, data: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Store, "read", lambda store, name: data)
    main([name, "https://host/m.clq?X-Amz-Signature=deadbeef01"])
    shown = capsys.readouterr()
    assert "https://host/m.clq" in shown.out
    assert "deadbeef01" not in shown.out + shown.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["inspect", "{tmp}/none.clq"], "cannot read {tmp}/none.clq"),
        (["inspect", "{tmp}"], "expected a committed run at {tmp}"),
        (["inspect", "nosuch://x/y.clq"], "check the URI"),
        (["inspect", "{tmp}/bad.clq"], ""),
        (["verify", "{tmp}"], "expected a .clq file, a run directory or a storage"),
        (["verify", "{tmp}/none.clq"], "cannot read {tmp}/none.clq"),
        (["verify", "{tmp}/nowhere"], "{tmp}/nowhere"),
        (["export", "{tmp}/m.clq", "{tmp}/out.pt"], "ends in .safetensors"),
        (["export", "{tmp}/bad.clq", "{tmp}/out.safetensors"], ""),
        (["export", "{tmp}/none.clq", "{tmp}/out.safetensors"], "none.clq"),
        (
            ["export", "{tmp}/m.clq", "{tmp}/m.clq", "--format", "safetensors"],
            "expected another file than the network itself",
        ),
        (
            ["export", "{tmp}/link.clq", "{tmp}/m.clq", "--format", "safetensors"],
            "expected another file than the network itself",
        ),
        (["export", "{tmp}/m.clq", "{tmp}/" + 300 * "x" + ".safetensors"], "expected a path as the output"),
        (["export", "{tmp}/m.clq", "", "--format", "huggingface"], "expected a storage URI"),
        (["export", "{tmp}/m.clq", "{tmp}/pipe.safetensors"], "a file or nothing yet, got something else"),
        (
            ["export", "{tmp}/m.clq", "{tmp}/m.clq/out.safetensors"],
            "choose a path whose parents are directories",
        ),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(
    file: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = file.parent
    (folder / "bad.clq").write_bytes(b"no network")
    (folder / "link.clq").symlink_to(file)
    os.mkfifo(folder / "pipe.safetensors")
    before = sorted(path.name for path in folder.iterdir())
    assert main([argument.format(tmp=folder) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("clipq: ")
    assert err.count("\n") == 1
    assert says.format(tmp=folder) in err
    assert sorted(path.name for path in folder.iterdir()) == before


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "clipq_ray.cli", *arguments]


def test_a_reader_that_goes_away_ends_the_command_quietly(tmp_path: Path, data: bytes) -> None:
    for one in range(3):
        commit(str(tmp_path), f"r-{one}", data)
    process = subprocess.Popen(
        command("verify", str(tmp_path)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 141


def test_help_names_the_commands_and_an_unknown_one_exits_with_2() -> None:
    root = Path(__file__).parents[1]
    shown = subprocess.run(command("--help"), capture_output=True, text=True, check=True, cwd=root).stdout
    assert all(word in shown for word in ("inspect", "verify", "export"))
    unknown = subprocess.run(command("explode"), capture_output=True, text=True, check=False, cwd=root)
    assert unknown.returncode == 2
    assert "Traceback" not in unknown.stderr


def test_what_a_hostile_file_says_of_itself_does_not_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = {
        "architecture": {"name": "\x1b[2Jlenet", "kwargs": {}},
        "dropped": ["\x1b]0;x\x07"],
    }
    path = tmp_path / "hostile.clq"
    path.write_bytes(codec.encode(codec.Packed(metadata, {"b": np.ones(2, np.float32)})))
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "lenet" in text


HOSTILE = "\x1b]0;owned\x07\x1b[2J"


@pytest.mark.parametrize("command", ["inspect", "verify"])
@pytest.mark.parametrize(
    "content",
    [
        {"n": ["w"], "s": [[1]], "c": [HOSTILE], "m": {}},
        {"v": [["w", [1]]], "k": HOSTILE, "m": {}},
        {"n": [], "needs": [HOSTILE], "m": {}},
        {"n": HOSTILE, "m": {}},
        {"m": {"input": HOSTILE}},
    ],
)
def test_what_is_wrong_with_a_hostile_file_does_not_steer_the_terminal(
    content: dict[str, Any], command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hostile.clq"
    path.write_bytes(crafted(content, *([bytes(4)] if "c" in content or "k" in content else [])))
    assert main([command, str(path)]) == 2
    shown = capsys.readouterr()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown.out + shown.err)
    assert (shown.out + shown.err).count("\n") == 1
    assert "x1b]0;owned" in shown.out + shown.err


def test_what_a_hostile_manifest_says_does_not_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = Store(tmp_path).child("fleet=all")
    manifests.replace(fleet, {}, {"format": 1, "fleet": "all", "runs": {f"m{HOSTILE}": f"r\u202e{HOSTILE}"}})
    newer = run_store(Store(tmp_path), "lenet", "r-1")
    newer.write(MANIFEST, json.dumps({"format": 2, "versions": {"clipq_ray": HOSTILE}}).encode())
    assert main(["verify", str(tmp_path)]) == 2
    assert main(["inspect", newer.uri]) == 2
    shown = capsys.readouterr()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown.out + shown.err)
    assert "\\x1b]0;owned\\x07\\x1b[2J" in shown.out
    assert "by clipq_ray \\x1b]0;owned" in shown.err


@pytest.mark.parametrize(
    "metadata", [{"architecture": [1]}, {"input": 5}, {"ties": {"a": "nothing"}}, {"classes": "x"}]
)
def test_metadata_of_another_kind_is_damage(metadata: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match=r"metadata|ties"):
        codec.encode(codec.Packed(metadata, {"b": np.ones(2, np.float32)}))
