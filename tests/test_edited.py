"""What somebody edited, and what a newer version wrote: named, exit code 2, and nothing changes."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from refusals import refused
from test_jobs import imported

from clipq_ray import cli, console, manifest
from clipq_ray.batch import compress
from clipq_ray.cluster.engine import LocalEngine
from clipq_ray.config import make
from clipq_ray.errors import FormatError
from clipq_ray.pipeline import Result
from clipq_ray.progress import Reporter
from clipq_ray.source import Source
from clipq_ray.storage import Store, fleet_store

OPTIONS: dict[str, Any] = {
    "engine": "local", "epochs": 1, "batch_size": 32, "search_evaluations": 4, "search_start": 3, "search_images": 60, "control": "never",
    "target_ratio": 15, "rounds": 1, "weights": "random",
}  # fmt: skip


def run(storage: Path, **changes: Any) -> Result:
    options = {**OPTIONS, **changes, "storage": str(storage)}
    return compress(Source(make(**options)), LocalEngine(), Reporter(quiet=True))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = tmp_path_factory.mktemp("made") / "s"
    run(storage)
    return storage


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def changed(**values: Any) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps({**json.loads(data), **values}).encode()


EDITS: dict[str, tuple[str, Callable[[bytes], bytes] | None, str]] = {
    "a report": ("report.html", lambda data: data + b"<p>mine</p>", "/report.html: expected "),
    "a table that is gone": ("layers.parquet", None, "/layers.parquet: expected "),
    "a byte of the network": ("model.clq", lambda data: data[:99] + bytes([data[99] ^ 1]) + data[100:], "/model.clq: expected SHA-256 "),
    "a number of the manifest": ("manifest.json", changed(seconds=1.0), "got another, so it was edited or damaged; "),
    "half a manifest": ("manifest.json", lambda data: data[: len(data) // 2], "expected JSON in "),
    "a manifest of nothing": ("manifest.json", lambda data: b"", "expected JSON in "),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_run_is_named_by_verify_and_left_alone_by_the_job(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], edit: str
) -> None:
    name, change, words = EDITS[edit]
    storage = tmp_path / "s"
    shutil.copytree(made, storage)
    (path,) = storage.glob(f"model=*/run=*/{name}")
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    before = contents(storage)

    assert cli.main(["verify", str(storage)]) == 2
    said = capsys.readouterr().out.splitlines()
    assert any(words in line and str(path) in line for line in said), said
    with refused(FormatError, match=re.escape(words)) as caught:
        run(storage)
    line = str(caught.value)
    assert caught.value.exit_code == 2
    assert str(path) in line
    assert line.endswith("; restore it, or make a new run with --force")
    assert line.count(";") == 1  # one thing to do, and not two
    assert contents(storage) == before


def test_force_makes_a_new_run_beside_an_edited_one(made: Path, tmp_path: Path) -> None:
    storage = tmp_path / "s"
    shutil.copytree(made, storage)
    (path,) = storage.glob("model=*/run=*/manifest.json")
    path.write_bytes(b"{")
    result = run(storage, force=True)
    assert result.uri == f"{path.parent}-2"
    assert manifest.verify(Store(result.uri)) == []
    assert path.read_bytes() == b"{"


def newer(path: Path) -> None:
    content = json.loads(path.read_bytes()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**content, "format": 2, "versions": {"clipq_ray": "9.1.0"}}))


def test_a_run_of_a_newer_version_is_named_and_left_alone(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = tmp_path / "s"
    shutil.copytree(made, storage)
    (path,) = storage.glob("model=*/run=*/manifest.json")
    newer(path)
    before = contents(storage)
    words = f"expected a manifest of format 1 in {path}, got 2, written by clipq_ray 9.1.0; use that version or a newer one"
    with pytest.raises(FormatError) as caught:
        run(storage)
    assert str(caught.value) == words
    for command in (
        ["verify", str(storage)],
        ["inspect", str(path.parent)],
        ["prune", str(storage), "--yes"],
    ):
        assert cli.main(command) == 2
        said = capsys.readouterr()
        assert words in said.out + said.err
    assert contents(storage) == before


def test_a_fleet_of_a_newer_version_is_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = tmp_path / "s"
    path = Path(fleet_store(Store(storage), "night").uri) / "manifest.json"
    newer(path)
    before = contents(storage)
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(
        yaml.safe_dump(
            {
                "name": "night",
                "defaults": {**OPTIONS, "storage": str(storage)},
                "models": [{"model": "lenet5"}],
            }
        )
    )
    monkeypatch.setattr("sys.argv", ["compress.py", f"--fleet={fleet}"])
    assert console.run("compress", imported("compress").main) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"compress: expected a manifest of format 1 in {path}, got 2, written by clipq_ray 9.1.0; use that version or a newer one"
    )
    assert contents(storage) == before


def test_a_packed_network_of_a_newer_version_is_named(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = made.glob("model=*/run=*/model.clq")
    data = bytearray(path.read_bytes())
    data[3] += 1
    (tmp_path / "m.clq").write_bytes(data)
    words = f"expected version 1 to {data[3] - 1} of the .clq format, got {data[3]}; use a newer clipq_ray"
    for command in ("verify", "inspect"):
        assert cli.main([command, str(tmp_path / "m.clq")]) == 2
        said = capsys.readouterr()
        assert words in said.out + said.err
