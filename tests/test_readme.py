"""The README is true: its files exist, its snippets run, its record scores what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from clipq_ray import cli, options

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_place_on_the_map_exists() -> None:
    found = re.findall(r"^\| `([^`]+)` \|", README.partition("## Map")[2], flags=re.MULTILINE)
    assert "clipq_ray/" in found
    for name in found:
        assert (ROOT / name).exists(), name


def test_the_python_snippet_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_the_command_of_the_record_is_a_valid_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = re.findall(r"python jobs/compress\.py (--config recipes/.*)", README)
    monkeypatch.chdir(ROOT)
    assert options.parse_all(command.split(), "").configs[0].epochs == 150


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make (\w[\w-]*)", README):
        assert target in ("on",) or re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize(
    ("record", "data"),
    [
        pytest.param("resnet56-cifar10-noloss", "cifar10", marks=pytest.mark.slow),
        pytest.param("resnet20-cifar10-noloss", "cifar10", marks=pytest.mark.slow),
        pytest.param("resnet20-cifar10-small", "cifar10", marks=pytest.mark.slow),
        ("lenet5_caffe-mnist-noloss", "mnist"),
        ("lenet5_caffe-mnist-small", "mnist"),
        ("lenet_300_100-mnist-noloss", "mnist"),
        ("lenet_300_100-mnist-small", "mnist"),
    ],
)
def test_a_record_scores_what_the_readme_says(shared: Path, record: str, data: str) -> None:
    file = ROOT / "bench" / "records" / f"{record}.clq"
    command = [sys.executable, "jobs/evaluate.py", str(file), "--data", str(shared / "data" / data)]
    printed = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300
    ).stdout
    (row,) = re.findall(rf"^\|.*\| {file.stat().st_size:,} \|.*$", README, flags=re.MULTILINE)
    _, before, size, ratio, _, top1 = (cell.strip() for cell in row.strip("|").split("|"))
    found = re.search(r"ratio +([0-9.]+)x .*\ntop-1 +(.*? %)", printed)
    assert found is not None
    assert (f"{float(found[1]):.1f}x", found[2]) == (ratio, top1)
    assert size in printed
    assert before in printed


def test_every_row_of_the_first_table_is_a_record() -> None:
    table = README.partition("\n\n| network, data |")[2].partition("\n\n")[0]
    sizes = [int(line.split("|")[3].replace(",", "")) for line in table.splitlines()[2:]]
    files = {path.stem: path.stat().st_size for path in (ROOT / "bench" / "records").glob("*-*-*.clq")}
    assert sorted(sizes) == sorted(files.values())


def test_the_commands_on_a_file_run(tmp_path: Path) -> None:
    commands = re.findall(r"`clipq (\w+) ([^`]+)`", README)
    assert [name for name, _ in commands] == ["inspect", "verify", "prune", "export"]
    file, out = str(ROOT / "bench" / "records" / "resnet20-cifar10.clq"), str(tmp_path / "out.safetensors")
    for name, arguments in commands:
        uri = str(tmp_path) if name == "prune" else file
        (tmp_path / "_stages" / "search-0").mkdir(parents=True, exist_ok=True)
        (tmp_path / "_stages" / "search-0" / "done.json").write_text("{}")
        words = arguments.replace("FILE", file).replace("URI", uri).replace("OUT.safetensors", out).split()
        assert cli.main([name, *words]) == 0
    assert Path(out).stat().st_size > 1_000_000
